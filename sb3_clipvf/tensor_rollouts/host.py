"""Rollouts from tensor environments on the CPU, whose tensors share memory with arrays."""

from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.common.nonfinite import is_finite
from sb3_clipvf.common.observations import parts_of
from sb3_clipvf.common.tensors import to_tensor
from sb3_clipvf.engines.env_actions import env_actions
from sb3_clipvf.engines.interface import Acted, Engine
from sb3_clipvf.engines.rollout_writer import RolloutWriter, writer_for
from sb3_clipvf.envs.tensor import LazyInfos, TensorStep, host_copy
from sb3_clipvf.envs.tensor_episodes import FinalValues
from sb3_clipvf.guards.diagnosis import reads_by_own_code, reward_fault, step_error
from sb3_clipvf.rollout import takes_dist_params
from sb3_clipvf.tensor_rollouts.base import TensorRollout


class HostRollout(TensorRollout):
    """A rollout in arrays on the host, which the environments' tensors are copied to."""

    def __init__(self, collector: Any, engine: Engine, env: VecEnv, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, env, buffer, callback)
        self._space = space = collector.action_space
        self._with_dist_params = takes_dist_params(buffer)
        self._writer: RolloutWriter | None = None if self.copies else writer_for(engine, buffer, space)
        self._acted = Acted(np.empty(0), np.empty(0), np.empty(0), None)
        self._final_values = FinalValues(engine, self.gamma, may_be_nonfinite=reads_by_own_code(collector.policy))

    def act(self) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Act by the engine's kernels, as in other environments."""
        collector, buffer, observations = self.collector, self.buffer, self.observations
        # Environments may write the next step into the same memory.
        collector._last_obs = self._store(observations)
        if self._writer is not None:
            clipped = collector._act_by_writer(self._writer, buffer)
            row = {name: th.from_numpy(array) for name, array in self._writer.row().items()}
            return observations, row["actions"], row["values"], row["log_probs"], th.from_numpy(clipped)
        tensors = to_tensor(collector._last_obs, buffer.device)
        self._acted = collector._act(self.engine, tensors, buffer, self._with_dist_params)
        self._with_dist_params = self._acted.dist_params is not None
        actions, values, log_probs, _ = self._acted.as_tensors()
        clipped = env_actions(collector.policy, self._space, actions)
        if isinstance(self._space, spaces.Box):
            clipped = clipped.astype(np.float32, copy=False)  # bounds of float64 or integers make it float64
        return observations, th.from_numpy(actions), values, log_probs, th.from_numpy(clipped)

    def add(self) -> None:
        """Store the step, with the value of the final observation if an episode was truncated."""
        collector, buffer, step = self.collector, self.buffer, cast(TensorStep, self.taken)
        t, observations = buffer.pos, collector._last_obs
        rewards = self._bootstrapped(step)
        if not is_finite(rewards):
            raise self._reward_error(step, rewards, t)
        if self._writer is not None:
            self._writer.add(observations, rewards, collector._last_episode_starts)
        else:
            acted, actions = self._acted, self._acted.actions
            if isinstance(self._space, spaces.Discrete):
                actions = actions.reshape(-1, 1)
            row = (observations, actions, rewards, collector._last_episode_starts)
            buffer.add(*row, acted.values, acted.log_prob, acted.dist_params)
        collector._last_episode_starts = self.dones[t].numpy()

    def finish(self) -> th.Tensor:
        """Compute returns and advantages."""
        values: th.Tensor = self.collector._compute_returns(self.engine, self.buffer, self.dones[-1].numpy())
        return values

    def _store(self, observations: Any) -> Any:
        rows, t = self.buffer.observations, self.buffer.pos
        if isinstance(rows, dict):
            return {key: _copied(part[t], observations[key]) for key, part in rows.items()}
        return _copied(rows[t], observations)

    def _bootstrapped(self, step: TensorStep) -> np.ndarray:
        rewards = step.rewards.to(th.float32)
        timed_out = step.truncated & ~step.terminated
        if not timed_out.any():
            return rewards.numpy()
        rows = timed_out.nonzero().flatten()
        if step.final_observations is None:
            values = self.buffer.values[self.buffer.pos] if self._writer is not None else self._acted.values
            final_values = th.from_numpy(values).flatten()[rows]
        else:
            finals = {key: part[rows] for key, part in parts_of(step.final_observations).items()}
            final_values = self._final_values.predict(finals)
        # Not in-place, since the environments may read their rewards again.
        return rewards.index_add(0, rows, final_values, alpha=self.gamma).numpy()

    def _reward_error(self, step: TensorStep, rewards: np.ndarray, t: int) -> Exception:
        own_rewards = host_copy(step.rewards)
        fault = reward_fault(own_rewards, rewards, LazyInfos(step, self.buffer.n_envs))
        acted = self._acted
        acted_arrays = {"actions": acted.actions, "values": acted.values, "log_probs": acted.log_prob}
        arrays = acted_arrays if self._writer is None else self._writer.row()
        arrays |= {"observations": self.collector._last_obs, "new_observations": host_copy(step.observations)}
        arrays |= {"rewards": own_rewards, "dones": self.dones[t].numpy()}
        return step_error(self.collector._fault_context(), fault, t, arrays)


def _copied(target: np.ndarray, tensor: th.Tensor) -> np.ndarray:
    """Copy a tensor into a row of the buffer, and return the row in the tensor's shape."""
    row = target.reshape(tuple(tensor.shape))
    row[...] = tensor.numpy()
    return row
