"""Threads of an update: how many, the other ones, also after a fork."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.linalg.cython_blas  # noqa: F401  # threadpool_limits sets the libraries that are loaded
import torch as th
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines import threads
from sb3_clipvf.engines.threads import (
    RETRY_INTERVAL,
    TRIALS,
    ThreadChoice,
    _blas_of_kernels,
    _Pool,
    one_blas_thread,
    run_on_threads,
)

_FORKS = """
import os, threading
from sb3_clipvf.engines.threads import run_on_threads
def idents():
    found = {}
    run_on_threads(lambda rank: found.setdefault(rank, threading.get_ident()), 2)
    return found
idents()
child = os.fork()
if child == 0:
    found = idents()
    os._exit(0 if found[0] == threading.get_ident() != found[1] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadChoice]:
    """A choice on a machine with two cores, whatever this one has."""
    yield from _choice_of(2, monkeypatch)


@pytest.fixture
def choice_of_twelve(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadChoice]:
    """A choice on a machine with twelve cores."""
    yield from _choice_of(12, monkeypatch)


def _choice_of(n_cores: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadChoice]:
    monkeypatch.setattr("sb3_clipvf.engines.threads.usable_cores", lambda: n_cores)
    monkeypatch.setattr(th, "get_num_threads", lambda: n_cores)
    yield ThreadChoice(n_tasks=32)


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


# Microseconds of a minibatch on each number of threads
SCALES = {1: 80.0, 2: 42.0, 4: 23.0, 8: 14.0, 12: 12.0}
FOUR_CORES = {1: 80.0, 2: 42.0, 4: 23.0, 8: 30.0, 12: 40.0}


def test_more_threads_than_help_are_left_step_by_step(choice_of_twelve: ThreadChoice) -> None:
    ran = _run(choice_of_twelve, 12, FOUR_CORES)
    assert sorted(ran) == [2] * TRIALS + [4] * TRIALS + [8] * TRIALS + [12] * TRIALS
    assert 2 not in ran[:9]
    assert choice_of_twelve.next() == 4


def test_numbers_far_from_the_fastest_are_not_tried(choice_of_twelve: ThreadChoice) -> None:
    assert set(_run(choice_of_twelve, 3 * RETRY_INTERVAL, SCALES)) == {8, 12}


def test_both_neighbours_are_tried_again(choice_of_twelve: ThreadChoice) -> None:
    _run(choice_of_twelve, 12, FOUR_CORES)
    later = _run(choice_of_twelve, 4 * RETRY_INTERVAL, FOUR_CORES)
    assert {number: later.count(number) for number in set(later)} == {2: 2, 4: 4 * RETRY_INTERVAL - 4, 8: 2}


def test_the_choice_is_logged_once(choice_of_twelve: ThreadChoice, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sb3_clipvf"):
        _run(choice_of_twelve, 100, {number: 1e-6 * seconds for number, seconds in FOUR_CORES.items()})
    assert caplog.messages == [
        "Updates run on 4 thread(s): a minibatch takes 42 us on 2, 23 us on 4, 30 us on 8; one in 50 updates tries "
        "another number"
    ]


@pytest.mark.usefixtures("choice_of_twelve")
def test_one_thread_where_torch_may_use_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "get_num_threads", lambda: 1)
    assert _run(ThreadChoice(n_tasks=32), 60, SCALES) == [1] * 60


@pytest.mark.usefixtures("choice_of_twelve")
def test_one_thread_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.engines.threads.usable_cores", lambda: 1)
    assert _run(ThreadChoice(n_tasks=32), 60, SCALES) == [1] * 60


@pytest.mark.usefixtures("choice_of_twelve")
def test_no_more_threads_than_tasks() -> None:
    assert set(_run(ThreadChoice(n_tasks=2), 60, SCALES)) == {1, 2}


def _blas_threads() -> list[int]:
    """Return the numbers of threads of the libraries that kernels may call."""
    return [get() for get, _ in _blas_of_kernels()]


