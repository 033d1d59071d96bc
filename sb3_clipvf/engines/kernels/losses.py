"""
The surrogate loss, the value loss and the normalisation of advantages, with their gradients.

They restate functions of :mod:`sb3_clipvf.objectives`; the parity test ``tests/test_kernels.py::TestLosses`` has the
pairs. Where torch splits a gradient between equal arguments of min and max, so do they.
"""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import exp32

F = np.float32

# A ratio this close to the range counts as inside, since log-probabilities of one policy from torch and from kernels
# differ by rounding. Otherwise, all gradients would be 0 once an annealed range has reached 0.
_ROUNDING = F(1e-5)

# Forms of the value loss.
NOT_CLIPPED, CLIPPED_MAX, CLIPPED_PREDICTION = range(3)


@fast
def shift_and_scale(advantages: np.ndarray, eps: float) -> tuple[float, float]:
    """Return mean and unbiased standard deviation plus ``eps``; (0, 1) for a single advantage, which has no spread."""
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
def surrogate_loss(
    log_prob: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, clip_range: float, n: int,
    gradient: np.ndarray,
) -> tuple[float, float, float, float]:  # fmt: skip
    """
    Return surrogate loss, share of clipped ratios, estimate k3 of the KL (nats), and largest ratio.

    The first three are sums over these rows, divided by ``n``, the number of rows in the whole minibatch. All arrays
    have one number per row. Log-probabilities are in nats, and an infinite ``clip_range`` does not clip. ``gradient``
    is filled with the loss's gradient with respect to ``log_prob``.
    """
    weight = F(1.0 / n)
    low, high, eps = F(1.0 - clip_range), F(1.0 + clip_range), F(clip_range)
    objective, n_clipped, k3, largest = 0.0, 0, 0.0, F(0)
    for i in range(log_prob.shape[0]):  # a loop of its own, which LLVM can turn into vector instructions
        gradient[i] = exp32(log_prob[i] - old_log_prob[i])
    for i in range(log_prob.shape[0]):
        log_ratio = log_prob[i] - old_log_prob[i]
        ratio = gradient[i]
        unclipped = advantages[i] * ratio
        # Python's max and min propagate NaN in one order of arguments only, so `unclipped` keeps a ratio's NaN.
        clipped = advantages[i] * min(max(ratio, low), high)
        objective += clipped if clipped < unclipped else unclipped
        inside = low - _ROUNDING <= ratio <= high + _ROUNDING
        passed = F(1) if inside or unclipped < clipped else (F(0.5) if unclipped == clipped else F(0))
        gradient[i] = -weight * unclipped * passed
        n_clipped += 1 if abs(ratio - F(1)) > eps + _ROUNDING else 0
        k3 += (ratio - F(1)) - log_ratio
        largest = ratio if ratio > largest or ratio != ratio else largest
    return -objective / n, n_clipped / n, k3 / n, largest


@fast
def value_loss(
    values: np.ndarray, old_values: np.ndarray, returns: np.ndarray, form: int, clip_range_vf: float, vf_coef: float,
    n: int, gradient: np.ndarray,
) -> tuple[float, float]:  # fmt: skip
    """
    Return the value loss, and the share of predictions that moved further than ``clip_range_vf``.

    Both are sums over these rows, divided by ``n``, the number of rows in the whole minibatch. All arrays have one
    number per row, in return units. ``gradient`` is filled with ``vf_coef`` times the loss's gradient with respect to
    ``values``; the loss returned is without ``vf_coef``.
    """
    weight, bound = F(2.0 * vf_coef / n), F(clip_range_vf)
    total, n_clipped = 0.0, 0
    for i in range(values.shape[0]):
        error = values[i] - returns[i]
        change = values[i] - old_values[i]
        clipped_error = old_values[i] + min(max(change, -bound), bound) - returns[i]
        moved = abs(change) > bound
        if form == NOT_CLIPPED:
            total += error * error
            gradient[i] = weight * error
        elif form == CLIPPED_PREDICTION:
            total += clipped_error * clipped_error
            gradient[i] = F(0) if moved else weight * clipped_error
        else:
            square, clipped_square = error * error, clipped_error * clipped_error
            total += clipped_square if clipped_square > square else square
            passed = F(1) if square > clipped_square else (F(0.5) if square == clipped_square else F(0))
            gradient[i] = weight * (error * passed if moved else error)
        n_clipped += 1 if moved else 0
    return total / n, n_clipped / n
