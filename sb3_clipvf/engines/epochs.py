"""
The loop over epochs and minibatches: what is skipped, when an update stops early, and its statistics.

The native engine restates this file in ``kernels/update.py`` and ``kernels/minibatch.py``. ``tests/test_engines.py``
and ``tests/test_nonfinite.py`` check that all engines compute the same numbers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch as th

from sb3_clipvf.common.nonfinite import FLOAT32_MAX, BadMinibatchError, drawn_indices
from sb3_clipvf.common.tensors import to_double
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.rollout import MiniBatch

Scalar: TypeAlias = th.Tensor | float
"""A number of a minibatch: a float, or a tensor without gradient that stays on the policy's device."""


@dataclass(slots=True)
class MinibatchStatistics:
    """The terms of one minibatch's loss, without their weights, and what is logged about it."""

    policy_loss: Scalar
    value_loss: Scalar
    entropy_loss: Scalar
    kl: Scalar | None  # None: not measured
    loss: Scalar  # weighted sum
    approx_kl: Scalar
    ratio_max: Scalar
    clip_fraction: Scalar | None  # None: not clipped
    vf_clip_fraction: Scalar | None
    grad_norm: Scalar | None = None  # before clipping; None: no backward pass

    def terms(self, coefficients: UpdateCoefficients) -> dict[str, float]:
        """Return the terms in the form of :class:`BadMinibatchError`; the KL only if it is a term of the loss."""
        names = ["policy_loss", "value_loss", "entropy_loss", *(["kl"] if coefficients.kl_coef else [])]
        values = {name: getattr(self, name) for name in (*names, "loss", "grad_norm")}
        return {name: 0.0 if value is None else float(value) for name, value in values.items()}


class MinibatchUpdate(Protocol):
    """One update of an engine. The methods are called in this order for each minibatch that is not skipped."""

    def loss(self, batch: MiniBatch, measure_kl: bool) -> MinibatchStatistics:
        """Compute the loss."""

    def backward(self) -> None:
        """Compute the gradients of this loss, if :meth:`loss` has not."""

    def prepare_step(self) -> Scalar:
        """Clip the gradients, or find the factor by which :meth:`step` clips them. Return their norm before that."""

    def step(self) -> None:
        """Take an optimizer step with clipped gradients."""


def run_epochs(
    update: MinibatchUpdate,
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    buffer: Any,
    *,
    checks: bool = True,
    draw: Callable[[int], Iterable[Any]] | None = None,
) -> "UpdateRecord":
    """
    Run the epochs of one update. With ``checks``, loss and gradient are read and checked before each step.

    ``draw`` yields the minibatches of an epoch, given their size; by default, the buffer draws them.

    :raises BadMinibatchError: If a minibatch is not finite and may not be skipped, or if all were skipped.
    """
    record, random_state = UpdateRecord(), np.random.get_state()
    for epoch in range(settings.n_epochs):
        measure_kl = settings.measures_kl(epoch, coefficients)
        record.n_epochs, record.epoch_start = epoch + 1, len(record.minibatches)
        for number, batch in enumerate((draw or buffer.get)(settings.batch_size)):
            minibatch = update.loss(batch, measure_kl)
            outcome = _try_step(update, minibatch, settings.target_kl, checks)
            if outcome == "skip":
                record.n_skipped += 1
                if record.skipped is None:
                    indices = drawn_indices(random_state, buffer, epoch, number * settings.batch_size, batch)
                    record.skipped = BadMinibatchError(minibatch.terms(coefficients), epoch, number, batch, indices)
                if settings.on_nonfinite == "raise":
                    raise record.skipped
                continue
            record.minibatches.append(minibatch)
            if outcome == "stop":
                record.stopped_at_kl = float(minibatch.approx_kl)
                return record
    if record.skipped is not None and not record.minibatches:
        raise record.skipped
    return record


def _try_step(update: MinibatchUpdate, minibatch: MinibatchStatistics, target_kl: float | None, checks: bool) -> str:
    """Take a step, unless loss or gradient is not finite, or ``target_kl`` stops the update before it, as in SB3."""
    if checks and not _is_finite(minibatch.loss):
        return "skip"
    if target_kl is not None and float(minibatch.approx_kl) > 1.5 * target_kl:
        return "stop"
    update.backward()
    minibatch.grad_norm = update.prepare_step()
    if checks and not _is_finite(minibatch.grad_norm):
        return "skip"
    update.step()
    return "step"


def _is_finite(scalar: Scalar) -> bool:
    return abs(float(scalar)) <= FLOAT32_MAX


@dataclass
class UpdateRecord:
    """The minibatches of an update that were not skipped, and how the update ended."""

    minibatches: list[MinibatchStatistics] = field(default_factory=list)
    n_epochs: int = 0
    epoch_start: int = 0  # number of minibatches before the last epoch
    n_skipped: int = 0
    skipped: BadMinibatchError | None = None  # the first one
    stopped_at_kl: float | None = None

    def is_finite(self) -> bool:
        """Return whether all losses and gradients were finite, in one read from the device."""
        norms = [minibatch.grad_norm for minibatch in self.minibatches if minibatch.grad_norm is not None]
        return bool(_stack([*(minibatch.loss for minibatch in self.minibatches), *norms]).isfinite().all())

    def statistics(self, kl_after: th.Tensor | None) -> UpdateStatistics:
        """Return the statistics of the update. None of them is read from the device."""
        minibatches, last_epoch = self.minibatches, self.minibatches[self.epoch_start :]
        means = {
            "policy_gradient_loss": _mean(minibatch.policy_loss for minibatch in minibatches),
            "value_loss": _mean(minibatch.value_loss for minibatch in minibatches),
            "entropy_loss": _mean(minibatch.entropy_loss for minibatch in minibatches),
            "clip_fraction": _mean(minibatch.clip_fraction for minibatch in minibatches),
            "vf_clip_fraction": _mean(minibatch.vf_clip_fraction for minibatch in minibatches),
            "grad_norm": _mean(minibatch.grad_norm for minibatch in minibatches),
        }
        approx_kl = _mean(minibatch.approx_kl for minibatch in last_epoch)
        return UpdateStatistics(
            means={name: mean for name, mean in means.items() if mean is not None},
            last_loss=_stack([minibatches[-1].loss])[0],
            # All of the last epoch may have been skipped.
            approx_kl=th.tensor(math.nan) if approx_kl is None else approx_kl,
            kl=_mean(minibatch.kl for minibatch in last_epoch),
            kl_after=kl_after,
            ratio_max=_stack([minibatch.ratio_max for minibatch in minibatches]).max(),
            n_epochs=self.n_epochs,
            stopped_at_kl=self.stopped_at_kl,
            n_skipped=self.n_skipped,
            skipped=self.skipped,
        )


def _mean(scalars: Iterable[Scalar | None]) -> th.Tensor | None:
    known = [scalar for scalar in scalars if scalar is not None]
    # SB3 averages Python floats, that is, in double precision.
    return to_double(_stack(known)).mean() if known else None


def _stack(scalars: list[Scalar]) -> th.Tensor:
    if isinstance(scalars[0], float):
        return th.tensor(scalars, dtype=th.float64)
    return th.stack(cast(list[th.Tensor], scalars))
