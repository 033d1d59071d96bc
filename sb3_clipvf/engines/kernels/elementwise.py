"""
exp, tanh and activations in float32, written so that LLVM turns their loops into vector instructions.

Parity tests: ``tests/test_kernels.py::TestElementwise`` with NumPy in double precision (exp, tanh); with torch's
activations and their derivatives ``tests/test_engines.py::TestContract``, which has a policy for each.
"""

import math

import numpy as np

from sb3_clipvf.common.jit import exact, fast
from sb3_clipvf.engines.kernels.inputs import ELU, LEAKY_RELU, RELU, SILU, TANH

F = np.float32

LEAKY_SLOPE = F(0.01)
"""torch.nn.LeakyReLU's default."""

_EXP_MAX, _EXP_MIN = F(88.72283), F(-87.33654)
_LOG2_E, _LN2_HIGH, _LN2_LOW = F(1.44269504088896341), F(0.693359375), F(-2.12194440e-4)

_TANH_MAX = F(19)
_ELU_MIN = F(-19)  # below it, ELU is -1 in float32
_ROUNDS = F(1.5 * 2**23)
_BITS_OF_ONE = np.int32(127 << 23)


@exact
def exp32(x: float) -> float:
    """
    Return exp(x) of a float32 to about one unit in the last place; 0 below the smallest normal number.

    Source of the reduction and the coefficients: Cephes, ``expf`` (Moshier 1987).
    """
    # The conversion to an integer inside needs a number; NaN comes back at the end.
    y = _exp_of_normal(min(max(x, _EXP_MIN), _EXP_MAX) if x == x else F(0))
    if x > _EXP_MAX:
        y = F(np.inf)
    if x < _EXP_MIN:
        y = F(0)
    return y if x == x else x


@exact
def tanh32(x: float) -> float:
    """
    Return tanh(x) of a float32 to about two and a half units in the last place.

    ``e / (e + 2)`` with ``e = exp(2 |x|) - 1``: one formula is accurate for all x.
    """
    doubled = abs(x) + abs(x)
    # Above it tanh is 1 in float32. NaN stays NaN to the end.
    e = _exp_minus_1(_TANH_MAX if doubled > _TANH_MAX else doubled)
    return math.copysign(e / (e + F(2)), x)


@exact
def elu32(x: float) -> float:
    """Return ELU(x), which is exp(x) - 1 below 0, of a float32 to about two units in the last place."""
    # NaN is not above the bound, and comes back at the end.
    bounded = x if x > _ELU_MIN else _ELU_MIN
    y = _exp_minus_1(bounded if bounded < F(0) else F(0))
    return y if x <= F(0) else x


@exact
def _exp_minus_1(x: float) -> float:
    """
    Return exp(x) - 1 for |x| < 87, summed without the 1, so that it is accurate near 0.

    Source of the coefficients: NumPy's ``Chebyshev.fit`` of degree 4 to ``(exp(r) - 1 - r) / r^2`` at 400 Chebyshev
    nodes, |r| <= 1.0005 ln(2) / 2.
    """
    # A sum this large keeps no fraction, and its last bits are the whole number.
    shifted = x * _LOG2_E + _ROUNDS
    n = shifted - _ROUNDS
    r = _minus_n_ln2(x, n)
    p = F(1.3933688e-3)
    p = p * r + F(8.3632050e-3)
    p = p * r + F(4.1666463e-2)
    p = p * r + F(1.6666576e-1)
    p = p * r + F(0.5)
    p = p * (r * r) + r
    power: float = _float_of_bits((_bits_of_float(shifted) << np.int32(23)) + _BITS_OF_ONE)  # 2^n
    return power * p + (power - F(1))


@exact
def _minus_n_ln2(x: float, n: float) -> float:
    """Return x - n ln(2), where ln(2) has more digits than a float32."""
    r = x - n * _LN2_HIGH
    return r - n * _LN2_LOW


