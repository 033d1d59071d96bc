"""Threads of an update: how many, the second one, also after a fork."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch as th
from threadpoolctl import threadpool_info, threadpool_limits

from sb3_clipvf.engines.threads import (
    RETRY_INTERVAL,
    TRIALS,
    ThreadChoice,
    one_blas_thread,
    second_thread,
    usable_cores,
)

_FORKS = """
import os, threading
from sb3_clipvf.engines.threads import second_thread
second_thread().submit(threading.get_ident).result()
child = os.fork()
if child == 0:
    found = second_thread().submit(threading.get_ident).result(timeout=20)
    os._exit(0 if found != threading.get_ident() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadChoice]:
    """A choice on a machine with two cores, whatever this one has."""
    monkeypatch.setattr("sb3_clipvf.engines.threads.usable_cores", lambda: 2)
    threads = th.get_num_threads()
    th.set_num_threads(2)
    yield ThreadChoice()
    th.set_num_threads(threads)


def _run(choice: ThreadChoice, n_updates: int, microseconds: dict[int, float], n_minibatches: int = 10) -> list[int]:
    ran = []
    for _ in range(n_updates):
        ran.append(choice.next())
        choice.record(microseconds[ran[-1]] * n_minibatches, n_minibatches)
    return ran


@pytest.mark.parametrize(("microseconds", "faster"), [({1: 3.0, 2: 2.0}, 2), ({1: 2.0, 2: 3.0}, 1)])
def test_both_are_tried_and_the_faster_one_is_kept(
    choice: ThreadChoice, microseconds: dict[int, float], faster: int
) -> None:
    assert sorted(_run(choice, 2 * TRIALS, microseconds)) == [1] * TRIALS + [2] * TRIALS
    later = _run(choice, 3 * RETRY_INTERVAL, microseconds)
    assert later.count(3 - faster) == 3  # one of so many looks again
    assert choice.next() == faster


def test_another_program_on_the_second_core_is_noticed(choice: ThreadChoice) -> None:
    _run(choice, 20, {1: 3.0, 2: 2.0})
    beside_it = _run(choice, 10, {1: 3.0, 2: 30.0})
    assert beside_it == [2, 2] + [1] * 8  # two slow ones of the last three make its median
    _run(choice, 3 * RETRY_INTERVAL, {1: 3.0, 2: 2.0})  # it has ended
    assert choice.next() == 2


def test_updates_that_stop_early_do_not_count_as_fast(choice: ThreadChoice) -> None:
    for _ in range(2 * TRIALS):
        n_threads = choice.next()
        n_minibatches = 100 if n_threads == 2 else 10
        choice.record({1: 3.0, 2: 2.0}[n_threads] * n_minibatches, n_minibatches)
    assert choice.next() == 2


@pytest.mark.usefixtures("choice")
def test_one_thread_where_torch_may_use_no_more() -> None:
    th.set_num_threads(1)
    assert _run(ThreadChoice(), 60, {1: 3.0, 2: 2.0}) == [1] * 60


@pytest.mark.usefixtures("choice")
def test_one_thread_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.engines.threads.usable_cores", lambda: 1)
    assert _run(ThreadChoice(), 60, {1: 3.0, 2: 2.0}) == [1] * 60


def test_cores_are_counted_where_the_system_keeps_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def _blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_the_last_of_several_updates_gives_blas_its_threads_back() -> None:
    with threadpool_limits(2, "blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert _blas_threads() == {1}
        second.__exit__(None, None, None)
        assert 2 in _blas_threads()


def test_it_is_the_same_thread_each_time() -> None:
    assert second_thread() is second_thread()


def test_a_forked_process_has_its_own() -> None:
    """The parent's thread does not exist there, so waiting for it would never end."""
    assert subprocess.run([sys.executable, "-c", _FORKS], timeout=120, check=False).returncode == 0
