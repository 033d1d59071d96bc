"""
Checks of what users pass. Each error names the argument, its rule, the value and a ``hint``, which says what to do.

A check raises ``TypeError`` for a value of the wrong type and ``ValueError`` for a value out of range.
"""

import contextlib
import inspect
import math
import numbers
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from sb3_clipvf.common.messages import log

MAX_INT = 2**63 - 1
"""Largest integer of arrays, tensors and kernels."""

MAX_SEED = 2**32 - 1
"""Largest seed of NumPy's generator."""

_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_SPACE_NAMES = ", ".join(space.__name__ for space in _SPACES)


class UnsupportedSpaceError(ValueError, NotImplementedError):
    """An observation space that SB3 cannot store, for which SB3 raises NotImplementedError."""


def wrong_type(name: str, rule: str, value: Any, hint: str) -> TypeError:
    """Return the error for an argument of the wrong type; ``rule`` completes "must be"."""
    return TypeError(f"`{name}` must be {rule}, got {value!r} of type {type(value).__name__}. {hint}")


def check_int(name: str, value: Any, minimum: int, hint: str, maximum: int = MAX_INT) -> int:
    """Return a whole number in [minimum, maximum] as an int; floats with a whole value, such as 1e6, are accepted."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, "a whole number", value, hint)
    # An int may be too large for a float.
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    is_whole = isinstance(number, int) or number.is_integer()
    too_large = is_whole and number > maximum
    if not is_whole or number < minimum or too_large:
        rule = f"in [{minimum}, {maximum}]" if maximum < MAX_INT or too_large else f"of at least {minimum}"
        raise ValueError(f"`{name}` must be a whole number {rule}, got {value!r}. {hint}")
    return int(number)


def check_float(
    name: str, value: Any, hint: str, low: float = 0.0, high: float = math.inf, *, above_low: bool = False
) -> float:
    """Return a finite number in [low, high], or in (low, high] if ``above_low``, as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, "a number", value, hint)
    number = as_float(value)
    too_low = number <= low if above_low else number < low
    if not math.isfinite(number) or too_low or number > high:
        if high == math.inf:
            rule = f"finite and {'above' if above_low else 'at least'} {low:g}"
        else:
            rule = f"in {'(' if above_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. {hint}")
    return number


def as_float(value: Any) -> float:
    """Return the nearest float to a real number, infinite if the number is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_choice(name: str, value: Any, choices: tuple[str, ...], hint: str) -> None:
    """Check that a value is one of several words."""
    # An array would compare with each of them element by element.
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}. {hint}")


def check_bool(name: str, value: Any) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value, "Pass a bool.")


def as_bool(name: str, value: Any) -> bool:
    """Return True or False; NumPy's bools, 0 and 1 are accepted, as SB3 accepts them."""
    if not (isinstance(value, np.bool_) or (isinstance(value, numbers.Integral) and value in (0, 1))):
        check_bool(name, value)
    return bool(value)


def check_type(name: str, value: Any, types: type | tuple[type, ...], rule: str, hint: str) -> None:
    """Check that a value is None or of one of the types; ``rule`` names them in words."""
    if value is not None and not isinstance(value, types):
        raise wrong_type(name, rule, value, hint)


def check_class(name: str, value: Any, base: type, hint: str) -> None:
    """Check that a value is a class derived from ``base``."""
    if not (isinstance(value, type) and issubclass(value, base)):
        raise TypeError(f"`{name}` must be a class derived from SB3's {base.__name__}, got {value!r}. {hint}")


def check_keywords(
    name: str, kwargs: Mapping[Any, Any], called: Callable[..., Any], taken: Collection[str], hint: str
) -> None:
    """Check that the keys of a dict are arguments of ``called`` that are not in ``taken``."""
    parameters = inspect.signature(called).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    legal = [parameter.name for parameter in parameters if parameter.name not in taken]
    for key in kwargs:
        if key not in legal:
            listed = f"arguments of {called.__name__} ({', '.join(legal) or 'there are none'})"
            raise TypeError(f"`{name}` must hold {listed}, got {key!r} in it. {hint}")


