"""Dead processes of ``SubprocVecEnv``: the training ends with an error and does not wait."""

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
from failing import BrokenError, Call, Faulty, Step, broken, check_resumes, make, model_of, notes
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.guards.workers import WorkerDiedError, unblock_dead_workers, worker_death


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail the test if it takes longer than this."""

    def late(*_: Any) -> None:
        pytest.fail("it waits")  # not a TimeoutError: it is an OSError, as a broken pipe is

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kill_itself(step: Step) -> Step:
    os.kill(os.getpid(), signal.SIGKILL)
    return step


def exit_itself(step: Step) -> Step:
    os._exit(3)


@pytest.mark.parametrize(
    ("fault", "bad", "code", "text", "hint"),
    [
        (kill_itself, 1, -9, "environment 1 was killed by SIGKILL", "memory runs out"),
        (kill_itself, 0, -9, "environment 0 was killed by SIGKILL", "memory runs out"),
        (exit_itself, 1, 3, "environment 1 ended with exit code 3", "DummyVecEnv"),
        (broken, 1, 1, "environment 1 ended with exit code 1", "its traceback is above, in the error output"),
    ],
)
def test_a_process_that_dies_ends_the_training(
    fault: Any, bad: int, code: int, text: str, hint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Forked processes keep the pipes of earlier ones open, so without the guard the death of number 1 is not seen.
    fork: Any = partial(SubprocVecEnv, start_method="fork")
    threads = set(threading.enumerate())
    venv = make(fault, 20, fork, bad)
    with within(120), pytest.raises(WorkerDiedError, match=text) as caught:
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert caught.value.exit_codes == {bad: code}
    assert hint in str(caught.value)
    assert "num_timesteps=38 of 96" in notes(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    assert (fault is broken) == ("the user's own words" in capfd.readouterr().err)
    assert not any(process.is_alive() for process in venv.processes)
    assert set(threading.enumerate()) <= threads
    with within(120):
        venv.close()
        with pytest.raises(ValueError, match="`env` is closed: its worker processes have ended"):
            model_of(venv).learn(32)
        check_resumes(tmp_path, make(cls=fork))


def test_processes_that_a_callback_sets_are_watched(tmp_path: Path) -> None:
    fork: Any = partial(SubprocVecEnv, start_method="fork")
    venv, threads = make(kill_itself, 4, fork), set(threading.enumerate())
    model = model_of(make(cls=fork))

    class Exchange(Call):
        def _on_rollout_end(self) -> None:
            model.set_env(venv, force_reset=False)
            model._last_obs = venv.reset()

    with within(120), pytest.raises(WorkerDiedError, match="environment 1 was killed by SIGKILL") as caught:
        model.learn(96, callback=Exchange(broken, 1000))
    assert "num_timesteps=38 of 96" in notes(caught.value)
    assert set(threading.enumerate()) <= threads


def stay(step: Step, mark: Path) -> Step:
    """Ignores both the end of its pipe and SIGTERM, from when the mark exists."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark.touch()
    while True:
        signal.pause()


def kill_itself_after(step: Step, mark: Path) -> Step:
    while not mark.exists():
        time.sleep(0.01)
    return kill_itself(step)


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.guards.workers.GRACE", 0.5)
    faults = [partial(fault, mark=tmp_path / "mark") for fault in (kill_itself_after, stay)]
    venv = SubprocVecEnv([partial(Faulty, fault, 20) for fault in faults], start_method="fork")
    with within(120), pytest.raises(WorkerDiedError) as caught:
        model_of(venv).learn(96)
    assert caught.value.exit_codes == {0: -9}
    assert [process.exitcode for process in venv.processes] == [-9, -9]


def test_processes_that_were_not_forked_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    venv = SubprocVecEnv([partial(Faulty, kill_itself, 20), *[Faulty] * 2], start_method="fork")

    def few(handles: Any, timeout: float | None = None) -> Any:
        if len(handles) > 2:
            raise ValueError("too many handles")  # Windows waits for 63 at most
        return wait(handles, timeout)

    wait = connection.wait
    monkeypatch.setattr(connection, "wait", few)
    # As on Windows. The end of the first process is seen without the guard: no other process holds its pipe.
    monkeypatch.setattr("sb3_clipvf.guards.workers._FORKED", ())
    monkeypatch.delattr(signal, "SIGKILL")
    threads = set(threading.enumerate())
    with unblock_dead_workers(venv):
        assert set(threading.enumerate()) <= threads
    with within(120), pytest.raises(WorkerDiedError) as caught:
        model_of(venv).learn(96)
    assert caught.value.exit_codes == {0: -9}
    assert "memory runs out" in str(caught.value)
    assert not any(process.is_alive() for process in venv.processes)


def test_a_users_class_may_have_fewer_processes_than_environments() -> None:
    venv = SubprocVecEnv([Faulty] * 2, start_method="fork")
    venv.num_envs = 4  # two in each process
    os.kill(venv.processes[1].pid, signal.SIGKILL)
    error = worker_death(venv, EOFError())
    assert error is not None and error.exit_codes == {1: -9}


def test_the_error_of_a_dead_process_can_be_pickled() -> None:
    error = WorkerDiedError("its message", {1: -9})
    error.add_note("its note")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_codes, notes(again)) == ("its message", {1: -9}, "its note")


def test_an_error_elsewhere_does_not_end_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.guards.workers.GRACE", 3600)  # no process needs that time to end
    venv = make(cls=partial(SubprocVecEnv, start_method="fork"))
    for error in (BrokenError, EOFError):

        def fail(error: type[Exception] = error) -> None:
            raise error("elsewhere")

        with pytest.raises(error, match="elsewhere"):
            model_of(venv).learn(96, callback=Call(fail))
    model_of(venv).learn(32)
    venv.close()
