"""Environments that cost nothing, for rows that time updates alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

_N_PREPARED = 16


class FreeVecEnv(VecEnv):
    """
    Returns arrays drawn beforehand, whatever the actions; episodes never end.

    :param n_envs: number of environments
    :param n_inputs: size of an observation, which is normally distributed
    :param n_actions: size of an action
    :param seed: seed of the arrays
    """

    def __init__(self, n_envs: int, n_inputs: int, n_actions: int, seed: int) -> None:
        self.render_mode = None
        super().__init__(n_envs, Box(-np.inf, np.inf, (n_inputs,)), Box(-1.0, 1.0, (n_actions,)))
        generator = np.random.default_rng(seed)
        self._observations = generator.standard_normal((_N_PREPARED, n_envs, n_inputs), np.float32)
        self._rewards = generator.standard_normal((_N_PREPARED, n_envs), np.float32)
        self._dones = np.zeros(n_envs, np.bool_)
        self._infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._n_calls = 0

    def reset(self) -> np.ndarray:
        """Return the first observations."""
        self._n_calls = 0
        first: np.ndarray = self._observations[0]
        return first

    def step_async(self, actions: np.ndarray) -> None:
        """Ignore the actions."""

    def step_wait(self) -> VecEnvStepReturn:
        """Return the next arrays, and those of the start after the last."""
        self._n_calls += 1
        index = self._n_calls % _N_PREPARED
        return self._observations[index], self._rewards[index], self._dones, self._infos

    def close(self) -> None:
        """Close nothing."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return this object's attribute for each environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: there are no environments with attributes."""
        raise NotImplementedError

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Refuse: there are no environments with methods."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Return that no environment has a wrapper."""
        return [False for _ in self._get_indices(indices)]
