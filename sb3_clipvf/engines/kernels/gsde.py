"""
gSDE: a Gaussian whose spread, and whose noise, are functions of the actor's last hidden layer (the latents).

variance_ij = 1e-6 + sum_l latent_il^2 std_lj^2, noise_ij = sum_l latent_il matrix_lj with matrix_lj ~ N(0, std_lj^2).
The formulas are those of SB3's ``StateDependentNoiseDistribution``, which passes no gradient to the latents through
the variance; the contract suite of tests/test_engines.py compares the two.

Source: Raffin et al. 2021, arXiv 2005.05719, section 3.
"""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.data import Network, log_std_of
from sb3_clipvf.engines.kernels.elementwise import exp32
from sb3_clipvf.engines.kernels.memory import DIST, GRAD, PARAM, SIZE, STATE_DEPENDENT, USE_EXPLN, matrix
from sb3_clipvf.engines.kernels.network import layer

F = np.float32
# SB3's: added to the variance, and to what `expln` takes the logarithm of.
_EPSILON = F(1e-6)


@fast
def log_stds(network: Network, work: np.ndarray, n: int) -> np.ndarray:
    """
    Log standard deviations of the actions after the actor's forward pass.

    :param network: The policy.
    :param work: The actor's workspace.
    :param n: Rows of that pass.
    :return: Shape ``(n, action_dim)``; ``(1, action_dim)`` where all states share them; empty if it is no Gaussian.
    """
    if network.codes[DIST] != STATE_DEPENDENT:
        return log_std_of(network, PARAM)
    latents = _latents(network, work, n)
    log_std, expln = _weights_log_std(network, PARAM), network.codes[USE_EXPLN]
    width, k = latents.shape[1], network.actor_sizes[-1]
    weights = np.empty((width, k), np.float32)
    for m in range(width):
        for j in range(k):
            std = _std(log_std[m, j if log_std.shape[1] > 1 else 0], expln)
            weights[m, j] = std * std
    rows = np.dot(latents * latents, weights)
    for i in range(n):
        for j in range(k):
            rows[i, j] = F(0.5) * np.log(rows[i, j] + _EPSILON)
    return rows


@fast
def log_std_gradients(
    network: Network, work: np.ndarray, n: int, log_std_rows: np.ndarray, row_gradients: np.ndarray
) -> None:
    """
    Overwrite the gradient of gSDE's parameter.

    :param network: A policy that explores with gSDE.
    :param work: The actor's workspace after the forward pass.
    :param n: Rows of that pass.
    :param log_std_rows: From :func:`log_stds`, shape ``(n, action_dim)``.
    :param row_gradients: Of the loss with respect to them; overwritten by those with respect to the variances.
    """
    for i in range(n):
        for j in range(row_gradients.shape[1]):
            row_gradients[i, j] *= F(0.5) * exp32(F(-2) * log_std_rows[i, j])
    latents = _latents(network, work, n)
    squares = latents * latents
    by_weight = np.dot(squares.T, row_gradients)
    log_std, target = _weights_log_std(network, PARAM), _weights_log_std(network, GRAD)
    expln = network.codes[USE_EXPLN]
    target[:] = F(0)
    for m in range(by_weight.shape[0]):
        for j in range(by_weight.shape[1]):
            column = j if log_std.shape[1] > 1 else 0
            x = log_std[m, column]
            target[m, column] += F(2) * _std(x, expln) * _std_slope(x, expln) * by_weight[m, j]


@fast
def noise_of(network: Network, work: np.ndarray, n: int, matrices: np.ndarray) -> np.ndarray:
    """
    What exploration matrices add to the means.

    :param network: A policy that explores with gSDE.
    :param work: The actor's workspace after the forward pass.
    :param n: Rows of that pass.
    :param matrices: One matrix for all rows, or one for each, below each other; shape
        ``(latent_dim, action_dim)`` or ``(n * latent_dim, action_dim)``.
    :return: Shape ``(n, action_dim)``.
    """
    latents = _latents(network, work, n)
    width = latents.shape[1]
    noise = np.zeros((n, matrices.shape[1]), np.float32)
    for i in range(n):
        first = i * width if matrices.shape[0] > width else 0
        for m in range(width):
            row = matrices[first + m]
            for j in range(row.shape[0]):
                noise[i, j] += latents[i, m] * row[j]
    return noise


@fast
def _latents(network: Network, work: np.ndarray, n: int) -> np.ndarray:
    """Outputs of the last hidden layer; without one, the observations. Shape ``(n, latent_dim)``, no copy."""
    sizes = network.actor_sizes
    return layer(work, sizes, n, len(sizes) - 2)


@fast
def _weights_log_std(network: Network, column: int) -> np.ndarray:
    """The parameter or its gradient, shape ``(latent_dim, action_dim)``, or ``(latent_dim, 1)``; no copy."""
    width, row = network.actor_sizes[-2], network.log_std_row
    return matrix(network.table[row, column], width, network.table[row, SIZE] // width)


@fast
def _std(log_std: float, expln: int) -> float:
    """SB3's ``get_std``: exp, or with ``use_expln`` log(1 + x) + 1 above 0."""
    if expln != 0 and log_std > F(0):
        return np.log1p(log_std + _EPSILON) + F(1)
    return exp32(log_std)


@fast
def _std_slope(log_std: float, expln: int) -> float:
    """Derivative of :func:`_std`."""
    if expln != 0 and log_std > F(0):
        return F(1) / (F(1) + (log_std + _EPSILON))
    return exp32(log_std)
