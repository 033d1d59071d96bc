"""One minibatch: its loss as gradients of the networks' outputs, and whether the optimizer makes a step."""

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
def policy_gradient(
    dist: ActionDist, actions: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, old_dist: np.ndarray,
    rows: np.ndarray, hyper: Hyperparameters, measure_kl: bool, log_std_gradient: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """
    Overwrite ``dist.probs`` by the gradient of the actor's loss with respect to the outputs, and fill ``stats``.

    ``advantages``, shape ``(n,)``, are normalised in place. ``old_dist`` and ``rows`` are as in
    :func:`.action_distributions.kl_from_old`; ``log_std_gradient`` is filled for a Gaussian.
    """
    n = dist.outputs.shape[0]
    log_prob, entropy, weights = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    shift, scale = F(hyper.shift), F(hyper.scale)
    if hyper.normalize != 0.0:
        shift, scale = shift_and_scale(advantages, hyper.advantage_eps)
    for i in range(n):
        advantages[i] = (advantages[i] - shift) / scale
    action_distributions.evaluate(dist, actions, log_prob, entropy)
    loss, clipped, k3, largest = surrogate_loss(log_prob, old_log_prob, advantages, hyper.clip_range, weights)
    kl = action_distributions.kl_from_old(dist, old_dist, rows) / n if measure_kl else 0.0
    action_distributions.gradients(
        dist, actions, weights, hyper.ent_coef, hyper.kl_coef, old_dist, rows, log_std_gradient
    )
    entropy_loss = 0.0
    for i in range(n):
        entropy_loss -= entropy[i] / n
    stats[STAT.policy_loss], stats[STAT.entropy_loss], stats[STAT.kl] = loss, entropy_loss, kl
    stats[STAT.approx_kl], stats[STAT.ratio_max], stats[STAT.clip_fraction] = k3, largest, clipped


@fast
def value_gradient(
    values: np.ndarray, old_values: np.ndarray, returns: np.ndarray, hyper: Hyperparameters, gradient: np.ndarray,
    stats: np.ndarray,
) -> None:  # fmt: skip
    """Fill ``gradient`` of the critic's loss with respect to the values, and ``stats``; arrays are ``(n,)``."""
    form = int(hyper.value_form)
    loss, clipped = value_loss(values, old_values, returns, form, hyper.clip_range_vf, hyper.vf_coef, gradient)
    stats[STAT.value_loss], stats[STAT.vf_clip_fraction] = loss, clipped if form != NOT_CLIPPED else 0.0


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
    Return STEP, SKIP, or STOP where k3 exceeds 1.5 ``target_kl``, as in SB3, and set the loss in ``stats``.

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
