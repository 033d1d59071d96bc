"""The rollout buffer whose memory is on the policy's device."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import explained_variance

from sb3_clipvf.common.tensors import torch_dtype
from sb3_clipvf.engines.interface import ActedTensors
from sb3_clipvf.rollout import MiniBatch, TensorRolloutBuffer, check_complete

DEVICE_RESERVE = 2**30
"""Bytes of a device's memory that a rollout leaves free for the networks' activations."""


class DeviceRolloutBuffer(TensorRolloutBuffer):
    """
    One rollout as tensors on a device, in the layout of :class:`sb3_clipvf.rollout.TensorRolloutBuffer`.

    Minibatches are drawn without copies from the host. Observations keep their dtype, so that images take a byte per
    number. ``observations``, ``actions``, ``rewards``, ``values`` and the other fields are tensors.

    :param draws_on_device: Whether torch's generator of the device draws the permutations, instead of NumPy's, which
        SB3 uses. Drawing then takes no time on the host.
    """

    is_of_this_package = True

    def __init__(self, *args: Any, draws_on_device: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draws_on_device = draws_on_device

    def check_memory(self) -> None:
        """Raise ``ValueError`` if the rollout is not allocated and does not fit into free memory of the device."""
        if self.device.type != "cuda":
            super().check_memory()
        elif not self._is_allocated and self.nbytes > (free := free_device_memory(self.device)):
            gib = 2**30
            raise ValueError(
                f"`n_steps` must be small enough for the rollout to fit into the memory of {self.device}, got n_steps="
                f"{self.buffer_size} with n_envs={self.n_envs}, which takes {self.nbytes / gib:.1f} GiB, but "
                f"{free / gib:.1f} GiB are free. Lower `n_steps`, or pass rollout_buffer_class=TensorRolloutBuffer to "
                "keep the rollout on the host."
            )

    def add(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        episode_start: Any,
        value: Any,
        log_prob: Any,
        dist_params: Any = None,
    ) -> None:
        """
        Store one step of all environments, from tensors or arrays of the shapes of ``TensorRolloutBuffer.add``.

        :raises ValueError: If the rollout is complete.
        """
        self.begin_step(obs)
        _write(self.rewards[self.pos], reward)
        _write(self.episode_starts[self.pos], episode_start)
        values: list[Any] = [None if part is None else th.as_tensor(part) for part in (value, log_prob, dist_params)]
        self.write_acted(ActedTensors(th.as_tensor(action), *values))
        self.end_step()

    def begin_step(self, obs: Any) -> Any:
        """Store the observations of the next step, and return them as a view of the buffer, in their own shape."""
        self._check_has_room()
        if isinstance(self.observations, dict):
            return {key: _write(rows[self.pos], obs[key]) for key, rows in self.observations.items()}
        return _write(self.observations[self.pos], obs)

    def write_acted(self, acted: ActedTensors, observations: Any = None) -> None:
        """Store what the policy computed in this step, and its observations if :meth:`begin_step` has not."""
        self._check_has_room()
        fields: Any = self
        pairs = [
            (fields.actions[self.pos], acted.actions),
            (fields.values[self.pos], acted.values),
            (fields.log_probs[self.pos], acted.log_prob),
        ]
        if acted.dist_params is None:
            self._lacks_dist_params = True
        elif self.dist_param_dim:
            pairs.append((fields.dist_params[self.pos], acted.dist_params))
        if isinstance(observations, dict):
            pairs += [(fields.observations[key][self.pos], part) for key, part in observations.items()]
        elif observations is not None:
            pairs.append((fields.observations[self.pos], observations))
        _write_all(pairs)

    def end_step(self) -> None:
        """Begin the next step."""
        self.pos += 1
        self.full = self.pos == self.buffer_size

    @th.no_grad()
    def compute_returns_and_advantage(self, last_values: Any, dones: Any) -> None:
        """
        Compute ``advantages`` and ``returns`` by the formula of :func:`sb3_clipvf.rollout.gae`, on the device.

        :param last_values: V_old of the observations after the last step, shape ``(n_envs,)`` or ``(n_envs, 1)``.
        :param dones: Whether the last step ended an episode, shape ``(n_envs,)``, tensor or array.
        """
        tensors: Any = self  # the base class has arrays
        values, advantages = tensors.values, tensors.advantages
        last = th.as_tensor(last_values, device=self.device).detach().reshape(1, -1).to(th.float32)
        ended = th.as_tensor(dones, device=self.device).reshape(1, -1).to(th.float32)
        continues = 1.0 - th.cat([tensors.episode_starts[1:], ended])
        deltas = tensors.rewards + self.gamma * th.cat([values[1:], last]) * continues - values
        decay = self.gamma * self.gae_lambda * continues
        advantages[-1] = deltas[-1]
        for step in reversed(range(self.buffer_size - 1)):
            th.addcmul(deltas[step], decay[step], advantages[step + 1], out=advantages[step])
        th.add(advantages, values, out=tensors.returns)

    def draw_rows(self) -> th.Tensor:
        """Return the rows of one epoch, as ``TensorRolloutBuffer.draw_rows`` does, from the generator in use."""
        if not self.draws_on_device:
            return super().draw_rows()
        check_complete(self)
        return th.randperm(self.buffer_size * self.n_envs, device=self.device)

    def get(self, batch_size: int | None = None) -> Generator[MiniBatch, None, None]:
        """
        Yield the minibatches of one epoch, in a random order of the transitions.

        :param batch_size: Transitions in a minibatch; the last one may be smaller. None: all transitions in one.
        :return: Minibatches on the buffer's device.
        :raises ValueError: If the rollout is not complete.
        """
        rows = self.draw_rows()
        size = len(rows) if batch_size is None else batch_size
        for start in range(0, len(rows), size):
            yield self._gather(rows[start : start + size])

    def _to_flat(self, array: Any, dtype: Any = None) -> th.Tensor:
        rows = th.as_tensor(array, device=self.device)  # a callback may have assigned an array
        flat = rows.reshape(self.buffer_size * self.n_envs, *rows.shape[2:])
        return flat if dtype is None else flat.to(th.float32)

    def _allocate(self) -> None:
        cells, zeros = (self.buffer_size, self.n_envs), self._zeros
        tensors: Any = {key: zeros(shape, dtype) for key, (shape, dtype) in self._obs_layout().items()}
        self.observations = tensors if isinstance(self.observation_space, spaces.Dict) else tensors[""]
        fields: Any = self
        fields.actions = zeros((self.action_dim,), self._action_dtype)
        for name in ("rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, zeros((), np.float32))
        fields.dist_params = zeros((self.dist_param_dim,), np.float32)
        self._allocated = cells

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> th.Tensor:
        cells = (self.buffer_size, self.n_envs)
        return th.zeros((*cells, *shape), dtype=torch_dtype(dtype), device=self.device)


def free_device_memory(device: th.device) -> int:
    """Return the bytes that torch may still allocate on a GPU, including those that it holds and does not use."""
    unused = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
    return int(th.cuda.mem_get_info(device)[0]) + unused


def explained_variance_of(buffer: Any) -> float:
    """Return 1 - Var(returns - values) / Var(returns) of a rollout, NaN if the returns do not vary, as SB3 does."""
    if not isinstance(buffer, DeviceRolloutBuffer):
        return float(explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    tensors: Any = buffer
    returns, values = th.as_tensor(tensors.returns).double(), th.as_tensor(tensors.values).double()
    spread = returns.var(correction=0)
    return float(th.where(spread == 0, th.nan, 1.0 - (returns - values).var(correction=0) / spread))


def _write_all(pairs: list[tuple[th.Tensor, th.Tensor]]) -> None:
    """Copy each second tensor into the first one of its pair. A GPU copies those of one type by a single launch."""
    targets, sources = [], []
    for target, source in pairs:
        if target.dtype == source.dtype and target.device == source.device:
            targets.append(target)
            sources.append(source.reshape(target.shape))
        else:
            _write(target, source)
    for dtype in {target.dtype for target in targets}:
        of_type = [number for number, target in enumerate(targets) if target.dtype == dtype]
        th._foreach_copy_([targets[number] for number in of_type], [sources[number] for number in of_type])


def _write(target: th.Tensor, values: Any) -> th.Tensor:
    """Copy values of any shape into a tensor of the same size, and return it in their shape."""
    given = th.as_tensor(values)
    target.copy_(given.reshape(target.shape), non_blocking=True)
    return target.reshape(given.shape)
