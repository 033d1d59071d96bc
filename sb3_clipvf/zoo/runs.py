"""Runs of the RL Zoo's train command: find one, read its training, evaluate its model. No torch at import."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_clipvf.common.validation import check_int
from sb3_clipvf.zoo.finding import choose_run, import_packages

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

# Training seeds are small numbers; the starts that an evaluation sees should not be theirs.
EVALUATION_SEED = 10_000


@dataclass(frozen=True)
class Run:
    """
    One run of the Zoo's train command.

    :param algo: the algorithm's name in the Zoo
    :param env_id: the environment's id
    :param folder: the run's folder, ``<log folder>/<algo>/<env>_<id>``
    :param model_path: the model's zip in it
    """

    algo: str
    env_id: str
    folder: Path
    model_path: Path

    @property
    def settings_folder(self) -> Path:
        """Where the Zoo keeps ``config.yml``, ``args.yml`` and ``vecnormalize.pkl``."""
        from huggingface_sb3 import EnvironmentName

        return Path(self.folder, EnvironmentName(self.env_id))


@dataclass(frozen=True)
class Evaluation:
    """
    Episodes of a trained agent. Returns are undiscounted sums of the environment's own rewards, before VecNormalize
    and reward clipping.

    :param returns: return of each episode, in reward units
    :param lengths: length of each episode, in steps of the unwrapped environment
    :param deterministic: whether actions were the most probable ones, or sampled
    :param num_timesteps: environment steps of the training that made the model
    :param seed: seed of the environments
    :param started: when that training started (s since 1970), later by what the compilation of kernels took; None where
        it was resumed, or the time is not known
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    deterministic: bool
    num_timesteps: int
    seed: int
    started: float | None = None

    @property
    def mean(self) -> float:
        """Mean return of the episodes."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation over the episodes (of these, not an estimate: divided by n)."""
        return float(np.std(self.returns))


@dataclass(frozen=True)
class TrainingCurve:
    """
    The episodes of a training, in the order in which they ended.

    :param steps: ``(n,)`` environment steps of all environments together at the end of each episode
    :param returns: ``(n,)`` their returns, in reward units
    :param seconds: ``(n,)`` seconds from the start of the training to the end of each episode
    """

    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray

    @property
    def training_seconds(self) -> float | None:
        """Seconds to the end of the last episode, None where no episode ended; the training took a little longer."""
        return float(self.seconds[-1]) if len(self.seconds) > 0 and self.seconds[-1] > 0 else None

    @property
    def steps_per_second(self) -> float | None:
        """Environment steps a second up to the end of the last episode, None where it cannot be known."""
        return float(self.steps[-1] / self.seconds[-1]) if self.training_seconds else None


def register_all() -> None:
    """Make ``clipppo`` known to the Zoo, and the environments of optional packages to Gymnasium."""
    import rl_zoo3.import_envs  # noqa: F401

    from sb3_clipvf.zoo.registration import register

    register()


def find_run(
    log_folder: str | os.PathLike[str],
    env_id: str,
    algo: str = "clipppo",
    exp_id: int = 0,
    load_best: bool = False,
) -> Run:
    """
    Find a run of the Zoo's train command.

    :param log_folder: the folder given to ``train -f``
    :param env_id: the environment's id
    :param algo: the algorithm's name in the Zoo
    :param exp_id: number of the run; 0: the newest that holds the model
    :param load_best: take ``best_model.zip`` of the evaluations while training, not the final model
    :return: the run
    :raises ValueError: where there is no such run, or it holds no such model
    """
    from huggingface_sb3 import EnvironmentName

    name = EnvironmentName(env_id)
    parent = Path(log_folder) / algo
    algo_option = "" if algo == "clipppo" else f"--algo {algo} "
    train = f"`sb3-clipvf train {algo_option}--env {env_id} -f {shlex.quote(str(log_folder))}`."
    model = "best_model.zip" if load_best else f"{name}.zip"
    number = choose_run(parent, name, exp_id, lambda run: (run / model).is_file())
    folder = parent / f"{name}_{number}"
    if exp_id < 0 or not folder.is_dir():
        what = f"a run of {env_id}" if exp_id == 0 else f"run {exp_id} of {env_id}"
        raise ValueError(f"`folder` must hold {what}, but there is none in {parent}. Train one with {train}")
    if (folder / model).is_file():
        return Run(algo, env_id, folder, folder / model)
    if load_best and (folder / f"{name}.zip").is_file():
        way_out = "It was trained without evaluations: leave out `--load-best`."
    elif any(folder.glob("checkpoints/checkpoint_*.zip")):
        way_out = f"Its training did not end: `sb3-clipvf train --resume {shlex.quote(str(folder))}` resumes it."
    else:
        way_out = f"Its training did not end. Train again with {train}"
    raise ValueError(f"{folder} must hold {model}, but does not. {way_out}")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from sb3_clipvf.zoo.run_files import read_settings

    return read_settings(path)


