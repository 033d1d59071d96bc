"""Rollouts on a device, from tensor environments or from environments on the host."""

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.collection import bootstrap_truncated
from sb3_clipvf.common.nonfinite import NonFiniteError, is_finite
from sb3_clipvf.common.observations import from_parts, parts_of
from sb3_clipvf.common.tensors import torch_dtype
from sb3_clipvf.engines.autograd import unvalidated_distributions
from sb3_clipvf.engines.env_actions import DeviceActions
from sb3_clipvf.engines.interface import Acted, ActedTensors, Engine
from sb3_clipvf.envs.faster import faster_step
from sb3_clipvf.envs.rows import copy_of
from sb3_clipvf.envs.shapes import StepCheck
from sb3_clipvf.envs.tensor import TensorStep, host_copy
from sb3_clipvf.envs.tensor_episodes import FinalValues
from sb3_clipvf.guards.diagnosis import (
    Fault,
    act_fault,
    find_fault,
    has_finite_statistics,
    observation_fault,
    reads_by_own_code,
    reward_fault,
    step_error,
)
from sb3_clipvf.rollout import takes_dist_params
from sb3_clipvf.tensor_rollouts.base import Rollout, TensorRollout


class DeviceRollout(TensorRollout):
    """A rollout from tensor environments on a device, which is read once, at its end."""

    def __init__(self, collector: Any, engine: Engine, env: VecEnv, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, env, buffer, callback)
        self.part = DevicePart(collector, engine, buffer, self.rewards, self.dones)
        may_be_nonfinite = reads_by_own_code(collector.policy)
        self.final_values = FinalValues(engine, self.gamma, may_be_nonfinite=may_be_nonfinite)
        self.timed_out = th.zeros_like(self.dones)
        # A simulator may not recover from NaN, which is found after the last step.
        self._actions = DeviceActions(collector.policy, collector.action_space, for_tensor_envs=True)
        self._acted: Any = None

    def act(self) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Act by the engine, without a copy to the host."""
        self._acted = acted = self.part.act(self.observations)
        shown = [acted.actions, acted.values, acted.log_prob]
        actions, values, log_probs = [tensor.clone() for tensor in shown] if self.copies else shown
        return self.observations, actions, values, log_probs, self._actions.for_env(acted.actions)

    def add(self) -> None:
        """Store the step. What a truncated episode's value is computed from is kept."""
        step, t = cast(TensorStep, self.taken), self.buffer.pos
        rewards = step.rewards
        th.gt(step.truncated, step.terminated, out=self.timed_out[t])
        if step.final_observations is None:
            values = self._acted.values.flatten()
            rewards = rewards.addcmul(values, self.timed_out[t].float(), value=self.gamma)
        else:
            self.final_values.keep(t, step.final_observations, self.timed_out)
        self.buffer.rewards[t].copy_(rewards)
        self.buffer.end_step()

    @th.no_grad()
    def finish(self) -> th.Tensor:
        """Add the values of truncated episodes' ends, check all numbers, and compute returns and advantages."""
        self.final_values.add_to(self.buffer.rewards, self.timed_out)
        return self.part.finish(self.observations, self.final_values.nonfinite)


