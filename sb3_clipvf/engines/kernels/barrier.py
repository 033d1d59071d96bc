"""A barrier inside compiled code, at which threads wait for each other, and at which all can end together."""

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

# Indices of the counters that threads share: arrivals at the barrier, whether a thread will never arrive, whether all
# are to end at the next minibatch, and the number of the minibatch before whose step they end.
ARRIVALS, CANCELLED, INTERRUPTED, LAST = range(4)
N_COUNTERS = 4


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


@strict
def is_interrupted(counters: np.ndarray) -> bool:
    """Return whether the update is to end before the next step."""
    return _read(counters.ctypes.data + INTERRUPTED * _WORD) != 0


@strict
def end_if_interrupted(counters: np.ndarray, n_minibatches: int) -> None:
    """Before the barrier of a minibatch, make all threads end after it, if the update is interrupted."""
    if is_interrupted(counters):
        counters[LAST] = n_minibatches  # each thread writes this number: none has passed the barrier


@strict
def ends(counters: np.ndarray, n_minibatches: int) -> bool:
    """After the barrier of a minibatch, return whether all threads end; another one may be at the next minibatch."""
    return _read(counters.ctypes.data + LAST * _WORD) == n_minibatches


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
