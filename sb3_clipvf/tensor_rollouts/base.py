"""The steps of a rollout, which the loop of ``tensor_collection`` calls, and episodes in tensor environments."""

import time
from abc import ABC, abstractmethod
from typing import Any, Self, cast

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.common.tensors import to_tensor
from sb3_clipvf.engines.callback_access import may_read_actions
from sb3_clipvf.engines.interface import Engine
from sb3_clipvf.envs.tensor import LazyInfos, TensorStep, copy_step, copy_tensors, host_copy
from sb3_clipvf.envs.tensor_episodes import finished_episodes, successes_of


class Rollout(ABC):
    """A rollout into one kind of buffer, from one kind of environments. At the end of its context, it can continue."""

    def __init__(self, collector: Any, engine: Engine, env: VecEnv, buffer: Any, callback: BaseCallback) -> None:
        self.collector, self.engine, self.env, self.buffer = collector, engine, env, buffer
        self.gamma = collector.gamma  # the buffer's, until the next rollout
        # Callbacks may keep the tensors of a step, whose memory the next step may write.
        self.copies = may_read_actions(callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.leave()
        except Exception:
            if kind is None:
                raise  # else the first error is raised

    @abstractmethod
    def act(self) -> tuple[Any, Any, th.Tensor, th.Tensor, Any]:
        """Return observations, actions, values, log-probabilities and the actions for the environments."""

    @abstractmethod
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any]:
        """Step the environments. Return observations, rewards, whether episodes ended, and infos."""

    @abstractmethod
    def add(self) -> None:
        """Store the step."""

    @abstractmethod
    def leave(self) -> None:
        """Write the present observations and episode starts to the collector, also after an incomplete rollout."""

    @abstractmethod
    def finish(self) -> th.Tensor:
        """Compute returns and advantages, and return the values of the observations after the last step."""


class TensorRollout(Rollout):
    """A rollout of tensors: its steps, rewards and ends of episodes."""

    def __init__(self, collector: Any, engine: Engine, env: VecEnv, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, env, buffer, callback)
        self.tensor_env = tensor_env = cast(Any, env)
        cells, device = (buffer.buffer_size, buffer.n_envs), buffer.device
        self.rewards = th.zeros(cells, device=device)  # those of the environments, before clipping
        self.dones = th.zeros(cells, dtype=th.bool, device=device)
        self.successes: th.Tensor | None = None
        self.n_recorded = 0
        self.taken: TensorStep | None = None
        self.observations = tensor_env.observations
        if self.observations is None:  # after `load(..., force_reset=False)`
            self.observations = to_tensor(collector._last_obs, device)
        if self.copies:
            self.observations = copy_tensors(self.observations)

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, LazyInfos]:
        """Step the environments, and keep what the statistics of episodes are computed from."""
        step = self.tensor_env.step_tensors(actions)
        t = self.n_recorded
        self.rewards[t].copy_(self.tensor_env.unwrapped.true_rewards)
        dones = th.logical_or(step.terminated, step.truncated, out=self.dones[t])
        if "is_success" in step.infos:
            if self.successes is None:
                self.successes = th.full_like(self.rewards, th.nan)
            self.successes[t].copy_(successes_of(step.infos, self.buffer.n_envs, self.buffer.device))
        self.n_recorded += 1
        return self.returned(step, dones)

    def returned(self, step: TensorStep, dones: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, LazyInfos]:
        """Take over a step, and return what callbacks see of it."""
        self.taken = step = copy_step(step) if self.copies else step
        self.observations = step.observations
        return step.observations, step.rewards, dones, LazyInfos(step, self.buffer.n_envs)

    def leave(self) -> None:
        """Report the episodes that ended in this rollout, as ``Monitor`` does, in few reads from the device."""
        self.show_place()
        if not self.n_recorded:
            return
        collector, rows = self.collector, slice(0, self.n_recorded)
        statistics, deque = self.tensor_env.unwrapped.statistics, collector.ep_info_buffer
        returns, lengths, statistics.returns[:], statistics.lengths[:] = finished_episodes(
            self.rewards[rows], self.dones[rows], statistics.returns, statistics.lengths
        )
        seconds = round(time.time() - statistics.started_at, 6)
        latest = slice(-(deque.maxlen or len(returns)), None)
        for total, length in zip(returns[latest].tolist(), lengths[latest].tolist(), strict=True):
            deque.append({"r": round(total, 6), "l": length, "t": seconds})
        if self.successes is not None:
            at_ends = self.successes[rows][self.dones[rows]]
            collector.ep_success_buffer.extend(at_ends[~at_ends.isnan()].tolist())
        self.n_recorded = 0

    def show_place(self) -> None:
        """Copy the present observations, and which episodes begin with them, to the collector."""
        self.collector._last_obs = host_copy(self.observations)
        if self.n_recorded:
            self.collector._last_episode_starts = host_copy(self.dones[self.n_recorded - 1])
