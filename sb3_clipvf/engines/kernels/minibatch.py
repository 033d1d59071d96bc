"""One minibatch's loss as gradients of what the networks give, and the optimizer's step."""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels import heads
from sb3_clipvf.engines.kernels.adam import adam_step
from sb3_clipvf.engines.kernels.data import (
    APPROX_KL,
    CLIP_FRACTION,
    ENTROPY_LOSS,
    GRAD_NORM,
    KL,
    LAST_LOSS,
    N_IN_EPOCH,
    N_LOOKED_AT,
    N_SKIPPED,
    N_STEPS,
    POLICY_LOSS,
    RATIO_MAX,
    STOPPED_AT,
    TOLD_APPROX_KL,
    TOLD_CLIP_FRACTION,
    TOLD_ENTROPY_LOSS,
    TOLD_EXACT_KL,
    TOLD_LOSS,
    TOLD_POLICY_LOSS,
    TOLD_RATIO_MAX,
    TOLD_VALUE_LOSS,
    TOLD_VF_CLIP_FRACTION,
    VALUE_LOSS,
    VF_CLIP_FRACTION,
    Numbers,
)
from sb3_clipvf.engines.kernels.losses import NOT_CLIPPED, shift_and_scale, surrogate, value_loss

F = np.float32
_CLIP_EPS = 1e-6
_LARGEST = np.finfo(np.float32).max

# What comes of a minibatch.
STEPS, SKIPS, STOPS = range(3)


@fast
def policy_gradient(
    kind: int, widths: np.ndarray, outputs: np.ndarray, log_std: np.ndarray, actions: np.ndarray,
    old_log_prob: np.ndarray, advantages: np.ndarray, old_dist: np.ndarray, rows: np.ndarray, numbers: Numbers,
    measure_kl: bool, gradient: np.ndarray, log_std_gradient: np.ndarray, told: np.ndarray,
) -> None:  # fmt: skip
    """
    The actor's part of a minibatch's loss: its gradient with respect to what the actor's last layer gives.

    :param kind: Of the distribution.
    :param widths: Of the categorical distributions.
    :param outputs: Shape ``(n, k)``; logits of categorical distributions are normalised in place.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``.
    :param actions: Shape ``(n, action_dim)``.
    :param old_log_prob: Shape ``(n,)``, nats.
    :param advantages: Shape ``(n,)``; normalised in place.
    :param old_dist: Old parameters, of the whole rollout or of this minibatch.
    :param rows: Which of its rows belong to this minibatch.
    :param numbers: Coefficients and settings.
    :param measure_kl: Whether the exact KL is wanted.
    :param gradient: Filled, shape ``(n, k)``.
    :param log_std_gradient: Filled, shape of ``log_std``, of a Gaussian.
    :param told: Terms of the loss and statistics go there.
    """
    n = outputs.shape[0]
    log_prob, entropy, weights = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    shift, scale = F(numbers.shift), F(numbers.scale)
    if numbers.normalize != 0.0:
        shift, scale = shift_and_scale(advantages, numbers.advantage_eps)
    for i in range(n):
        advantages[i] = (advantages[i] - shift) / scale
    heads.evaluate(kind, outputs, log_std, widths, actions, gradient, log_prob, entropy)
    loss, clipped, k3, largest = surrogate(log_prob, old_log_prob, advantages, numbers.clip_range, weights)
    kl = heads.kl_from_old(kind, outputs, log_std, gradient, old_dist, rows) / n if measure_kl else 0.0
    heads.gradients(
        kind, outputs, log_std, widths, actions, gradient, weights, numbers.ent_coef, numbers.kl_coef, old_dist, rows,
        log_std_gradient,
    )  # fmt: skip
    entropy_loss = 0.0
    for i in range(n):
        entropy_loss -= entropy[i] / n
    told[TOLD_POLICY_LOSS], told[TOLD_ENTROPY_LOSS], told[TOLD_EXACT_KL] = loss, entropy_loss, kl
    told[TOLD_APPROX_KL], told[TOLD_RATIO_MAX], told[TOLD_CLIP_FRACTION] = k3, largest, clipped


@fast
def value_gradient(
    values: np.ndarray, old_values: np.ndarray, returns: np.ndarray, numbers: Numbers, gradient: np.ndarray,
    told: np.ndarray,
) -> None:  # fmt: skip
    """
    The critic's part of a minibatch's loss: its gradient with respect to the predicted values.

    :param values: Shape ``(n,)``, return units.
    :param old_values: Shape ``(n,)``, return units.
    :param returns: Shape ``(n,)``, return units.
    :param numbers: Coefficients and settings.
    :param gradient: Filled, shape ``(n,)``.
    :param told: The loss and a statistic go there.
    """
    form = int(numbers.value_form)
    loss, clipped = value_loss(values, old_values, returns, form, numbers.clip_range_vf, numbers.vf_coef, gradient)
    told[TOLD_VALUE_LOSS], told[TOLD_VF_CLIP_FRACTION] = loss, clipped if form != NOT_CLIPPED else 0.0


