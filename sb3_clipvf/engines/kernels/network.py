"""Forward and backward pass of one MLP: hidden layers with an activation, and a linear layer at the end."""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import activate, add_bias, times_derivative
from sb3_clipvf.engines.kernels.memory import GRAD, PARAM, SILU, matrix, vector

_NARROW_OUTPUTS, _NARROW_INPUTS, _MOST_WEIGHTS = 16, 8, 4096
"""Widths and sizes of layers up to which a product of our own was measured to be faster than BLAS's."""

_BLOCK = 256
"""Rows that are summed by themselves: the more numbers a float32 sum has, the less it feels the next one."""


def workspace_size(sizes: np.ndarray) -> int:
    """
    How much memory :func:`forward` and :func:`backward` need for each row.

    :param sizes: Width of the input and of each layer.
    :return: float32 numbers: outputs and SiLU's inputs of each layer, and two gradients of the widest.
    """
    return int(2 * sizes.sum() + 2 * sizes.max())


@fast
def layer(work: np.ndarray, sizes: np.ndarray, n: int, index: int) -> np.ndarray:
    """
    Where the outputs of a layer lie.

    :param work: The network's workspace.
    :param sizes: Width of the input and of each layer.
    :param n: Rows of this pass.
    :param index: 0 is the input, the last one the network's output.
    :return: Shape ``(n, sizes[index])``, no copy.
    """
    start = 0
    for k in range(index):
        start += n * sizes[k]
    return work[start : start + n * sizes[index]].reshape(n, sizes[index])


@fast
def _pre_activation(work: np.ndarray, sizes: np.ndarray, n: int, index: int) -> np.ndarray:
    return layer(work[n * sizes.sum() :], sizes, n, index)


@fast
def output_gradient(work: np.ndarray, sizes: np.ndarray, n: int) -> np.ndarray:
    """
    Where :func:`backward` expects the gradient of the network's output.

    :param work: The network's workspace.
    :param sizes: Width of the input and of each layer.
    :param n: Rows of this pass.
    :return: Shape ``(n, sizes[-1])``, no copy.
    """
    return _gradient(work, sizes, n, len(sizes) - 1)


@fast
def _gradient(work: np.ndarray, sizes: np.ndarray, n: int, index: int) -> np.ndarray:
    # Two buffers in turn: each layer reads one and writes the other.
    start = 2 * n * sizes.sum() + (index % 2) * n * sizes.max()
    return work[start : start + n * sizes[index]].reshape(n, sizes[index])


@fast
def forward(work: np.ndarray, sizes: np.ndarray, n: int, table: np.ndarray, first: int, activation: int) -> np.ndarray:
    """
    Compute the network's output from what lies in layer 0 of its workspace.

    :param work: The network's workspace.
    :param sizes: Width of the input and of each layer.
    :param n: Rows.
    :param table: Parameters; weight and bias of each layer follow each other.
    :param first: Row of the first layer's weight.
    :param activation: Of the hidden layers.
    :return: Shape ``(n, sizes[-1])``, in the workspace.
    """
    n_layers = len(sizes) - 1
    for k in range(n_layers):
        weight = matrix(table[first + 2 * k, PARAM], sizes[k + 1], sizes[k])
        bias = vector(table[first + 2 * k + 1, PARAM], sizes[k + 1])
        outputs = layer(work, sizes, n, k + 1)
        np.dot(layer(work, sizes, n, k), weight.T, outputs)
        if k < n_layers - 1:
            kept = _pre_activation(work, sizes, n, k + 1) if activation == SILU else outputs
            activate(outputs, bias, activation, kept)
        else:
            add_bias(outputs, bias)
    return layer(work, sizes, n, n_layers)


@fast
def backward(work: np.ndarray, sizes: np.ndarray, n: int, table: np.ndarray, first: int, activation: int) -> None:
    """
    Compute the gradients of all parameters from the one in :func:`output_gradient`, after :func:`forward`.

    :param work: The network's workspace.
    :param sizes: Width of the input and of each layer.
    :param n: Rows.
    :param table: Parameters; their gradients are overwritten.
    :param first: Row of the first layer's weight.
    :param activation: Of the hidden layers.
    """
    for k in range(len(sizes) - 2, -1, -1):
        gradients = _gradient(work, sizes, n, k + 1)
        inputs = layer(work, sizes, n, k)
        weight_gradient(gradients, inputs, matrix(table[first + 2 * k, GRAD], sizes[k + 1], sizes[k]))
        _add_rows(gradients, vector(table[first + 2 * k + 1, GRAD], sizes[k + 1]))
        if k > 0:
            below = _gradient(work, sizes, n, k)
            np.dot(gradients, matrix(table[first + 2 * k, PARAM], sizes[k + 1], sizes[k]), below)
            kept = _pre_activation(work, sizes, n, k) if activation == SILU else inputs
            times_derivative(below, inputs, activation, kept)


@fast
def weight_gradient(gradients: np.ndarray, inputs: np.ndarray, weight: np.ndarray) -> None:
    """
    Compute the gradient of a layer's weight, ``gradients.T @ inputs``.

    BLAS rearranges both factors before it multiplies them, which takes longer than the product where one is narrow.

    :param gradients: With respect to the layer's outputs, shape ``(n, outputs)``.
    :param inputs: Of the layer, shape ``(n, inputs)``.
    :param weight: Filled, shape ``(outputs, inputs)``.
    """
    n_outputs, n_inputs = weight.shape
    # Of one output, BLAS makes a product with a vector.
    is_small = n_outputs > 1 and weight.size <= _MOST_WEIGHTS
    if is_small and n_outputs <= _NARROW_OUTPUTS:
        _multiply_narrow(gradients, inputs, weight)
    elif is_small and n_inputs <= _NARROW_INPUTS:
        turned = np.empty((n_inputs, n_outputs), np.float32)
        _multiply_narrow(inputs, gradients, turned)
        for i in range(n_outputs):
            for j in range(n_inputs):
                weight[i, j] = turned[j, i]
    else:
        np.dot(gradients.T, inputs, weight)


@fast
def _multiply_narrow(narrow: np.ndarray, wide: np.ndarray, product: np.ndarray) -> None:
    """``narrow.T @ wide``, as the sum of those of blocks of rows."""
    n = narrow.shape[0]
    part = np.empty_like(product)
    product[:] = np.float32(0)
    for start in range(0, n, _BLOCK):
        end = min(n, start + _BLOCK)
        part[:] = np.float32(0)
        _add_products(narrow[start:end], wide[start:end], part)
        product += part


@fast
def _add_products(narrow: np.ndarray, wide: np.ndarray, product: np.ndarray) -> None:
    """Four rows at a time, so that the product is written a quarter as often."""
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
def _add_rows(rows: np.ndarray, total: np.ndarray) -> None:
    """Sum rows, shape ``(n, width)``, as the sum of those of blocks."""
    part = np.empty_like(total)
    total[:] = np.float32(0)
    for start in range(0, rows.shape[0], _BLOCK):
        part[:] = np.float32(0)
        for i in range(start, min(rows.shape[0], start + _BLOCK)):
            row = rows[i]
            for j in range(row.shape[0]):
                part[j] += row[j]
        total += part
