"""Faults around a training: what it needs at its start, and what it leaves behind where an error ends it."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, cast

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_clipvf import validation
from sb3_clipvf.envs.shapes import checked_rows
from sb3_clipvf.messages import log

if TYPE_CHECKING:
    from sb3_clipvf.checkpoint.callback import TrainingCheckpoint
    from sb3_clipvf.clip_ppo import ClipPPO

GRACE = 2.0
"""Seconds that processes get to end by themselves, before they are made to."""

# What `learn` calls once it has begun; an error before is one of its arguments.
_TRAINING = frozenset({"collect_rollouts", "dump_logs", "train", "on_training_end"})


class WorkerDiedError(RuntimeError):
    """
    A process of ``SubprocVecEnv`` has ended while its environment was needed; the others were ended too.

    :param message: Which, how, and what to do.
    :param exit_codes: By environment: as the process gave it, or minus the number of the signal that ended it.
    """

    def __init__(self, message: str, exit_codes: dict[int, int]) -> None:
        super().__init__(message)
        self.exit_codes = exit_codes


def check_ready(model: "ClipPPO") -> None:
    """
    Check what a training needs beside its arguments: someone may have replaced the environments, or ended them.

    :param model: With its environments.
    :raises ValueError: If they do not fit the model, or are closed.
    :raises OSError: If the log cannot be written.
    """
    env = cast(VecEnv, model.env)
    if isinstance(env.unwrapped, SubprocVecEnv) and env.unwrapped.closed:
        raise ValueError("`env` must be open, got a SubprocVecEnv whose processes have ended. Make it anew.")
    with validation.same_spaces():
        check_for_correct_spaces(env, model.observation_space, model.action_space)
    if env.num_envs != model.n_envs:
        raise ValueError(
            f"`env` must have the number of environments that the model was built for, {model.n_envs}, got "
            f"{env.num_envs}. Save the model, and pass the environments to `load`."
        )
    if model.tensorboard_log is not None and not model._custom_logger:
        validation.check_folder(
            "tensorboard_log", model.tensorboard_log, "Choose another one, or None for no such log."
        )


def tell_of_n_envs(model: "ClipPPO", before: Any) -> None:
    """
    Say what changes where a model goes on in another number of environments.

    :param model: Loaded, with its environments.
    :param before: The number that it was saved with.
    """
    if before == model.n_envs or not isinstance(before, int):
        return
    size, size_before = model.n_steps * model.n_envs, model.n_steps * before
    log.warning(
        "`env` has %d environments, and the model was saved with %d: a rollout of n_steps=%d steps of each now has %d "
        "transitions instead of %d, and an epoch %d minibatches of batch_size=%d instead of %d.",
        model.n_envs,
        before,
        model.n_steps,
        size,
        size_before,
        math.ceil(size / model.batch_size),
        model.batch_size,
        math.ceil(size_before / model.batch_size),
    )


@contextlib.contextmanager
def told(model: "ClipPPO", callback: Any) -> Iterator[None]:
    """
    Run a training so that an error that ends it says where it was, what is kept and how to go on.

    The error itself comes through as it is, with these sentences as a note; only where a process of ``SubprocVecEnv``
    has died does a :class:`WorkerDiedError` take the place of the broken pipe. Where a ``TrainingCheckpoint`` keeps a
    copy in memory of an update after the last checkpoint, it is written.

    :param model: A ClipPPO with its environments.
    :param callback: What the user passed to ``learn``.
    :return: Context manager.
    :raises WorkerDiedError: In the place of an EOFError or OSError.
    """
    venv = cast(VecEnv, model.env).unwrapped
    try:
        with _watched(venv), checked_rows(venv):
            yield
    except Exception as error:
        died = _death(venv, error)
        _tell(died or error, error, model, callback)
        if died is None:
            raise
        raise died from error


def _tell(told_error: Exception, error: Exception, model: "ClipPPO", callback: Any) -> None:
    if not _TRAINING & {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}:
        return
    total = model._total_timesteps
    where = f"The training ended at num_timesteps={model.num_timesteps} of {total}."
    checkpoints = _checkpoints(callback)
    if not checkpoints:
        told_error.add_note(
            f"{where} No TrainingCheckpoint was among its callbacks: what is left of it is the model in memory, which "
            "`save` writes."
        )
    for checkpoint in checkpoints:
        try:
            # The copy that signals save; at step 0 nothing is lost.
            if checkpoint._last is not None and checkpoint._last.num_timesteps > 0:
                checkpoint._save_last(type(told_error).__name__)
        except Exception as second:  # it must not take the place of the first
            told_error.add_note(f"The last update could not be saved: {second}")
        told_error.add_note(f"{where} {_way_on(checkpoint)}")


def _way_on(checkpoint: "TrainingCheckpoint") -> str:
    if not checkpoint._kept:
        return f"There is no checkpoint yet in {checkpoint.path}: start anew."
    return (
        f"Its last whole checkpoint is {checkpoint._kept[-1]}. To go on from there, make environments and callbacks as "
        f"they were made, and call model = ClipPPO.resume({str(checkpoint.path)!r}, env) and "
        "model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=callbacks)."
    )


def _checkpoints(callback: Any) -> list["TrainingCheckpoint"]:
    from sb3_clipvf.checkpoint.callback import TrainingCheckpoint

    parts = callback.callbacks if isinstance(callback, CallbackList) else callback
    if isinstance(parts, list):
        return [found for part in parts for found in _checkpoints(part)]
    return [parts] if isinstance(parts, TrainingCheckpoint) else []


# ------------------------------------------------------------------ processes of SubprocVecEnv


@contextlib.contextmanager
def _watched(venv: VecEnv) -> Iterator[None]:
    """
    See to it that waiting for a process that has died ends.

    Where processes were forked, each holds the ends of the pipes of those that were forked after it: the end of one of
    these is then no end of its pipe, and ``SubprocVecEnv`` would wait for its answer for ever.
    """
    if not isinstance(venv, SubprocVecEnv):
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


def _death(venv: VecEnv, error: Exception) -> WorkerDiedError | None:
    """Tell whether an error is that of processes that have died, and end the others."""
    if not isinstance(venv, SubprocVecEnv) or not isinstance(error, EOFError | OSError):
        return None
    # Its pipes are at their end some moments before a process is.
    ended = connection.wait([process.sentinel for process in venv.processes], GRACE)
    for process in venv.processes:
        if process.sentinel in ended:
            process.join(GRACE)
    exit_codes = {index: process.exitcode for index, process in enumerate(venv.processes)}
    died = {index: code for index, code in exit_codes.items() if code is not None}
    if not died:
        return None
    _end_processes(venv)
    ends = ", ".join(f"that of environment {index} {_end(code)}" for index, code in died.items())
    if -signal.SIGKILL in died.values():
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
