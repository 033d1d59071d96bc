"""A matrix product that is added to a matrix, which :func:`numpy.dot` cannot do."""

import numpy as np
from numba import types

from sb3_clipvf.common.jit import strict

_POINTER = types.CPointer(types.float32)  # type: ignore[no-untyped-call]

# numba's np.dot calls this function of BLAS, too: C := alpha op(A) op(B) + beta C, in column-major order.
_gemm = types.ExternalFunction(
    "numba_xxgemm",
    types.intc(
        types.char, types.char, types.char,  # kind of number, transposition of A and of B
        types.intp, types.intp, types.intp,  # rows and columns of C, columns of op(A)
        _POINTER, _POINTER, types.intp, _POINTER, types.intp,  # alpha, A, its leading dimension, B, the same
        _POINTER, _POINTER, types.intp,  # beta, C, its leading dimension
    ),
)  # fmt: skip
_FLOAT32, _NO_TRANSPOSE, _TRANSPOSE = ord("s"), ord("n"), ord("t")
_ZERO_AND_ONE = np.array([0.0, 1.0], np.float32)


@strict
def multiply_transposed(a: np.ndarray, b: np.ndarray, product: np.ndarray, adds: bool) -> None:
    """Compute ``a.T @ b``, or add it to ``product``; all arrays are float32 and C-contiguous."""
    n, n_rows = a.shape
    n_columns = b.shape[1]
    # Row by row, a matrix is its transpose column by column: product.T = b.T @ a.
    _gemm(
        _FLOAT32, _NO_TRANSPOSE, _TRANSPOSE, n_columns, n_rows, n,
        _ZERO_AND_ONE[1:].ctypes, b.ctypes, n_columns,
        a.ctypes, n_rows, _ZERO_AND_ONE[int(adds) :].ctypes, product.ctypes, n_columns,
    )  # fmt: skip