def check_verbose(verbose: Any) -> int:
    """Return the verbosity as an int; False and True are 0 and 1, as in SB3."""
    number = int(verbose) if isinstance(verbose, bool | np.bool_) else verbose
    return check_int("verbose", number, 0, "0 is silent, 1 shows messages, 2 shows details.")


def check_device(device: Any) -> None:
    """Check that PyTorch knows a device, and warn if it is CUDA and there is none here."""
    import torch as th  # here, so that the commands that only read results start without it

    if isinstance(device, str) and device == "auto":
        return
    try:
        kind = th.device(device).type
    except (RuntimeError, TypeError, ValueError):  # ValueError for numbers beyond 64 bits
        raise ValueError(
            f"`device` must be 'auto' or a PyTorch device, got {device!r}. Use for example 'cpu' or 'cuda'."
        ) from None
    if kind == "cuda" and not th.cuda.is_available():
        # SB3 falls back to the CPU silently, also for files that were written with a GPU.
        log.warning("`device` is %r, but there is no CUDA device here: the CPU is used. Use 'auto' or 'cpu'.", device)


def ensure_writable_folder(name: str, folder: str | os.PathLike[str], hint: str) -> None:
    """Create a folder if necessary, and raise ``OSError`` if files cannot be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        rule = f"`{name}` must be a folder that can be written to"
        text = f"{rule}, got {os.fspath(folder)!r}: {error.strerror}. {hint}"
        raise OSError(error.errno, text) from error


def as_gymnasium(env: Any) -> Any:
    """Return a Gymnasium environment or ``VecEnv``; SB3 converts environments of OpenAI Gym, with its warning."""
    from stable_baselines3.common.vec_env import VecEnv  # imports torch
    from stable_baselines3.common.vec_env.patch_gym import _patch_env

    if isinstance(env, VecEnv):
        return env
    is_envpool = any(cls.__module__.startswith("envpool.") for cls in type(env).__mro__)
    rule = "a gymnasium environment or an SB3 VecEnv"
    if isinstance(env, VectorEnv) or is_envpool:
        raise TypeError(
            f"`env` must be {rule}, got the vectorised environment {type(env).__name__}. "
            "Pass sb3_clipvf.envs.as_vec_env(env)."
        )
    if not (hasattr(env, "observation_space") and hasattr(env, "action_space")):
        hint = "Pass for example gymnasium.make('CartPole-v1'); only the constructor accepts the id as well."
        raise wrong_type("env", rule, env, hint)
    return _patch_env(env)


@contextlib.contextmanager
def same_spaces() -> Iterator[None]:
    """Add what to do to SB3's error about spaces that differ from the model's."""
    try:
        yield
    except ValueError as error:
        if "spaces do not match" not in str(error):
            raise
        raise ValueError(
            f"`env` must have the model's spaces. {error} (the model's, then `env`'s). Wrap the environment so that "
            "they are the same, or train a new model in it."
        ) from None


def check_env(policy: Any, env: Any, use_sde: bool) -> None:
    """Check the spaces of an environment (or of a model) for a policy class or alias, and ``use_sde``."""
    as_bool("use_sde", use_sde)
    _check_action_space(env.action_space, use_sde)
    _check_observation_space(policy, env.observation_space)


def check_observations(policy_class: type, policy_kwargs: dict[str, Any], observation_space: Any) -> None:
    """Check observation spaces for what SB3's policies would reject only when they read observations."""
    from stable_baselines3.common import torch_layers
    from stable_baselines3.common.policies import ActorCriticPolicy

    parts = _parts(observation_space)
    if not parts or any(0 in (space.shape or ()) for space in parts):
        raise ValueError(
            f"`env` must have observations of at least one number, got {observation_space}. Leave out a key that is "
            "empty (gymnasium.wrappers.FilterObservation), or add a constant in a wrapper."
        )
    if getattr(policy_class, "extract_features", None) is not ActorCriticPolicy.extract_features:
        return  # the user's code reads them
    default = inspect.signature(policy_class).parameters.get("features_extractor_class")
    extractor = policy_kwargs.get("features_extractor_class", default and default.default)
    flattening = (torch_layers.FlattenExtractor, torch_layers.NatureCNN, torch_layers.CombinedExtractor)
    for space in parts:
        _check_discrete(space, "observations", "FlattenObservation")
        if isinstance(space, spaces.Box) and space.shape == () and extractor in flattening:
            raise ValueError(
                f"`env` must have Box observations of at least one dimension for {extractor.__name__}, got {space}. "
                "Reshape them in a wrapper (gymnasium.wrappers.ReshapeObservation(env, (1,)))."
            )


