"""Handling of errors that end a run: a last checkpoint, and notes on what is kept and how to resume."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.distributed import current_group
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.guards.env_checks import checked_and_faster
from sb3_clipvf.guards.workers import unblock_dead_workers, worker_death

# Methods that `learn` calls during training. An error outside of them is an error in its arguments.
_TRAINING = frozenset({"collect_rollouts", "dump_logs", "train", "on_training_end"})


# Environments in a context of `guarded`, by their ids.
_guarded: set[int] = set()


@contextlib.contextmanager
def guarded(env: VecEnv) -> Iterator[None]:
    """Check and speed up steps, and unblock reads from dead workers; no-op in such a context for these environments."""
    if id(env) in _guarded:
        yield
        return
    _guarded.add(id(env))
    try:
        with unblock_dead_workers(vec_env_layers(env)[-1]), checked_and_faster(env):
            yield
    finally:
        _guarded.discard(id(env))


@contextlib.contextmanager
def failures_explained(callback: Any, state: Callable[[], tuple[Any, int, int]]) -> Iterator[None]:
    """
    Add notes to an error that ends training in this context: where it was, what is kept and how to resume.

    If a ``SubprocVecEnv`` worker has died, a :class:`.WorkerDiedError` replaces the EOFError or OSError of its pipe. If
    a ``TrainingCheckpoint`` in ``callback`` holds a copy of a later update than its last checkpoint, it is written,
    unless the error is a :class:`.NonFiniteError`. ``state`` returns the environments, which callbacks may replace, and
    the environment steps so far and in total.

    The error also ends training in the other processes of its group.
    """
    group = current_group()
    with group.failing_together():
        try:
            with guarded(state()[0]):
                yield
        except Exception as error:
            env, num_timesteps, total_timesteps = state()
            died = worker_death(vec_env_layers(env)[-1], error)
            if _TRAINING & {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}:
                where = f"The training ended at num_timesteps={num_timesteps} of {total_timesteps}."
                _add_notes(died or error, error, callback, where, group.rank)
            if died is None:
                raise
            raise died from error


def _add_notes(raised: Exception, cause: Exception, callback: Any, where: str, rank: int) -> None:
    checkpoints = _checkpoints(callback)
    if rank > 0:  # these callbacks have not run
        folders = "".join(f" to {checkpoint.path}" for checkpoint in checkpoints)
        raised.add_note(
            f"{where} Process 0 runs the callbacks. If it has written checkpoints{folders}, resume from the newest one."
        )
        return
    if not checkpoints:
        raised.add_note(
            f"{where} No TrainingCheckpoint was used, so only the model in memory is left. Call `model.save` to keep "
            "it."
        )
    for checkpoint in checkpoints:
        try:
            # After a NonFiniteError, the copy in memory may hold non-finite weights, too.
            if not isinstance(cause, NonFiniteError):
                checkpoint.save_last(type(raised).__name__, at_start=False)  # at step 0 nothing is lost
        except Exception as second:  # a failed save must not mask the original error
            raised.add_note(f"The last update could not be saved: {second}")
        raised.add_note(f"{where} {_hint(checkpoint)}")


def _hint(checkpoint: TrainingCheckpoint) -> str:
    if checkpoint.newest is None:
        return f"There is no checkpoint yet in {checkpoint.path}: start again."
    return (
        f"Its last complete checkpoint is {checkpoint.newest}. To resume from it, create environments and callbacks "
        f"as before, and call model = ClipPPO.resume({str(checkpoint.path)!r}, env) and "
        "model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=callbacks)."
    )


def _checkpoints(callback: Any) -> list[TrainingCheckpoint]:
    parts = callback.callbacks if isinstance(callback, CallbackList) else callback
    if isinstance(parts, list):
        return [found for part in parts for found in _checkpoints(part)]
    return [parts] if isinstance(parts, TrainingCheckpoint) else []
