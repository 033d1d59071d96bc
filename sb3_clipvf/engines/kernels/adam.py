"""
Adam and AdamW, in place, and the bound on the joint gradient norm.

They restate ``torch.optim.Adam``, ``torch.optim.AdamW`` and ``torch.nn.utils.clip_grad_norm_``. Parity test:
``tests/test_engines.py::TestContract``, with the policies ``adamw``, ``adam_options`` and ``adam_decoupled``.
"""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.inputs import Hyperparameters
from sb3_clipvf.engines.kernels.memory import GRAD, MOMENT1, MOMENT2, PARAM, SIZE, vector

F = np.float32
_CLIP_EPS = 1e-6  # torch's


@fast
def squared_norm(table: np.ndarray) -> float:
    """Return the sum of the squares of all gradients of a parameter table, float64."""
    total = 0.0
    for k in range(table.shape[0]):
        gradient = vector(table[k, GRAD], table[k, SIZE])
        squares = F(0)
        for i in range(gradient.shape[0]):
            squares += gradient[i] * gradient[i]
        total += squares
    return total


@fast
def add_groups(pieces: np.ndarray, first: int, last: int, partials: np.ndarray, squares: np.ndarray) -> None:
    """
    Add the gradients of all groups, in order, for pieces ``first`` to ``last - 1``; fill the sums of their squares.

    ``pieces`` is a parameter table cut into rows of limited size, whose gradients are those of the first group;
    ``partials``, shape ``(n_groups - 1, n_parameters)``, has those of the others, in the order of the table.
    """
    start = 0
    for k in range(first):
        start += pieces[k, SIZE]
    for k in range(first, last):
        gradient = vector(pieces[k, GRAD], pieces[k, SIZE])
        for group in range(partials.shape[0]):
            partial = partials[group, start : start + gradient.shape[0]]
            for i in range(gradient.shape[0]):
                gradient[i] += partial[i]
        squares[k] = squared_norm(pieces[k : k + 1])
        start += gradient.shape[0]


@fast
def clip_factor(squares: float, max_grad_norm: float) -> tuple[float, float]:
    """Return the joint norm, root of ``squares``, and the factor of all gradients that bounds it; NaN stays NaN."""
    norm = math.sqrt(squares)
    factor = max_grad_norm / (norm + _CLIP_EPS)
    return norm, 1.0 if factor > 1.0 else factor


@fast
def adam_step(table: np.ndarray, factor: float, step: int, hyper: Hyperparameters) -> None:
    """
    Take step number ``step``, counted from 1, after multiplying the gradients of a table by ``factor``.

    Sources: Kingma and Ba 2015, arXiv 1412.6980 (Adam); Loshchilov and Hutter 2019, arXiv 1711.05101 (AdamW).
    """
    decoupled = hyper.decoupled != 0.0
    root = math.sqrt(1.0 - hyper.beta2**step)
    # `step_size` and `eps` contain the second moment's bias correction, which saves a division per parameter.
    step_size, eps = F(hyper.learning_rate * root / (1.0 - hyper.beta1**step)), F(hyper.eps * root)
    scale, keep1, keep2, add2 = F(factor), F(1.0 - hyper.beta1), F(hyper.beta2), F(1.0 - hyper.beta2)
    shrink = F(1.0 - hyper.learning_rate * hyper.weight_decay) if decoupled else F(1)
    decay = F(0) if decoupled else F(hyper.weight_decay)
    for k in range(table.shape[0]):
        size = table[k, SIZE]
        p, g = vector(table[k, PARAM], size), vector(table[k, GRAD], size)
        m, v = vector(table[k, MOMENT1], size), vector(table[k, MOMENT2], size)
        for i in range(size):
            clipped = g[i] * scale
            g[i] = clipped
            p_i = p[i] * shrink
            with_decay = clipped + decay * p_i
            m_i = m[i] + (with_decay - m[i]) * keep1
            v_i = v[i] * keep2 + add2 * with_decay * with_decay
            m[i] = m_i
            v[i] = v_i
            p[i] = p_i - step_size * (m_i / (np.sqrt(v_i) + eps))
