"""
The whole step of a rollout as operations on static tensors (see the package).

The policy acts, the environments step, and the buffer takes a row, whose number is on the device, too. Therefore, one
CUDA graph can contain all of it (:mod:`.cuda_graph`). On the CPU, the operations run one by one; tests compare them
with other rollouts.
"""

import operator
from typing import Any

import torch as th

from sb3_clipvf.common.observations import from_parts, parts_of
from sb3_clipvf.distributions import current_dist
from sb3_clipvf.engines.autograd import unvalidated_distributions
from sb3_clipvf.engines.cuda.capture import Graph, GraphCapturer
from sb3_clipvf.engines.cuda.sampling import sampled
from sb3_clipvf.engines.env_actions import DeviceActions
from sb3_clipvf.engines.interface import ActedTensors
from sb3_clipvf.envs.graphed import restorer_of
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.tensor import TensorStep, copy_tensors
from sb3_clipvf.envs.tensor_episodes import n_kept, successes_of


class RolloutStep:
    """
    A step of a policy and of captured environments (:class:`.GraphedTensorEnv`), and the tensors that it writes.

    These are rows of the buffer, and of ``rewards``, ``dones``, ``timed_out`` and ``successes``, shape ``(n_steps,
    n_envs)``. ``finals`` has the final observations of the steps since the last :meth:`forget_finals`, ``n_finals`` at
    most. After a step, ``observations``, ``acted``, ``clipped`` and ``taken`` are what it computed.
    """

    taken: TensorStep
    acted: ActedTensors
    clipped: th.Tensor

    def __init__(self, policy: Any, env: Any, buffer: Any, gamma: float, observations: Any) -> None:
        self._policy, self._env, self._buffer, self._gamma = policy, env, buffer, gamma
        layers: list[Any] = list(vec_env_layers(env))
        *self._normalizers, self._base = layers
        self._graphed = self._base.env
        self._kept = self._graphed.kept()
        for layer in self._normalizers:
            layer.to_device()
        self._fields, self._options = self._fields_of(buffer), self._options_now()
        self._addresses = [(tensor.data_ptr(), tensor.shape) for tensor in self._fields]
        cells, device = (buffer.buffer_size, buffer.n_envs), buffer.device
        self.rewards = th.zeros(cells, device=device)
        self.dones, self.timed_out = th.zeros((2, *cells), dtype=th.bool, device=device)
        self.successes: th.Tensor | None = None
        self._parts = {key: part.clone() for key, part in parts_of(observations).items()}
        self.observations = from_parts(self._parts)
        self.n_finals = n_kept(self._parts, buffer.buffer_size)
        self.finals: dict[str, th.Tensor] = {}
        # The numbers of the row, and of that of final observations
        self._t, self._slot = th.zeros((2, 1), dtype=th.int64, device=device)
        self._actions = DeviceActions(policy, buffer.action_space, for_tensor_envs=True)
        self._graph: Graph | None = None
        self._shown: list[tuple[Any, dict[str, Any]]] = []

    def fits(self, env: Any, buffer: Any, gamma: float) -> bool:
        """Return whether the captured operations collect from these environments into this buffer."""
        if self._graph is None or self._graphed.kept() is not self._kept:
            return False
        layers = [id(layer) for layer in (*self._normalizers, self._base)]
        if gamma != self._gamma or buffer is not self._buffer or layers != list(map(id, vec_env_layers(env))):
            return False
        addresses = [(tensor.data_ptr(), tensor.shape) for tensor in self._fields_of(buffer)]
        return addresses == self._addresses and self._is_unchanged()

    def capture(self, capturer: GraphCapturer) -> Graph:
        """Capture the step. Policy, environments and random states stay as they are."""
        tensors = [tensor for layer in self._normalizers for tensor in layer.tensors()]
        restore = restorer_of([self._t, self._slot, *self._parts.values(), *tensors])
        shown = [(holder, copy_tensors(values)) for holder, values in self._attributes()]

        def warm_up() -> None:
            self.run()
            self._t.zero_()
            self._slot.zero_()

        try:
            with self._graphed.unchanged():
                self._graph = capturer.capture(self.run, warm_up, self._graphed.generators)
        finally:
            restore()
            _show(shown)
        return self._graph

    def begin(self, observations: Any) -> None:
        """Begin a rollout with these observations."""
        self._t.zero_()
        self.forget_finals()
        for key, part in parts_of(observations).items():
            self._parts[key].copy_(part)

    def forget_finals(self) -> None:
        """Discard the kept final observations; the next step writes row 0 again."""
        self._slot.zero_()

    def __call__(self) -> None:
        """Run a step."""
        for layer in self._normalizers:  # a callback may have changed their numbers
            layer.to_device()
        if self._graph is not None and not self._is_unchanged():
            self._graph = None  # for good: single operations write tensors that differ from those that a graph shows
        if self._graph is None:
            self.run()
            return
        self._graph.replay()
        _show(self._shown)

    @unvalidated_distributions
    @th.no_grad()
    def run(self) -> None:
        """Run the operations of a step one by one."""
        policy, buffer, observations = self._policy, self._buffer, self.observations
        with_dist_params = bool(buffer.dist_param_dim)
        actions, values, log_prob, params, _ = sampled(policy, observations)
        self.acted = ActedTensors(actions, values, log_prob, params if with_dist_params else None)
        for key, rows in parts_of(buffer.observations).items():
            self._write(rows, self._parts[key])
        for rows, column in ((buffer.actions, actions), (buffer.values, values), (buffer.log_probs, log_prob)):
            self._write(rows, column)
        if with_dist_params:
            self._write(buffer.dist_params, params)
        self.clipped = self._actions.for_env(actions)
        with self._graphed.as_part():
            self.taken = step = self._env.step_tensors(self.clipped)
        self._keep(step, values.flatten())
        for key, part in parts_of(step.observations).items():
            self._parts[key].copy_(part)
        self._t += 1
        self._shown = [*self._attributes(), (policy.action_dist, {"distribution": current_dist(policy)})]

    def _attributes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the objects that have tensors of the latest step, where tools read them, and these by attribute."""
        base = self._base
        of_base = (base, {"observations": base.observations, "true_rewards": base.true_rewards})
        return [of_base, *(shown for layer in self._normalizers for shown in layer.shown())]

    def _keep(self, step: TensorStep, values: th.Tensor) -> None:
        """Store rewards, ends of episodes, and what the values of truncated episodes are computed from."""
        timed_out, rewards = th.gt(step.truncated, step.terminated), step.rewards
        if step.final_observations is None:
            rewards = rewards.addcmul(values, timed_out.float(), value=self._gamma)
        else:
            for key, part in parts_of(step.final_observations).items():
                if key not in self.finals:
                    self.finals[key] = part.new_zeros((self.n_finals, *part.shape))
                self._write(self.finals[key], part, self._slot)
            self._slot += 1
        self._write(self._buffer.rewards, rewards)
        self._write(self.rewards, self._base.true_rewards)
        self._write(self.dones, th.logical_or(step.terminated, step.truncated))
        self._write(self.timed_out, timed_out)
        if "is_success" in step.infos:
            if self.successes is None:
                self.successes = th.full_like(self.rewards, th.nan)
            self._write(self.successes, successes_of(step.infos, len(values), values.device))

    def _write(self, rows: th.Tensor, row: th.Tensor, number: th.Tensor | None = None) -> None:
        rows.index_copy_(0, self._t if number is None else number, row.reshape(1, *rows.shape[1:]).to(rows.dtype))

    def _is_unchanged(self) -> bool:
        """Return whether callbacks have changed neither an option nor a tensor of the buffer. This reads no number."""
        fields = self._fields_of(self._buffer)
        return all(map(operator.is_, fields, self._fields)) and self._options_now() == self._options

    def _options_now(self) -> tuple[object, ...]:
        """Return what the operations of a step depend on, besides the layers and numbers on the device."""
        base = self._base
        return (id(base.env), base.clip_rewards, *(layer.options() for layer in self._normalizers))

    @staticmethod
    def _fields_of(buffer: Any) -> list[th.Tensor]:
        fields = [buffer.actions, buffer.values, buffer.log_probs, buffer.dist_params, buffer.rewards]
        return fields + list(parts_of(buffer.observations).values())


def _show(attributes: list[tuple[Any, dict[str, Any]]]) -> None:
    for holder, values in attributes:
        vars(holder).update(values)