@fast
def total_loss(told: np.ndarray, numbers: Numbers) -> float:
    """
    The loss of a minibatch.

    :param told: From :func:`policy_gradient` and :func:`value_gradient`.
    :param numbers: Coefficients and settings.
    :return: float64.
    """
    loss = told[TOLD_POLICY_LOSS] + numbers.ent_coef * told[TOLD_ENTROPY_LOSS]
    loss += numbers.vf_coef * told[TOLD_VALUE_LOSS]
    # A KL that is only measured may be infinite.
    return loss + numbers.kl_coef * told[TOLD_EXACT_KL] if numbers.kl_coef != 0.0 else loss


@fast
def is_finite(number: float) -> bool:
    """
    Tell whether a number is one.

    :param number: As float32, in which torch has it.
    :return: False for NaN and infinities.
    """
    return abs(F(number)) <= _LARGEST


@fast
def verdict(told: np.ndarray, numbers: Numbers, norm: float) -> int:
    """
    What comes of a minibatch: a step; none, since its loss or its gradient is not finite; or the end of the update, by
    ``target_kl``, as in SB3.

    :param told: From :func:`policy_gradient` and :func:`value_gradient`; the loss goes there.
    :param numbers: Coefficients and settings.
    :param norm: Joint gradient norm; 0 where it is not known yet.
    :return: STEPS, SKIPS or STOPS.
    """
    told[TOLD_LOSS] = total_loss(told, numbers)
    if not is_finite(told[TOLD_LOSS]):
        return SKIPS
    if F(told[TOLD_APPROX_KL]) > 1.5 * numbers.target_kl:
        return STOPS
    return STEPS if is_finite(norm) else SKIPS


@fast
def count(told: np.ndarray, what: int, norm: float, totals: np.ndarray) -> None:
    """
    Add a minibatch to the statistics.

    :param told: From :func:`policy_gradient`, :func:`value_gradient` and :func:`verdict`.
    :param what: From :func:`verdict`; of what is skipped only the number is kept.
    :param norm: Joint gradient norm.
    :param totals: Of the update.
    """
    if what == SKIPS:
        totals[N_SKIPPED] += 1
        return
    totals[N_LOOKED_AT] += 1
    totals[N_IN_EPOCH] += 1
    totals[POLICY_LOSS] += told[TOLD_POLICY_LOSS]
    totals[ENTROPY_LOSS] += told[TOLD_ENTROPY_LOSS]
    totals[CLIP_FRACTION] += told[TOLD_CLIP_FRACTION]
    totals[VALUE_LOSS] += told[TOLD_VALUE_LOSS]
    totals[VF_CLIP_FRACTION] += told[TOLD_VF_CLIP_FRACTION]
    totals[APPROX_KL] += told[TOLD_APPROX_KL]
    totals[KL] += told[TOLD_EXACT_KL]
    totals[RATIO_MAX] = max(totals[RATIO_MAX], told[TOLD_RATIO_MAX])
    totals[LAST_LOSS] = told[TOLD_LOSS]
    if what == STOPS:
        totals[STOPPED_AT] = told[TOLD_APPROX_KL]
        return
    totals[N_STEPS] += 1
    totals[GRAD_NORM] += norm


@fast
def clip_factor(squares: float, max_grad_norm: float) -> tuple[float, float]:
    """
    The joint gradient norm, and what gradients are multiplied by to bound it, as torch's ``clip_grad_norm_`` does.

    :param squares: Sum of the squares of all gradients.
    :param max_grad_norm: The bound.
    :return: Norm before clipping, and factor; NaN stays NaN.
    """
    norm = math.sqrt(squares)
    factor = max_grad_norm / (norm + _CLIP_EPS)
    return norm, 1.0 if factor > 1.0 else factor


@fast
def step(table: np.ndarray, first: int, end: int, factor: float, n_steps: int, numbers: Numbers) -> None:
    """
    One step of the optimizer.

    :param table: Parameters.
    :param first: First row.
    :param end: Row after the last one.
    :param factor: Of all gradients.
    :param n_steps: Steps of this update, this one included.
    :param numbers: The optimizer's, and the steps that it made before.
    """
    adam_step(
        table, first, end, factor, int(numbers.step) + n_steps, numbers.learning_rate, numbers.beta1, numbers.beta2,
        numbers.eps, numbers.weight_decay, numbers.decoupled != 0.0,
    )  # fmt: skip
