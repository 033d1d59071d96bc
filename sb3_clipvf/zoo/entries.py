"""The forms of entries in the settings of an environment: null, one class, or a list of classes with arguments."""

import re
from typing import Any

from sb3_clipvf.envs.episode_ends import EpisodeEnds

ZOO_KEYS = frozenset(
    "callback env_kwargs env_wrapper frame_stack monitor_kwargs n_envs n_timesteps normalize vec_env_wrapper".split()
)
"""Keys of the settings that the RL Zoo itself reads for an on-policy algorithm."""

WRAPPER_FUNCTIONS = ("rl_zoo3.utils.flatten_dict_observations",)
"""Functions, not classes, that ``env_wrapper`` may name."""

SCHEDULE = re.compile(r"(lin|cos|exp|const)_([\d.eE+-]+)")
"""ClipPPO's schedules as text: their kind and initial value."""


def items(value: Any) -> list[Any]:
    """Return an entry as a list: itself if it is one, an empty one for None, else one of a single item."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def with_arguments(value: Any) -> list[tuple[Any, Any]]:
    """Return the names or classes of an entry, each with its arguments; an empty dict has the name None."""
    return [next(iter(item.items()), (None, {})) if isinstance(item, dict) else (item, {}) for item in items(value)]


def is_module_name(value: Any) -> bool:
    """Return whether a value is the full name of a module."""
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def drop_null(settings: dict[str, Any]) -> None:
    """Remove the RL Zoo's keys whose value is null, in place. ClipPPO's arguments stay, since they may be None."""
    for key in ZOO_KEYS & settings.keys():
        if settings[key] is None:
            del settings[key]


def add_episode_ends(settings: dict[str, Any]) -> None:
    """Add :class:`EpisodeEnds` around all wrappers in place, since the RL Zoo puts them around ``Monitor``."""
    wrappers = items(settings.get("env_wrapper"))
    if wrappers and wrappers[-1] is not EpisodeEnds:
        settings["env_wrapper"] = [*wrappers, EpisodeEnds]
