"""How many threads an update runs on, the thread beside Python's own, and keeping BLAS from adding more."""

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
"""Updates whose median tells how fast a number of threads is, the first ones in turn, then the last ones."""

LOOK_AGAIN = 50
"""Updates of which one runs on the number of threads that was slower: what else the machine runs may have changed."""


class ProcessWide:
    """
    A context that is the process's own: the first of several threads enters it, and the last one leaves it.

    :param make: Makes the context manager that is entered for all of them.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = Lock()
        self._n_inside = 0
        self._context = ExitStack()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """
        Be in the context, whether this thread entered it or another one.

        :return: Context manager.
        """
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


def usable_cores() -> int:
    """
    Count the cores that this process may run on.

    :return: At least 1; all of the machine's where the system keeps no such list, as macOS and Windows.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ThreadChoice:
    """
    One thread or two, whichever was faster lately. The numbers of an update are the same on both.

    Two are tried where torch may use two and the process may run on two cores.
    """

    def __init__(self) -> None:
        self._may_be_two = min(th.get_num_threads(), usable_cores()) > 1
        self._seconds = {n_threads: deque[float](maxlen=TRIALS) for n_threads in (1, 2)}
        self._n_updates = 0
        self._faster: int | None = None

    def next(self) -> int:
        """
        Say how many threads the next update runs on.

        :return: 1 or 2.
        """
        if not self._may_be_two:
            return 1
        if self._faster is None:
            return 1 + self._n_updates % 2
        looks_again = self._n_updates % LOOK_AGAIN == 0
        return 3 - self._faster if looks_again else self._faster

    def took(self, seconds: float, n_minibatches: int) -> None:
        """
        Tell how long the update took that :meth:`next` was asked for.

        :param seconds: Wall-clock time.
        :param n_minibatches: How many minibatches it has looked at: ``target_kl`` may have ended it early.
        """
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
                "looks again",
                self._faster,
                1e6 * one,
                1e6 * two,
                LOOK_AGAIN,
            )


def second_thread() -> ThreadPoolExecutor:
    """
    Give the thread that runs the critic's half of an update; it waits for the next one, since starting it takes longer.

    :return: An executor of one thread, the same one for the whole process.
    """
    return _second_thread(os.getpid())


@cache
def _second_thread(process: int) -> ThreadPoolExecutor:
    # A forked process has no copy of its parent's threads, and so needs one of its own.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sb3_clipvf-{process}")


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController  # SB3 does not load it

    return ThreadpoolController()


_limited = ProcessWide(lambda: _controller().limit(limits=1, user_api="blas"))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """
    Let matrix products run on the thread that asks for them: those of minibatches are too small to be shared.

    A single product that BLAS shares would also leave its threads spinning for some 30 ms, on the cores that the
    update and the environments need. The limit is the process's own: the last of several threads lifts it.
    """
    with _limited.inside():
        yield
