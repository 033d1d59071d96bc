"""Faults around a training: what it needs at its start, and what it leaves behind where an error ends it."""

import contextlib
import math
import traceback
from collections.abc import Iterator
from itertools import starmap
from typing import TYPE_CHECKING, Any, cast

from gymnasium import spaces
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_clipvf.common import validation
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.guards.env_checks import checked_rows
from sb3_clipvf.guards.workers import death, watched

if TYPE_CHECKING:
    from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint
    from sb3_clipvf.clip_ppo import ClipPPO

# What `learn` calls once it has begun; an error before is one of its arguments.
_TRAINING = frozenset({"collect_rollouts", "dump_logs", "train", "on_training_end"})


def check_ready(model: "ClipPPO") -> None:
    """
    Check what a training needs beside its arguments: someone may have replaced the environments, or ended them.

    :param model: With its environments.
    :raises ValueError: If they do not fit the model, or are closed.
    :raises OSError: If the log cannot be written.
    """
    env = cast(VecEnv, model.env)
    base = vec_env_layers(env)[-1]
    if isinstance(base, SubprocVecEnv) and base.closed:
        raise ValueError("`env` must be open, got a SubprocVecEnv whose processes have ended. Make it anew.")
    same = _same_but_for_bounds(env.observation_space, model.observation_space)
    with validation.same_spaces():
        check_for_correct_spaces(env, env.observation_space if same else model.observation_space, model.action_space)
    if env.num_envs != model.n_envs:
        raise ValueError(
            f"`env` must have the number of environments that the model was built for, {model.n_envs}, got "
            f"{env.num_envs}. Save the model, and pass the environments to `load`."
        )
    if model.tensorboard_log is not None and not model._custom_logger:
        validation.check_folder(
            "tensorboard_log", model.tensorboard_log, "Choose another one, or None for no such log."
        )


def _same_but_for_bounds(first: spaces.Space[Any], second: spaces.Space[Any]) -> bool:
    """Return whether a policy sees no difference; a curriculum may move the bounds of observations."""
    if isinstance(first, spaces.Dict) and isinstance(second, spaces.Dict):
        pairs = [(first.spaces[key], second.spaces[key]) for key in first.spaces.keys() & second.spaces.keys()]
        return len(pairs) == len(first.spaces) == len(second.spaces) and all(starmap(_same_but_for_bounds, pairs))
    if isinstance(first, spaces.Box) and isinstance(second, spaces.Box):
        return (first.shape, first.dtype) == (second.shape, second.dtype)
    return first == second


def tell_of_n_envs(model: "ClipPPO") -> None:
    """
    Warn once of what changes if training resumes in another number of environments.

    :param model: Loaded, with its environments.
    """
    before, model._n_envs_before = model._n_envs_before, None
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
    has died does a :class:`.WorkerDiedError` take the place of the broken pipe. Where a ``TrainingCheckpoint`` keeps a
    copy in memory of an update after the last checkpoint, it is written, but for a :class:`.NonFiniteError`.

    :param model: A ClipPPO with its environments.
    :param callback: What the user passed to ``learn``.
    :return: Context manager.
    :raises WorkerDiedError: In the place of an EOFError or OSError.
    """
    env = cast(VecEnv, model.env)
    venv = vec_env_layers(env)[-1]
    try:
        with watched(venv), checked_rows(env):
            yield
    except Exception as error:
        died = death(venv, error)
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
            # The copy in memory may hold what is not finite: weights that were ruined before it was taken.
            if not isinstance(error, NonFiniteError):
                # At step 0 nothing is lost.
                checkpoint.save_last(type(told_error).__name__, at_start=False)
        except Exception as second:  # it must not take the place of the first
            told_error.add_note(f"The last update could not be saved: {second}")
        told_error.add_note(f"{where} {_way_on(checkpoint)}")


def _way_on(checkpoint: "TrainingCheckpoint") -> str:
    if checkpoint.newest is None:
        return f"There is no checkpoint yet in {checkpoint.path}: start anew."
    return (
        f"Its last whole checkpoint is {checkpoint.newest}. To go on from there, make environments and callbacks as "
        f"they were made, and call model = ClipPPO.resume({str(checkpoint.path)!r}, env) and "
        "model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=callbacks)."
    )


def _checkpoints(callback: Any) -> list["TrainingCheckpoint"]:
    from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint

    parts = callback.callbacks if isinstance(callback, CallbackList) else callback
    if isinstance(parts, list):
        return [found for part in parts for found in _checkpoints(part)]
    return [parts] if isinstance(parts, TrainingCheckpoint) else []
