"""Runs of the RL Zoo's train command: find one, read its training, evaluate its model. No torch at import."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_clipvf.common.validation import check_int
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.run_folders import CHECKPOINTS, choose_run, resume_command

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

EVALUATION_SEED = 10_000
"""Seed of evaluations, far from the usual small seeds of training runs, whose initial states they must not repeat."""


@dataclass(frozen=True)
class Run:
    """
    One run of the Zoo's train command.

    :param algo: Name of the algorithm in the Zoo.
    :param env_id: Id of the environment.
    :param folder: Folder of the run, ``<log folder>/<algo>/<env>_<id>``.
    :param model_path: Zip file of the model in this folder.
    """

    algo: str
    env_id: str
    folder: Path
    model_path: Path

    @property
    def settings_folder(self) -> Path:
        """Folder of ``config.yml``, ``args.yml`` and ``vecnormalize.pkl``."""
        from huggingface_sb3 import EnvironmentName

        return Path(self.folder, EnvironmentName(self.env_id))


@dataclass(frozen=True)
class Evaluation:
    """
    Episodes of a trained agent. Returns are undiscounted sums of the environment's own rewards, before VecNormalize
    and reward clipping.

    :param returns: Return of each episode, in reward units.
    :param lengths: Length of each episode, in steps of the unwrapped environment.
    :param deterministic: Whether actions were the most probable ones rather than samples.
    :param num_timesteps: Environment steps for which the model was trained.
    :param seed: Seed of the environments.
    :param started: Start of the training (s since 1970), after the compilation of kernels. None if it was resumed
        before this model was saved, or the time is unknown.
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
        """Standard deviation of the episodes (divided by n: of these episodes, not an estimate)."""
        return float(np.std(self.returns))


@dataclass(frozen=True)
class TrainingCurve:
    """
    Training episodes of a run, in the order in which they ended.

    :param steps: Environment steps of all environments together at the end of each episode, ``(n,)``, ascending.
    :param returns: Returns in reward units, ``(n,)``.
    :param seconds: Seconds from the start of training to the end of each episode, ``(n,)``; NaN if a file shows that
        its clock has started again, as a continued training does.
    :param env_id: Id of the environment; "" if unknown.
    """

    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray
    env_id: str = ""

    @property
    def training_seconds(self) -> float | None:
        """Seconds to the end of the last episode, a little before the end of training; None if no episode ended."""
        return float(self.seconds[-1]) if len(self.seconds) > 0 and self.seconds[-1] > 0 else None

    @property
    def steps_per_second(self) -> float | None:
        """Environment steps per second up to the end of the last episode; None if no episode ended."""
        return float(self.steps[-1] / self.seconds[-1]) if self.training_seconds else None


def register_all() -> None:
    """Register ``clipppo`` with the Zoo, and the environments of optional packages with Gymnasium."""
    import rl_zoo3.import_envs  # noqa: F401

    from sb3_clipvf.zoo.registration import register

    register()


def find_run(
    log_folder: str | os.PathLike[str],
    env_id: str,
    algo: str = ALGORITHM,
    exp_id: int = 0,
    load_best: bool = False,
) -> Run:
    """
    Find a run of the Zoo's train command.

    :param log_folder: Folder given to ``train -f``.
    :param env_id: Id of the environment.
    :param algo: Name of the algorithm in the Zoo.
    :param exp_id: Number of the run; 0 selects the newest run that holds the model.
    :param load_best: Whether to use ``best_model.zip`` of the evaluations during training, not the final model.
    :return: The run.
    :raises ValueError: If there is no such run, or it holds no such model.
    """
    from huggingface_sb3 import EnvironmentName

    name = EnvironmentName(env_id)
    parent = Path(log_folder) / algo
    algo_option = "" if algo == ALGORITHM else f"--algo {algo} "
    train = f"`sb3-clipvf train {algo_option}--env {env_id} -f {shlex.quote(str(log_folder))}`."
    model = "best_model.zip" if load_best else f"{name}.zip"
    number = choose_run(parent, name, exp_id, lambda run: (run / model).is_file())
    folder = parent / f"{name}_{number}"
    if exp_id < 0 or not folder.is_dir():
        what = f"run of {env_id}" if exp_id == 0 else f"run {exp_id} of {env_id}"
        raise ValueError(f"There is no {what} in {parent}. Train one with {train}")
    run = Run(algo, env_id, folder, folder / model)
    if run.model_path.is_file():
        return run
    if load_best and (folder / f"{name}.zip").is_file():
        hint = "It was trained without evaluations. Leave out `--load-best`."
    elif any(folder.glob(f"{CHECKPOINTS}/checkpoint_*.zip")):
        from sb3_clipvf.zoo.checked_files import undamaged_settings

        arguments = undamaged_settings(run.settings_folder / "args.yml")
        hint = f"Its training did not end: `{resume_command(folder, arguments)}` resumes it."
    else:
        hint = f"Its training did not end. Train again with {train}"
    raise ValueError(f"{folder} contains no {model}. {hint}")


