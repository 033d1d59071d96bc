"""
Which run and model a command uses, and which statistics of ``VecNormalize`` belong to the model.

The Zoo finds no checkpoints of ClipPPO, and normalises every model by the statistics of the run's last one.
"""

import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName, ModelName
from rl_zoo3 import utils
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_clipvf.callbacks import BEST_MODEL
from sb3_clipvf.checkpoint import newest_checkpoint
from sb3_clipvf.checkpoint.file import sorted_checkpoints
from sb3_clipvf.checkpoint.model_statistics import has_statistics, load_statistics
from sb3_clipvf.common.messages import log
from sb3_clipvf.files.statistics import STATISTICS_FILE
from sb3_clipvf.zoo.checked_files import read_settings, undamaged_settings
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.entries import add_episode_ends, drop_null
from sb3_clipvf.zoo.patching import patched
from sb3_clipvf.zoo.run_folders import CHECKPOINTS, choose_run, resume_command
from sb3_clipvf.zoo.settings import import_packages

_MID_TRAINING = re.compile(rf"rl_model_\d+_steps\.zip|{re.escape(BEST_MODEL)}")
"""Names of models saved during training, whose statistics are not those of the Zoo's file."""


def choose_run_of_options(options: Namespace) -> None:
    """Replace ``exp_id`` with that of the run to use, and import the packages that register its environment."""
    parent = Path(options.folder, options.algo)
    options.exp_id = choose_run(parent, options.env, options.exp_id, has_model(options.env, options))
    settings = parent / f"{options.env}_{options.exp_id}" / options.env / "args.yml"
    if not settings.is_file():
        return
    import_packages(read_settings(settings).get("gym_packages"), str(settings))
    env_id = options.env.gym_id
    if env_id not in gym.registry:  # the Zoo would raise a KeyError
        takes_packages = hasattr(options, "gym_packages")
        hint = "Name it by `--gym-packages`, or add it there." if takes_packages else "Add the module there."
        raise ValueError(
            f"{env_id} not found in gym registry, and `gym_packages` in {settings} names no module that registers it. "
            f"{hint}"
        )


def has_model(env_name: str, options: Namespace) -> Callable[[Path], bool]:
    """Return a function that checks whether the folder of a run holds the model that the options ask for."""
    if getattr(options, "load_best", False):
        names = [BEST_MODEL]
    elif getattr(options, "load_checkpoint", None) is not None:
        steps = options.load_checkpoint
        names = [f"rl_model_{steps}_steps.zip", f"{CHECKPOINTS}/checkpoint_{steps}.zip"]
    elif getattr(options, "load_last_checkpoint", False):
        names = ["rl_model_*_steps.zip", f"{CHECKPOINTS}/checkpoint_*.zip"]
    elif hasattr(options, "load_checkpoint"):
        names = [f"{env_name}.zip"]
    else:  # `record_training` records all models
        names = [f"{env_name}.zip", BEST_MODEL, "rl_model_*_steps.zip", f"{CHECKPOINTS}/checkpoint_*.zip"]
    return lambda folder: any(any(folder.glob(name)) for name in names)


