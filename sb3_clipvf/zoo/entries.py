"""Entries of the settings that the RL Zoo reads: null ones, and those that name classes, with or without arguments."""

from typing import Any

from sb3_clipvf.envs.episode_ends import EpisodeEnds

ZOO_KEYS = frozenset(
    {
        "callback",
        "env_kwargs",
        "env_wrapper",
        "frame_stack",
        "monitor_kwargs",
        "n_envs",
        "n_timesteps",
        "normalize",
        "vec_env_wrapper",
    }
)
"""Keys of an entry that the RL Zoo itself reads, where the algorithm is on-policy."""

WRAPPER_FUNCTIONS = ("rl_zoo3.utils.flatten_dict_observations",)
"""What the entry of a wrapper may name although it is no class."""


def items(value: Any) -> list[Any]:
    """
    Make a list of an entry.

    :param value: A list, None or a single item.
    :return: The list itself, none, or that item.
    """
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def with_arguments(value: Any) -> list[tuple[Any, Any]]:
    """
    Take an entry apart.

    :param value: A name or class, a dict of one name and its arguments, a list of these, or None.
    :return: Names or classes, each with its arguments; None as the name of an empty dict.
    """
    return [next(iter(item.items()), (None, {})) if isinstance(item, dict) else (item, {}) for item in items(value)]


def drop_null(settings: dict[str, Any]) -> None:
    """
    Remove keys of the RL Zoo that are null: as if they were not given.

    :param settings: Of one environment; ClipPPO's own arguments stay, since None may be a value of theirs.
    """
    for key in [key for key, value in settings.items() if value is None and key in ZOO_KEYS]:
        del settings[key]


def counted(settings: dict[str, Any]) -> None:
    """
    Add :class:`EpisodeEnds` outside of all wrappers in place, since the RL Zoo puts these outside of ``Monitor``.

    :param settings: Of one environment.
    """
    wrappers = items(settings.get("env_wrapper"))
    if wrappers and wrappers[-1] is not EpisodeEnds:
        settings["env_wrapper"] = [*wrappers, EpisodeEnds]