def read_hyperparams(run: Run) -> dict[str, Any]:
    """
    Read the settings that a run was trained with: those of the YAML file with the changes of ``-params``.

    :param run: Run from :func:`find_run`.
    :return: Settings in YAML's types; {} if the run does not hold them.
    """
    return _read_yaml(run.settings_folder / "config.yml")


def read_arguments(run: Run) -> dict[str, Any]:
    """
    Read the options of the command that trained a run.

    :param run: Run from :func:`find_run`.
    :return: Options of the Zoo's ``train``, by name; {} if the run does not hold them.
    """
    return _read_yaml(run.settings_folder / "args.yml")


def make_env(run: Run, n_envs: int, seed: int, render_mode: str | None = None) -> VecEnv:
    """Create the run's environments as the Zoo's enjoy does, with wrappers, arguments and fixed statistics."""
    from rl_zoo3 import create_test_env, get_saved_hyperparams
    from rl_zoo3.exp_manager import ExperimentManager
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_clipvf.zoo.checked_files import checked_files
    from sb3_clipvf.zoo.model_choice import complete_settings, make_test_env
    from sb3_clipvf.zoo.settings import import_packages

    arguments = read_arguments(run)
    import_packages(arguments.get("gym_packages"), str(run.settings_folder / "args.yml"))
    # The Zoo prints statistics and frame stack for every environment.
    with checked_files(), contextlib.redirect_stdout(io.StringIO()):
        hyperparams, stats_path = get_saved_hyperparams(str(run.settings_folder), test_mode=True)
        env_kwargs = dict(arguments.get("env_kwargs") or {})
        complete_settings(hyperparams, env_kwargs)
        env_kwargs.pop("render_mode", None)
        if render_mode is not None:
            env_kwargs["render_mode"] = render_mode
        return make_test_env(
            create_test_env,
            run.model_path,
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

    from sb3_clipvf.zoo.checked_files import checked_files

    set_random_seed(seed)
    algorithm = ALGOS[run.algo]
    # An evaluation never reads the replay buffer of an off-policy algorithm: do not allocate it.
    kwargs: dict[str, Any] = {"buffer_size": 1} if issubclass(algorithm, OffPolicyAlgorithm) else {}
    with checked_files():
        return algorithm.load(run.model_path, device=device, **kwargs)


def is_deterministic_by_default(env_id: str) -> bool:
    """Return whether the Zoo uses the most probable actions, as it does everywhere except in Atari and MiniGrid."""
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
    Evaluate a run's model in its environment, with the run's own settings.

    Each environment runs a fixed share of the episodes, so that short episodes are not favoured. Global random states
    (Python, NumPy, torch) are set to ``seed``.

    :param run: Run from :func:`find_run`.
    :param n_episodes: Number of episodes, at least 1.
    :param n_envs: Number of parallel environments, at least 1; at most ``n_episodes`` are created.
    :param seed: Seed of the environments and of sampled actions.
    :param deterministic: Whether to use the most probable action; None follows the Zoo's rule.
    :param device: PyTorch device of the policy.
    :return: The episodes.
    :raises ValueError: If ``n_episodes`` or ``n_envs`` is below 1, the run lacks its VecNormalize statistics, or a
        ``vec_env_wrapper`` ends episodes.
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
        _start_of_training(model),
    )


