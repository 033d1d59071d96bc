"""How many threads an update runs on, the thread beside Python's own, and keeping BLAS from adding more."""

import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch as th
from threadpoolctl import ThreadpoolController

from sb3_clipvf.messages import log

TRIALS = 3
"""Updates that are timed on one and on two threads before the faster number is chosen."""


class ThreadChoice:
    """
    One thread or two, whichever was faster in the first updates. The numbers of an update are the same on both.

    Two are tried where torch may use two and the process may run on two cores.
    """

    def __init__(self) -> None:
        may_use = min(th.get_num_threads(), len(os.sched_getaffinity(0)))
        self._seconds: dict[int, list[float]] = {1: [], 2: []}
        self._chosen = 1 if may_use < 2 else None

    def next(self) -> int:
        """
        Say how many threads the next update runs on.

        :return: 1 or 2.
        """
        if self._chosen is not None:
            return self._chosen
        return 1 if len(self._seconds[1]) <= len(self._seconds[2]) else 2

    def took(self, seconds: float) -> None:
        """
        Tell how long the update took that :meth:`next` was asked for.

        :param seconds: Wall-clock time.
        """
        if self._chosen is not None:
            return
        self._seconds[self.next()].append(seconds)
        if len(self._seconds[2]) == TRIALS:
            one, two = (statistics.median(self._seconds[n]) for n in (1, 2))
            self._chosen = 1 if one <= two else 2
            log.info("Updates run on %d thread(s): %.1f ms on one, %.1f ms on two", self._chosen, 1e3 * one, 1e3 * two)


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
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """
    Let matrix products run on the thread that asks for them: those of minibatches are too small to be shared.

    A single product that BLAS shares would also leave its threads spinning for some 30 ms, on the cores that the
    update and the environments need.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
