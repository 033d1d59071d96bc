"""Two threads inside compiled code: a barrier at which they wait for each other."""

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sb3_clipvf.common.jit import strict

# The system's call by which a waiting thread leaves the core to whoever needs it.
_leave_core = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())
_SPINS = 4000
_WORD = 8

# What threads share: how often they came to the barrier, and whether one of them will come no more.
ARRIVALS, GIVEN_UP = range(2)
N_COUNTERS = 2


def _as_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    signature = types.int64(types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _as_pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return signature, generate


@intrinsic
def _read(typing_context: Any, address: Any) -> Any:
    signature = types.int64(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_as_pointer(builder, arguments[0]), "seq_cst", align=_WORD)

    return signature, generate


@strict
def wait_for_all(counter: np.ndarray, n_threads: int, n_waits: int) -> bool:
    """
    Wait until all threads have come here as often as this one.

    :param counter: ``N_COUNTERS`` int64 that the threads share, 0 at first.
    :param n_threads: How many they are; 1 returns at once.
    :param n_waits: How often this thread has come here, this time included.
    :return: False if another thread will come no more.
    """
    if n_threads == 1:
        return True
    address = counter.ctypes.data
    _add(address + ARRIVALS * _WORD, 1)
    spins = 0
    while _read(address + ARRIVALS * _WORD) < n_threads * n_waits:
        if _read(address + GIVEN_UP * _WORD) != 0:
            return False
        spins += 1
        if spins > _SPINS:
            _leave_core()
    return True