def read_training_curve(
    folder: str | os.PathLike[str],
    num_timesteps: int | None = None,
    started: float | None = None,
    n_processes: int = 1,
) -> TrainingCurve:
    """
    Read the training episodes of a run from its monitor files.

    The environments step together, so an episode that ends after ``k`` steps of its own environment ends at step
    ``k * n_envs * n_processes`` of the training. If one file serves all environments, its column ``total_timesteps``
    has ``k * n_envs``. Without this column (SB3's ``VecMonitor``, earlier versions), the step is the sum of the lengths
    so far, which is too low by the steps of the episodes that have not ended. Monitor counts frames below Atari's
    frame skip: if its count is a multiple of the training's, steps are divided by that (whole) number.

    :param folder: Folder of the run, with ``<i>.monitor.csv``, or ``monitor.csv`` of SB3's ``VecMonitor``.
    :param num_timesteps: Environment steps of the whole run; None if unknown.
    :param started: Start of training (s since 1970); None: the time at which its environments were created.
    :param n_processes: Processes of the run, of which the first one wrote the files.
    :return: The episodes; empty if no episode ended or there are no monitor files.
    :raises ValueError: If a monitor file is damaged, or the files are of several trainings.
    """
    files = [read_monitor(path) for path in monitor_paths(folder)]
    is_continued = any(np.any(np.diff([end for _, _, end in file.episodes]) < 0) for file in files)
    if len(files) > 1 and not is_continued:
        _check_one_training(files)
    first_start = min((file.start for file in files), default=0.0)
    rows = [
        (own_steps * len(files) * n_processes, file.start - first_start + end, episode_return)
        for file in files
        for episode_return, own_steps, end in file.episodes
    ]
    # Steps first: the time may have started again.
    rows.sort(key=lambda row: row[:2])
    steps, seconds, returns = (np.array([row[i] for row in rows], dtype=np.float64) for i in range(3))
    if is_continued:
        seconds[:] = np.nan
    if num_timesteps and len(steps) > 0:
        steps = steps / frame_skip(steps[-1], num_timesteps)
    if started is not None:
        seconds += first_start - started
    return TrainingCurve(steps, returns, seconds, files[0].env_id if files else "")


def monitor_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the Monitor files of a run, sorted, without those of evaluations beside others."""
    paths = sorted(Path(folder).glob("*monitor.csv"))
    return [path for path in paths if not is_of_evaluations(path.name)] or paths


def is_of_evaluations(name: str) -> bool:
    """Return whether a file or folder is named as one of evaluations, such as ``eval_env`` or ``my_test``."""
    return re.search(r"(?:^|[_-])(?:eval|test)", name, re.IGNORECASE) is not None


def frame_skip(n_frames: float, num_timesteps: float) -> int:
    """Return the frames of a step if Monitor has counted ``n_frames`` in a training of ``num_timesteps`` steps."""
    return max(1, round(n_frames / num_timesteps))


@dataclass(frozen=True)
class MonitorFile:
    """
    Start (s since 1970), environment and episodes of a file.

    An episode has its return, the steps of the file's environments at its end, and the seconds from the start.
    """

    path: Path
    start: float
    env_id: str
    episodes: list[tuple[float, int, float]]


def read_monitor(path: Path) -> MonitorFile:
    """
    Read a file of SB3's ``Monitor``; a cut last line is left out.

    :raises ValueError: If the file has no header or is damaged.
    """
    episodes, steps, cut = [], 0, ""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            header = json.loads(file.readline().lstrip("#"))
            start, env_id = float(header["t_start"]), str(header.get("env_id") or "")
            env_id = "" if env_id == "None" else env_id  # of an environment that is not registered
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must begin with the header of SB3's Monitor, but does not ({type(error).__name__}: {error}). "
                "Remove it if its training has ended."
            ) from error
        try:
            # A kill may have cut the last line.
            for number, row in enumerate(csv.DictReader(line for line in file if line.endswith("\n")), 3):
                if cut:
                    raise csv.Error(cut)
                try:
                    episode_return, length, end = float(row["r"]), int(row["l"]), float(row["t"])
                    steps = int(row["total_timesteps"]) if "total_timesteps" in row else steps + length
                    episodes.append((episode_return, steps, end))
                except (TypeError, ValueError) as error:
                    cut = f"line {number}: {error}"
        except (KeyError, csv.Error) as error:
            reason = cut or f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} must have the columns of SB3's Monitor, but is damaged ({reason}). "
                f"Remove {'the line' if cut else 'it'} if its training has ended."
            ) from error
    return MonitorFile(path, start, env_id, episodes)


def _check_one_training(files: Sequence[MonitorFile]) -> None:
    """
    Raise ValueError if files of separate environments cannot be of one training, in which they step together.

    By the time of an episode's end, all have made the same number of steps. A resume may begin new episodes, so that
    environments lose different numbers of steps.
    """
    rows = sorted((file.start + end, steps, file.path) for file in files for _, steps, end in file.episodes)
    longest = max((np.diff([0, *(steps for _, steps, _ in file.episodes)]).max(initial=0) for file in files), default=0)
    most, first = 0, files[0].path
    for _, steps, path in rows:
        if most - steps > most / 2 + longest:
            raise ValueError(
                f"{path.parent} must hold one training, got {first.name} and {path.name}, whose environments did not "
                "step together. Keep each training in its own folder."
            )
        if steps > most:
            most, first = steps, path


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from sb3_clipvf.zoo.checked_files import read_settings

    return read_settings(path)


def _start_of_training(model: BaseAlgorithm) -> float | None:
    """Return when the model's training started (s since 1970); None if it was resumed."""
    if model._num_timesteps_at_start != 0 or not model.start_time:
        return None
    return model.start_time / 1e9