def _parts(observation_space: Any) -> list[Any]:
    is_dict = isinstance(observation_space, spaces.Dict)
    return list(observation_space.spaces.values()) if is_dict else [observation_space]


def _full_type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_discrete(space: Any, what: str, wrapper: str) -> None:
    """Check that a space, if it is discrete, counts from 0 and has one dimension."""
    hint = f"Wrap the environment, for example in gymnasium.wrappers.{wrapper}."
    if np.any(getattr(space, "start", 0)):
        raise ValueError(f"`env` must count its discrete {what} from 0, got {space}. {hint}")
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        raise ValueError(f"`env` must have MultiDiscrete {what} of one dimension, got {space}. {hint}")


def _check_action_space(action_space: Any, use_sde: bool) -> None:
    if not isinstance(action_space, _SPACES):
        raise ValueError(
            f"`env` must have an action space of type {_SPACE_NAMES}, got {action_space} of type "
            f"{_full_type(action_space)}. Wrap the environment to convert it."
        )
    if 0 in (action_space.shape or ()):
        raise ValueError(f"`env` must have actions of at least one number, got {action_space}. Change it in a wrapper.")
    if isinstance(action_space, spaces.Box) and not action_space.is_bounded("both"):
        raise ValueError(
            f"`env` must have an action space with finite bounds, got {action_space}. "
            "Wrap it, for example in gymnasium.wrappers.RescaleAction."
        )
    if isinstance(action_space, spaces.MultiBinary) and not isinstance(action_space.n, int):
        raise ValueError(
            f"`env` must have MultiBinary actions of one dimension, got {action_space}. "
            "Wrap the environment, for example in gymnasium.wrappers.TransformAction."
        )
    _check_discrete(action_space, "actions", "TransformAction")
    if use_sde and not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"`use_sde` must be False unless actions are continuous, got True and {action_space}. Leave it out."
        )


def _check_observation_space(policy: Any, observation_space: Any) -> None:
    for space in _parts(observation_space):
        if not isinstance(space, _SPACES):
            raise UnsupportedSpaceError(
                f"`env` must have an observation space of type {_SPACE_NAMES}, or a Dict of these that is not nested, "
                f"got {observation_space} with a part of type {_full_type(space)}. Wrap the environment to convert it, "
                "for example in gymnasium.wrappers.FlattenObservation."
            )
    if not isinstance(policy, str):
        return
    is_dict = isinstance(observation_space, spaces.Dict)
    squashed = "Squashed" if policy.startswith("Squashed") else ""
    if is_dict and policy.removeprefix(squashed) in ("MlpPolicy", "CnnPolicy"):
        raise ValueError(
            f"`policy` must accept dict observations, got {policy!r}. You must use `{squashed}MultiInputPolicy` when "
            "working with dict observation space."
        )
    if not is_dict and policy.removeprefix(squashed) == "MultiInputPolicy":
        raise ValueError(
            f"`policy` must accept observations that are not dicts, got {policy!r} and {observation_space}. Use "
            f"'{squashed}MlpPolicy', or '{squashed}CnnPolicy' for images."
        )
