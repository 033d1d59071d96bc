"""
Views of the policy's and the optimizer's tensors, which kernels find by a table of addresses.

Therefore, one compiled kernel serves every architecture. With tuples of arrays, one would be compiled for each depth.
"""

from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from sb3_clipvf.common.jit import strict

# Columns of the parameter table, one row per tensor: its number of elements, then addresses.
SIZE, PARAM, GRAD, MOMENT1, MOMENT2 = range(5)
N_COLUMNS = 5


@strict
def vector(address: int, size: int) -> np.ndarray:
    """Return the float32 vector at an address, shape ``(size,)``, no copy; its owner must outlive the call."""
    return carray(_pointer(address), (size,), np.float32)


@strict
def matrix(address: int, n_rows: int, n_columns: int) -> np.ndarray:
    """Return the float32 matrix at an address, row by row without gaps, shape ``(n_rows, n_columns)``, no copy."""
    return carray(_pointer(address), (n_rows, n_columns), np.float32)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate
