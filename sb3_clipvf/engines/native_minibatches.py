"""Single minibatches of the native engine, for an update that several processes share."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th

from sb3_clipvf.engines.bridge import changed, set_advantage_moments, statistics_of
from sb3_clipvf.engines.epochs import MinibatchStatistics
from sb3_clipvf.engines.interface import UpdateCoefficients
from sb3_clipvf.engines.kernels import entry, inputs
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL
from sb3_clipvf.engines.kernels.warmup import warm_up

# Statistics of a minibatch, and their places in the totals of an update that has no other
_PLACES = {
    STAT.policy_loss: TOTAL.policy_loss,
    STAT.entropy_loss: TOTAL.entropy_loss,
    STAT.value_loss: TOTAL.value_loss,
    STAT.kl: TOTAL.kl,
    STAT.approx_kl: TOTAL.approx_kl,
    STAT.ratio_max: TOTAL.ratio_max,
    STAT.clip_fraction: TOTAL.clip_fraction,
    STAT.vf_clip_fraction: TOTAL.vf_clip_fraction,
    STAT.loss: TOTAL.last_loss,
}


class DrawnPart:
    """Transitions of a minibatch, by their indices in a rollout; the fields of ``MiniBatch`` are read when used."""

    def __init__(self, buffer: Any, indices: np.ndarray) -> None:
        self.indices = indices
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._buffer._get_samples(self.indices), name)

    @property
    def advantages(self) -> th.Tensor:
        """Advantages, shape ``(n,)``."""
        flat = self._buffer.advantages.reshape(-1)
        return th.from_numpy(flat[self._buffer._rows(self.indices).numpy()])


class NativeUpdate:
    """Loss, gradients and step of single minibatches, each by one kernel call."""

    def __init__(
        self,
        run: Callable[[np.ndarray, np.ndarray], inputs.Shared],
        table: np.ndarray,
        hyper: np.ndarray,
        coefficients: UpdateCoefficients,
        buffer: Any,
    ) -> None:
        """Store ``run``, which runs an update with hyperparameters and permutations, and the parameter table."""
        self._run, self._table, self._buffer = run, table, buffer
        self._coefficients = coefficients
        self._hyper = hyper
        # An update with this target ends before the step of its first minibatch, whose gradients are then complete.
        self._without_step = changed(hyper, target_kl=-1.0, skips=0.0)
        self.n_steps = int(inputs.Hyperparameters(*hyper).step)
        self.compile_seconds = warm_up("fused")

    def draw(self, size: int) -> Iterator[DrawnPart]:
        """Yield the minibatches of an epoch, in the order in which the buffer draws them."""
        n = self._buffer.buffer_size * self._buffer.n_envs
        permutation = np.random.permutation(n)
        for start in range(0, n, size):
            yield DrawnPart(self._buffer, permutation[start : start + size])

    def set_advantage_moments(self, mean: float, divisor: float) -> None:
        """Normalise advantages as ``(advantages - mean) / divisor`` from the next minibatch on."""
        set_advantage_moments(self._without_step, mean, divisor)

    def loss(self, batch: Any, measure_kl: bool) -> MinibatchStatistics:
        """Compute the loss of a minibatch, and its gradients."""
        hyper = changed(self._without_step, kl_from_epoch=0.0 if measure_kl else np.inf)
        shared = self._run(hyper, batch.indices.reshape(1, -1).astype(np.int32))
        stats = np.zeros(len(STAT))
        for place, total in _PLACES.items():
            stats[place] = shared.totals[total]
        if shared.totals[TOTAL.n_skipped]:
            stats = shared.skipped
        return statistics_of(stats, self._coefficients, measure_kl)

    def backward(self) -> None:
        """Do nothing, since the loss came with its gradients."""

    def prepare_step(self) -> float:
        """Find the factor by which ``step`` clips the gradients, and return their joint norm before that."""
        norm, self._factor, _ = entry.gradient_norm(self._table, inputs.Hyperparameters(*self._hyper).max_grad_norm)
        return float(norm)

    def step(self) -> None:
        """Clip the gradients, and take an optimizer step."""
        self.n_steps += 1
        entry.optimizer_step(self._table, self._factor, self.n_steps, self._hyper)
