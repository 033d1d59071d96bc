"""
gSDE: a Gaussian whose spread, and whose noise, are functions of the actor's last hidden layer (the latents).

variance_ij = 1e-6 + sum_l latent_il^2 std_lj^2, noise_ij = sum_l latent_il matrix_lj with matrix_lj ~ N(0, std_lj^2).

The kernels restate SB3's ``StateDependentNoiseDistribution``: no gradient passes to the latents through the variance.
Parity tests: ``tests/test_engines.py::TestContract`` with the policies ``gsde*`` (updates), and
``tests/test_native.py::TestActingWithGSDE`` (noise).

Source: Raffin et al. 2021, arXiv 2005.05719, section 3.
"""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import exp32
from sb3_clipvf.engines.kernels.inputs import Policy
from sb3_clipvf.engines.kernels.memory import GRAD, PARAM, SIZE, matrix
from sb3_clipvf.engines.kernels.mlp import layer

F = np.float32
# SB3's: added to the variance, and to the arguments of logarithms in `expln`.
_EPSILON = F(1e-6)


@fast
def log_stds(policy: Policy, workspace: np.ndarray, n: int) -> np.ndarray:
    """Return log standard deviations of the actions in ``n`` states, ``(n, k)``, after the actor's forward pass."""
    latents = _latents(policy, workspace, n)
    log_std = _weights_log_std(policy, PARAM)
    width, k = latents.shape[1], policy.actor.sizes[-1]
    weights = np.empty((width, k), np.float32)
    for m in range(width):
        for j in range(k):
            std = _std(log_std[m, j if log_std.shape[1] > 1 else 0], policy.use_expln)
            weights[m, j] = std * std
    rows = np.empty((n, k), np.float32)
    np.dot(_squares(latents), weights, rows)
    for i in range(n):
        for j in range(k):
            rows[i, j] = F(0.5) * np.log(rows[i, j] + _EPSILON)
    return rows


@fast
def log_std_gradients(
    policy: Policy, workspace: np.ndarray, n: int, log_std_rows: np.ndarray, row_gradients: np.ndarray, adds: bool
) -> None:
    """
    Overwrite the gradient of gSDE's parameter, or add to it, after the actor's forward pass.

    ``log_std_rows`` come from :func:`log_stds`. ``row_gradients`` are the loss's gradients with respect to them, and
    are overwritten with those with respect to the variances. Both have the shape ``(n, k)``.
    """
    for i in range(n):
        for j in range(row_gradients.shape[1]):
            row_gradients[i, j] *= F(0.5) * exp32(F(-2) * log_std_rows[i, j])
    latents = _latents(policy, workspace, n)
    by_weight = np.empty((latents.shape[1], row_gradients.shape[1]), np.float32)
    np.dot(_squares(latents).T, row_gradients, by_weight)
    log_std, target = _weights_log_std(policy, PARAM), _weights_log_std(policy, GRAD)
    if not adds:
        target[:] = F(0)
    for m in range(by_weight.shape[0]):
        for j in range(by_weight.shape[1]):
            column = j if log_std.shape[1] > 1 else 0
            x = log_std[m, column]
            target[m, column] += F(2) * _std(x, policy.use_expln) * _std_slope(x, policy.use_expln) * by_weight[m, j]


@fast
def noise_of(policy: Policy, workspace: np.ndarray, n: int, matrices: np.ndarray) -> np.ndarray:
    """
    Return the noise that exploration matrices add to the means, shape ``(n, k)``, after the actor's forward pass.

    ``matrices`` has the shape ``(latent_dim, k)``, for all rows, or ``(n * latent_dim, k)``, one for each row.
    """
    latents = _latents(policy, workspace, n)
    width = latents.shape[1]
    noise = np.empty((n, matrices.shape[1]), np.float32)
    for i in range(n):
        for j in range(noise.shape[1]):
            noise[i, j] = F(0)
        first = i * width if matrices.shape[0] > width else 0
        for m in range(width):
            row = matrices[first + m]
            for j in range(row.shape[0]):
                noise[i, j] += latents[i, m] * row[j]
    return noise


@fast
def _latents(policy: Policy, workspace: np.ndarray, n: int) -> np.ndarray:
    """Return the last hidden layer, or the observations if there is none, shape ``(n, latent_dim)``, no copy."""
    return layer(policy.actor, workspace, n, len(policy.actor.sizes) - 2)


@fast
def _squares(latents: np.ndarray) -> np.ndarray:
    squares = np.empty((latents.shape[0], latents.shape[1]), np.float32)
    for i in range(latents.shape[0]):
        for m in range(latents.shape[1]):
            squares[i, m] = latents[i, m] * latents[i, m]
    return squares


@fast
def _weights_log_std(policy: Policy, column: int) -> np.ndarray:
    """Return the parameter or its gradient, shape ``(latent_dim, k)`` or ``(latent_dim, 1)``, no copy."""
    width, row = policy.actor.sizes[-2], policy.actor.table[-1]
    return matrix(row[column], width, row[SIZE] // width)


@fast
def _std(log_std: float, expln: int) -> float:
    """Return SB3's ``get_std``: exp, or with ``use_expln`` log(1 + x) + 1 above 0."""
    if expln != 0 and log_std > F(0):
        return np.log1p(log_std + _EPSILON) + F(1)
    return exp32(log_std)


@fast
def _std_slope(log_std: float, expln: int) -> float:
    """Return the derivative of :func:`_std`."""
    if expln != 0 and log_std > F(0):
        return F(1) / (F(1) + (log_std + _EPSILON))
    return exp32(log_std)
