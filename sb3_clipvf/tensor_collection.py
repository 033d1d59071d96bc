"""
The loop for tensor environments, and for rollouts that are kept on a GPU.

``TensorRolloutCollector`` adds it to ``RolloutCollector``. What a step does is in ``tensor_rollouts``: with tensor
environments on a GPU, nothing is read from it before the end of a rollout.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.collection import RolloutCollector
from sb3_clipvf.common.messages import log
from sb3_clipvf.engines.callback_access import is_noop
from sb3_clipvf.engines.device_buffer import DEVICE_RESERVE, DeviceRolloutBuffer, free_device_memory
from sb3_clipvf.engines.recognition import has_own_add
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.tensor import TensorEnvAdapter, check_tensor_device, tensor_device
from sb3_clipvf.rollout import TensorRolloutBuffer
from sb3_clipvf.tensor_rollouts.base import Rollout
from sb3_clipvf.tensor_rollouts.device import DeviceRollout, UploadingRollout
from sb3_clipvf.tensor_rollouts.host import HostRollout
from sb3_clipvf.tensor_rollouts.whole import WholeStepRollout, whole_step


class TensorRolloutCollector(RolloutCollector):
    """The base of ``ClipPPO``: collects from environments of SB3's kind and from tensor environments."""

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        check_tensor_device(self.env, self.device)  # a user may have replaced the environments
        return super()._setup_learn(*args, **kwargs)

    def _make_rollout_buffer(self, default: type[Any] = TensorRolloutBuffer, *, checks_memory: bool = True) -> Any:
        """Build the buffer, on a GPU if the policy is there and the rollout fits into its memory."""
        check_tensor_device(self.env, self.device)
        if self.rollout_buffer_class is not None or self.device.type != "cuda":
            return super()._make_rollout_buffer(default, checks_memory=checks_memory)
        on_device = super()._make_rollout_buffer(DeviceRolloutBuffer, checks_memory=False)
        free = free_device_memory(self.device)
        size = f"takes {on_device.nbytes / 2**20:.2f} MiB, and {self.device} has {free / 2**20:.2f} MiB free"
        if on_device.nbytes + DEVICE_RESERVE > free:
            log.info("The rollout stays on the host: it %s.", size)
            return super()._make_rollout_buffer(default, checks_memory=checks_memory)
        log.info("The rollout is kept on the device: it %s.", size)
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
        :raises RuntimeError: If the environments have not been reset.
        """
        kind: Callable[..., Rollout] | None = _kind_of_rollout(env, rollout_buffer)
        if kind is None:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self._check_was_reset()
        started = time.perf_counter()
        n_steps = 0
        engine = self._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        has_callback = not is_noop(callback)
        if kind is DeviceRollout and (whole := whole_step(env, engine, rollout_buffer, self)) is not None:
            kind = partial(WholeStepRollout, whole)

        with kind(self, engine, env, rollout_buffer, callback) as rollout:
            while n_steps < n_rollout_steps:
                self._renew_noise(env.num_envs, n_steps)
                obs_tensor, actions, values, log_probs, clipped_actions = rollout.act()
                new_obs, rewards, dones, infos = rollout.step(clipped_actions)
                self.num_timesteps += env.num_envs + self._n_envs_elsewhere

                if has_callback:
                    callback.update_locals(locals())
                if not callback.on_step():
                    return False
                rollout.add()
                n_steps += 1

        values = rollout.finish()

        callback.update_locals(locals())
        callback.on_rollout_end()
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        return True


def trains_on_tensors(env: VecEnv, buffer: Any) -> bool:
    """Return whether training steps the tensors of an environment: there is no other layer, and our own buffer."""
    layers = vec_env_layers(env)
    base: Any = layers[-1]
    # Wrappers forward attributes that they lack, so an object's own attributes say nothing.
    known = type(base) is TensorEnvAdapter and all(hasattr(type(layer), "step_tensors") for layer in layers)
    if not known or not base.may_train_on_tensors:
        return False
    is_host = type(buffer) is TensorRolloutBuffer and buffer.device.type == "cpu" and not has_own_add(buffer)
    return is_host or _is_plain_device_buffer(buffer)


def _is_plain_device_buffer(buffer: Any) -> bool:
    return type(buffer) is DeviceRolloutBuffer and "add" not in vars(buffer)


def _kind_of_rollout(env: VecEnv, buffer: Any) -> type[Rollout] | None:
    """Return the class of the rollout, or None for one of arrays."""
    if not _is_plain_device_buffer(buffer):
        return HostRollout if trains_on_tensors(env, buffer) else None
    return DeviceRollout if trains_on_tensors(env, buffer) else UploadingRollout