def test_blas_has_its_threads_again_after_an_exception() -> None:
    with threadpool_limits(2, "blas"):
        with pytest.raises(KeyboardInterrupt), one_blas_thread:
            assert _blas_threads() == [1]
            raise KeyboardInterrupt
        assert _blas_threads() == [2]


def test_the_last_of_several_threads_gives_blas_its_threads_back() -> None:
    """The one that set the limit is still alive, and may have left it before."""
    is_inside, may_leave, has_left, may_end = (threading.Event() for _ in range(4))

    def first() -> None:
        with one_blas_thread:
            is_inside.set()
            may_leave.wait(60)
        has_left.set()
        may_end.wait(60)

    with threadpool_limits(2, "blas"):
        OpenBLASController.clear_controlling_thread()
        other = threading.Thread(target=first)
        other.start()
        is_inside.wait(60)
        with one_blas_thread:
            may_leave.set()
            has_left.wait(60)
            assert _blas_threads() == [1]
        assert _blas_threads() == [2]
        may_end.set()
        other.join()


def test_numpys_own_blas_keeps_its_threads() -> None:
    """Environments may use it."""
    with threadpool_limits(2, "blas"), one_blas_thread:
        numbers = {library["num_threads"] for library in threadpool_info() if "numpy" in library["filepath"]}
        assert numbers <= {2}


def test_each_rank_has_a_thread_and_the_caller_the_first() -> None:
    meeting, found = threading.Barrier(3, timeout=60), {}

    def run(rank: int) -> None:
        meeting.wait()
        found[rank] = threading.get_ident()

    run_on_threads(run, 3)
    assert sorted(found) == [0, 1, 2]
    assert found[0] == threading.get_ident()
    assert len(set(found.values())) == 3


def test_threads_are_used_again() -> None:
    before = [thread.ident for thread in threading.enumerate()]
    for _ in range(9):
        run_on_threads(lambda _: None, 3)
    assert len({thread.ident for thread in threading.enumerate()} - set(before)) <= 2


def test_several_callers_at_once_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ranks would, if they stood in turn in the queue: each caller's need all threads of the pool."""
    submit = _Pool.submit

    def slow_submit(*arguments: Any) -> Any:
        time.sleep(1e-3)  # so that another caller submits in between, if it may
        return submit(*arguments)

    monkeypatch.setattr(_Pool, "submit", slow_submit)

    def call() -> None:
        for _ in range(5):
            meeting = threading.Barrier(4, timeout=60)
            run_on_threads(lambda _, meeting=meeting: meeting.wait(), 4)
        done.append(threading.get_ident())

    done: list[int] = []
    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(done) == 4


def test_an_interrupted_caller_cancels_the_others_and_waits_for_them() -> None:
    cancelled, meeting, ended = threading.Event(), threading.Barrier(3, timeout=60), []

    def run(rank: int) -> None:
        meeting.wait()
        if rank == 0:
            raise KeyboardInterrupt
        ended.append(cancelled.wait(60))

    with pytest.raises(KeyboardInterrupt):
        run_on_threads(run, 3, cancelled.set)
    assert ended == [True, True]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_another_thread_cancels_the_caller_and_is_raised(failing: int) -> None:
    """The caller would wait at the barrier for ever, for a kernel that found no memory."""
    cancelled, ended = threading.Event(), []

    def run(rank: int) -> None:
        if rank == failing:
            raise MemoryError
        ended.append(cancelled.wait(10))

    with pytest.raises(MemoryError):
        run_on_threads(run, 3, cancelled.set)
    assert ended == [True, True]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_signal_interrupts_all_ranks_while_the_main_thread_waits(n_threads: int) -> None:
    interrupted, cancelled, ended = threading.Event(), threading.Event(), []
    meeting = threading.Barrier(n_threads, timeout=60)

    def run(rank: int) -> None:
        if meeting.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        ended.append((interrupted.wait(60), threading.get_ident()))

    with pytest.raises(KeyboardInterrupt):
        run_on_threads(run, n_threads, cancelled.set, interrupted.set)
    assert [is_interrupted for is_interrupted, _ in ended] == [True] * n_threads
    assert threading.get_ident() not in {ident for _, ident in ended}
    assert not cancelled.is_set()


