"""Check what environments return: NumPy would broadcast or cast wrong shapes and types without an error."""

from collections.abc import Iterator
from itertools import dropwhile
from typing import Any

import numpy as np
from gymnasium import spaces

# NumPy's kinds of dtypes: bool, int, unsigned int, float.
_NUMBERS = "biuf"
_WHOLE = "biu"

_HINT = "Fix it, or its observation space; stable_baselines3.common.env_checker.check_env finds more."


class StepCheck:
    """
    Check steps of ``n_envs`` environments against the space of one environment's observations.

    A matching step costs a few comparisons. As in SB3's PPO, float64 observations are cast, rewards may be whole
    numbers, and values may lie outside the space.
    """

    def __init__(self, space: spaces.Space[Any], n_envs: int) -> None:
        self._space = space
        self._n_envs = n_envs
        self._column_shape = (n_envs,)
        # With the kinds of dtypes whose values need no check.
        self._parts = [
            (key, part, (n_envs, *(part.shape or ())), _NUMBERS if np.dtype(part.dtype).kind == "f" else _WHOLE)
            for key, part in parts(space)
        ]

    def observations(self, obs: Any) -> None:
        """Check the observations of all environments: an array, or a dict of arrays."""
        for key, space, shape, kinds in self._parts:
            part = obs if key is None else obs[key]
            if type(part) is not np.ndarray or part.shape != shape or part.dtype.kind not in kinds:
                _check_batch(name_of(key), space, shape, part)

    def __call__(self, step: tuple[Any, Any, Any, Any]) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """Check a step of a ``VecEnv``, and return it with rewards as an array and dones as an array of bools."""
        obs, rewards, dones, infos = step
        self.observations(obs)
        if type(rewards) is not np.ndarray or rewards.shape != self._column_shape or rewards.dtype.kind != "f":
            rewards = self._column("rewards", rewards)
        if type(dones) is not np.ndarray or dones.shape != self._column_shape or dones.dtype.kind != "b":
            dones = self._column("dones", dones).astype(bool)  # as an index, numbers would select rows
        check_final(self._space, dones, infos)
        return obs, rewards, dones, infos

    def _column(self, name: str, values: Any) -> np.ndarray:
        array = values if type(values) is np.ndarray else np.asarray(values)
        if array.shape != self._column_shape:
            raise ValueError(
                f"`env` must return {name} of the shape ({self._n_envs},), got {array.shape}. Return one number "
                "per environment."
            )
        if array.dtype.kind not in _NUMBERS:
            raise TypeError(f"`env` must return numbers as {name}, got {values!r}. Return int, float or bool.")
        return array


def check_one(space: spaces.Space[Any], obs: Any, index: int, *, columns: bool = False) -> None:
    """
    Check the shape of an observation of environment ``index``, which NumPy would broadcast to that of the space.

    Leading axes of length 1 do not count, since they leave the numbers as they are. ``columns`` allows an array of
    shape ``(1,)`` as discrete observation, which NumPy does not write into a row.
    """
    if type(obs) is np.ndarray and obs.shape == space.shape:
        return
    for key, wanted, shape in misfits(space, obs, (), columns=columns):
        raise ValueError(
            f"`env` must return {name_of(key)} of its space's shape {wanted}, got {shape} from environment {index}. "
            f"{_HINT}"
        )


def misfits(
    space: spaces.Space[Any], obs: Any, leading: tuple[int, ...], *, columns: bool
) -> Iterator[tuple[Any, tuple[int, ...], tuple[int, ...]]]:
    """Yield key, expected shape and actual shape of parts that do not match the leading axes and the space's own."""
    for key, part in parts(space):
        given = obs if key is None else obs[key]
        shape = given.shape if isinstance(given, np.ndarray) else np.shape(given)
        if part.shape is not None and not _fits(part, shape, leading, columns=columns):
            yield key, (*leading, *part.shape), shape


def _fits(space: spaces.Space[Any], shape: tuple[int, ...], leading: tuple[int, ...], *, columns: bool) -> bool:
    """Return whether a shape is the leading axes and the space's own, or one that SB3 reshapes to it."""
    own = space.shape or ()
    if shape == (*leading, *own):
        return True
    if isinstance(space, spaces.Discrete):
        return columns and shape == (*leading, 1)
    return not leading and _without_leading_ones(shape) == _without_leading_ones(own)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda length: length == 1, shape))


def check_final(space: spaces.Space[Any], dones: Any, infos: Any) -> None:
    """Check the shapes of the final observations of truncated episodes, whose values are bootstrapped."""
    if np.count_nonzero(dones):
        for index in np.flatnonzero(dones).tolist():
            # Training reads no others, so wrappers may return them in any shape.
            if infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
                check_one(space, infos[index]["terminal_observation"], index, columns=True)


def _check_batch(name: str, space: spaces.Space[Any], shape: tuple[int, ...], obs: Any) -> None:
    if not isinstance(obs, np.ndarray) or obs.dtype.kind not in _NUMBERS:
        kind = f"of {obs.dtype}" if isinstance(obs, np.ndarray) else f"of type {type(obs).__name__}"
        raise TypeError(f"`env` must return {name} as a NumPy array of numbers, got one {kind}. {_HINT}")
    if not _fits(space, obs.shape, shape[:1], columns=True):
        raise shape_error(name, shape, obs.shape)
    is_whole = obs.dtype.kind in _WHOLE or np.dtype(space.dtype).kind == "f"
    # Another check reports NaN, before the policy acts.
    if not is_whole and not np.array_equal(obs, np.trunc(obs), equal_nan=True):
        raise ValueError(
            f"`env` must return whole numbers as {name}, since its space has the dtype {space.dtype}, got fractions, "
            f"which the rollout would truncate. {_HINT}"
        )


def shape_error(name: str, shape: tuple[int, ...], given: tuple[int, ...]) -> ValueError:
    """Return the error for observations of all environments that have the wrong shape."""
    return ValueError(
        f"`env` must return {name} of its space's shape, {shape} for {shape[0]} environments, got {given}. {_HINT}"
    )


def parts(space: spaces.Space[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Return each space that is stored in one array, with its key, or None if observations have no keys."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else [(None, space)]


def name_of(key: Any) -> str:
    """Return how messages name observations, or the entry under a key."""
    return "observations" if key is None else f"observations[{key!r}]"
