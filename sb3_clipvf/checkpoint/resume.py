"""Resuming a run from a checkpoint, as if it had never been interrupted."""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.checkpoint.callback_state import compare_callbacks, restore_callbacks, without_repeats
from sb3_clipvf.checkpoint.file import newest_checkpoint, read_checkpoint, versions
from sb3_clipvf.checkpoint.protocol import ResumableModel
from sb3_clipvf.checkpoint.random_state import (
    generator_from,
    global_states,
    set_global_states,
    set_space_states,
    space_states,
)
from sb3_clipvf.checkpoint.state_attributes import check_names
from sb3_clipvf.checkpoint.training_state import OBSERVATIONS, set_logger_state
from sb3_clipvf.checkpoint.vec_env_state import check_same_build, describe_vec_env, restore_vec_env
from sb3_clipvf.common.messages import log
from sb3_clipvf.distributed import Group, current_group
from sb3_clipvf.envs.tensor import as_sb3_env

Model = TypeVar("Model", bound=ResumableModel)


@dataclass(frozen=True)
class Resumed:
    """State that :func:`begin_resume` and :func:`finish_resume` restore in the first ``learn`` of a resumed model."""

    tree: dict[str, Any]
    # States of the random generators of the process and of the model's spaces at the start of the next rollout
    random: dict[str, Any]
    spaces: dict[str, Any]
    # Observations that the next rollout starts from; `learn` replaces them if it resets the environments
    observations: Any
    # Last step of the interrupted run, if `resume` lets schedules end there; None if the user set their end
    held_horizon: int | None
    # Logger that writes to the folder of the interrupted run, if `resume` made one
    own_logger: Logger | None
    # Number of processes that wrote the checkpoint
    n_processes: int


def resume(
    cls: type[Model], path: str | os.PathLike[str], env: GymEnv, device: th.device | str, **kwargs: Any
) -> Model:
    """Load a model from a checkpoint, or from a folder of them, with its environments; see ``ClipPPO.resume``."""
    if env is None:
        raise ValueError("`env` must be the environment to resume in, got None. Build it as for the training.")
    if "seed" in kwargs:
        raise TypeError(
            f"`seed` must not be passed to `resume`, got {kwargs['seed']!r}. The checkpoint holds the random states. "
            "To train with different ones, pass it to `load`."
        )
    checkpoint = newest_checkpoint(path) if Path(path).is_dir() else read_checkpoint(path)
    manifest, trees = checkpoint.manifest, [checkpoint.tree, *checkpoint.tree.get("processes", [])]
    env = as_sb3_env(env)
    n_envs = env.num_envs if isinstance(env, VecEnv) else 1
    tree = _own_part(trees, current_group(), n_envs)
    check_same_build(tree["build"], {**tree["build"], "n_envs": n_envs})  # before a model of a different size is built
    _warn_about_versions(manifest.versions)
    model = cls.load(io.BytesIO(checkpoint.content), env=env, device=device, **kwargs)
    venv = model.env
    if venv is None:
        raise ValueError("`env` must be a Gymnasium environment or an SB3 VecEnv, got one that is neither.")
    check_same_build(tree["build"], describe_vec_env(venv))
    model._training_id = manifest.training or None
    model._n_envs_before = None  # of the first process; the build has this one's
    for name, value in _restore_environments(model, venv, tree).items():
        setattr(model, name, value)
    set_space_states(model, tree["spaces"])
    own_logger = _continue_tensorboard(model, tree["logger"]["folder"])
    holds_horizon = model._schedule_timesteps is None and manifest.total_timesteps > 0
    if holds_horizon:
        # Schedules still end there if learn() trains for fewer or for more steps.
        model._schedule_timesteps = manifest.total_timesteps
    model._resumed = Resumed(
        tree=tree,
        random=global_states(),
        spaces=space_states(model),
        observations=model._last_obs,
        held_horizon=manifest.total_timesteps if holds_horizon else None,
        own_logger=own_logger,
        n_processes=len(trees),
    )
    text = "The training resumes from %s, at step %d of %d"
    log.info(text, checkpoint.path, manifest.num_timesteps, manifest.total_timesteps)
    for difference in without_repeats(manifest.differences):
        log.warning("The training is not resumed exactly: %s", difference)
    return model


