"""
Minibatches that several processes share: each has a part, and all take the same step.

The loss of a shared minibatch is the mean over the transitions of all parts. Advantages are normalised over all of
them, gradients and statistics are added with the parts' shares as weights, and skips and stops follow from the sums.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import torch as th

from sb3_clipvf import objectives
from sb3_clipvf.distributed import Group, Moments, merged_moments
from sb3_clipvf.engines.epochs import MinibatchStatistics, MinibatchUpdate, Scalar, UpdateRecord, run_epochs
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings
from sb3_clipvf.rollout import MiniBatch

_MEANS = ("policy_loss", "value_loss", "entropy_loss", "kl", "loss", "approx_kl", "clip_fraction", "vf_clip_fraction")


class PartialUpdate(MinibatchUpdate, Protocol):
    """An update of a part of each minibatch. Its gradients may be changed before ``prepare_step``."""

    def set_advantage_moments(self, mean: float, divisor: float) -> None:
        """Normalise advantages as ``(advantages - mean) / divisor`` from the next minibatch on."""


def run_shared_epochs(
    update: PartialUpdate,
    parameters: Iterable[th.Tensor],
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    buffer: Any,
    *,
    checks: bool = True,
    draw: Callable[[int], Iterable[Any]] | None = None,
) -> UpdateRecord:
    """
    Run the epochs of one update as :func:`.epochs.run_epochs` does, together with the processes of ``settings.group``.

    :raises ValueError: If the processes have different numbers of minibatches.
    """
    group = settings.group
    if group.size == 1:
        return run_epochs(update, settings, coefficients, buffer, checks=checks, draw=draw)
    shared = _SharedUpdate(update, list(parameters), settings, draw or buffer.get)
    record = run_epochs(shared, settings, coefficients, buffer, checks=checks, draw=shared.draw)
    # The only statistic that is not a sum
    largest = max(float(minibatch.ratio_max) for minibatch in record.minibatches)
    loss = record.minibatches[0].loss
    ratio_max = max(group.gather(largest))
    record.minibatches[0].ratio_max = ratio_max if isinstance(loss, float) else loss.new_tensor(ratio_max)
    return record


class _SharedUpdate:
    """An update of a process's parts that takes the steps of the whole minibatches."""

    def __init__(
        self,
        update: PartialUpdate,
        parameters: list[th.Tensor],
        settings: UpdateSettings,
        draw: Callable[[int], Iterable[Any]],
    ) -> None:
        self._update, self._draw = update, draw
        self._group: Group = settings.group
        self._normalizes = settings.normalize_advantage and settings.advantage_scope == "minibatch"
        self._sums = _Sums(parameters)
        self._minibatch_moments: Iterator[Moments] = iter(())  # of the epoch's whole minibatches

    def draw(self, size: int) -> Iterable[Any]:
        """Return this process's parts of an epoch's minibatches, and compute the whole minibatches' moments."""
        parts = list(self._draw(size))
        moments = self._group.gather([Moments.of(part.advantages) for part in parts])
        numbers = [len(each) for each in moments]
        if len(set(numbers)) > 1:
            raise ValueError(
                f"`rollout_buffer` must have equally many minibatches in all processes, got {numbers}. Use the same "
                "numbers of environments and steps."
            )
        self._minibatch_moments = iter([merged_moments(list(each)) for each in zip(*moments, strict=True)])
        return parts

    def loss(self, batch: MiniBatch, measure_kl: bool) -> MinibatchStatistics:
        """Compute the loss of the whole minibatch, and its gradients."""
        whole = next(self._minibatch_moments)
        if self._normalizes and whole.n > 1:
            self._update.set_advantage_moments(whole.mean, whole.sample_std + objectives.ADVANTAGE_EPS)
        part = self._update.loss(batch, measure_kl)
        self._update.backward()
        return self._sums.of(self._group, part, len(batch.advantages) / whole.n)

    def backward(self) -> None:
        """Do nothing, since :meth:`loss` adds its gradients to those of the other processes."""

    def prepare_step(self) -> Scalar:
        """Prepare the step of the whole minibatch, and return the joint norm of its gradients."""
        return self._update.prepare_step()

    def step(self) -> None:
        """Take an optimizer step."""
        self._update.step()


class _Sums:
    """Adds gradients and statistics of all processes, in one buffer."""

    def __init__(self, parameters: list[th.Tensor]) -> None:
        self._parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        n = sum(sizes)
        is_double = any(parameter.dtype == th.float64 for parameter in parameters)
        self._flat = th.zeros(
            n + len(parameters) + len(_MEANS),
            dtype=th.float64 if is_double else th.float32,
            device=parameters[0].device,
        )
        self._weighted = self._flat[:n]
        parts = th.split(self._weighted, sizes)
        self._gradients = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        # Number of processes with a gradient, for each parameter. If it is 0, `grad` stays None.
        self._n_gradients = self._flat[n : n + len(parameters)]
        self._means = self._flat[n + len(parameters) :]

    @th.no_grad()
    def of(self, group: Group, part: MinibatchStatistics, weight: float) -> MinibatchStatistics:
        """Replace the gradients of a part with those of the whole minibatch, and return its statistics."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
        self._weighted.mul_(weight)
        has_gradient = [parameter.grad is not None for parameter in self._parameters]
        if all(has_gradient):
            self._n_gradients.fill_(1.0)
        else:
            self._n_gradients.copy_(th.tensor(has_gradient))
        values = [getattr(part, name) for name in _MEANS]
        in_floats = isinstance(part.loss, float)
        if in_floats:
            self._means.copy_(th.tensor([0.0 if value is None else value for value in values]))
        else:
            self._means.copy_(th.stack([self._flat.new_zeros(()) if value is None else value for value in values]))
        self._means.mul_(weight)
        group.add_up(self._flat)
        self._write_gradients(has_gradient)
        means = self._means.tolist() if in_floats else self._means.clone().unbind()
        known = {
            name: mean if value is not None else None for name, value, mean in zip(_MEANS, values, means, strict=True)
        }
        return MinibatchStatistics(**cast(dict[str, Any], known), ratio_max=part.ratio_max)

    def _write_gradients(self, has_gradient: list[bool]) -> None:
        """Overwrite gradients with the sums, including those of parameters whose gradient only other processes have."""
        # If this process has all gradients, nothing needs to be read from the device.
        counts = has_gradient if all(has_gradient) else self._n_gradients.tolist()
        for parameter, gradient, n in zip(self._parameters, self._gradients, counts, strict=True):
            if not n:
                continue
            if parameter.grad is None:
                parameter.grad = th.empty_like(parameter)
            parameter.grad.copy_(gradient)