@exact
def _exp_of_normal(x: float) -> float:
    """Return exp of a number whose exponential is a normal float32."""
    n = np.floor(x * _LOG2_E + F(0.5))
    r = _minus_n_ln2(x, n)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    # 2^n in two factors: 2^128 is no float32, though the largest exp is.
    half = np.int32(n) >> np.int32(1)
    rest = np.int32(n) - half
    y = (p * (r * r) + r) + F(1)
    y = y * _float_of_bits((half + np.int32(127)) << np.int32(23))
    return y * _float_of_bits((rest + np.int32(127)) << np.int32(23))


@exact
def _float_of_bits(bits: int) -> float:
    return np.int32(bits).view(np.float32)


@exact
def _bits_of_float(number: float) -> int:
    return np.float32(number).view(np.int32)


@fast
def copy_rows(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array of shape ``(n, k)``. Slice assignment takes 2 s more to compile, for its error message."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@fast
def add_bias(values: np.ndarray, bias: np.ndarray) -> None:
    """Add a bias, shape ``(width,)``, to each row of ``values``, shape ``(n, width)``, in place."""
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(row.shape[0]):
            row[j] += bias[j]


@fast
def activate(values: np.ndarray, bias: np.ndarray, kind: int, inputs: np.ndarray) -> None:
    """
    Add a bias, shape ``(width,)``, to each row of ``values``, shape ``(n, width)``, and apply an activation, in place.

    ``inputs``, of the same shape, is filled with the activation's inputs for SILU, whose derivative needs them.
    """
    if kind == TANH:
        for i in range(values.shape[0]):
            row = values[i]
            for j in range(row.shape[0]):
                row[j] = tanh32(row[j] + bias[j])
    elif kind == RELU:
        for i in range(values.shape[0]):
            row = values[i]
            for j in range(row.shape[0]):
                x = row[j] + bias[j]
                row[j] = F(0) if x < F(0) else x
    elif kind == ELU:
        for i in range(values.shape[0]):
            row = values[i]
            for j in range(row.shape[0]):
                row[j] = elu32(row[j] + bias[j])
    elif kind == LEAKY_RELU:
        for i in range(values.shape[0]):
            row = values[i]
            for j in range(row.shape[0]):
                x = row[j] + bias[j]
                row[j] = x if x > F(0) else LEAKY_SLOPE * x
    elif kind == SILU:
        for i in range(values.shape[0]):
            row, kept = values[i], inputs[i]
            for j in range(row.shape[0]):
                x = row[j] + bias[j]
                kept[j] = x
                row[j] = x / (F(1) + exp32(-x))


@fast
def times_derivative(gradients: np.ndarray, values: np.ndarray, kind: int, inputs: np.ndarray) -> None:
    """
    Multiply ``gradients`` of an activation's outputs by its derivative, in place; at 0 it is torch's.

    ``values`` are the outputs, and ``inputs`` the inputs if it is SILU, all of shape ``(n, width)``.
    """
    g, y, x = gradients.reshape(gradients.size), values.reshape(values.size), inputs.reshape(inputs.size)
    if kind == TANH:
        for k in range(g.shape[0]):
            g[k] *= F(1) - y[k] * y[k]
    elif kind == RELU:
        for k in range(g.shape[0]):
            g[k] = g[k] if y[k] > F(0) else F(0)
    elif kind == ELU:
        for k in range(g.shape[0]):
            g[k] *= F(1) if y[k] > F(0) else y[k] + F(1)
    elif kind == LEAKY_RELU:
        for k in range(g.shape[0]):
            g[k] *= F(1) if y[k] > F(0) else LEAKY_SLOPE
    elif kind == SILU:
        for k in range(g.shape[0]):
            sigmoid = F(1) / (F(1) + exp32(-x[k]))
            g[k] *= sigmoid * (F(1) + x[k] * (F(1) - sigmoid))
