"""What environments give at a step, checked for shapes and types that NumPy would stretch or cut in silence."""

from collections.abc import Iterator
from itertools import dropwhile
from typing import Any

import numpy as np
from gymnasium import spaces

_NUMBERS = "biuf"
"""NumPy's kinds: truth values, whole numbers with and without a sign, floats."""

_WHOLE = "biu"

_WAY_OUT = "Mend it, or its observation space; stable_baselines3.common.env_checker.check_env finds more."


class StepCheck:
    """
    Refuse what environments give where it does not fit their spaces. What fits costs some comparisons.

    SB3's PPO casts float64 observations and takes whole numbers as rewards and values outside of the space; so does
    this, with the same numbers.

    :param space: Of one environment's observations.
    :param n_envs: Number of environments.
    """

    def __init__(self, space: spaces.Space[Any], n_envs: int) -> None:
        self._space = space
        self._n_envs = n_envs
        self._column_shape = (n_envs,)
        # Kinds of numbers that need no look at the numbers themselves.
        self._parts = [
            (key, part, (n_envs, *(part.shape or ())), _NUMBERS if np.dtype(part.dtype).kind == "f" else _WHOLE)
            for key, part in parts(space)
        ]

    def observations(self, obs: Any) -> None:
        """
        Check the observations of all environments.

        :param obs: An array, or a dict of such.
        :raises ValueError: If a shape is not that of the space, or fractions come where it has whole numbers.
        :raises TypeError: If it is no array of numbers.
        """
        for key, space, shape, kinds in self._parts:
            part = obs if key is None else obs[key]
            if type(part) is not np.ndarray or part.shape != shape or part.dtype.kind not in kinds:
                _check_batch(name_of(key), space, shape, part)

    def __call__(self, step: tuple[Any, Any, Any, Any]) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """
        Check a step.

        :param step: Observations, rewards, dones and infos of a ``VecEnv``.
        :return: The same; rewards are an array, dones one of bools, if they were not.
        :raises ValueError: If a shape is wrong, or fractions come where a space has whole numbers.
        :raises TypeError: If something is no array of numbers.
        """
        obs, rewards, dones, infos = step
        self.observations(obs)
        rewards, dones = self._column("rewards", rewards), self._column("dones", dones)
        if dones.dtype != bool:
            dones = dones.astype(bool)  # numbers would be rows where they index
        check_final(self._space, dones, infos)
        return obs, rewards, dones, infos

    def _column(self, name: str, values: Any) -> np.ndarray:
        array = values if type(values) is np.ndarray else np.asarray(values)
        if array.shape != self._column_shape:
            raise ValueError(
                f"`env` must give {name} of the shape ({self._n_envs},), got {array.shape}. Let step() give one number "
                "for each environment."
            )
        if array.dtype.kind not in _NUMBERS:
            raise TypeError(f"`env` must give numbers as {name}, got {values!r}. Let step() give int, float or bool.")
        return array


def check_one(space: spaces.Space[Any], obs: Any, index: int, *, columns: bool = False) -> None:
    """
    Check the shape of one environment's observation, which NumPy would stretch to that of the space.

    Leading axes of length 1 do not count, since its numbers stay the same without them.

    :param space: Of the observation.
    :param obs: The observation.
    :param index: Which environment gave it.
    :param columns: Whether a discrete observation may be an array of one, which NumPy does not write into a row.
    :raises ValueError: If its shape is another.
    """
    if type(obs) is np.ndarray and obs.shape == space.shape:
        return
    for key, wanted, shape in misfits(space, obs, (), columns=columns):
        raise ValueError(
            f"`env` must give {name_of(key)} of its space's shape {wanted}, got {shape} from environment {index}. "
            f"{_WAY_OUT}"
        )


def misfits(
    space: spaces.Space[Any], obs: Any, leading: tuple[int, ...], *, columns: bool
) -> Iterator[tuple[Any, tuple[int, ...], tuple[int, ...]]]:
    """Parts whose shape does not fit the leading axes and the space's own: the key, the shape wanted, the one given."""
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
    return not leading and _without_ones(shape) == _without_ones(own)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda length: length == 1, shape))


def check_final(space: spaces.Space[Any], dones: Any, infos: Any) -> None:
    """Check the shapes of the final observations of truncated episodes, of which values are bootstrapped."""
    if np.count_nonzero(dones):
        for index in np.flatnonzero(dones).tolist():
            # Of others it is not read, so that wrappers may leave it as it is.
            if infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
                check_one(space, infos[index]["terminal_observation"], index, columns=True)


def _check_batch(name: str, space: spaces.Space[Any], shape: tuple[int, ...], obs: Any) -> None:
    if not isinstance(obs, np.ndarray) or obs.dtype.kind not in _NUMBERS:
        kind = f"of {obs.dtype}" if isinstance(obs, np.ndarray) else f"of type {type(obs).__name__}"
        raise TypeError(f"`env` must give {name} as a NumPy array of numbers, got one {kind}. {_WAY_OUT}")
    if not _fits(space, obs.shape, shape[:1], columns=True):
        raise shape_error(name, shape, obs.shape)
    is_whole = obs.dtype.kind in _WHOLE or np.dtype(space.dtype).kind == "f"
    # NaN is found, and told by its name, where the policy is to act on it.
    if not is_whole and not np.array_equal(obs, np.trunc(obs), equal_nan=True):
        raise ValueError(
            f"`env` must give whole numbers as {name}, as its space of {space.dtype} says, got fractions, which the "
            f"rollout would cut off. {_WAY_OUT}"
        )


def shape_error(name: str, shape: tuple[int, ...], given: tuple[int, ...]) -> ValueError:
    """Return the error for observations of all environments that have the wrong shape."""
    return ValueError(
        f"`env` must give {name} of its space's shape, {shape} for {shape[0]} environments, got {given}. {_WAY_OUT}"
    )


def parts(space: spaces.Space[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Spaces that are stored in one array each, by their key; None where observations have no keys."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else [(None, space)]


def name_of(key: Any) -> str:
    """Return how messages name observations, or one key of them."""
    return "observations" if key is None else f"observations[{key!r}]"
