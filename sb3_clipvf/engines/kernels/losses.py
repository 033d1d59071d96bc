"""
The surrogate, the value loss and the normalisation of advantages, with their gradients.

They restate :mod:`sb3_clipvf.objectives`; where torch splits a gradient between equal arguments of min and max, so do
they.
"""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import exp32

F = np.float32

# A ratio this close to the range is inside. Where torch acted and kernels update, log-probabilities of one policy
# differ by rounding, which would cut gradients off when an annealed range has come to 0.
_ROUNDING = F(1e-5)

# How value predictions are clipped.
NOT_CLIPPED, CLIPPED_MAX, CLIPPED_PREDICTION = range(3)


@fast
def shift_and_scale(advantages: np.ndarray, eps: float) -> tuple[float, float]:
    """
    Mean and unbiased standard deviation; (0, 1) for a single advantage, which has no spread.

    :param advantages: Shape ``(n,)``.
    :param eps: Added to the standard deviation.
    :return: float32 numbers.
    """
    n = advantages.shape[0]
    if n <= 1:
        return F(0), F(1)
    total = 0.0
    for i in range(n):
        total += advantages[i]
    mean = total / n
    squares = 0.0
    for i in range(n):
        squares += (advantages[i] - mean) ** 2
    return F(mean), F(math.sqrt(squares / (n - 1))) + F(eps)


@fast
def surrogate(
    log_prob: np.ndarray,
    old_log_prob: np.ndarray,
    advantages: np.ndarray,
    clip_range: float,
    gradient: np.ndarray,
) -> tuple[float, float, float, float]:
    """
    The negative surrogate objective of a minibatch, and what is measured of its ratios.

    :param log_prob: log pi(a|s), shape ``(n,)``, nats.
    :param old_log_prob: log pi_old(a|s), shape ``(n,)``, nats.
    :param advantages: As normalised, shape ``(n,)``.
    :param clip_range: epsilon; infinity: not clipped.
    :param gradient: Filled with the loss's gradient with respect to ``log_prob``, shape ``(n,)``.
    :return: Loss, share of clipped ratios, estimator k3 of the KL (nats), largest ratio.
    """
    n = log_prob.shape[0]
    weight = F(1.0 / n)
    low, high, eps = F(1.0 - clip_range), F(1.0 + clip_range), F(clip_range)
    objective, n_clipped, k3, largest = 0.0, 0, 0.0, F(0)
    for i in range(n):  # a loop of its own, which vector instructions can take
        gradient[i] = exp32(log_prob[i] - old_log_prob[i])
    for i in range(n):
        log_ratio = log_prob[i] - old_log_prob[i]
        ratio = gradient[i]
        free = advantages[i] * ratio
        # max and min of Python pass NaN in one order only: the ratio's own NaN is kept by `free`.
        held = advantages[i] * min(max(ratio, low), high)
        inside = low - _ROUNDING <= ratio <= high + _ROUNDING
        objective += held if held < free else free
        share = F(1) if inside or free < held else (F(0.5) if free == held else F(0))
        gradient[i] = -weight * free * share
        n_clipped += 1 if abs(ratio - F(1)) > eps + _ROUNDING else 0
        k3 += (ratio - F(1)) - log_ratio
        largest = ratio if ratio > largest or ratio != ratio else largest
    return -objective / n, n_clipped / n, k3 / n, largest


@fast
def value_loss(
    values: np.ndarray,
    old_values: np.ndarray,
    returns: np.ndarray,
    form: int,
    clip_range_vf: float,
    vf_coef: float,
    gradient: np.ndarray,
) -> tuple[float, float]:
    """
    The critic's loss of a minibatch.

    :param values: V, shape ``(n,)``, return units.
    :param old_values: V_old, shape ``(n,)``, return units.
    :param returns: Targets, shape ``(n,)``, return units.
    :param form: NOT_CLIPPED, CLIPPED_MAX or CLIPPED_PREDICTION.
    :param clip_range_vf: Return units.
    :param vf_coef: Weight of this loss in the gradient.
    :param gradient: Filled with ``vf_coef`` times the gradient with respect to ``values``, shape ``(n,)``.
    :return: Loss without ``vf_coef``, and the share of predictions that moved further than ``clip_range_vf``.
    """
    n = values.shape[0]
    weight, bound = F(2.0 * vf_coef / n), F(clip_range_vf)
    total, n_clipped = 0.0, 0
    for i in range(n):
        free = values[i] - returns[i]
        change = values[i] - old_values[i]
        held = old_values[i] + min(max(change, -bound), bound) - returns[i]
        moved = abs(change) > bound
        if form == NOT_CLIPPED:
            total += free * free
            gradient[i] = weight * free
        elif form == CLIPPED_PREDICTION:
            total += held * held
            gradient[i] = F(0) if moved else weight * held
        else:
            free_error, held_error = free * free, held * held
            total += held_error if held_error > free_error else free_error
            share = F(1) if free_error > held_error else (F(0.5) if free_error == held_error else F(0))
            gradient[i] = weight * (free * share if moved else free)
        n_clipped += 1 if moved else 0
    return total / n, n_clipped / n
