"""Forward and backward pass of one MLP: hidden layers with an activation, and a linear layer at the end."""

import numpy as np

from sb3_clipvf.compiled import fast
from sb3_clipvf.engines.kernels.elementwise import activate, add_bias, times_derivative
from sb3_clipvf.engines.kernels.memory import GRAD, PARAM, SILU, matrix, vector


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
        np.dot(gradients.T, inputs, matrix(table[first + 2 * k, GRAD], sizes[k + 1], sizes[k]))
        bias_gradient = vector(table[first + 2 * k + 1, GRAD], sizes[k + 1])
        bias_gradient[:] = np.float32(0)
        for i in range(n):
            row = gradients[i]
            for j in range(row.shape[0]):
                bias_gradient[j] += row[j]
        if k > 0:
            below = _gradient(work, sizes, n, k)
            np.dot(gradients, matrix(table[first + 2 * k, PARAM], sizes[k + 1], sizes[k]), below)
            kept = _pre_activation(work, sizes, n, k) if activation == SILU else inputs
            times_derivative(below, inputs, activation, kept)
