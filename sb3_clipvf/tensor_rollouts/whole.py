"""Rollouts whose whole steps are one CUDA graph: policy, environments and buffer."""

from typing import Any

import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.common.tensors import to_tensor
from sb3_clipvf.engines.cuda.rollout_step import RolloutStep
from sb3_clipvf.envs.graphed import GraphedTensorEnv
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.tensor import LazyInfos, copy_tensors
from sb3_clipvf.tensor_rollouts.device import DeviceRollout


class WholeStepRollout(DeviceRollout):
    """A rollout on a device, of whose steps each is one call: the buffer has the step when :meth:`act` returns."""

    def __init__(self, step: RolloutStep, *args: Any) -> None:
        super().__init__(*args)
        self._step = step
        step.begin(self.observations)
        self.rewards, self.dones, self.timed_out, self.successes = step.rewards, step.dones, step.timed_out, None
        self.part.rewards, self.part.dones = step.rewards, step.dones

    def act(self) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Run the whole step."""
        step, observations = self._step, self.observations
        step()
        shown = [step.acted.actions, step.acted.values, step.acted.log_prob, step.clipped]
        if not self.copies:
            return observations, *shown
        return observations, *copy_tensors(shown)

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, LazyInfos]:
        """Return what the environments returned."""
        step, t = self._step, self.n_recorded
        self.successes = step.successes
        self.n_recorded += 1
        dones = step.dones[t]
        returned = self.returned(step.taken, dones.clone() if self.copies else dones)
        if not self.copies:
            self.observations = step.observations
        return returned

    def add(self) -> None:
        """Count the step, and predict values if there is no more room for final observations."""
        step, t = self._step, self.buffer.pos
        self.buffer.end_step()
        if not step.finals:
            return
        self.final_values.refer(t, step.finals)
        if len(self.final_values.steps) == step.n_finals:
            self.final_values.find(self.timed_out)
            step.forget_finals()


def whole_step(env: VecEnv, engine: Any, buffer: Any, collector: Any) -> RolloutStep | None:
    """Return the whole step of rollouts from these environments, if an engine can capture it."""
    layers: list[Any] = list(vec_env_layers(env))
    if not hasattr(engine, "rollout_step") or type(getattr(layers[-1], "env", None)) is not GraphedTensorEnv:
        return None
    if len(layers) > 1:
        from sb3_clipvf.envs.tensor_normalize import TensorVecNormalize  # imports numba, which takes half a second

        if any(type(layer) is not TensorVecNormalize for layer in layers[:-1]):
            return None
    observations = getattr(env, "observations", None)
    if observations is None:  # after a reset on the host
        observations = to_tensor(collector._last_obs, buffer.device)
    step: RolloutStep | None = engine.rollout_step(env, buffer, collector.gamma, observations)
    return step
