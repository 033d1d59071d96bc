"""Checks at the door: each says which argument broke which rule, with which value, and what to do."""

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
"""Arrays, tensors and kernels count no further."""

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class UnsupportedSpaceError(ValueError, NotImplementedError):
    """An observation space that SB3 cannot store; code that catches SB3's NotImplementedError goes on working."""


def check_int(name: str, value: Any, minimum: int, way_out: str, maximum: int = MAX_INT) -> int:
    """
    Check a whole number.

    :param name: The argument's name.
    :param value: What the user passed; floats with a whole value, such as 1e6, count as whole numbers.
    :param minimum: Smallest legal value.
    :param way_out: What to do instead, a sentence.
    :param maximum: Largest legal value.
    :return: The value as an int.
    :raises TypeError: If it is no number.
    :raises ValueError: If it is not whole or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a whole number, got {value!r} of type {type(value).__name__}. {way_out}")
    # An int may be too large for a float.
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    is_whole = isinstance(number, int) or number.is_integer()
    too_large = is_whole and number > maximum
    if not is_whole or number < minimum or too_large:
        rule = f"in [{minimum}, {maximum}]" if maximum < MAX_INT or too_large else f"of at least {minimum}"
        raise ValueError(f"`{name}` must be a whole number {rule}, got {value!r}. {way_out}")
    return int(number)


def check_float(
    name: str, value: Any, way_out: str, low: float = 0.0, high: float = math.inf, *, above_low: bool = False
) -> float:
    """
    Check a finite number.

    :param name: The argument's name.
    :param value: What the user passed.
    :param way_out: What to do instead, a sentence.
    :param low: Smallest legal value.
    :param high: Largest legal value.
    :param above_low: Whether ``low`` itself is refused.
    :return: The value as a float.
    :raises TypeError: If it is no number.
    :raises ValueError: If it is not finite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}. {way_out}")
    number = as_float(value)
    too_low = number <= low if above_low else number < low
    if not math.isfinite(number) or too_low or number > high:
        if high == math.inf:
            rule = f"finite and {'above' if above_low else 'at least'} {low:g}"
        else:
            rule = f"in {'(' if above_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. {way_out}")
    return number


def as_float(value: Any) -> float:
    """
    Turn a number into a float.

    :param value: A real number.
    :return: The nearest one, infinite where there is none.
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_choice(name: str, value: Any, choices: tuple[str, ...], way_out: str) -> None:
    """
    Check one of several words.

    :param name: The argument's name.
    :param value: What the user passed.
    :param choices: The legal ones.
    :param way_out: What to do instead, a sentence.
    :raises ValueError: If it is none of them.
    """
    # An array compares with each of them element by element.
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}. {way_out}")


def check_bool(name: str, value: Any) -> None:
    """
    Check a truth value.

    :param name: The argument's name.
    :param value: What the user passed.
    :raises TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r} of type {type(value).__name__}. Pass a bool.")


def check_type(name: str, value: Any, types: type | tuple[type, ...], rule: str, way_out: str) -> None:
    """
    Check the type of an argument that may be None.

    :param name: The argument's name.
    :param value: What the user passed.
    :param types: The legal ones beside None.
    :param rule: The same in words.
    :param way_out: What to do instead, a sentence.
    :raises TypeError: If it is of another type.
    """
    if value is not None and not isinstance(value, types):
        raise TypeError(f"`{name}` must be {rule}, got {value!r} of type {type(value).__name__}. {way_out}")


def check_class(name: str, value: Any, base: type, way_out: str) -> None:
    """
    Check a class that the user passed.

    :param name: The argument's name.
    :param value: What the user passed.
    :param base: Class that it must be derived from.
    :param way_out: What to do instead, a sentence.
    :raises TypeError: If it is no class, or not derived from ``base``.
    """
    if not (isinstance(value, type) and issubclass(value, base)):
        raise TypeError(f"`{name}` must be a class derived from SB3's {base.__name__}, got {value!r}. {way_out}")


def check_keywords(
    name: str, kwargs: Mapping[Any, Any], called: Callable[..., Any], taken: Collection[str], way_out: str
) -> None:
    """
    Check the keys of a dict whose entries become arguments.

    :param name: The argument that the dict was given for.
    :param kwargs: The dict.
    :param called: Class or function that gets its entries; one that takes any keyword is not asked here.
    :param taken: Arguments that it gets from elsewhere.
    :param way_out: What to do instead, a sentence.
    :raises TypeError: If a key is none of its arguments.
    """
    parameters = inspect.signature(called).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    legal = [parameter.name for parameter in parameters if parameter.name not in taken]
    for key in kwargs:
        if key not in legal:
            listed = f"arguments of {called.__name__} ({', '.join(legal) or 'there are none'})"
            raise TypeError(f"`{name}` must hold {listed}, got {key!r} in it. {way_out}")