@contextmanager
def own_models() -> Iterator[None]:
    """Make the RL Zoo's commands find ClipPPO's checkpoints and build the environments of the run."""
    zoo_path, zoo_hyperparams, zoo_env = utils.get_model_path, utils.get_saved_hyperparams, utils.create_test_env
    chosen: Path | None = None
    normalizes_rewards = False

    def get_model_path(
        exp_id: int, folder: str, algo: str, env_name: EnvironmentName, *which: Any, **named: Any
    ) -> tuple[str, str, str]:
        nonlocal chosen
        if algo != ALGORITHM:
            return zoo_path(exp_id, folder, algo, env_name, *which, **named)
        found = _find_model(zoo_path, exp_id, folder, env_name, *which, **named)
        chosen = Path(found[1])
        return found

    def get_saved_hyperparams(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
        nonlocal normalizes_rewards
        normalizes_rewards = kwargs.get("norm_reward", False)  # `enjoy` names it
        hyperparams, path = zoo_hyperparams(*args, **kwargs)
        drop_null(hyperparams)
        return hyperparams, path

    def create_test_env(*args: Any, **kwargs: Any) -> VecEnv:
        env = make_test_env(zoo_env, chosen, *args, **kwargs)
        if normalizes_rewards:
            _normalize_rewards(env)
        return env

    with patched(
        latest_run=_latest_run_id,
        model_path=get_model_path,
        saved_settings=get_saved_hyperparams,
        test_env=create_test_env,
    ):
        yield


def complete_settings(hyperparams: dict[str, Any], env_kwargs: dict[str, Any]) -> None:
    """Complete a run's settings in place, so that the RL Zoo builds the training environments from them."""
    drop_null(hyperparams)
    hyperparams.setdefault("normalize", False)
    add_episode_ends(hyperparams)
    for name, value in hyperparams.pop("env_kwargs", {}).items():
        env_kwargs.setdefault(name, value)


def make_test_env(
    create: Callable[..., VecEnv],
    model: Path | None,
    *args: Any,
    stats_path: str | None,
    hyperparams: dict[str, Any],
    env_kwargs: dict[str, Any],
    **kwargs: Any,
) -> VecEnv:
    """Call ``create``, the RL Zoo's ``create_test_env``, with the model's own statistics and complete settings."""
    # In place, since `push_to_hub` writes the arguments to its files.
    complete_settings(hyperparams, env_kwargs)
    with ExitStack() as stack:
        if stats_path is not None and model is not None and hyperparams["normalize"]:
            if has_statistics(model):
                stats_path = stack.enter_context(tempfile.TemporaryDirectory())
                Path(stats_path, STATISTICS_FILE).touch()  # the Zoo checks that the file exists
                load = staticmethod(lambda _, venv: load_normalizer(model, venv))
                stack.enter_context(patched(load_statistics=load))
            elif _MID_TRAINING.fullmatch(model.name):
                log.warning(
                    "%s has no statistics of VecNormalize: those of another step, in %s, are used. Models in "
                    "`checkpoints/` have their own.",
                    model,
                    stats_path,
                )
        return create(*args, stats_path=stats_path, hyperparams=hyperparams, env_kwargs=env_kwargs, **kwargs)


def find_statistics(model: Path, env_name: str, *, normalizes: bool) -> Path | None:
    """
    Return the file with the statistics of a model given to ``--trained-agent``: the model's, or the Zoo's beside it.

    Return None if there are none. Raise ValueError if the settings normalise (``normalizes``) and there are none, if
    they do not normalise and there are some, or if those in the Zoo's file are of another step.
    """
    beside = model.parent / env_name / STATISTICS_FILE
    found = None
    if has_statistics(model):
        found = model
    elif beside.is_file():
        found = beside
        if _MID_TRAINING.fullmatch(model.name):
            raise ValueError(
                f"`--trained-agent` must be a model whose statistics of VecNormalize are known, got {model}, which has "
                f"none of its own: {beside} holds those of another step. Use the run's last model, or one of its "
                "`checkpoints/`."
            )
    if found is None and normalizes:
        raise ValueError(
            f"`--trained-agent` must be a model with statistics of VecNormalize, since the settings normalise, got "
            f"{model} without any. Copy them to {beside}, or pass `-params normalize:False`."
        )
    if found is not None and not normalizes:
        raise ValueError(
            f"`normalize` must be set for {model}, which was trained in normalised environments, got none in the "
            "settings. Pass `-params normalize:True`; the model's own statistics and their settings are used."
        )
    return found


def load_normalizer(path: Path, venv: VecEnv) -> VecNormalize:
    """Wrap environments in the ``VecNormalize`` of a file: ``vecnormalize.pkl``, a checkpoint or a best model."""
    if path.name == STATISTICS_FILE:
        return VecNormalize.load(str(path), venv)
    return load_statistics(path, venv)


def _normalize_rewards(env: VecEnv) -> None:
    """Make environments normalise rewards for ``--norm-reward``; the Zoo turns that off for evaluations."""
    normalizer = unwrap_vec_normalize(env)
    if normalizer is None:
        env.close()
        raise ValueError(
            "`--norm-reward` must be used with a run whose settings normalise, got one whose settings do not. Omit it."
        )
    normalizer.norm_reward = True


def _find_model(
    zoo_path: Callable[..., tuple[str, str, str]],
    exp_id: int,
    folder: str,
    env_name: EnvironmentName,
    load_best: bool = False,
    load_checkpoint: int | None = None,
    load_last_checkpoint: bool = False,
) -> tuple[str, str, str]:
    """Return the name, path and run folder of the model, as the Zoo's ``get_model_path`` (``zoo_path``) does."""
    parent = Path(folder, ALGORITHM)
    number = exp_id or _latest_run_id(str(parent), env_name)
    run = parent / f"{env_name}_{number}" if number > 0 else parent
    checkpoint = None
    if not load_best and load_checkpoint is not None:
        checkpoint = run / CHECKPOINTS / f"checkpoint_{load_checkpoint}.zip"
    elif not load_best and load_last_checkpoint:
        checkpoint = _last_checkpoint(run)
    if checkpoint is not None and checkpoint.is_file():
        return f"checkpoint-{_steps(checkpoint)}-{ModelName(ALGORITHM, env_name)}", str(checkpoint), str(run)
    try:
        return zoo_path(exp_id, folder, ALGORITHM, env_name, load_best, load_checkpoint, load_last_checkpoint)
    except ValueError as error:
        steps = [str(_steps(path)) for path in sorted_checkpoints(run / CHECKPOINTS)]
        if not steps:
            raise
        has_ended = (run / f"{env_name}.zip").is_file()
        arguments = undamaged_settings(run / env_name / "args.yml")
        resume = "" if has_ended else f", and `{resume_command(run, arguments)}` ends the training"
        raise ValueError(
            f"{error}. {run / CHECKPOINTS} has those of the steps {', '.join(steps)}: `--load-last-checkpoint` or "
            f"`--load-checkpoint {steps[-1]}` loads one{resume}."
        ) from error


def _last_checkpoint(run: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there is none or the Zoo has saved a later model."""
    if not sorted_checkpoints(run / CHECKPOINTS):
        return None
    newest = newest_checkpoint(run / CHECKPOINTS)
    of_zoo = max(map(_steps, run.glob("rl_model_*_steps.zip")), default=-1)
    return newest.path if newest.manifest.num_timesteps >= of_zoo else None


def _steps(path: Path) -> int:
    return int(path.stem.removeprefix("rl_model_").removeprefix("checkpoint_").removesuffix("_steps"))


def _latest_run_id(log_path: str, env_name: str) -> int:
    """Replace the Zoo's function of this name; a run counts only if it has ended with a model."""
    return choose_run(Path(log_path), env_name, 0, lambda run: (run / f"{env_name}.zip").is_file())