def begin_resume(model: ResumableModel, callback: BaseCallback) -> None:
    """Check the first ``learn`` of a resumed model, when it has built its callbacks and its logger."""
    resumed: Resumed | None = model._resumed
    if resumed is None:
        return
    if model._last_obs is not resumed.observations:
        raise ValueError(
            "`reset_num_timesteps` must be False in the first learn() of a resumed model, got environments that were "
            "reset. Call model.learn(model.remaining_timesteps, reset_num_timesteps=False) without set_env before it, "
            "or use ClipPPO.load to start again."
        )
    if model._total_timesteps == model._schedule_timesteps == resumed.held_horizon:
        # Schedules of this call end there anyway. In later calls they end with each call, as without the interruption.
        model._schedule_timesteps = None
    compare_callbacks(callback, resumed.tree["callbacks"])


def finish_resume(model: ResumableModel, callback: BaseCallback) -> None:
    """
    Restore callbacks, the logger and random generators before the first rollout of a resumed model.

    Callbacks have started by then: what they set and draw in ``_on_training_start`` does not belong to the state.
    """
    resumed: Resumed | None = model._resumed
    if resumed is None:
        return
    model._resumed = None
    if model.logger is resumed.own_logger:  # the user may have set another one since
        model._custom_logger = False
    restore_callbacks(callback, resumed.tree["callbacks"])
    set_logger_state(model, resumed.tree["logger"])
    # Last, since building and restoring environments and callbacks may have drawn random numbers.
    set_space_states(model, resumed.spaces)
    set_global_states(resumed.random)


def reset_environments(model: ResumableModel, venv: VecEnv, generator: np.random.Generator | None) -> None:
    """Begin a new episode in each environment, seeded from the generator unless it is None."""
    if generator is not None:
        venv.seed(draw_seed(generator))
    model._last_obs = venv.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones(venv.num_envs, dtype=bool)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        model._last_original_obs = normalizer.get_original_obs()


def draw_seed(generator: np.random.Generator) -> int:
    """Draw the seed of a reset, to which each environment adds its own number."""
    return int(generator.integers(2**30))


def _own_part(trees: list[dict[str, Any]], group: Group, n_envs: int) -> dict[str, Any]:
    """
    Return this process's part of a checkpoint.

    If fewer processes have written it, an additional one gets the first one's part, without environments and files.
    """
    if len(trees) != group.size:
        log.warning(
            "The training is not resumed exactly: the number of processes has changed from %d to %d. The environments "
            "of all but the first one begin new episodes.",
            len(trees),
            group.size,
        )
    if group.rank < len(trees):
        return trees[group.rank]
    build = {**trees[0]["build"], "n_envs": n_envs, "environments": None}
    return {**trees[0], "build": build, "environments": None}


def _restore_environments(model: ResumableModel, venv: VecEnv, tree: dict[str, Any]) -> dict[str, Any]:
    """Restore the environments. Return the model's attributes from which the next rollout starts."""
    if tree["environments"] is None:  # `learn` resets them
        return {}
    venv.reset()
    restore_vec_env(venv, tree["environments"])
    set_global_states(tree["random"])
    if tree["resets"] is None and tree["environments"]["exact"]:
        check_names(tree["model"], OBSERVATIONS, "the model")
        return dict(tree["model"])
    generator = generator_from(tree["resets"])
    if generator is None and model.seed is not None:
        # Not the seed itself: each resumed run would repeat the first episodes of the interrupted one.
        rank = current_group().rank
        entropy = (model.seed, model.num_timesteps, *([rank] if rank else []))
        generator = np.random.default_rng(np.random.SeedSequence(entropy))
    reset_environments(model, venv, generator)
    return {name: getattr(model, name) for name in OBSERVATIONS}


def _continue_tensorboard(model: ResumableModel, folder: str | None) -> Logger | None:
    """Log to the folder of the interrupted run if it is in ``tensorboard_log``. Return the logger, or None."""
    if folder is None or model.tensorboard_log is None or current_group().rank > 0:
        return None
    if not Path(folder).resolve().is_relative_to(Path(model.tensorboard_log).resolve()):
        return None
    os.makedirs(folder, exist_ok=True)
    formats: list[KVWriter] = [HumanOutputFormat(sys.stdout)] if model.verbose >= 1 else []
    logger = Logger(folder, [*formats, _ContinuedTensorBoard(folder, model.num_timesteps + 1)])
    model.set_logger(logger)
    return logger


class _ContinuedTensorBoard(TensorBoardOutputFormat):
    """SB3's writer, which hides the interrupted run's steps after the checkpoint: the resumed run repeats them."""

    def __init__(self, folder: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=folder, purge_step=first_step)
        self._is_closed = False


def _warn_about_versions(saved: dict[str, str]) -> None:
    now = versions()
    changed = [
        f"{name} {saved.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if changed:
        text = "Numbers may differ in their last digits, since versions have changed: %s. "
        log.warning(text + "Install the earlier versions to avoid it.", ", ".join(changed))
