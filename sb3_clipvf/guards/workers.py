"""Worker processes of ``SubprocVecEnv`` that die during training."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection, context

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_clipvf.envs.subproc import GRACE, FastSubprocVecEnv, described, ended_workers

# Windows has neither SIGKILL nor forked processes.
_KILLED = -9
_FORKED: tuple[type, ...] = (context.ForkProcess,) if hasattr(context, "ForkProcess") else ()


class WorkerDiedError(RuntimeError):
    """
    A worker process of ``SubprocVecEnv`` or ``FastSubprocVecEnv`` has died; the others were terminated.

    :param message: Which process, its exit code, and what to do.
    :param exit_codes: Exit codes by environment; minus the signal's number if a signal ended the process.
    """

    def __init__(self, message: str, exit_codes: dict[int, int] | None = None) -> None:
        super().__init__(message)
        self.exit_codes = {} if exit_codes is None else exit_codes


@contextlib.contextmanager
def unblock_dead_workers(venv: VecEnv) -> Iterator[None]:
    """
    Unblock reads from dead workers, if ``venv`` is a ``SubprocVecEnv``.

    A forked worker inherits the pipe ends of the workers before it. The pipe of a dead worker then stays open, and
    ``SubprocVecEnv`` would wait for its answer forever. Workers that are not forked inherit nothing.
    """
    if not isinstance(venv, SubprocVecEnv) or not isinstance(next(iter(venv.processes), None), _FORKED):
        yield
        return
    stopped, stop = multiprocessing.Pipe(duplex=False)
    watch = threading.Thread(target=_end_pipes, args=(venv, stopped), daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.send(None)
        watch.join()
        stop.close()
        stopped.close()


def _end_pipes(venv: SubprocVecEnv, stopped: connection.Connection) -> None:
    remotes = {process.sentinel: remote for process, remote in zip(venv.processes, venv.remotes, strict=True)}
    while remotes:
        for ended in connection.wait([stopped, *remotes]):
            if ended is stopped:
                return
            # Data that it sent can still be read. A read that is waiting for more then stops, in whichever thread.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(remotes.pop(ended).fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)


def worker_death(venv: VecEnv, error: Exception) -> WorkerDiedError | None:
    """Return the error to raise in place of ``error`` if a worker of ``venv`` has died, and terminate the others."""
    if not isinstance(venv, SubprocVecEnv) or not isinstance(error, EOFError | OSError):
        return None
    single = [range(row, row + 1) for row in range(len(venv.processes))]  # a class of the user's may have fewer
    rows = venv.worker_rows if isinstance(venv, FastSubprocVecEnv) else single
    ended = ended_workers(venv.processes, rows, GRACE if _may_be_of_pipe(error) else 0.0)
    if not ended:
        return None
    _end_processes(venv)
    died = {row: code for part, code in ended for row in part}
    if _KILLED in died.values():
        hint = "The system kills processes when memory runs out (see `dmesg`): run fewer or smaller environments."
    elif isinstance(venv, FastSubprocVecEnv):
        hint = "An environment ended or crashed its process: see the error output (stderr) above."
    else:
        hint = (
            "An error in the environment ends its process: its traceback is above, in the error output (stderr). A "
            "DummyVecEnv raises the error itself."
        )
    return WorkerDiedError(
        f"`env` must keep its {len(venv.processes)} processes running, but {described(ended)}. The others were "
        f"terminated. {hint}",
        died,
    )


def _may_be_of_pipe(error: Exception) -> bool:
    """Return whether the error may come from a worker's pipe, not from an environment or a callback."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not modules or modules[-1] == connection.__name__


def _end_processes(venv: SubprocVecEnv) -> None:
    if isinstance(venv, FastSubprocVecEnv):
        with contextlib.suppress(Exception):  # in `close` of an environment; it must not mask the dead worker
            venv.close()
        return
    for remote in venv.remotes:
        with contextlib.suppress(OSError):
            remote.send(("close", None))
    for end in (None, "terminate", "kill"):
        for process in venv.processes:
            if end is not None and process.is_alive():
                getattr(process, end)()
        deadline = time.monotonic() + GRACE
        for process in venv.processes:
            process.join(max(0.0, deadline - time.monotonic()))
    for remote in venv.remotes:
        remote.close()
    venv.waiting, venv.closed = False, True  # else `close` would wait for them
