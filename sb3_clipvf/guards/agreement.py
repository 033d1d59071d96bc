"""Checks that the processes of a run have the same arguments, policies, spaces and versions."""

import numbers
from typing import Any

from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.arguments import constructor_arguments
from sb3_clipvf.checkpoint.file import versions

# Arguments that may differ between processes, or that are compared in a different way
_OWN = frozenset(
    "policy env seed device verbose tensorboard_log stats_window_size policy_kwargs rollout_buffer_kwargs".split()
)


def check_same(descriptions: list[dict[str, Any]]) -> None:
    """
    Check that all processes have the same description.

    :param descriptions: Values by name, one dict for each process.
    :raises ValueError: If one differs from the first; the message has the names and values that differ.
    """
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        different = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if different:
            values = "; ".join(f"{name}: {first.get(name)} and {other.get(name)}" for name in different)
            raise ValueError(
                f"Processes 0 and {rank} must have the same {', '.join(different)}, got {values}. Start all of them "
                "with the same script, arguments and installation."
            )


def description_of(model: Any) -> dict[str, Any]:
    """Return what must be equal in all processes, by name, as values that can be compared between them."""
    return {
        **{f"`{name}`": _comparable(getattr(model, name)) for name in common_arguments(model)},
        "policy": str(model.policy),
        "optimizer": _comparable(model.policy.optimizer),
        "observation space": str(model.observation_space),
        "action space": str(model.action_space),
        "kind of device": model.device.type,
        "VecNormalize": _normalizer_description(model.get_vec_normalize_env()),
        **{f"version of {name}": version for name, version in versions().items()},
    }


def common_arguments(model: Any) -> list[str]:
    """Return the names of a model's arguments that must be equal in all processes."""
    names = set(constructor_arguments(type(model))) - _OWN
    return [name for name in sorted(names) if hasattr(model, name)]


def replaced_arguments(model: Any, earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """
    Return the names of arguments that are functions or objects, and differ between two descriptions of a model.

    Callbacks of the first process may have replaced them. Such values are not sent to the other processes.
    """
    names = [f"`{name}`" for name in common_arguments(model) if not _is_plain(getattr(model, name))]
    return [name for name in names if earlier.get(name, now[name]) != now[name]]


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return those of named values that are numbers, texts or None."""
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, numbers.Real))


def _normalizer_description(normalizer: VecNormalize | None) -> str:
    names = "norm_obs norm_reward norm_obs_keys clip_obs clip_reward gamma epsilon".split()
    settings = ", ".join(f"{name}={getattr(normalizer, name, None)}" for name in names)
    return "none" if normalizer is None else f"{type(normalizer).__name__}({settings})"


def _comparable(value: Any) -> Any:
    if _is_plain(value):
        return value
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else type(value).__qualname__
