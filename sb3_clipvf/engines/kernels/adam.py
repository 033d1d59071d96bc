"""Adam and AdamW on tensors in place, and the norm of gradients."""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.memory import GRAD, MOMENT1, MOMENT2, PARAM, SIZE, vector

F = np.float32


@fast
def squared_norm(table: np.ndarray, first: int, end: int) -> float:
    """
    Sum of the squares of some parameters' gradients.

    :param table: Parameters.
    :param first: First row.
    :param end: Row after the last one.
    :return: float64.
    """
    total = 0.0
    for k in range(first, end):
        gradient = vector(table[k, GRAD], table[k, SIZE])
        squares = F(0)
        for i in range(gradient.shape[0]):
            squares += gradient[i] * gradient[i]
        total += squares
    return total


@fast
def adam_step(
    table: np.ndarray,
    first: int,
    end: int,
    scale: float,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """
    One step of Adam (Kingma and Ba 2015, arXiv 1412.6980) or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    :param table: Parameters; values, gradients (scaled) and moments are changed.
    :param first: First row.
    :param end: Row after the last one.
    :param scale: Factor of all gradients, from clipping their norm.
    :param step: Counts from 1.
    :param learning_rate: At least 0.
    :param beta1: Decay of the first moment.
    :param beta2: Decay of the second moment.
    :param eps: Added to the root of the second moment.
    :param weight_decay: Added to the gradient, or taken from the parameters where ``decoupled``.
    :param decoupled: AdamW's form.
    """
    step_size = F(learning_rate / (1.0 - beta1**step))
    root = F(math.sqrt(1.0 - beta2**step))
    factor, keep1, keep2, add2, eps32 = F(scale), F(1.0 - beta1), F(beta2), F(1.0 - beta2), F(eps)
    shrink = F(1.0 - learning_rate * weight_decay) if decoupled else F(1)
    decay = F(0) if decoupled else F(weight_decay)
    for k in range(first, end):
        size = table[k, SIZE]
        p, g = vector(table[k, PARAM], size), vector(table[k, GRAD], size)
        m, v = vector(table[k, MOMENT1], size), vector(table[k, MOMENT2], size)
        for i in range(size):
            clipped = g[i] * factor
            g[i] = clipped
            p_i = p[i] * shrink
            with_decay = clipped + decay * p_i
            m_i = m[i] + (with_decay - m[i]) * keep1
            v_i = v[i] * keep2 + add2 * with_decay * with_decay
            m[i] = m_i
            v[i] = v_i
            p[i] = p_i - step_size * (m_i / (np.sqrt(v_i) / root + eps32))
