"""
Forward and backward pass of one MLP: hidden layers with an activation, and a linear layer at the end.

A workspace, float32, holds outputs and gradients of the layers; :func:`workspace_size` is its size for a row. Parity
tests: ``tests/test_engines.py::TestContract``; ``tests/test_kernels.py::TestWeightGradient`` for products without BLAS.
"""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import activate, add_bias, times_derivative
from sb3_clipvf.engines.kernels.inputs import SILU, Mlp
from sb3_clipvf.engines.kernels.memory import GRAD, PARAM, matrix, vector
from sb3_clipvf.engines.kernels.products import multiply_transposed

_NARROW_OUTPUTS, _NARROW_INPUTS, _MOST_WEIGHTS = 16, 8, 4096
"""Largest widths and sizes of layers at which products without BLAS were measured to be faster than BLAS's."""

_BLOCK = 256
"""Rows of a partial sum. Partial sums limit the rounding error, which grows with the length of a float32 sum."""


def workspace_size(sizes: np.ndarray) -> int:
    """Return the float32 numbers per row: outputs and SiLU's inputs of each layer, and two gradients of the widest."""
    return int(2 * sizes.sum() + 2 * sizes.max())


@fast
def layer(mlp: Mlp, workspace: np.ndarray, n: int, index: int) -> np.ndarray:
    """
    Return the outputs of a layer for ``n`` rows, shape ``(n, sizes[index])``, no copy.

    Layer 0 is the network's input, and the last one its output.
    """
    start = 0
    for k in range(index):
        start += n * mlp.sizes[k]
    return workspace[start : start + n * mlp.sizes[index]].reshape(n, mlp.sizes[index])


@fast
def output_gradient(mlp: Mlp, workspace: np.ndarray, n: int) -> np.ndarray:
    """Return where :func:`backward` reads the gradient of the network's output, shape ``(n, sizes[-1])``, no copy."""
    return _gradient(mlp, workspace, n, len(mlp.sizes) - 1)


@fast
def forward(mlp: Mlp, workspace: np.ndarray, n: int) -> np.ndarray:
    """Compute the network's output, shape ``(n, sizes[-1])`` in the workspace, from its layer 0."""
    sizes, n_layers = mlp.sizes, len(mlp.sizes) - 1
    for k in range(n_layers):
        weight = matrix(mlp.table[2 * k, PARAM], sizes[k + 1], sizes[k])
        bias = vector(mlp.table[2 * k + 1, PARAM], sizes[k + 1])
        outputs = layer(mlp, workspace, n, k + 1)
        np.dot(layer(mlp, workspace, n, k), weight.T, outputs)
        if k < n_layers - 1:
            kept = _pre_activation(mlp, workspace, n, k + 1) if mlp.activation == SILU else outputs
            activate(outputs, bias, mlp.activation, kept)
        else:
            add_bias(outputs, bias)
    return layer(mlp, workspace, n, n_layers)


@fast
def backward(mlp: Mlp, workspace: np.ndarray, n: int, adds: bool) -> None:
    """
    Overwrite the gradients of all weights and biases, or add to them.

    They follow from :func:`output_gradient`, after :func:`forward`.
    """
    sizes = mlp.sizes
    for k in range(len(sizes) - 2, -1, -1):
        gradients = _gradient(mlp, workspace, n, k + 1)
        inputs = layer(mlp, workspace, n, k)
        weight_gradient(gradients, inputs, matrix(mlp.table[2 * k, GRAD], sizes[k + 1], sizes[k]), adds)
        _add_rows(gradients, vector(mlp.table[2 * k + 1, GRAD], sizes[k + 1]), adds)
        if k > 0:
            below = _gradient(mlp, workspace, n, k)
            np.dot(gradients, matrix(mlp.table[2 * k, PARAM], sizes[k + 1], sizes[k]), below)
            kept = _pre_activation(mlp, workspace, n, k) if mlp.activation == SILU else inputs
            times_derivative(below, inputs, mlp.activation, kept)


