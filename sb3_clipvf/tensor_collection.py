"""
The loop over tensor environments: no step is copied to the host.

``TensorRolloutCollector`` adds it to ``RolloutCollector``. On the CPU, tensors and arrays share memory, so that engines
with kernels act as they do elsewhere. On another device, nothing is read from it before the end of a rollout.
"""

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.collection import RolloutCollector, add_to_buffer, bootstrap_truncated, is_noop, to_tensor
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.nonfinite import is_finite
from sb3_clipvf.common.tensors import from_parts, observation_parts, torch_dtype
from sb3_clipvf.engines.autograd import unvalidated_distributions
from sb3_clipvf.engines.device_rollout import DEVICE_RESERVE, DeviceActions, DeviceRolloutBuffer, free_device_memory
from sb3_clipvf.engines.in_place import InPlace, env_actions, in_place, may_read_actions
from sb3_clipvf.engines.interface import Acted, Engine
from sb3_clipvf.engines.recognition import has_own_add
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.rows import copy_of
from sb3_clipvf.envs.shapes import StepCheck
from sb3_clipvf.envs.tensor import (
    LazyInfos,
    TensorEnvAdapter,
    TensorStep,
    check_tensor_device,
    host_copy,
    tensor_device,
)
from sb3_clipvf.envs.tensor_episodes import FinalValues, finished_episodes
from sb3_clipvf.guards.diagnosis import Fault, act_fault, find_fault, observation_fault, reads_by_own_code, step_error
from sb3_clipvf.rollout import TensorRolloutBuffer, takes_dist_params