def check_verbose(verbose: Any) -> None:
    """
    Check how much is shown.

    :param verbose: What the user passed.
    :raises TypeError: If it is no number.
    :raises ValueError: If it is not whole or out of range.
    """
    check_int("verbose", verbose, 0, "0 is silent, 1 shows messages, 2 shows details.")


def check_device(device: Any) -> None:
    """
    Check a PyTorch device.

    :param device: What the user passed.
    :raises ValueError: If PyTorch knows no such device. Where there is none here, a warning says that the CPU is used.
    """
    import torch as th  # here, so that the commands that only read results start without it

    if isinstance(device, str) and device == "auto":
        return
    try:
        kind = th.device(device).type
    except (RuntimeError, TypeError, ValueError):  # the last one for numbers beyond 64 bits
        raise ValueError(
            f"`device` must be 'auto' or a PyTorch device, got {device!r}. Use for example 'cpu' or 'cuda'."
        ) from None
    if kind == "cuda" and not th.cuda.is_available():
        # SB3 takes the CPU then, also for files that a GPU machine wrote; but nothing falls back in silence.
        log.warning("`device` is %r, but there is no CUDA device here: the CPU is used. Use 'auto' or 'cpu'.", device)


def as_gymnasium(env: Any) -> Any:
    """
    Return an environment that SB3 takes; one of OpenAI Gym is converted as SB3 does it, with its warning.

    :param env: What the user passed, made already where it was an id.
    :return: A Gymnasium environment or a ``VecEnv``.
    :raises TypeError: If it is no environment, or a vectorised one that is no ``VecEnv``.
    :raises ValueError: SB3's, if it is neither of Gymnasium nor of OpenAI Gym.
    :raises ImportError: SB3's, if the package is missing that converts it.
    """
    from stable_baselines3.common.vec_env import VecEnv  # imports torch
    from stable_baselines3.common.vec_env.patch_gym import _patch_env

    if isinstance(env, VecEnv):
        return env
    is_envpool = any(cls.__module__.startswith("envpool.") for cls in type(env).__mro__)
    if isinstance(env, VectorEnv) or is_envpool:
        raise TypeError(
            "`env` must be a gymnasium environment or an SB3 VecEnv, got the vectorised environment "
            f"{type(env).__name__}. Pass sb3_clipvf.envs.as_vec_env(env)."
        )
    if not (hasattr(env, "observation_space") and hasattr(env, "action_space")):
        raise TypeError(
            f"`env` must be a gymnasium environment or an SB3 VecEnv, got {env!r} of type {type(env).__name__}. Pass "
            "for example gymnasium.make('CartPole-v1'); only the constructor takes the id as well."
        )
    return _patch_env(env)


def check_env(policy: Any, env: Any, use_sde: bool) -> None:
    """
    Check that the algorithm can act in an environment.

    :param policy: Policy class or alias.
    :param env: The environment, or whatever else has its spaces.
    :param use_sde: Whether gSDE is asked for.
    :raises ValueError: If it cannot.
    """
    check_bool("use_sde", use_sde)
    _check_action_space(env.action_space, use_sde)
    _check_observation_space(policy, env.observation_space)


@contextlib.contextmanager
def same_spaces() -> Iterator[None]:
    """
    Say more where SB3 finds that environments have other spaces than the model.

    :return: Context manager.
    :raises ValueError: In the place of SB3's.
    """
    try:
        yield
    except ValueError as error:
        if "spaces do not match" not in str(error):
            raise
        raise ValueError(
            f"`env` must have the spaces of the model, got others. {error}, that of the model and that of `env`. Wrap "
            "the environment so that they are the same, or train a new model in it."
        ) from None