def read_hyperparams(run: Run) -> dict[str, Any]:
    """
    Read the settings that a run was made with: those of the YAML file with the changes of ``-params``.

    :param run: the run
    :return: settings, in YAML's types; {} where the run does not hold them
    """
    return _read_yaml(run.settings_folder / "config.yml")


def read_arguments(run: Run) -> dict[str, Any]:
    """
    Read the options of the command that trained a run.

    :param run: the run
    :return: options of the Zoo's ``train``, by name; {} where the run does not hold them
    """
    return _read_yaml(run.settings_folder / "args.yml")


def make_env(run: Run, n_envs: int, seed: int, render_mode: str | None = None) -> VecEnv:
    """The run's environment as the Zoo's enjoy makes it: wrappers, statistics (not updated), frame stack, arguments."""
    from rl_zoo3 import create_test_env, get_saved_hyperparams
    from rl_zoo3.exp_manager import ExperimentManager
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_clipvf.zoo.models import complete_settings
    from sb3_clipvf.zoo.run_files import checked_files
    from sb3_clipvf.zoo.statistics import own_statistics_loaded

    arguments = read_arguments(run)
    import_packages(arguments.get("gym_packages"), str(run.settings_folder / "args.yml"))
    with checked_files():
        hyperparams, stats_path = get_saved_hyperparams(str(run.settings_folder), test_mode=True)
    env_kwargs = dict(arguments.get("env_kwargs") or {})
    complete_settings(hyperparams, env_kwargs)
    env_kwargs.pop("render_mode", None)
    if render_mode is not None:
        env_kwargs["render_mode"] = render_mode
    with contextlib.ExitStack() as stack:
        stack.enter_context(checked_files())
        if hyperparams["normalize"]:
            stats_path = stack.enter_context(own_statistics_loaded(run.model_path, stats_path))
        # It reports statistics and frame stack for every environment.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return create_test_env(
            run.env_id,
            n_envs=n_envs,
            stats_path=stats_path,
            seed=seed,
            should_render=False,
            hyperparams=hyperparams,
            env_kwargs=env_kwargs,
            vec_env_cls=ExperimentManager.default_vec_env_cls or DummyVecEnv,
        )


def load_model(run: Run, seed: int, device: str) -> BaseAlgorithm:
    """Load the run's model for evaluation, and set the global random states to ``seed``."""
    from rl_zoo3 import ALGOS
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.utils import set_random_seed

    from sb3_clipvf.zoo.run_files import checked_files

    set_random_seed(seed)
    algorithm = ALGOS[run.algo]
    # An off-policy algorithm would otherwise take the memory of its replay buffer, which an evaluation never reads.
    kwargs: dict[str, Any] = {"buffer_size": 1} if issubclass(algorithm, OffPolicyAlgorithm) else {}
    with checked_files():
        return algorithm.load(run.model_path, device=device, **kwargs)


def is_deterministic_by_default(env_id: str) -> bool:
    """:return: the Zoo's rule: sampled actions for Atari and MiniGrid, the most probable ones elsewhere"""
    from rl_zoo3.exp_manager import ExperimentManager

    return not (ExperimentManager.is_atari(env_id) or ExperimentManager.is_minigrid(env_id))