class UploadingRollout(Rollout):
    """A rollout on a device from environments on the host. Each step sends observations, and reads actions."""

    def __init__(self, collector: Any, engine: Engine, env: VecEnv, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, env, buffer, callback)
        self._check_step = StepCheck(buffer.observation_space, env.num_envs)
        self._check_step.observations(collector._last_obs)
        self._step_envs = faster_step(env)
        self._staged: dict[str, th.Tensor] = {}
        # Rewards, rewards with values of final observations, and whether episodes ended.
        self._columns = self._host_memory((3, buffer.buffer_size, buffer.n_envs), th.float32)
        self._part = DevicePart(collector, engine, buffer, self._columns[0], self._columns[2])
        self._actions = DeviceActions(collector.policy, collector.action_space)
        self._acted: Any = None
        self._taken: tuple[Any, ...] = ()

    def act(self) -> tuple[Any, Any, th.Tensor, th.Tensor, np.ndarray]:
        """Send the observations, act by the engine, and read the actions."""
        collector = self.collector
        if not collector._may_act():
            raise self._error(cast(Fault, observation_fault(collector._last_obs)))
        observations = self._upload(collector._last_obs)
        self._acted = acted = self._part.act(observations)
        for_env = self._actions.for_env(acted.actions).cpu().numpy()
        if not is_finite(for_env):
            fault = act_fault(collector.policy, collector._last_obs, observations, acted.on_host())
            if fault is not None:
                raise self._error(fault)
        actions = acted.actions.cpu().numpy() if self.copies else acted.actions
        values, log_probs = (tensor.clone() if self.copies else tensor for tensor in (acted.values, acted.log_prob))
        return observations, actions, values, log_probs, for_env

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """Step the environments, and check what they return."""
        self._taken = self._check_step(self._step_envs(actions))
        return self._taken

    def add(self) -> None:
        """Store the step."""
        collector, t = self.collector, self.buffer.pos
        new_obs, rewards, dones, infos = self._taken
        collector._update_info_buffer(infos, dones)
        bootstrapped = bootstrap_truncated(self.engine, rewards, dones, infos, self.gamma, self._acted.values)
        columns = self._columns.numpy()[:, t]
        columns[0], columns[1], columns[2] = rewards, bootstrapped, dones
        self.buffer.end_step()
        if not is_finite(bootstrapped):
            fault = reward_fault(rewards, bootstrapped, infos)
            raise step_error(collector._fault_context(), fault, t, self._part.arrays(t, new_obs))
        collector._last_obs, collector._last_episode_starts = new_obs, dones.copy()
        self._taken = ()

    def leave(self) -> None:
        """Set the observations from which the collector continues."""
        collector = self.collector
        if self._taken:  # it was not added
            collector._last_obs, collector._last_episode_starts = self._taken[0], self._taken[2].copy()
        collector._last_obs = copy_of(collector._last_obs)

    @th.no_grad()
    def finish(self) -> th.Tensor:
        """Send what the environments returned, check all numbers, and compute returns and advantages."""
        rewards, bootstrapped, dones = self._columns.to(self.buffer.device, non_blocking=True)
        self.buffer.rewards.copy_(bootstrapped)
        self._part.rewards, self._part.dones = rewards, dones.bool()
        return self._part.finish(self._upload(self.collector._last_obs))

    def _error(self, fault: Fault) -> NonFiniteError:
        t = self.buffer.pos
        arrays = self._part.arrays(t - 1, self.collector._last_obs)
        return step_error(self.collector._fault_context(), fault, t, arrays)

    def _upload(self, observations: Any) -> Any:
        """Return observations on the device. They are copied from page-locked memory while the host continues."""
        parts, device = parts_of(observations), self.buffer.device
        return from_parts({key: self._stage(key, rows).to(device, non_blocking=True) for key, rows in parts.items()})

    def _stage(self, key: str, rows: np.ndarray) -> th.Tensor:
        # The host waits for the actions of each step, so that the copy of the step before is complete.
        if key not in self._staged or self._staged[key].shape != rows.shape:
            self._staged[key] = self._host_memory(rows.shape, torch_dtype(rows.dtype))
        self._staged[key].numpy()[...] = rows
        return self._staged[key]

    def _host_memory(self, shape: tuple[int, ...], dtype: th.dtype) -> th.Tensor:
        return th.zeros(shape, dtype=dtype, pin_memory=self.buffer.device.type == "cuda")


