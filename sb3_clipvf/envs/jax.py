"""Environments of Brax and MuJoCo Playground, which are functions in JAX, as tensor environments."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_clipvf.common.validation import check_int
from sb3_clipvf.envs.tensor import TensorObs, TensorStep


class JaxTensorEnv:
    """
    A :class:`.TensorVecEnv` over many copies of one environment of Brax or MuJoCo Playground.

    One compiled function steps and resets all copies. Arrays of JAX and tensors share memory (DLPack). As in the
    training wrappers of both libraries, a row whose episode ended starts again in the state of its own first reset.
    Unlike them, it keeps the final observation.

    On a GPU, JAX reserves 75 % of the memory, unless the process starts with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``.

    :param env: Environment without wrappers: ``reset(key)`` and ``step(state, action)`` return a state with ``obs``,
        ``reward``, ``done`` and either ``pipeline_state`` or ``data``.
    :param num_envs: Number of copies.
    :param episode_length: Steps after which an episode is truncated.
    :param seed: Seed of the first reset, if ``reset_tensors`` gets none.
    :raises ImportError: If JAX is not installed.
    """

    def __init__(self, env: Any, num_envs: int, episode_length: int = 1000, seed: int = 0) -> None:
        self._jax = jax = _jax()
        self.env = env
        self.num_envs = check_int("num_envs", num_envs, 1, "Brax trains with 2048.")
        self.episode_length = check_int("episode_length", episode_length, 1, "Brax's default is 1000.")
        self._key = jax.random.PRNGKey(seed)
        shapes = jax.eval_shape(env.reset, self._key).obs
        self.observation_space = _space(shapes)
        self.action_space = spaces.Box(-1.0, 1.0, (int(env.action_size),), np.float32)
        self._reset, self._step = jax.jit(jax.vmap(env.reset)), jax.jit(self._step_all)
        self._state: Any = None
        self.device = _tensor(jax.numpy.zeros(1)).device

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Begin an episode in every environment. The first call compiles."""
        jax = self._jax
        if seed is not None:
            self._key = jax.random.PRNGKey(seed)
        self._key, key = jax.random.split(self._key)
        first = self._reset(jax.random.split(key, self.num_envs))
        self._state = first, first, jax.numpy.zeros(self.num_envs, int)
        return _tensors(first.obs)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments. The first call compiles."""
        # The actions' memory must not change while JAX computes.
        self._state, step = self._step(self._state, self._jax.dlpack.from_dlpack(actions.detach().contiguous()))
        observations, final, rewards, terminated, truncated = step
        metrics = self._state[0].metrics
        return TensorStep(
            _tensors(observations),
            _tensor(rewards),
            _tensor(terminated),
            _tensor(truncated),
            _tensors(final),
            {name: _tensor(values) for name, values in metrics.items()},
        )

    def close(self) -> None:
        """Free the states."""
        self._state = None

    def _step_all(self, carried: Any, actions: Any) -> Any:
        """Return the next states and the step: a function of JAX, compiled by the constructor."""
        jax, jnp = self._jax, self._jax.numpy
        state, first, n_steps = carried
        state = jax.vmap(self.env.step)(state, actions)
        n_steps = n_steps + 1
        terminated, truncated = state.done > 0, n_steps >= self.episode_length
        ended = terminated | truncated

        def chosen(begun: Any, now: Any) -> Any:
            return jnp.where(ended.reshape(-1, *[1] * (now.ndim - 1)), begun, now)

        physics = "data" if hasattr(state, "data") else "pipeline_state"
        restarted = {
            name: jax.tree.map(chosen, getattr(first, name), getattr(state, name)) for name in (physics, "obs")
        }
        following = state.replace(**restarted, done=jnp.zeros_like(state.done))
        step = (following.obs, state.obs, state.reward.astype(jnp.float32), terminated, truncated)
        return (following, first, jnp.where(ended, 0, n_steps)), step


def _jax() -> Any:
    try:
        return import_module("jax")  # without types, which would be checked only where it is installed
    except ImportError as error:
        raise ImportError(
            "`JaxTensorEnv` needs JAX. Install it for your device, or with pip install 'sb3_clipvf[sbx]'."
        ) from error


def _space(shapes: Any) -> spaces.Space[Any]:
    if isinstance(shapes, Mapping):
        return spaces.Dict({key: _space(part) for key, part in shapes.items()})
    return spaces.Box(-np.inf, np.inf, shapes.shape, np.dtype(shapes.dtype))


def _tensors(arrays: Any) -> TensorObs:
    if isinstance(arrays, Mapping):
        return {key: _tensor(part) for key, part in arrays.items()}
    return _tensor(arrays)


def _tensor(array: Any) -> th.Tensor:
    tensor: th.Tensor = th.utils.dlpack.from_dlpack(array)
    return tensor
