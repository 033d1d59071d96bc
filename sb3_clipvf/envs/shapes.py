"""What environments give at a step, checked for shapes and types that NumPy would stretch or cut in silence."""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

_NUMBERS = "biuf"
"""NumPy's kinds: truth values, whole numbers with and without a sign, floats."""

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
        self._shape = (n_envs, *(space.shape or ()))
        self._column_shape = (n_envs,)
        self._dtype = space.dtype

    def observations(self, obs: Any) -> None:
        """
        Check the observations of all environments.

        :param obs: An array, or a dict of such.
        :raises ValueError: If a shape is not that of the space, or fractions come where it has whole numbers.
        :raises TypeError: If it is no array of numbers.
        """
        if type(obs) is np.ndarray and obs.shape == self._shape and obs.dtype == self._dtype:
            return
        for key, space in _parts(self._space):
            _check_batch(_name(key), space, obs if key is None else obs[key], self._n_envs)

    def __call__(self, step: tuple[Any, Any, Any, Any]) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """
        Check a step.

        :param step: Observations, rewards, dones and infos of a ``VecEnv``.
        :return: The same; rewards and dones are arrays, if they were not.
        :raises ValueError: If a shape is wrong, or fractions come where a space has whole numbers.
        :raises TypeError: If something is no array of numbers.
        """
        obs, rewards, dones, infos = step
        self.observations(obs)
        rewards, dones = self._column("rewards", rewards), self._column("dones", dones)
        if np.count_nonzero(dones):
            for index in np.flatnonzero(dones).tolist():
                # Of others it is not read, so that wrappers may leave it as it is.
                if infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
                    check_one(self._space, infos[index]["terminal_observation"], index)
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


def check_one(space: spaces.Space[Any], obs: Any, index: int) -> None:
    """
    Check the shape of one environment's observation, which NumPy would stretch to that of the space.

    :param space: Of the observation.
    :param obs: The observation.
    :param index: Which environment gave it.
    :raises ValueError: If its shape is another.
    """
    if type(obs) is np.ndarray and obs.shape == space.shape:
        return
    for key, part in _parts(space):
        given = obs if key is None else obs[key]
        shape = given.shape if isinstance(given, np.ndarray) else np.shape(given)
        if shape != part.shape:
            raise ValueError(
                f"`env` must give {_name(key)} of its space's shape {part.shape}, got {shape} from environment "
                f"{index}. {_WAY_OUT}"
            )


@contextlib.contextmanager
def checked_rows(venv: VecEnv) -> Iterator[None]:
    """
    Let SB3's ``DummyVecEnv`` refuse observations that it would stretch, for as long as this lasts.

    :param venv: The innermost ``VecEnv``; those that save observations by other code stay as they are.
    :return: Context manager.
    """
    is_sb3s = isinstance(venv, DummyVecEnv) and type(venv)._save_obs is DummyVecEnv._save_obs
    if is_sb3s:
        # A method, so that a copy of the environments writes into its own rows.
        venv.__dict__["_save_obs"] = MethodType(_save_obs, venv)
    try:
        yield
    finally:
        if is_sb3s:
            venv.__dict__.pop("_save_obs", None)


def _save_obs(self: DummyVecEnv, env_idx: int, obs: Any) -> None:
    check_one(self.observation_space, obs, env_idx)
    DummyVecEnv._save_obs(self, env_idx, obs)


def _check_batch(name: str, space: spaces.Space[Any], obs: Any, n_envs: int) -> None:
    if not isinstance(obs, np.ndarray) or obs.dtype.kind not in _NUMBERS:
        kind = f"of {obs.dtype}" if isinstance(obs, np.ndarray) else f"of type {type(obs).__name__}"
        raise TypeError(f"`env` must give {name} as a NumPy array of numbers, got one {kind}. {_WAY_OUT}")
    shape = (n_envs, *(space.shape or ()))
    if obs.shape != shape:
        raise ValueError(
            f"`env` must give {name} of its space's shape, {shape} for {n_envs} environments, got {obs.shape}. "
            f"{_WAY_OUT}"
        )
    if obs.dtype.kind == "f" and np.dtype(space.dtype).kind in "biu" and not np.array_equal(obs, np.trunc(obs)):
        raise ValueError(
            f"`env` must give whole numbers as {name}, as its space of {space.dtype} says, got fractions, which the "
            f"rollout would cut off. {_WAY_OUT}"
        )


def _parts(space: spaces.Space[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Spaces that are stored in one array each, by their key; None where observations have no keys."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else [(None, space)]


def _name(key: Any) -> str:
    return "observations" if key is None else f"observations[{key!r}]"
