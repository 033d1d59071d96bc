"""Compiling or loading, before they are needed, the kernels that an engine calls."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sb3_clipvf.common.messages import log
from sb3_clipvf.engines.kernels import entry
from sb3_clipvf.engines.kernels.barrier import N_COUNTERS
from sb3_clipvf.engines.kernels.inputs import (
    CATEGORICAL,
    FLOAT32,
    N_HYPERPARAMETERS,
    TANH,
    Division,
    Mlp,
    Policy,
    RolloutArrays,
    Shared,
    pack,
)
from sb3_clipvf.engines.kernels.memory import N_COLUMNS
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

NOTE_SECONDS = 3.0
"""Waiting time after which a warning says that kernels are being compiled."""


def warm_up(group: str) -> float:
    """
    Compile a group of kernels, or load them from numba's cache, and return the seconds that this took.

    One group serves all policies of an engine: "native" and "fused" hold what these engines call, "kl_of_rollout" the
    native engine's measurement after an update. Groups are separate, since a kernel takes some megabytes of memory.
    """
    kernels, call = GROUPS[group]
    if kernels[0].signatures:
        return 0.0
    note = threading.Timer(
        NOTE_SECONDS,
        lambda: log.warning(
            "Compiling the kernels (%s), which takes 10 to 30 seconds; they are kept on disk for later runs", group
        ),
    )
    note.daemon = True
    started = time.perf_counter()
    note.start()
    # Compiling creates many objects. Garbage collections would visit all of them, for a tenth of the time or more.
    collects = gc.isenabled()
    gc.disable()
    try:
        call()
    finally:
        if collects:
            gc.enable()
        note.cancel()
    seconds = time.perf_counter() - started
    if any(kernel.stats.cache_misses for kernel in kernels):
        log.info("Compiled the kernels in %.1f s", seconds)
    return seconds


# Each kernel is called once, with the smallest arguments of real types: layers of one weight, an empty rollout.


def _call_native() -> None:
    packed, _tensors = _smallest_policy()
    workspace, cell, vector = np.zeros(8, np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
    none = np.zeros((0, 1), np.float32)
    entry.predict_values(packed, cell, workspace, vector)
    target = np.array([vector.ctypes.data, vector.ctypes.data, 0, 0, 0, 0, 0])
    entry.act_into(packed, target, 0, cell, cell, workspace, cell.copy())
    entry.advantages_and_returns(none, none, none, vector, vector, 1.0, 1.0, none, none)
    hyper, permutations = np.zeros(N_HYPERPARAMETERS), np.zeros((0, 0), np.int32)
    shared = Shared(
        pieces=np.zeros((0, N_COLUMNS), np.int64),
        partials=none,
        squares=np.zeros((2, 0)),
        stats=np.zeros((2, 2, len(STAT))),
        skipped=np.zeros(len(STAT)),
        counters=np.zeros(N_COUNTERS, np.int64),
        totals=np.zeros(len(TOTAL)),
    )
    entry.run_update(
        0, 1, packed.reshape(1, -1), _empty_rollout(), hyper, permutations, Division(1, 1, 1, 0), shared, workspace
    )


def _call_kl_of_rollout() -> None:
    packed, _tensors = _smallest_policy()
    entry.kl_of_rollout(0, 1, packed, _empty_rollout(), 1, np.zeros(8, np.float32), np.zeros(0))


def _call_fused() -> None:
    hyper, stats = np.ones(N_HYPERPARAMETERS), np.zeros(len(STAT))
    widths, cell, vector = np.ones(1, np.int64), np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
    entry.loss_gradients(
        CATEGORICAL, widths, cell, cell, vector, cell, vector, vector.copy(), vector, vector, cell, hyper, False,
        cell.copy(), cell.copy(), vector.copy(), stats,
    )  # fmt: skip
    entry.draw(CATEGORICAL, widths, cell.copy(), cell, cell, cell.copy(), vector.copy(), cell.copy())
    table = np.zeros((0, N_COLUMNS), np.int64)
    entry.gradient_norm(table, 1.0)
    entry.optimizer_step(table, 1.0, 1, hyper)


def _smallest_policy() -> tuple[np.ndarray, np.ndarray]:
    """Return a packed policy, and the tensors that it points to, which must outlive it."""
    tensors = np.zeros((4, N_COLUMNS), np.float32)
    table = np.full((4, N_COLUMNS), 1, np.int64)
    for row in range(4):
        table[row, 1:] = [tensors[row, column:].ctypes.data for column in range(1, N_COLUMNS)]
    sizes = np.ones(2, np.int64)
    actor, critic = Mlp(sizes, table[:2], TANH), Mlp(sizes, table[2:], TANH)
    return pack(Policy(actor, critic, CATEGORICAL, sizes[:1], 0)), tensors


def _empty_rollout() -> RolloutArrays:
    none, nothing = np.zeros((0, 1), np.float32), np.zeros(0, np.float32)
    return RolloutArrays(none.view(np.uint8), FLOAT32, none, nothing, nothing, nothing, nothing, none, 0, 1)


GROUPS: dict[str, tuple[Sequence[Any], Callable[[], None]]] = {
    "native": (entry.NATIVE, _call_native),
    "kl_of_rollout": ((entry.kl_of_rollout,), _call_kl_of_rollout),
    "fused": (entry.FUSED, _call_fused),
}