_ENDS = """
import os, signal
from sb3_clipvf.engines.threads import run_on_threads
try:
    run_on_threads(lambda _: os.kill(os.getpid(), signal.SIGINT), 1, interrupt=lambda: None)
    import time; time.sleep(10)
except KeyboardInterrupt:
    raise SystemExit(7)
"""


def test_a_process_ends_after_a_signal_while_its_threads_start() -> None:
    assert subprocess.run([sys.executable, "-c", _ENDS], timeout=120, check=False).returncode == 7


def test_an_exception_cancels_where_the_main_thread_waits() -> None:
    cancelled = threading.Event()

    def run(rank: int) -> None:
        if rank == 0:
            raise MemoryError
        assert cancelled.wait(60)

    with pytest.raises(MemoryError):
        run_on_threads(run, 2, cancelled.set, lambda: None)


def test_a_rank_that_cannot_begin_cancels_where_the_main_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ranks that have begun wait for it at the barrier."""
    submit, cancelled = _Pool.submit, threading.Event()

    def submit_first(self: _Pool, function: Any, rank: int) -> Any:
        if rank > 0:
            raise KeyboardInterrupt
        return submit(self, function, rank)

    monkeypatch.setattr(_Pool, "submit", submit_first)
    with pytest.raises(KeyboardInterrupt):
        run_on_threads(lambda _: cancelled.wait(60), 2, cancelled.set, lambda: None)
    assert cancelled.is_set()


def test_a_rank_that_has_begun_is_waited_for_if_its_submission_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, begun, interrupted, ended = _Pool.submit, threading.Event(), threading.Event(), []

    def interrupted_submit(*arguments: Any) -> Any:
        submit(*arguments)
        begun.wait(60)
        raise KeyboardInterrupt

    def run(_: int) -> None:
        begun.set()
        ended.append(interrupted.wait(60))

    monkeypatch.setattr(_Pool, "submit", interrupted_submit)
    with pytest.raises(KeyboardInterrupt):
        run_on_threads(run, 1, interrupt=interrupted.set)
    assert ended == [True]


def test_a_rank_that_has_not_begun_when_the_caller_leaves_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Any] = []

    def interrupted_submit(_: Any, *arguments: Any) -> Any:
        late.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Pool, "submit", interrupted_submit)
    ran: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_on_threads(ran.append, 2)
    ((function, rank),) = late
    function(rank)
    assert ran == []


def test_a_caller_that_gets_no_signals_has_the_first_rank() -> None:
    found: list[bool] = []

    def call() -> None:
        caller = threading.get_ident()
        run_on_threads(lambda _: found.append(threading.get_ident() == caller), 1, interrupt=lambda: None)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == [True]


def test_a_forked_process_has_its_own() -> None:
    """The parent's thread does not exist there, so waiting for it would never end."""
    assert subprocess.run([sys.executable, "-c", _FORKS], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("engine", "n_threads", "n_warnings"),
    [("autograd", 8, 1), ("fused", 8, 1), ("native", 8, 0), ("autograd", 2, 0)],
)
def test_more_threads_than_cores_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: Any, n_threads: int, n_warnings: int
) -> None:
    threads._warn_of_excess_threads.cache_clear()
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
    for _ in range(2):
        model = ClipPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, engine=engine, device="cpu")
        assert model._current_engine().name == engine
    found = [record.getMessage() for record in caplog.records if "PyTorch runs 8 threads" in record.getMessage()]
    assert len(found) == n_warnings
    assert all("may use 2 core(s)" in text and "pass `--num-threads 2`" in text for text in found)
