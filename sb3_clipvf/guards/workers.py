"""Processes of ``SubprocVecEnv`` that die while a training waits for them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection, context

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

GRACE = 2.0
"""Seconds that processes get to end by themselves, before they are made to."""

# Windows has neither of them: no SIGKILL, and no processes that were forked.
_KILLED = -9
_FORKED: tuple[type, ...] = (context.ForkProcess,) if hasattr(context, "ForkProcess") else ()


class WorkerDiedError(RuntimeError):
    """
    A process of ``SubprocVecEnv`` has ended while its environment was needed; the others were ended too.

    :param message: Which, how, and what to do.
    :param exit_codes: By environment: as the process gave it, or minus the number of the signal that ended it.
    """

    def __init__(self, message: str, exit_codes: dict[int, int] | None = None) -> None:
        super().__init__(message)
        self.exit_codes = {} if exit_codes is None else exit_codes


@contextlib.contextmanager
def watched(venv: VecEnv) -> Iterator[None]:
    """
    See to it that waiting for a process that has died ends.

    Where processes were forked, each holds the ends of the pipes of those that were forked after it: the end of one of
    these is then no end of its pipe, and ``SubprocVecEnv`` would wait for its answer for ever. Processes that were
    started otherwise need no watch.

    :param venv: The innermost ``VecEnv``, of any kind.
    :return: Context manager.
    """
    if not isinstance(venv, SubprocVecEnv) or not isinstance(venv.processes[0], _FORKED):
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
            # What it sent before can still be read; what waits for more, in any thread, finds the end.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(remotes.pop(ended).fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)


def death(venv: VecEnv, error: Exception) -> WorkerDiedError | None:
    """
    Tell whether an error is that of processes that have died, and end the others.

    :param venv: The innermost ``VecEnv``, of any kind.
    :param error: What has ended the training.
    :return: What to raise in its place; None where it is another error.
    """
    if not isinstance(venv, SubprocVecEnv) or not isinstance(error, EOFError | OSError):
        return None
    # Its pipes are at their end some moments before a process is.
    deadline = time.monotonic() + GRACE
    while all(process.is_alive() for process in venv.processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    exit_codes = {index: process.exitcode for index, process in enumerate(venv.processes)}
    died = {index: code for index, code in exit_codes.items() if code is not None}
    if not died:
        return None
    _end_processes(venv)
    ends = ", ".join(f"that of environment {index} {_end(code)}" for index, code in died.items())
    if _KILLED in died.values():
        way_out = "The system kills so where memory runs out (see `dmesg`): run fewer or smaller environments."
    else:
        way_out = (
            "An error in the environment ends its process so: its traceback stands above, in the error output "
            "(stderr). In a DummyVecEnv it is raised here."
        )
    return WorkerDiedError(
        f"`env` must keep its {venv.num_envs} processes running, but {ends}. The others were ended, too. {way_out}",
        died,
    )


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    known = {int(number): number.name for number in signal.Signals}
    return f"was killed by {known.get(-code, f'signal {-code}')}"


def _end_processes(venv: SubprocVecEnv) -> None:
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
    venv.waiting, venv.closed = False, True  # for `close`, which would wait for them
