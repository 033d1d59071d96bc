"""One minibatch: its loss as gradients of the networks' outputs, and whether the optimizer takes a step."""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels import action_distributions
from sb3_clipvf.engines.kernels.action_distributions import ActionDist
from sb3_clipvf.engines.kernels.inputs import Hyperparameters
from sb3_clipvf.engines.kernels.losses import NOT_CLIPPED, shift_and_scale, surrogate_loss, value_loss
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

F = np.float32
_LARGEST = np.finfo(np.float32).max

# Outcomes of a minibatch: a step of the optimizer; no step, since loss or gradient is not finite; the update's end.
STEP, SKIP, STOP = range(3)


@fast
def advantage_scale(advantages: np.ndarray, hyper: Hyperparameters) -> tuple[float, float]:
    """Return shift and scale by which the advantages of a minibatch, ``(n,)``, are normalised."""
    if hyper.normalize != 0.0:
        return shift_and_scale(advantages, hyper.advantage_eps)
    return F(hyper.shift), F(hyper.scale)


@fast
def policy_gradient(
    dist: ActionDist, actions: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, old_dist: np.ndarray,
    rows: np.ndarray, hyper: Hyperparameters, measure_kl: bool, n: int, log_std_gradient: np.ndarray,
    stats: np.ndarray,
) -> None:  # fmt: skip
    """
    Overwrite ``dist.probs`` with the gradient of the actor's loss with respect to the outputs, and add to ``stats``.

    The loss is a mean over the ``n`` rows of a minibatch, of which these are some or all. ``advantages`` are
    normalised. ``old_dist`` and ``rows`` are as in :func:`.action_distributions.kl_from_old`. For a Gaussian the
    gradient of the log standard deviations is added to ``log_std_gradient``.
    """
    n_rows = rows.shape[0]
    log_prob, entropy = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
    weights = np.empty(n_rows, np.float32)
    action_distributions.evaluate(dist, actions, log_prob, entropy)
    loss, clipped, k3, largest = surrogate_loss(log_prob, old_log_prob, advantages, hyper.clip_range, n, weights)
    kl = action_distributions.kl_from_old(dist, old_dist, rows) / n if measure_kl else 0.0
    action_distributions.gradients(
        dist, actions, weights, hyper.ent_coef, hyper.kl_coef, old_dist, rows, n, log_std_gradient
    )
    entropy_loss = 0.0
    for i in range(n_rows):
        entropy_loss -= entropy[i] / n
    stats[STAT.policy_loss] += loss
    stats[STAT.entropy_loss] += entropy_loss
    stats[STAT.kl] += kl
    stats[STAT.approx_kl] += k3
    stats[STAT.ratio_max] = larger(stats[STAT.ratio_max], largest)
    stats[STAT.clip_fraction] += clipped


@fast
def value_gradient(
    values: np.ndarray, old_values: np.ndarray, returns: np.ndarray, hyper: Hyperparameters, n: int,
    gradient: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """
    Fill ``gradient`` of the critic's loss with respect to the values, and add to ``stats``.

    The loss is a mean over the ``n`` rows of a minibatch, of which these are some or all. Arrays have a number per row.
    """
    form = int(hyper.value_form)
    loss, clipped = value_loss(values, old_values, returns, form, hyper.clip_range_vf, hyper.vf_coef, n, gradient)
    stats[STAT.value_loss] += loss
    stats[STAT.vf_clip_fraction] += clipped if form != NOT_CLIPPED else 0.0


@fast
def add_up(parts: np.ndarray, stats: np.ndarray) -> None:
    """Fill the statistics of a minibatch with the sums, or the largest ratio, of its parts, one row each, in order."""
    stats[:] = 0.0
    for part in range(parts.shape[0]):
        for k in range(stats.shape[0]):
            number = parts[part, k]
            stats[k] = larger(stats[k], number) if k == STAT.ratio_max else stats[k] + number


@fast
def larger(first: float, second: float) -> float:
    """Return the larger number, or NaN if one is NaN."""
    return second if second > first or second != second else first


@fast
def total_loss(stats: np.ndarray, hyper: Hyperparameters) -> float:
    """Return the weighted sum of the terms in ``stats``."""
    loss = stats[STAT.policy_loss] + hyper.ent_coef * stats[STAT.entropy_loss]
    loss += hyper.vf_coef * stats[STAT.value_loss]
    # A KL that is only measured may be infinite.
    return loss + hyper.kl_coef * stats[STAT.kl] if hyper.kl_coef != 0.0 else loss


@fast
def outcome_of(stats: np.ndarray, hyper: Hyperparameters, norm: float) -> int:
    """
    Return STEP, SKIP, or STOP if k3 exceeds 1.5 ``target_kl``, as in SB3, and set the loss in ``stats``.

    ``norm`` is the joint gradient norm. Restates ``engines/epochs.py``; parity tests: ``tests/test_nonfinite.py`` and
    ``tests/test_engines.py::TestContract::test_target_kl_stops_before_the_step``.
    """
    stats[STAT.loss] = total_loss(stats, hyper)
    if not is_finite(stats[STAT.loss]):
        return SKIP
    if F(stats[STAT.approx_kl]) > 1.5 * hyper.target_kl:
        return STOP
    return STEP if is_finite(norm) else SKIP


@fast
def is_finite(number: float) -> bool:
    """Return whether a number is finite in float32, the dtype of torch's losses."""
    return abs(F(number)) <= _LARGEST


@fast
def add_to_totals(stats: np.ndarray, outcome: int, norm: float, totals: np.ndarray) -> None:
    """Add a minibatch to the statistics of the update. A skipped one is only counted."""
    if outcome == SKIP:
        totals[TOTAL.n_skipped] += 1
        return
    totals[TOTAL.n_minibatches] += 1
    totals[TOTAL.n_in_epoch] += 1
    totals[TOTAL.policy_loss] += stats[STAT.policy_loss]
    totals[TOTAL.entropy_loss] += stats[STAT.entropy_loss]
    totals[TOTAL.clip_fraction] += stats[STAT.clip_fraction]
    totals[TOTAL.value_loss] += stats[STAT.value_loss]
    totals[TOTAL.vf_clip_fraction] += stats[STAT.vf_clip_fraction]
    totals[TOTAL.approx_kl] += stats[STAT.approx_kl]
    totals[TOTAL.kl] += stats[STAT.kl]
    totals[TOTAL.ratio_max] = max(totals[TOTAL.ratio_max], stats[STAT.ratio_max])
    totals[TOTAL.last_loss] = stats[STAT.loss]
    if outcome == STOP:
        totals[TOTAL.stopped_at_kl] = stats[STAT.approx_kl]
        return
    totals[TOTAL.n_steps] += 1
    totals[TOTAL.grad_norm] += norm
