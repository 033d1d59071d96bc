"""Threads of an update: the choice of their number, a pool of them, and the limit on BLAS's threads."""

import os
import statistics
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Lock, Thread, current_thread, main_thread
from typing import Any, cast

import torch as th

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.resources import usable_cores

TRIALS = 3
"""Updates on each number of threads before the first choice, and the window of the medians that choices compare."""

RETRY_INTERVAL = 50
"""Interval, in updates, at which one runs on a neighbouring number of threads: the machine's load may change."""

_SECONDS_BETWEEN_SIGNALS = 0.1  # on Windows, where no signal ends a wait


def warn_of_excess_threads() -> None:
    """Warn once if PyTorch runs more threads than the process may use cores, as in a container with a CPU quota."""
    n_threads, n_cores = th.get_num_threads(), usable_cores()
    if n_threads > n_cores:
        _warn_of_excess_threads(n_threads, n_cores)


@cache
def _warn_of_excess_threads(n_threads: int, n_cores: int) -> None:
    log.warning(
        "PyTorch runs %d threads, but this process may use %d core(s), so that threads wait for each other. Call "
        "torch.set_num_threads(%d), or pass `--num-threads %d` on the command line.",
        n_threads, n_cores, n_cores, n_cores,
    )  # fmt: skip


class ThreadChoice:
    """
    Choice of the number of threads that was the fastest in recent updates.

    It is a power of two, or the largest possible number: the smallest of ``n_tasks``, torch's threads and the cores
    that the process may use. The first choice compares the largest number with the next smaller one. Later choices
    compare the present number with its neighbours, so that no update runs on far fewer threads than the others.
    """

    def __init__(self, n_tasks: int) -> None:
        most = max(1, min(th.get_num_threads(), usable_cores(), n_tasks))
        self._numbers = [2**k for k in range(most.bit_length()) if 2**k < most] + [most]
        self._seconds = {number: deque[float](maxlen=TRIALS) for number in self._numbers}
        self._fastest = most
        self._n_updates = 0
        self._is_logged = False

    def next(self) -> int:
        """Return the number of threads for the next update."""
        neighbours = self._neighbours()
        if not self._are_tried(neighbours):
            return min(neighbours, key=lambda number: len(self._seconds[number]))
        n_retries, rest = divmod(self._n_updates, RETRY_INTERVAL)
        others = [number for number in neighbours if number != self._fastest]
        return self._fastest if rest or not others else others[n_retries % len(others)]

    def record(self, seconds: float, n_minibatches: int) -> None:
        """Record the wall-clock time of an update on :meth:`next` threads, which ``target_kl`` may have stopped."""
        if len(self._numbers) == 1:
            return
        self._seconds[self.next()].append(seconds / max(1, n_minibatches))
        self._n_updates += 1
        if not self._are_tried(self._neighbours()):
            return
        medians = {number: statistics.median(self._seconds[number]) for number in self._neighbours()}
        self._fastest = min(medians, key=medians.__getitem__)
        if not self._is_logged and self._are_tried(self._neighbours()):
            self._is_logged = True
            log.info(
                "Updates run on %d thread(s): a minibatch takes %s; one in %d updates tries another number",
                self._fastest,
                ", ".join(f"{1e6 * median:.0f} us on {number}" for number, median in medians.items()),
                RETRY_INTERVAL,
            )

    def _are_tried(self, numbers: list[int]) -> bool:
        return all(len(self._seconds[number]) == TRIALS for number in numbers)

    def _neighbours(self) -> list[int]:
        index = self._numbers.index(self._fastest)
        return self._numbers[max(0, index - 1) : index + 2]


def run_on_threads(
    run: Callable[[int], object],
    n_threads: int,
    cancel: Callable[[], object] = lambda: None,
    interrupt: Callable[[], object] | None = None,
) -> None:
    """
    Call ``run`` with each of the ranks 0, 1, ..., on as many threads at once; this thread has rank 0.

    If one of the calls raises an exception, ``cancel`` is called, and must cause the others to return. The exception is
    raised when all have returned.

    With ``interrupt``, the main thread, which alone handles signals, only waits, so that it handles them at once. If a
    handler raises an exception, as for Ctrl-C, ``interrupt`` is called, and must make all ranks return soon.
    """
    ranks = _Ranks(run, cancel)
    n_own = 0 if interrupt is not None and current_thread() is main_thread() else 1
    try:
        if n_threads > n_own:
            pool = _other_threads(os.getpid(), n_threads - n_own)
            # Ranks of two updates must not alternate in the queue: each update would wait for threads of the other.
            with pool.lock:
                for rank in range(n_own, n_threads):
                    pool.submit(ranks.run, rank)
        if n_own:
            run(0)
        ranks.wait(n_threads - n_own)
    except BaseException:  # such as Ctrl-C, even before all ranks have begun
        n_begun = ranks.close()
        if interrupt is not None and n_begun == n_threads:
            interrupt()
        else:
            cancel()
        ranks.wait(n_begun)
        raise
    if ranks.errors:
        raise ranks.errors[0]


