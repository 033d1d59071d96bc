"""Two threads inside compiled code: a barrier at which they wait for each other."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sb3_clipvf.compiled import strict

# The libc call; waiting threads leave the core to whoever needs it.
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_SPINS = 4000
_WORD = 8


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
def wait_for_all(counter: np.ndarray, n_threads: int, n_waits: int) -> None:
    """
    Wait until all threads have come here as often as this one.

    :param counter: One int64 that the threads share, 0 at first.
    :param n_threads: How many they are; 1 returns at once.
    :param n_waits: How often this thread has come here, this time included.
    """
    if n_threads == 1:
        return
    address = counter.ctypes.data
    _add(address, 1)
    spins = 0
    while _read(address) < n_threads * n_waits:
        spins += 1
        if spins > _SPINS:
            _sched_yield()