class TensorRolloutCollector(RolloutCollector):
    """The base of ``ClipPPO``: collects from environments of SB3's kind and from tensor environments."""

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        check_tensor_device(self.env, self.device)  # a user may have replaced the environments
        return super()._setup_learn(*args, **kwargs)

    def _make_rollout_buffer(self, default: type[Any] = TensorRolloutBuffer) -> Any:
        """Build the buffer, on a GPU if the policy is there and the rollout fits into its memory."""
        check_tensor_device(self.env, self.device)
        buffer = super()._make_rollout_buffer(default)
        if self.rollout_buffer_class is not None or self.device.type != "cuda":
            return buffer
        free = free_device_memory(self.device)
        size = f"takes {buffer.nbytes / 2**20:.2f} MiB, where {self.device} has {free / 2**20:.2f} MiB free"
        if buffer.nbytes + DEVICE_RESERVE > free:
            log.info("The rollout stays on the host: it %s.", size)
            return buffer
        log.info("The rollout is kept on the device: it %s.", size)
        on_device = super()._make_rollout_buffer(DeviceRolloutBuffer)
        # SB3 has no tensor environments whose permutations these could be.
        on_device.draws_on_device = tensor_device(self.env) is not None
        return on_device

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """
        Fill the buffer with steps of the current policy.

        Callbacks see this method's local variables, under SB3's names. In a tensor environment they are tensors:
        ``obs_tensor``, ``actions``, ``clipped_actions``, ``values``, ``log_probs``, ``new_obs``, ``rewards`` and
        ``dones``. ``infos`` is a sequence that is built when it is read.

        :param env: The training environments.
        :param callback: Callback, called at each step and at both ends of the rollout.
        :param rollout_buffer: Buffer to fill. SB3's buffers and ours are resized to the rollout first.
        :param n_rollout_steps: Steps of each environment.
        :return: False if the callback asked to stop; the rollout is then incomplete.
        :raises NonFiniteError: If observations, rewards, values or log-probabilities are not finite.
        """
        if not steps_tensors(env, rollout_buffer):
            to_device = _is_plain_device_buffer(rollout_buffer)
            collect = self._collect_to_device if to_device else super().collect_rollouts
            return collect(env, callback, rollout_buffer, n_rollout_steps)
        started = time.perf_counter()
        tensor_env: Any = env
        n_steps = 0
        engine = self._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        has_callback = not is_noop(callback)
        kind = _DeviceRollout if isinstance(rollout_buffer, DeviceRolloutBuffer) else _HostRollout
        rollout = kind(self, engine, rollout_buffer, callback)
        obs_tensor = tensor_env.observations
        if obs_tensor is None:  # after `load(..., force_reset=False)`
            obs_tensor = to_tensor(self._last_obs, self.device)

        while n_steps < n_rollout_steps:
            self._renew_noise(env.num_envs, n_steps)
            actions, values, log_probs, clipped_actions = rollout.act(obs_tensor)
            step = tensor_env.step_tensors(clipped_actions)
            dones = rollout.record(tensor_env.unwrapped.true_rewards, step)
            new_obs, rewards, infos = step.observations, step.rewards, LazyInfos(step, env.num_envs)
            self.num_timesteps += env.num_envs + self._n_envs_elsewhere

            if has_callback:
                callback.update_locals(locals())
            if not callback.on_step():
                rollout.end_episodes(tensor_env.unwrapped)
                self._last_obs, self._last_episode_starts = host_copy(new_obs), host_copy(dones)
                return False

            rollout.add(step)
            n_steps += 1
            obs_tensor = new_obs

        rollout.end_episodes(tensor_env.unwrapped)
        self._last_obs, self._last_episode_starts = host_copy(new_obs), host_copy(dones)
        values = rollout.finish(new_obs)

        callback.update_locals(locals())
        callback.on_rollout_end()
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        return True

    def _collect_to_device(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: DeviceRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Collect from environments on the host. Each step sends observations to the device, and reads actions."""
        started = time.perf_counter()
        n_steps = 0
        check_step = StepCheck(rollout_buffer.observation_space, env.num_envs)
        check_step.observations(self._last_obs)
        engine = self._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        has_callback = not is_noop(callback)
        rollout = _UploadingRollout(self, engine, rollout_buffer, callback)

        while n_steps < n_rollout_steps:
            self._renew_noise(env.num_envs, n_steps)
            if not self._may_act():
                raise self._act_error(cast(Fault, observation_fault(self._last_obs)), rollout_buffer)
            obs_tensor = rollout.upload(self._last_obs)
            action_tensor, values, log_probs, clipped_tensor = rollout.act(obs_tensor)
            clipped_actions = clipped_tensor.cpu().numpy()
            new_obs, rewards, dones, infos = check_step(env.step(clipped_actions))
            self.num_timesteps += env.num_envs + self._n_envs_elsewhere

            if has_callback:
                actions = action_tensor.cpu().numpy()
                callback.update_locals(locals())
            if not callback.on_step():
                self._last_obs, self._last_episode_starts = copy_of(new_obs), dones.copy()
                return False

            self._update_info_buffer(infos, dones)
            bootstrapped = bootstrap_truncated(engine, rewards, dones, infos, self.gamma)
            if not is_finite(bootstrapped):
                raise self._reward_error(bootstrapped, n_steps, {"actions": clipped_actions, **locals()})
            rollout.add_arrays(rewards, bootstrapped, dones)
            n_steps += 1
            self._last_obs, self._last_episode_starts = new_obs, dones.copy()

        self._last_obs = copy_of(new_obs)
        values = rollout.finish(rollout.upload(self._last_obs))

        callback.update_locals(locals())
        callback.on_rollout_end()
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        return True


def steps_tensors(env: VecEnv, buffer: Any) -> bool:
    """Return whether a training steps the tensors of an environment: there is no other layer, and our own buffer."""
    layers = vec_env_layers(env)
    base: Any = layers[-1]
    # Wrappers forward attributes that they lack, so an object's own attributes say nothing.
    known = type(base) is TensorEnvAdapter and all(hasattr(type(layer), "step_tensors") for layer in layers)
    if not known or not base.steps_tensors:
        return False
    is_host = type(buffer) is TensorRolloutBuffer and buffer.device.type == "cpu" and not has_own_add(buffer)
    return is_host or _is_plain_device_buffer(buffer)


def _is_plain_device_buffer(buffer: Any) -> bool:
    return type(buffer) is DeviceRolloutBuffer and "add" not in vars(buffer)


class _TensorRollout(ABC):
    """A rollout of tensors: its rewards and ends of episodes."""

    def __init__(self, collector: Any, engine: Engine, buffer: Any, callback: BaseCallback) -> None:
        self.collector, self.engine, self.buffer = collector, engine, buffer
        self.with_dist_params = takes_dist_params(buffer)
        cells, device = (buffer.buffer_size, buffer.n_envs), buffer.device
        self.rewards = th.zeros(cells, device=device)
        self.dones = th.zeros(cells, dtype=th.bool, device=device)
        self.n_recorded = 0

    @abstractmethod
    def act(self, observations: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Store observations, and return actions, values, log-probabilities and the actions for the environments."""

    @abstractmethod
    def add(self, step: TensorStep) -> None:
        """Store the step."""

    @abstractmethod
    def finish(self, observations: Any) -> th.Tensor:
        """Compute returns and advantages, and return the values of the observations after the last step."""

    def record(self, true_rewards: th.Tensor, step: TensorStep) -> th.Tensor:
        """Keep what the statistics of episodes are computed from, and return whether episodes ended."""
        self.rewards[self.n_recorded].copy_(true_rewards)
        dones = th.logical_or(step.terminated, step.truncated, out=self.dones[self.n_recorded])
        self.n_recorded += 1
        return dones

    def end_episodes(self, base: TensorEnvAdapter) -> None:
        """Report the episodes that ended in this rollout, as ``Monitor`` does, in one read from the device."""
        statistics, deque = base.statistics, self.collector.ep_info_buffer
        returns, lengths, statistics.returns[:], statistics.lengths[:] = finished_episodes(
            self.rewards[: self.n_recorded], self.dones[: self.n_recorded], statistics.returns, statistics.lengths
        )
        seconds = round(time.time() - statistics.started_at, 6)
        latest = slice(-(deque.maxlen or len(returns)), None)
        for total, length in zip(returns[latest].tolist(), lengths[latest].tolist(), strict=True):
            deque.append({"r": round(total, 6), "l": length, "t": seconds})


class _HostRollout(_TensorRollout):
    """A rollout in arrays on the host, which the environments' tensors are copied to."""

    def __init__(self, collector: Any, engine: Engine, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, buffer, callback)
        space = collector.action_space
        self._space = space
        self._writer: InPlace | None = None if may_read_actions(callback) else in_place(engine, buffer, space)
        self._acted = Acted(np.empty(0), np.empty(0), np.empty(0), None)

    def act(self, observations: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Act by the engine's kernels, as in other environments."""
        collector, buffer = self.collector, self.buffer
        # Environments may write the next step into the same memory.
        collector._last_obs = self._store(observations)
        if self._writer is not None:
            clipped = collector._act_in_place(self._writer, buffer)
            row = {name: th.from_numpy(array) for name, array in self._writer.row().items()}
            return row["actions"], row["values"], row["log_probs"], th.from_numpy(clipped)
        tensors = to_tensor(collector._last_obs, buffer.device)
        self._acted = collector._act(self.engine, tensors, buffer, self.with_dist_params)
        self.with_dist_params = self._acted.dist_params is not None
        actions, values, log_probs, _ = self._acted.as_tensors()
        clipped = env_actions(collector.policy, self._space, actions)
        return th.from_numpy(actions), values, log_probs, th.from_numpy(clipped)

    def add(self, step: TensorStep) -> None:
        """Store the step, with the value of the final observation where an episode was truncated."""
        collector, buffer = self.collector, self.buffer
        t, observations = buffer.pos, collector._last_obs
        rewards = self._bootstrapped(step)
        if not is_finite(rewards):
            raise self._reward_error(step, rewards, t)
        if self._writer is not None:
            self._writer.add(observations, rewards, collector._last_episode_starts)
        else:
            actions = self._acted.actions
            if isinstance(self._space, spaces.Discrete):
                actions = actions.reshape(-1, 1)
            row = (observations, actions, rewards, collector._last_episode_starts)
            add_to_buffer(buffer, row, self._acted, None, None, None)
        collector._last_episode_starts = self.dones[t].numpy()

    def finish(self, observations: Any) -> th.Tensor:
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
            final_values = FinalValues(self.engine, self.collector.gamma).predict(step.final_observations, rows)
        # Not in-place, since the environments may read their rewards again.
        return rewards.index_add(0, rows, final_values, alpha=self.collector.gamma).numpy()

    def _reward_error(self, step: TensorStep, rewards: np.ndarray, t: int) -> Exception:
        collector = self.collector
        fault = find_fault("reward", None, step.rewards.numpy()) or find_fault("terminal_value", None, rewards)
        arrays = {"observations": collector._last_obs, "rewards": rewards, "dones": self.dones[t].numpy()}
        arrays["new_observations"] = host_copy(step.observations)
        if self._writer is not None:
            arrays |= self._writer.row()
        return step_error(collector._fault_context(), fault, t, arrays)  # type: ignore[arg-type]


class _DeviceRollout(_TensorRollout):
    """A rollout on a device, which is read once, at its end."""

    def __init__(self, collector: Any, engine: Engine, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, buffer, callback)
        self._starts = th.as_tensor(collector._last_episode_starts, device=buffer.device)
        self._final_values = FinalValues(engine, collector.gamma)
        self._timed_out = th.zeros_like(self.dones)
        self._actions = DeviceActions(collector.policy, collector.action_space)
        # Without validation, a GPU ends the process if it samples from non-finite probabilities.
        is_gaussian = hasattr(collector.policy, "log_std")
        self._validation: Any = unvalidated_distributions if is_gaussian else nullcontext()
        self._acted: Any = None

    def act(self, observations: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Act by the engine, without a copy to the host."""
        try:
            with self._validation:
                acted = self.engine.act_tensors(observations, with_dist_params=self.with_dist_params)
        except (ValueError, RuntimeError) as error:
            # torch refuses to sample from a distribution whose parameters are not finite.
            fault = act_fault(self.collector.policy, host_copy(observations), observations, None)
            if fault is None:
                raise
            raise self.collector._act_error(fault, self.buffer) from error
        if self.with_dist_params and acted.dist_params is None:
            self.with_dist_params = False
            self.collector._omit_kl(self.buffer)
        self._acted = acted
        # Now, since the environments may write the next step into the same memory.
        self.buffer.write_acted(acted, observations)
        return acted.actions, acted.values, acted.log_prob, self._actions.for_env(acted.actions)

    def add(self, step: TensorStep) -> None:
        """Store the step. What a truncated episode's value is computed from is kept."""
        t, rewards = self.buffer.pos, step.rewards
        th.gt(step.truncated, step.terminated, out=self._timed_out[t])
        if step.final_observations is None:
            values = self._acted.values.flatten()
            rewards = rewards.addcmul(values, self._timed_out[t].float(), value=self.collector.gamma)
        else:
            self._final_values.keep(t, step.final_observations, self._timed_out)
        self.buffer.rewards[t].copy_(rewards)
        self.buffer.end_step()

    @th.no_grad()
    def finish(self, observations: Any) -> th.Tensor:
        """Add the values of truncated episodes' ends, check all numbers, and compute returns and advantages."""
        buffer = self.buffer
        buffer.episode_starts.copy_(th.cat([self._starts[None], self.dones[:-1]]))
        self._final_values.add_to(buffer.rewards, self._timed_out)
        values = self.engine.predict_values(observations)
        self._check(values)
        buffer.compute_returns_and_advantage(values, self.dones[-1])
        return values

    def _check(self, values: th.Tensor) -> None:
        """Raise NonFiniteError for the first number of the rollout that is not finite."""
        collector, buffer = self.collector, self.buffer
        tensors = [buffer.rewards, buffer.values, buffer.log_probs, values]
        observations = observation_parts(buffer.observations)
        if not reads_by_own_code(collector.policy):
            tensors += [part for part in observations.values() if part.is_floating_point()]
        if bool(th.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            return
        for t in range(buffer.buffer_size):
            rows = host_copy({key: part[t] for key, part in observations.items()})
            columns = {name: getattr(buffer, name)[t] for name in ("actions", "values", "log_probs", "rewards")}
            arrays = host_copy(columns)
            acted = Acted(arrays["actions"], arrays["values"], arrays["log_probs"], None)
            fault = (
                act_fault(collector.policy, from_parts(rows), None, acted)
                or find_fault("reward", None, host_copy(self.rewards[t]))
                or find_fault("terminal_value", None, arrays["rewards"])
            )
            if fault is not None:
                raise step_error(collector._fault_context(), fault, t, {**arrays, "observations": rows})
        fault = find_fault("value", None, host_copy(values).reshape(-1))
        if fault is not None:
            raise collector._act_error(fault, buffer)


class _UploadingRollout(_DeviceRollout):
    """A rollout on a device from environments on the host; rewards and ends of episodes are sent at its end."""

    def __init__(self, collector: Any, engine: Engine, buffer: Any, callback: BaseCallback) -> None:
        super().__init__(collector, engine, buffer, callback)
        self._staged: dict[str, th.Tensor] = {}
        # Rewards, rewards with values of final observations, and whether episodes ended.
        self._columns = self._host_memory((3, *self.rewards.shape), th.float32)

    def upload(self, observations: Any) -> Any:
        """Return observations on the device. They are copied from page-locked memory while the host continues."""
        if isinstance(observations, dict):
            return self._on_device({key: self._stage(key, rows) for key, rows in observations.items()})
        return self._on_device(self._stage("", observations))

    def add_arrays(self, rewards: np.ndarray, bootstrapped: np.ndarray, dones: np.ndarray) -> None:
        """Store the step."""
        columns = self._columns.numpy()[:, self.buffer.pos]
        columns[0], columns[1], columns[2] = rewards, bootstrapped, dones
        self.buffer.end_step()

    def finish(self, observations: Any) -> th.Tensor:
        """Send what the environments returned, check all numbers, and compute returns and advantages."""
        self.rewards, bootstrapped, dones = self._columns.to(self.buffer.device, non_blocking=True)
        self.buffer.rewards.copy_(bootstrapped)
        self.dones = dones.bool()
        return super().finish(observations)

    def _on_device(self, observations: Any) -> Any:
        device = self.buffer.device
        if isinstance(observations, dict):
            return {key: rows.to(device, non_blocking=True) for key, rows in observations.items()}
        return observations.to(device, non_blocking=True)

    def _stage(self, key: str, rows: np.ndarray) -> th.Tensor:
        # The host waits for the actions of each step, so that the copy of the step before is complete.
        if key not in self._staged or self._staged[key].shape != rows.shape:
            self._staged[key] = self._host_memory(rows.shape, torch_dtype(rows.dtype))
        self._staged[key].numpy()[...] = rows
        return self._staged[key]

    def _host_memory(self, shape: tuple[int, ...], dtype: th.dtype) -> th.Tensor:
        return th.zeros(shape, dtype=dtype, pin_memory=self.buffer.device.type == "cuda")


def _copied(target: np.ndarray, tensor: th.Tensor) -> np.ndarray:
    """Copy a tensor into a row of the buffer, and return the row in the tensor's shape."""
    row = target.reshape(tuple(tensor.shape))
    row[...] = tensor.numpy()
    return row