def check_folder(name: str, folder: str | os.PathLike[str], way_out: str) -> None:
    """
    Check that files can be written to a folder, which is made where it does not exist.

    :param name: The argument's name.
    :param folder: What the user passed.
    :param way_out: What to do instead, a sentence.
    :raises OSError: If they cannot, of the subclass for the error number.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        rule = f"`{name}` must be a folder that can be written to"
        text = f"{rule}, got {os.fspath(folder)!r}: {error.strerror}. {way_out}"
        raise OSError(error.errno, text) from error


def check_observations(policy_class: type, policy_kwargs: dict[str, Any], observation_space: Any) -> None:
    """
    Check that a policy can read observations, which SB3's policies find out when they see them.

    :param policy_class: Class of the policy.
    :param policy_kwargs: Its further arguments.
    :param observation_space: Of the environment, of a type that SB3 takes.
    :raises ValueError: If it cannot.
    """
    from stable_baselines3.common import torch_layers
    from stable_baselines3.common.policies import ActorCriticPolicy

    is_dict = isinstance(observation_space, spaces.Dict)
    parts = list(observation_space.spaces.values()) if is_dict else [observation_space]
    if not parts or any(0 in (space.shape or ()) for space in parts):
        raise ValueError(
            f"`env` must have observations of at least one number, got {observation_space}. Leave out a key that is "
            "empty (gymnasium.wrappers.FilterObservation), or add a constant by a wrapper."
        )
    if getattr(policy_class, "extract_features", None) is not ActorCriticPolicy.extract_features:
        return  # it may read them in its own way
    default = inspect.signature(policy_class).parameters.get("features_extractor_class")
    extractor = policy_kwargs.get("features_extractor_class", default and default.default)
    flattening = (torch_layers.FlattenExtractor, torch_layers.NatureCNN, torch_layers.CombinedExtractor)
    for space in parts:
        if np.any(getattr(space, "start", 0)):
            raise ValueError(
                f"`env` must count its discrete observations from 0, got {space}. Shift them by a wrapper "
                "(gymnasium.wrappers.TransformObservation), or turn them into vectors "
                "(gymnasium.wrappers.FlattenObservation)."
            )
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
            raise ValueError(
                f"`env` must have MultiDiscrete observations of one dimension, got {space}. Flatten them by a wrapper "
                "(gymnasium.wrappers.FlattenObservation)."
            )
        if isinstance(space, spaces.Box) and space.shape == () and extractor in flattening:
            raise ValueError(
                f"`env` must have Box observations of at least one dimension for {extractor.__name__}, got {space}. "
                "Reshape them by a wrapper (gymnasium.wrappers.ReshapeObservation(env, (1,)))."
            )


def _full_type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_action_space(action_space: Any, use_sde: bool) -> None:
    if not isinstance(action_space, ACTION_SPACES):
        legal = ", ".join(space.__name__ for space in ACTION_SPACES)
        raise ValueError(
            f"`env` must have an action space of type {legal}, got {action_space} of type {_full_type(action_space)}. "
            "Wrap the environment to convert it."
        )
    if 0 in (action_space.shape or ()):
        raise ValueError(f"`env` must have actions of at least one number, got {action_space}. Change it by a wrapper.")
    if isinstance(action_space, spaces.Box) and not action_space.is_bounded("both"):
        raise ValueError(
            f"`env` must have an action space with finite bounds, got {action_space}. "
            "Wrap it, for example in gymnasium.wrappers.RescaleAction."
        )
    if isinstance(action_space, spaces.MultiBinary) and not isinstance(action_space.n, int):
        raise ValueError(
            f"`env` must have a MultiBinary action space of one dimension, got {action_space}. Flatten it by a wrapper."
        )
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim != 1:
        raise ValueError(
            f"`env` must have a MultiDiscrete action space of one dimension, got {action_space}. "
            "Flatten it by a wrapper."
        )
    if np.any(getattr(action_space, "start", 0)):
        raise ValueError(
            f"`env` must count its discrete actions from 0, got {action_space}. Shift them by a wrapper "
            "(gymnasium.wrappers.TransformAction)."
        )
    if use_sde and not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"`use_sde` must be False unless actions are continuous, got True and {action_space}. Drop it."
        )


def _check_observation_space(policy: Any, observation_space: Any) -> None:
    is_dict = isinstance(observation_space, spaces.Dict)
    for space in observation_space.spaces.values() if is_dict else [observation_space]:
        if not isinstance(space, ACTION_SPACES):
            legal = ", ".join(space.__name__ for space in ACTION_SPACES)
            raise UnsupportedSpaceError(
                f"`env` must have an observation space of type {legal}, or a Dict of these that is not nested, got "
                f"{observation_space} with a part of type {_full_type(space)}. Wrap the environment to convert it, for "
                "example in gymnasium.wrappers.FlattenObservation."
            )
    if not isinstance(policy, str):
        return
    squashed = "Squashed" if policy.startswith("Squashed") else ""
    if is_dict and policy.removeprefix(squashed) in ("MlpPolicy", "CnnPolicy"):
        raise ValueError(
            f"`policy` must take dict observations, got {policy!r}. You must use `{squashed}MultiInputPolicy` when "
            "working with dict observation space."
        )
    if not is_dict and policy.removeprefix(squashed) == "MultiInputPolicy":
        raise ValueError(
            f"`policy` must take observations that are no dict, got {policy!r} and {observation_space}. Use "
            f"'{squashed}MlpPolicy', or '{squashed}CnnPolicy' for images."
        )
