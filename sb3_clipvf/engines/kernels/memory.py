"""
How kernels see the tensors of a policy: a table of addresses, and what the columns of the tables mean.

One compiled kernel serves every architecture this way; one that took tuples of arrays would be compiled for each depth.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from sb3_clipvf.common.jit import strict

# Columns of the parameter table, one row a tensor: its size, then addresses.
SIZE, PARAM, GRAD, MOMENT1, MOMENT2 = range(5)
N_COLUMNS = 5

# The kinds of action distribution (a state-dependent one is gSDE's Gaussian), and of activation.
CATEGORICAL, BERNOULLI, GAUSSIAN, STATE_DEPENDENT = range(4)
TANH, RELU, ELU, LEAKY_RELU, SILU = range(5)

# Places in the `codes` of a policy.
DIST, ACTIVATION, ACTION_DIM, DIST_DIM, USE_EXPLN = range(5)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    signature = types.voidptr(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return signature, generate


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits are those of an int32."""
    signature = types.float32(types.int32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return signature, generate


@intrinsic
def bits_of_float(typing_context: Any, number: Any) -> Any:
    """The bits of a float32 as an int32."""
    signature = types.int32(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return signature, generate


@strict
def vector(address: int, size: int) -> np.ndarray:
    """
    The float32 vector at an address.

    :param address: Of its first element; its owner must outlive the call.
    :param size: Elements.
    :return: Shape ``(size,)``, no copy.
    """
    return carray(_pointer(address), (size,), np.float32)


@strict
def matrix(address: int, n_rows: int, n_columns: int) -> np.ndarray:
    """
    The float32 matrix at an address.

    :param address: Of its first element; rows follow each other without a gap.
    :param n_rows: Rows.
    :param n_columns: Columns.
    :return: Shape ``(n_rows, n_columns)``, no copy.
    """
    return carray(_pointer(address), (n_rows, n_columns), np.float32)