@fast
def _pre_activation(mlp: Mlp, workspace: np.ndarray, n: int, index: int) -> np.ndarray:
    return layer(mlp, workspace[n * _sum_and_largest(mlp.sizes)[0] :], n, index)


@fast
def _gradient(mlp: Mlp, workspace: np.ndarray, n: int, index: int) -> np.ndarray:
    # Two buffers in turn: each layer reads one and writes the other.
    total, largest = _sum_and_largest(mlp.sizes)
    start = 2 * n * total + (index % 2) * n * largest
    return workspace[start : start + n * mlp.sizes[index]].reshape(n, mlp.sizes[index])


@fast
def _sum_and_largest(sizes: np.ndarray) -> tuple[int, int]:
    """Return the sum and the maximum of sizes. NumPy's functions take half a second to compile."""
    total, largest = 0, 0
    for size in sizes:
        total += size
        largest = size if size > largest else largest
    return total, largest


@fast
def weight_gradient(gradients: np.ndarray, inputs: np.ndarray, weight: np.ndarray, adds: bool) -> None:
    """
    Compute the gradient of a layer's weight, ``gradients.T @ inputs``, shape ``(n_outputs, n_inputs)``, or add it.

    BLAS rearranges both factors before it multiplies them, which takes longer than the product if one is narrow.
    """
    n_outputs, n_inputs = weight.shape
    # BLAS has a faster way for one output, a product with a vector.
    is_small = n_outputs > 1 and weight.size <= _MOST_WEIGHTS
    if is_small and n_outputs <= _NARROW_OUTPUTS:
        _multiply_narrow(gradients, inputs, weight, adds)
    elif is_small and n_inputs <= _NARROW_INPUTS:
        turned = np.empty((n_inputs, n_outputs), np.float32)
        _multiply_narrow(inputs, gradients, turned, False)
        for i in range(n_outputs):
            for j in range(n_inputs):
                weight[i, j] = turned[j, i] + (weight[i, j] if adds else np.float32(0))
    else:
        multiply_transposed(gradients, inputs, weight, adds)


@fast
def _multiply_narrow(narrow: np.ndarray, wide: np.ndarray, product: np.ndarray, adds: bool) -> None:
    """Compute ``narrow.T @ wide`` as a sum over blocks of rows, or add it."""
    n = narrow.shape[0]
    part = np.empty_like(product)
    if not adds:
        product[:] = np.float32(0)
    for start in range(0, n, _BLOCK):
        end = min(n, start + _BLOCK)
        part[:] = np.float32(0)
        _add_products(narrow[start:end], wide[start:end], part)
        product += part


@fast
def _add_products(narrow: np.ndarray, wide: np.ndarray, product: np.ndarray) -> None:
    """Add ``narrow.T @ wide``, four rows at a time, so that the product is written a quarter as often."""
    n, k = narrow.shape
    whole = n - n % 4
    for i in range(0, whole, 4):
        row0, row1, row2, row3 = wide[i], wide[i + 1], wide[i + 2], wide[i + 3]
        for j in range(k):
            a, b, c, d = narrow[i, j], narrow[i + 1, j], narrow[i + 2, j], narrow[i + 3, j]
            sums = product[j]
            for m in range(sums.shape[0]):
                sums[m] += a * row0[m] + b * row1[m] + c * row2[m] + d * row3[m]
    for i in range(whole, n):
        row = wide[i]
        for j in range(k):
            a, sums = narrow[i, j], product[j]
            for m in range(sums.shape[0]):
                sums[m] += a * row[m]


@fast
def _add_rows(rows: np.ndarray, total: np.ndarray, adds: bool) -> None:
    """Sum rows, shape ``(n, width)``, as a sum over blocks of rows, or add them."""
    part = np.empty_like(total)
    if not adds:
        total[:] = np.float32(0)
    for start in range(0, rows.shape[0], _BLOCK):
        part[:] = np.float32(0)
        for i in range(start, min(rows.shape[0], start + _BLOCK)):
            row = rows[i]
            for j in range(row.shape[0]):
                part[j] += row[j]
        total += part
