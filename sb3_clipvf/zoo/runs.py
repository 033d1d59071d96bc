"""Runs of the RL Zoo's train command: find one, read its settings, evaluate its model. No torch at import."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
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
