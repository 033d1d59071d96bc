"""A barrier inside compiled code, at which threads wait for each other."""

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sb3_clipvf.common.jit import strict

# The system call by which a waiting thread leaves its core to other threads.
_yield_core = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())
_SPINS = 4000
_WORD = 8

# Indices of the counters that threads share: arrivals at the barrier, and whether a thread will never arrive.
ARRIVALS, CANCELLED = range(2)
N_COUNTERS = 2


@strict
def wait_for_all(counters: np.ndarray, n_threads: int, n_waits: int) -> bool:
    """
    Wait until all threads have called this ``n_waits`` times, and return False if one of them never will.

    ``counters`` are ``N_COUNTERS`` shared int64, first 0. This call counts, too.
    """
    if n_threads == 1:
        return True
    address = counters.ctypes.data
    _add(address + ARRIVALS * _WORD, 1)
    spins = 0
    while _read(address + ARRIVALS * _WORD) < n_threads * n_waits:
        if _read(address + CANCELLED * _WORD) != 0:
            return False
        spins += 1
        if spins > _SPINS:
            _yield_core()
    return True


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _as_pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_as_pointer(builder, arguments[0]), "seq_cst", align=_WORD)

    return types.int64(types.int64), generate


def _as_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())