class DevicePart:
    """
    What both kinds of rollouts on a device share: the policy's steps, the check of all numbers, and the returns.

    ``rewards`` are those of the environments, and ``dones`` mark ends of episodes, shape ``(n_steps, n_envs)``.
    """

    def __init__(self, collector: Any, engine: Engine, buffer: Any, rewards: th.Tensor, dones: th.Tensor) -> None:
        self._collector, self._engine, self._buffer = collector, engine, buffer
        self.rewards, self.dones = rewards, dones
        self._starts = collector._last_episode_starts
        self._with_dist_params = takes_dist_params(buffer)
        # Without validation, a GPU ends the process if it samples from non-finite probabilities.
        is_gaussian = hasattr(collector.policy, "log_std")
        self._validation: Any = unvalidated_distributions if is_gaussian else nullcontext()

    def act(self, observations: Any) -> ActedTensors:
        """Sample actions for observations on the device, and store both."""
        collector, buffer = self._collector, self._buffer
        try:
            with self._validation:
                acted = self._engine.act_tensors(observations, with_dist_params=self._with_dist_params)
        except (ValueError, RuntimeError) as error:
            # torch refuses to sample from a distribution whose parameters are not finite.
            rows = host_copy(observations)
            fault = act_fault(collector.policy, rows, observations, None)
            if fault is None:
                raise
            arrays = self.arrays(buffer.pos - 1, rows)
            raise step_error(collector._fault_context(), fault, buffer.pos, arrays) from error
        if self._with_dist_params and acted.dist_params is None:
            self._with_dist_params = False
            collector._omit_kl(buffer)
        # Now, since the environments may write the next step into the same memory.
        buffer.write_acted(acted, observations)
        return acted

    def finish(self, observations: Any, finals: Mapping[tuple[int, int], Any] = MappingProxyType({})) -> th.Tensor:
        """
        Check all numbers, and compute returns and advantages.

        ``observations`` are those after the last step; ``finals`` are the final ones whose value is not finite, by step
        and environment.
        """
        buffer = self._buffer
        starts = th.as_tensor(self._starts, device=buffer.device)
        buffer.episode_starts.copy_(th.cat([starts[None], self.dones[:-1]]))
        values = self._engine.predict_values(observations)
        self._check(values, observations, finals)
        buffer.compute_returns_and_advantage(values, self.dones[-1])
        return values

    def arrays(self, t: int, last: Any) -> dict[str, Any]:
        """Return the arrays of step ``t``; ``last`` are the observations after the latest step."""
        buffer = self._buffer
        if t < 0:
            return {"dones": self._starts, "new_observations": last}
        arrays = {name: host_copy(getattr(buffer, name)[t]) for name in ("actions", "values", "log_probs")}
        parts = parts_of(buffer.observations)
        for name, step in (("observations", t), ("new_observations", t + 1)):
            in_buffer = step < buffer.pos
            arrays[name] = (
                from_parts(host_copy({key: part[step] for key, part in parts.items()})) if in_buffer else last
            )
        return arrays | {"rewards": host_copy(self.rewards[t]), "dones": host_copy(self.dones[t].bool())}

    def _check(self, values: th.Tensor, last: Any, finals: Mapping[tuple[int, int], Any]) -> None:
        """Raise NonFiniteError for the first number of the rollout that is not finite."""
        collector, buffer = self._collector, self._buffer
        acting, ends = [buffer.values, buffer.log_probs], [values]
        # As `_may_act` of the collector.
        if not (reads_by_own_code(collector.policy) and has_finite_statistics(collector.get_vec_normalize_env())):
            acting += [part for part in parts_of(buffer.observations).values() if part.is_floating_point()]
            ends += [part for part in parts_of(last).values() if part.is_floating_point()]
        may_act = th.stack([tensor.flatten(1).isfinite().all(1) for tensor in acting]).all(0)
        may_end = th.stack([tensor.isfinite().all() for tensor in ends]).all()
        finite = th.stack([may_act, buffer.rewards.isfinite().all(1)])
        if bool(finite.all() & may_end):
            return
        last = host_copy(last)
        for t, (acts, is_rewarded) in enumerate(finite.T.tolist()):
            if acts and is_rewarded:
                continue
            arrays = self.arrays(t, last)
            acted = Acted(arrays["actions"], arrays["values"], arrays["log_probs"], None)
            fault = None if acts else act_fault(collector.policy, arrays["observations"], None, acted)
            fault = fault or find_fault("reward", None, arrays["rewards"])
            rewards = host_copy(buffer.rewards[t])  # normalised, and with the values of final observations
            fault = fault or find_fault("reward", None, np.where(arrays["dones"], 0.0, rewards))
            infos = [{"terminal_observation": finals.get((t, row), {})} for row in range(buffer.n_envs)]
            fault = fault or reward_fault(arrays["rewards"], rewards, infos)
            raise step_error(collector._fault_context(), fault, t, arrays)
        fault = observation_fault(last) or find_fault("value", None, host_copy(values).reshape(-1))
        n_steps = buffer.buffer_size
        raise step_error(collector._fault_context(), cast(Fault, fault), n_steps, self.arrays(n_steps - 1, last))