def evaluate_run(
    run: Run,
    n_episodes: int = 20,
    n_envs: int = 8,
    seed: int = EVALUATION_SEED,
    deterministic: bool | None = None,
    device: str = "auto",
) -> Evaluation:
    """
    Evaluate a run's model on its environment, in the run's own settings.

    Episodes are shared out evenly over the environments beforehand, so that short ones are not favoured. Global random
    states (Python, NumPy, torch) are set to ``seed``.

    :param run: the run, see :func:`find_run`
    :param n_episodes: number of episodes, at least 1
    :param n_envs: number of environments side by side, at least 1; more than ``n_episodes`` are not made
    :param seed: seed of the environments and of sampled actions
    :param deterministic: take the most probable action; None: the Zoo's rule
    :param device: where the policy runs
    :return: the episodes
    :raises ValueError: where ``n_episodes`` or ``n_envs`` is below 1, the run lacks its VecNormalize statistics, or a
        ``vec_env_wrapper`` ends episodes
    """
    n_episodes = check_int("n_episodes", n_episodes, 1, "Pass a positive number.")
    n_envs = check_int("n_envs", n_envs, 1, "Pass a positive number.")
    register_all()
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_clipvf.envs.episode_ends import check_end

    model = load_model(run, seed, device)
    env = make_env(run, min(n_envs, n_episodes), seed)
    if deterministic is None:
        deterministic = is_deterministic_by_default(run.env_id)
    try:
        returns, lengths = evaluate_policy(
            model, env, n_episodes, deterministic, callback=check_end, return_episode_rewards=True
        )
    finally:
        env.close()
    return Evaluation(
        tuple(float(value) for value in np.asarray(returns)),
        tuple(int(value) for value in np.asarray(lengths)),
        deterministic,
        model.num_timesteps,
        seed,
        _started(model),
    )


def _started(model: BaseAlgorithm) -> float | None:
    """When the training started by which a model came to its steps; None where several did."""
    if model._num_timesteps_at_start != 0 or not model.start_time:
        return None
    return model.start_time / 1e9


def _read_monitor(path: Path) -> tuple[float, list[tuple[float, int, float]]]:
    """The start time (s) of a monitor file, and return, length and end (s since the start) of its episodes."""
    episodes = []
    with path.open(newline="", encoding="utf-8") as file:
        start = float(json.loads(file.readline().lstrip("#"))["t_start"])
        for row in csv.DictReader(file):
            try:
                episodes.append((float(row["r"]), int(row["l"]), float(row["t"])))
            except (TypeError, ValueError):  # a kill may cut the last line short
                break
    return start, episodes


def read_training_curve(
    folder: str | os.PathLike[str], num_timesteps: int | None = None, started: float | None = None
) -> TrainingCurve:
    """
    Read the episodes of a training from its monitor files.

    The environments step together, so an episode that ends after ``k`` steps of its own environment ends at step
    ``k * n_envs`` of the training. Monitor counts below Atari's frame skip: where its count is a multiple of the
    training's, steps are divided by that (whole) number.

    :param folder: the run's folder, with ``<i>.monitor.csv``
    :param num_timesteps: environment steps of the whole training, None where not known
    :param started: when the training started (s since 1970), None: when its environments were made
    :return: the episodes; empty where no episode ended or there are no monitor files
    """
    files = [_read_monitor(path) for path in sorted(Path(folder).glob("*.monitor.csv"))]
    first_start = min((start for start, _ in files), default=0.0)
    rows: list[tuple[float, int, float]] = []
    for start, episodes in files:
        own_steps = 0
        for episode_return, length, end in episodes:
            own_steps += length
            rows.append((start - first_start + end, own_steps * len(files), episode_return))
    rows.sort()
    seconds, steps, returns = (np.array([row[i] for row in rows], dtype=np.float64) for i in range(3))
    if num_timesteps and len(steps) > 0:
        steps = steps / max(1, round(steps[-1] / num_timesteps))
    if started is not None:
        seconds += first_start - started
    return TrainingCurve(steps, returns, seconds)
