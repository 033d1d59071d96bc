"""The writer of a rollout's steps: kernels fill the buffer's arrays, without new arrays at each step."""

from typing import Any, Protocol, cast

import numpy as np
from gymnasium import spaces

from sb3_clipvf.distributions import to_action_space
from sb3_clipvf.engines.interface import Engine
from sb3_clipvf.engines.recognition import has_own_add
from sb3_clipvf.rollout import TensorRolloutBuffer


class Target:
    """Arrays ``(n_steps, n_envs, ...)`` that a kernel fills step by step, and their addresses."""

    def __init__(
        self,
        values: np.ndarray,
        log_prob: np.ndarray,
        dist_params: np.ndarray,
        actions: np.ndarray | None = None,
        bounds: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """All arrays are float32 and C-contiguous. If actions and bounds are given, actions are stored and clipped."""
        from sb3_clipvf.engines.kernels import acting  # imports numba, which takes half a second

        self.values, self.log_prob, self.dist_params = values, log_prob, dist_params
        self.shape = dist_params.shape  # (n_steps, n_envs, k)
        self._kept = (actions, bounds)  # keeps them alive, since kernels know only their addresses
        self.packed, self._row_bytes = np.zeros((2, 1 + acting.HIGH), np.int64)
        arrays = {acting.VALUES: values, acting.LOG_PROB: log_prob, acting.DIST_PARAMS: dist_params}
        if actions is not None and bounds is not None:
            arrays[acting.ACTIONS] = actions
            self.packed[[acting.LOW, acting.HIGH]] = [bound.ctypes.data for bound in bounds]
        for index, array in arrays.items():
            self.packed[index], self._row_bytes[index] = array.ctypes.data, array.strides[1]
        self.packed[acting.DIST_WIDTH] = self.shape[2]

    def of_rows(self, step: int, first: int) -> np.ndarray:
        """Return the addresses of a step's rows from ``first`` on, as those of a target of one step."""
        addresses: np.ndarray = self.packed + (step * self.shape[1] + first) * self._row_bytes
        return addresses

    def check(self, step: int, n_envs: int, dist_param_dim: int) -> None:
        """Raise ValueError if a step does not fit: a kernel would write beyond the arrays."""
        n_steps, n_rows, width = self.shape
        if step >= n_steps or n_envs != n_rows or width not in (0, dist_param_dim):
            raise ValueError(
                f"`step`, `n_envs` and `dist_param_dim` must fit arrays of shape {self.shape}, got {step}, {n_envs} "
                f"and {dist_param_dim}. Do not change the policy, the buffer or the environments during a rollout."
            )


class WritingEngine(Engine, Protocol):
    """An engine whose kernels write to a :class:`Target`."""

    def act_into(self, target: Target, step: int, observations: np.ndarray) -> tuple[np.ndarray, bool]:
        """
        Sample an action for each environment, and fill a step of the target.

        Return the actions, float32 ``(n_envs, action_dim)``, and whether observations, values and log-probabilities are
        finite. The actions are clipped if the target has bounds.
        """


class RolloutWriter:
    """
    Writes the steps of a rollout into the buffer, by the kernels of an engine.

    With it, the loop has no local variables of actions, values and log-probabilities, which callbacks may read.
    """

    def __init__(self, engine: WritingEngine, buffer: TensorRolloutBuffer, space: spaces.Space[Any]) -> None:
        self._engine, self._buffer, self._space = engine, buffer, space
        self._observations = cast(np.ndarray, buffer.observations)  # dict observations run on other engines
        bounds = None
        if isinstance(space, spaces.Box):
            bounds = (np.ascontiguousarray(space.low).reshape(-1), np.ascontiguousarray(space.high).reshape(-1))
        self._clips = bounds is not None
        self._has_vectors = self._clips and len(space.shape or ()) == 1
        self._target = Target(buffer.values, buffer.log_probs, buffer.dist_params, buffer.actions, bounds)

    def act(self, observations: Any) -> tuple[np.ndarray, bool]:
        """Return actions for the environments, and whether observations, values and log-probabilities are finite."""
        actions, is_finite = self._engine.act_into(self._target, self._buffer.pos, observations)
        if not self._clips:
            actions = to_action_space(actions, self._space)
            row = self._buffer.actions[self._buffer.pos]
            row[:] = actions.reshape(row.shape)
        elif not self._has_vectors:
            actions = to_action_space(actions, self._space)
        return actions, is_finite

    def add(self, observations: Any, rewards: np.ndarray, episode_starts: Any) -> None:
        """Complete the step; the arguments are those of ``TensorRolloutBuffer.add``."""
        buffer, step = self._buffer, self._buffer.pos
        row = self._observations[step]
        row[:] = observations if observations.shape == row.shape else observations.reshape(row.shape)
        buffer.rewards[step] = rewards
        buffer.episode_starts[step] = episode_starts
        buffer.pos = step + 1
        buffer.full = buffer.pos == buffer.buffer_size

    @property
    def values(self) -> np.ndarray:
        """Values of the observations of the present step, shape ``(n_envs,)``."""
        values: np.ndarray = self._buffer.values[self._buffer.pos]
        return values

    def row(self) -> dict[str, np.ndarray]:
        """Return what the engine wrote for the present step."""
        buffer, step = self._buffer, self._buffer.pos
        return {name: getattr(buffer, name)[step] for name in ("actions", "values", "log_probs")}


def writer_for(engine: Engine, buffer: Any, space: spaces.Space[Any]) -> RolloutWriter | None:
    """Return the writer of an engine for a buffer and an action space, or None if one of them does not allow it."""
    if not hasattr(engine, "act_into") or type(buffer) is not TensorRolloutBuffer or has_own_add(buffer):
        return None
    arrays = [buffer.values, buffer.log_probs, buffer.dist_params]
    if isinstance(space, spaces.Box):
        if engine.policy.squash_output or space.dtype != np.float32:
            return None
        if engine.policy.action_space.shape != space.shape:  # kernels would write beyond the actions
            return None
        arrays.append(buffer.actions)
    cells = (buffer.buffer_size, buffer.n_envs)
    for array in arrays:
        is_float = type(array) is np.ndarray and array.dtype == np.float32
        if not is_float or array.shape[:2] != cells or not array.flags.carray:
            return None
    return RolloutWriter(engine, buffer, space)  # type: ignore[arg-type]
