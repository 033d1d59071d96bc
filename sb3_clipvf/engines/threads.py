"""Threads of an update: the choice of their number, the second thread, and the limit of BLAS's threads."""

import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch as th

from sb3_clipvf.common.messages import log

TRIALS = 3
"""Updates on each number of threads before the first choice, and the window of the medians that choices compare."""

RETRY_INTERVAL = 50
"""Interval, in updates, at which one runs on the slower number of threads: the machine's load may have changed."""


class ThreadChoice:
    """Choice of the recently faster of one thread and two. Two are tried if torch and the process may use two cores."""

    def __init__(self) -> None:
        self._may_be_two = min(th.get_num_threads(), usable_cores()) > 1
        self._seconds = {n_threads: deque[float](maxlen=TRIALS) for n_threads in (1, 2)}
        self._n_updates = 0
        self._faster: int | None = None

    def next(self) -> int:
        """Return the number of threads for the next update."""
        if not self._may_be_two:
            return 1
        if self._faster is None:
            return 1 + self._n_updates % 2
        retries = self._n_updates % RETRY_INTERVAL == 0
        return 3 - self._faster if retries else self._faster

    def record(self, seconds: float, n_minibatches: int) -> None:
        """Record the wall-clock time of an update on :meth:`next` threads, which ``target_kl`` may have stopped."""
        if not self._may_be_two:
            return
        self._seconds[self.next()].append(seconds / max(1, n_minibatches))
        self._n_updates += 1
        if self._n_updates < 2 * TRIALS:
            return
        one, two = (statistics.median(self._seconds[n_threads]) for n_threads in (1, 2))
        is_first = self._faster is None
        self._faster = 1 if one <= two else 2
        if is_first:
            log.info(
                "Updates run on %d thread(s): a minibatch takes %.0f us on one, %.0f us on two; one of %d updates "
                "tries the other number",
                self._faster,
                1e6 * one,
                1e6 * two,
                RETRY_INTERVAL,
            )


def usable_cores() -> int:
    """Return the number of cores that this process may use, or the machine's number if the system has no such list."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def second_thread() -> ThreadPoolExecutor:
    """Return the process's executor of one thread, for the critic's part of updates; reuse is faster than a new one."""
    return _second_thread(os.getpid())


@cache
def _second_thread(process: int) -> ThreadPoolExecutor:
    # A forked process has no copy of its parent's threads, and so needs its own.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sb3_clipvf-{process}")


class ProcessWide:
    """A process-wide context that the first of several threads enters, and the last one leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = Lock()
        self._n_inside = 0
        self._context = ExitStack()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Return a context manager within which the process is in the context."""
        with self._lock:
            if self._n_inside == 0:
                self._context.enter_context(self._make())
            self._n_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_inside -= 1
                if self._n_inside == 0:
                    self._context.close()


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController  # SB3 does not import it

    return ThreadpoolController()


one_blas_thread = ProcessWide(lambda: _controller().limit(limits=1, user_api="blas")).inside
"""
Return a context in which matrix products run on the calling thread; those of minibatches are too small to split.

A single product that BLAS splits also leaves its threads spinning for some 30 ms, on the cores that the update and the
environments need.
"""