class _Ranks:
    """Ranks of one call that other threads run. The caller may leave at any moment, even while it submits them."""

    def __init__(self, run: Callable[[int], object], cancel: Callable[[], object]) -> None:
        self._run, self._cancel = run, cancel
        self._changed = Condition()
        self._n_begun = self._n_ended = 0
        self._is_closed = False
        self.errors: list[BaseException] = []

    def run(self, rank: int) -> None:
        """Run a rank, unless the caller has left before it began."""
        with self._changed:
            if self._is_closed:
                return
            self._n_begun += 1
        try:
            self._run(rank)
        except BaseException as error:
            self.errors.append(error)
            self._cancel()
        finally:
            with self._changed:
                self._n_ended += 1
                self._changed.notify()

    def close(self) -> int:
        """Let no further rank begin, and return the number of those that have begun."""
        with self._changed:
            self._is_closed = True
            return self._n_begun

    def wait(self, n_ranks: int) -> None:
        """Wait until so many ranks have ended."""
        with self._changed:
            while self._n_ended < n_ranks:
                self._changed.wait(_SECONDS_BETWEEN_SIGNALS)


class _Pool:
    """
    Threads that wait for calls.

    Those of the standard library's pool delay the end of the process for ever if a signal arrives while they start.
    """

    def __init__(self, n_threads: int) -> None:
        self.lock = Lock()
        self._calls: SimpleQueue[tuple[Callable[[int], None], int]] = SimpleQueue()
        for _ in range(n_threads):
            Thread(target=self._work, daemon=True, name="sb3_clipvf").start()

    def submit(self, function: Callable[[int], None], rank: int) -> None:
        """Let a thread call a function, which raises no exception."""
        self._calls.put((function, rank))

    def _work(self) -> None:
        while True:
            function, rank = self._calls.get()
            function(rank)
            del function  # it holds the arrays of an update


@cache
def _other_threads(process: int, n_threads: int) -> _Pool:
    # Reuse is faster than new threads. A forked process has no copy of its parent's threads, and so needs its own.
    return _Pool(n_threads)


class ProcessWide(ContextDecorator):
    """A process-wide context that the first of several threads enters, and the last one leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = Lock()
        self._n_inside = 0
        self._context: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._context = self._make()
                self._context.__enter__()
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._context.__exit__(None, None, None)


class _BlasLimit:
    def __enter__(self) -> None:
        self._numbers = [get() for get, _ in _blas_of_kernels()]
        for _, set_number in _blas_of_kernels():
            set_number(1)

    def __exit__(self, *_: object) -> None:
        for (_get, set_number), number in zip(_blas_of_kernels(), self._numbers, strict=True):
            set_number(number)


one_blas_thread = ProcessWide(_BlasLimit)
"""
A context in which each matrix product of a kernel runs on the thread that calls it.

Updates are divided among threads without BLAS. After each product that BLAS splits, its threads spin for about 30 ms,
on cores that updates and environments need. BLAS that only environments call keeps its threads.
"""


@cache
def _blas_of_kernels() -> list[tuple[Callable[[], int], Callable[[int], object]]]:
    """Return what reads and sets the number of threads of the BLAS that kernels call: SciPy's own, or any."""
    import_module("scipy.linalg.cython_blas")  # numba loads it for its first product
    from threadpoolctl import ThreadpoolController  # SB3 does not import it

    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    of_scipy = [library for library in libraries if {"scipy", "scipy.libs"} & set(Path(library.filepath).parts)]
    return [(library.get_num_threads, _setter(library)) for library in of_scipy or libraries]


def _setter(library: Any) -> Callable[[int], object]:
    if library.internal_api == "openblas" and library.threading_layer == "pthreads":
        # From threadpoolctl 3.8 on, its own method does nothing if another thread has called it before.
        for name in library.check_symbols:
            function = getattr(library.dynlib, name.replace("_get_", "_set_"), None)
            if function is not None:
                return cast(Callable[[int], object], function)
    return cast(Callable[[int], object], library.set_num_threads)
