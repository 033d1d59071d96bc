"""How the RL Zoo builds and trains a ClipPPO: its experiment manager, adapted to ClipPPO's settings and files."""

import inspect
import logging
import os
import shutil
import sys
import traceback
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import get_class_by_name
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_clipvf.callbacks import IsolatedEvalCallback
from sb3_clipvf.checkpoint import ResumableEnv, TrainingCheckpoint
from sb3_clipvf.checkpoint.file import sorted_checkpoints
from sb3_clipvf.clip_ppo import ClipPPO
from sb3_clipvf.distributed import current_group
from sb3_clipvf.envs import FastDummyVecEnv, FastSubprocVecEnv
from sb3_clipvf.zoo.commands import ALGORITHM, hyperparams_path
from sb3_clipvf.zoo.entries import add_episode_ends, drop_null
from sb3_clipvf.zoo.model_choice import find_statistics, load_normalizer
from sb3_clipvf.zoo.resume import ResumedRun
from sb3_clipvf.zoo.run_folders import CHECKPOINTS, resume_command
from sb3_clipvf.zoo.settings import check_hyperparams, check_saved, check_schedules, constructor_keys, readable_config
from sb3_clipvf.zoo.terminal import timed_tables
from sb3_clipvf.zoo.training_log import logged_to
from sb3_clipvf.zoo.tuning import CheckedSearch
from sb3_clipvf.zoo.vec_env import (
    EnvSettings,
    appended_monitor_files,
    known_keywords,
    make_vec_env,
    stacks_frames,
    wrapper_list,
)

_FASTER = {DummyVecEnv: FastDummyVecEnv, SubprocVecEnv: FastSubprocVecEnv}
_PREPROCESSED_BY_ZOO = ("learning_rate", "clip_range", "clip_range_vf")
_OF_OBSERVATIONS = ("clip_obs", "epsilon", "norm_obs", "norm_obs_keys")  # arguments of VecNormalize


def new_manager(cls: type[ExperimentManager], *args: Any, **kwargs: Any) -> ExperimentManager:
    """Create an experiment manager that knows ClipPPO, as ``ExperimentManager.__new__``; it is not initialised."""
    return object.__new__(experiment_manager(cls))


def experiment_manager(base: type[ExperimentManager]) -> type[ExperimentManager]:
    """Return a subclass of the Zoo's manager, or of a class derived from it, that knows ClipPPO."""
    if issubclass(base, ClipPPOExperimentManager):
        return base
    if issubclass(ClipPPOExperimentManager, base):
        return ClipPPOExperimentManager
    return type(f"ClipPPO{base.__name__}", (ClipPPOExperimentManager, base), {})


class ClipPPOExperimentManager(CheckedSearch):
    """
    The RL Zoo's experiment manager, adapted to ``clipppo``; for other algorithms it behaves as the Zoo's.

    ``clipppo`` gets the packaged settings by default, and unknown keys are refused. Coefficients reach ClipPPO as
    written: the Zoo would turn each string into a linear schedule and refuse ``null``. ``FastDummyVecEnv`` and
    ``FastSubprocVecEnv`` replace SB3's, ``FastVecNormalize`` normalises, and ``IsolatedEvalCallback`` evaluates.
    """

    vec_env: ClassVar[str | None] = None
    """One of ``sb3_clipvf.zoo.vec_env.VEC_ENVS`` for the training environments; None leaves them to the Zoo."""

    checkpoint_freq: ClassVar[int] = -1
    """Environment steps between two checkpoints; no checkpoints if not positive."""

    resumed: ClassVar[ResumedRun | None] = None
    """The run to resume; None starts a new run."""

    def __init__(self, args: Namespace, algo: str, *rest: Any, config: str | None = None, **kwargs: Any) -> None:
        if algo == ALGORITHM and not config:
            config = str(hyperparams_path())
        super().__init__(args, algo, *rest, config=config, **kwargs)  # type: ignore[misc]
        if algo == ALGORITHM:
            self.vec_env_class = _FASTER.get(self.vec_env_class, self.vec_env_class)
        self._wrappers: Any = None
        self._has_folder = False  # whether this manager has created the folder of a new run
        self._statistics: Path | None = None  # file with the statistics of the model given to `--trained-agent`
        self._of_agent: dict[str, Any] = {}  # settings of that model, where they differ from the file's
        if self.vec_env is not None:
            args.vec_env = self.vec_env  # for args.yml of the run
        if (n_processes := current_group().size) > 1:
            args.n_processes = n_processes
            of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", n_processes))
            if of_machine != n_processes:
                args.n_processes_per_machine = of_machine
        self._keeps_checkpoints = algo == ALGORITHM and self.checkpoint_freq > 0 and not self.optimize_hyperparameters
        if self._keeps_checkpoints:
            args.checkpoint_freq = self.checkpoint_freq
        if self.resumed is not None:
            if current_group().rank == 0:  # the others have a folder of their own
                self.save_path, self.params_path = str(self.resumed.folder), str(self.resumed.settings_folder)
            self.env_kwargs = self.resumed.args.get("env_kwargs") or {}
            self._eval_env_kwargs_args = self.resumed.args.get("eval_env_kwargs")
            self.continue_training = True  # the Zoo then loads a model from a file

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """Build environments and model; return the model and the settings to save, or None for a search."""
        had_folder = self._has_folder
        try:
            return super().setup_experiment()
        except Exception:
            if self.algo == ALGORITHM and self._has_folder and not had_folder:
                shutil.rmtree(self.save_path, ignore_errors=True)  # `enjoy` would take the folder for a run
            raise

    def create_log_folder(self) -> None:
        """Create the folder of the run. If another run has taken its number meanwhile, use the next free one."""
        while self.resumed is None and not self._has_folder:
            try:
                os.makedirs(self.save_path)
                self._has_folder = True
            except FileExistsError:
                stem, _, number = self.save_path.rpartition("_")
                if not number.isdecimal():  # it ends with the suffix of `-uuid`, or a derived class has chosen it
                    break
                self.save_path = f"{stem}_{int(number) + 1}"
                self.params_path = f"{self.save_path}/{self.env_name}"
        super().create_log_folder()  # type: ignore[no-untyped-call]

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read and check the settings of the environment; return them and a sorted copy to save with the run."""
        env_id = self.env_name.gym_id
        source = f"the entry for {env_id} in {self.config}"
        if self.algo != ALGORITHM:
            with readable_config(self.config, env_id):
                hyperparams, saved_hyperparams = super().read_hyperparameters()
            check_schedules(hyperparams, self.custom_hyperparams or (), source, self.algo)
            return hyperparams, saved_hyperparams
        if self.resumed is not None:
            return dict(self.resumed.hyperparams), OrderedDict(self.resumed.hyperparams)
        overrides = dict(self.custom_hyperparams or {})
        if self.trial_id == 0 and self.storage and self.study_name:
            # The Zoo ignores the trial of number 0.
            self.custom_hyperparams = {**self.load_trial(self.storage, self.study_name, 0), **overrides}
        with readable_config(self.config, env_id):
            hyperparams, saved_hyperparams = super().read_hyperparameters()
        for settings in (hyperparams, saved_hyperparams):
            drop_null(settings)
        check_hyperparams(hyperparams, overrides, source)
        for name, value in vars(self.args).items():
            check_saved(name, value, "the command line")
        return hyperparams, saved_hyperparams

    def create_callbacks(self) -> None:
        """Create the callbacks of the command line, in addition to those of the settings, in the first process."""
        if current_group().rank > 0:
            self.callbacks = []
            return
        if self.algo != ALGORITHM:
            super().create_callbacks()  # type: ignore[no-untyped-call]
            return
        eval_freq, self.eval_freq = self.eval_freq, -1
        n_processes = current_group().size
        if self.save_freq > 0:  # the Zoo divides by the number of environments in this process
            self.save_freq = max(self.save_freq // n_processes, 1)
        super().create_callbacks()  # type: ignore[no-untyped-call]
        self.eval_freq = eval_freq
        if eval_freq > 0 and not self.optimize_hyperparameters:
            self.eval_freq = max(eval_freq // (n_processes * self.n_envs), 1)
            self.callbacks.append(self._evaluation())
        if self._keeps_checkpoints and not any(isinstance(one, TrainingCheckpoint) for one in self.callbacks):
            # The best model is that of the evaluations.
            folder = Path(self.save_path, CHECKPOINTS)
            checkpoint = TrainingCheckpoint(self.checkpoint_freq, folder, keep_best=False)
            checkpoint.differences_level = logging.INFO  # most environments cannot be resumed exactly
            self.callbacks.insert(0, checkpoint)
        # The Zoo ends the first callback if the training is interrupted. Put the bar there, so that it is closed.
        self.callbacks.sort(key=lambda callback: not isinstance(callback, ProgressBarCallback))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Create environments with all wrappers; ``vec_env`` sets the class of those for training.

        Evaluations keep the Zoo's class, so that their episodes are those of ``enjoy`` and ``report``.
        """
        manager = self
        no_log = no_log or current_group().rank > 0  # only the first process keeps files
        if self._keeps_checkpoints and self.vec_env_class is FastSubprocVecEnv:
            manager = copy(self)
            manager.env_wrapper = partial(_wrap_resumable, self.env_wrapper)
        known = known_keywords(self.eval_env_kwargs if eval_env else self.env_kwargs)
        with known, nullcontext() if self.resumed is None else appended_monitor_files():
            if self.vec_env is None or eval_env:
                return super(ClipPPOExperimentManager, manager).create_envs(n_envs, eval_env, no_log)
            return manager._create_vectorised(self.vec_env, n_envs, no_log)

    def learn(self, model: BaseAlgorithm) -> None:
        """Train the model of ``setup_experiment``."""
        target: Any = model
        if isinstance(model, ClipPPO):
            n_envs = model.n_envs * current_group().size  # as many in each process, since the command seeds all
            model._warn_about_early_end(n_envs, 0, self.n_timesteps, on_command_line=True)
        if self.resumed is not None:
            target = SimpleNamespace(env=model.env, learn=partial(model.learn, reset_num_timesteps=False))
        # Keep an interval that the user chose.
        is_timed = self.algo == ALGORITHM and self.log_interval == -1
        try:
            tables = timed_tables() if is_timed else nullcontext()
            resumed = None if self.resumed is None else model
            with warnings.catch_warnings(), logged_to(Path(self.save_path), resumed), tables:
                if self.vec_env is not None:
                    # SB3's warning: the difference is intended and changes nothing.
                    warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
                super().learn(target)
        except (SystemExit, Exception) as error:
            original = _original_error(error, model)
            if self._keeps_checkpoints and _ends_training(original):
                if sorted_checkpoints(Path(self.save_path, CHECKPOINTS)):
                    sys.stdout.write(f"To resume: {resume_command(Path(self.save_path), vars(self.args))}\n")
            if original is error:
                raise
            raise original from original.__cause__

    def _evaluation(self) -> IsolatedEvalCallback:
        if self.verbose > 0:
            sys.stdout.write("Creating test environment\n")
        return IsolatedEvalCallback(
            self.create_envs(self.n_eval_envs, eval_env=True),
            # For the Zoo's own checkpoints, which hold no statistics.
            callback_on_new_best=SaveVecNormalizeCallback(save_freq=1, save_path=self.params_path),
            best_model_save_path=self.save_path,
            n_eval_episodes=self.n_eval_episodes,
            log_path=self.save_path,
            eval_freq=self.eval_freq,
            deterministic=self.deterministic_eval,
        )

    def _create_vectorised(self, name: str, n_envs: int, no_log: bool) -> VecEnv:
        settings = EnvSettings(
            gym.spec(self.env_name.gym_id),
            self.env_kwargs,
            wrapper_list(self._wrappers),
            frame_stack=self.frame_stack,
            normalize=bool(self.normalize),
            monitor_folder=None if no_log else self.save_path,
        )
        # The Zoo seeds, normalises, stacks and transposes the result. Use a copy of the manager, since a search creates
        # environments in several threads.
        manager = copy(self)
        manager.vec_env_class = lambda env_fns: make_vec_env(  # type: ignore[assignment]
            name,
            replace(settings, monitor_kwargs=manager.monitor_kwargs),  # the Zoo has completed them by now
            env_fns,
        )
        if stacks_frames(name, settings):
            manager.frame_stack = None
        return super(ClipPPOExperimentManager, manager).create_envs(n_envs, no_log=no_log)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.resumed is None:
            settings = dict(hyperparams)
            agent = super()._load_pretrained_agent(hyperparams, env)
            if self.algo == ALGORITHM:
                self._of_agent = {**_other_networks(agent, settings), **_other_arguments(agent, settings)}
                if (normalizer := agent.get_vec_normalize_env()) is not None and self._statistics is not None:
                    self._of_agent |= _other_normalization(normalizer, self.normalize_kwargs)
            return agent
        run = self.resumed
        model = ClipPPO.resume(run.checkpoint, env, device=self.device, verbose=self.verbose)
        self.n_timesteps = max(0, run.total_timesteps - model.num_timesteps)
        schedules_end = model._schedule_timesteps
        if run.total_timesteps != schedules_end and self.verbose > 0:
            sys.stdout.write(
                f"The run now ends at step {run.total_timesteps}; schedules still end at step {schedules_end}\n"
            )
        return model

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        # A resumed run keeps its settings and its command.
        if self.resumed is None:
            saved_hyperparams.update(self._of_agent)
            super()._save_config(saved_hyperparams)

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., gym.Env[Any, Any]] | None, list[BaseCallback], Callable[..., Any] | None]:
        self._wrappers = hyperparams.get("env_wrapper")
        if self.algo != ALGORITHM:
            return super()._preprocess_hyperparams(hyperparams)
        coefficients = {key: hyperparams.pop(key) for key in _PREPROCESSED_BY_ZOO if key in hyperparams}
        add_episode_ends(hyperparams)
        hyperparams, env_wrapper, callbacks, vec_env_wrapper = super()._preprocess_hyperparams(hyperparams)
        hyperparams.update(coefficients)
        # The Zoo evaluates without the `env_kwargs` of the settings.
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        if self.trained_agent:
            agent = Path(self.trained_agent)
            self._statistics = find_statistics(agent, self.env_name, normalizes=bool(self.normalize))
        if isinstance(hyperparams.get("rollout_buffer_class"), str):
            hyperparams["rollout_buffer_class"] = get_class_by_name(hyperparams["rollout_buffer_class"])
        return hyperparams, env_wrapper, callbacks, vec_env_wrapper

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if self.algo != ALGORITHM:
            return super()._maybe_normalize(env, eval_env)
        if not self.normalize:
            return env
        if self._statistics is None:
            normalizer = VecNormalize(env, **self.normalize_kwargs)
        else:
            normalizer = load_normalizer(self._statistics, env)
            if not normalizer.training:
                # Statistics on the hub are those of an evaluation, which does not normalise rewards either.
                normalizer.training = normalizer.norm_reward = True
            _change_normalization(normalizer, self.normalize_kwargs, self._statistics)
        if eval_env:
            normalizer.training = normalizer.norm_reward = False
        if type(normalizer) is not VecNormalize:
            return normalizer
        from sb3_clipvf.envs import FastVecNormalize  # imports numba

        return FastVecNormalize.from_sb3(normalizer)


def _wrap_resumable(wrapper: Callable[..., gym.Env[Any, Any]] | None, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return ResumableEnv(env if wrapper is None else wrapper(env))


def _other_networks(agent: BaseAlgorithm, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the policy of an agent and its arguments, where they differ from those in the settings."""
    found: dict[str, Any] = {}
    policy: Any = agent.policy_class
    if agent.policy_aliases.get(settings["policy"], settings["policy"]) is not policy:
        names = [name for name, known in agent.policy_aliases.items() if known is policy]
        found["policy"] = names[0] if names else f"{policy.__module__}.{policy.__qualname__}"
    if agent.policy_kwargs != (settings.get("policy_kwargs") or {}):
        with suppress(ValueError):  # files of a run cannot hold all that a model's file can
            check_saved("policy_kwargs", agent.policy_kwargs, "the agent")
            found["policy_kwargs"] = agent.policy_kwargs
    return found


def _other_arguments(agent: BaseAlgorithm, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an agent that the settings do not contain, where they differ from the defaults."""
    found: dict[str, Any] = {}
    for name in constructor_keys() - {"policy", "policy_kwargs"} - settings.keys():
        value = getattr(agent, "_stats_window_size" if name == "stats_window_size" else name)
        if isinstance(value, type):
            value = f"{value.__module__}.{value.__qualname__}"
        if callable(value) or value in (inspect.signature(ClipPPO).parameters[name].default, {}):
            continue  # files of a run hold no functions
        with suppress(ValueError):
            check_saved(name, value, "the agent")
            found[name] = value
    return found


def _other_normalization(normalizer: VecNormalize, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the setting ``normalize`` of environments, if it differs from the arguments in the settings."""
    given = {name: one.default for name, one in inspect.signature(VecNormalize).parameters.items()} | settings
    used = {name: getattr(normalizer, name) for name in (*_OF_OBSERVATIONS, "clip_reward", "norm_reward")}
    other = {name: value for name, value in used.items() if value != given[name]}
    return {"normalize": {**settings, **other}} if other else {}


def _change_normalization(normalizer: VecNormalize, settings: dict[str, Any], path: Path) -> None:
    """Set the arguments in the settings; those of observations must be those in the agent's file."""
    for name, value in settings.items():
        known = getattr(normalizer, name)
        if name in _OF_OBSERVATIONS and value != known:
            normalizer.close()
            raise ValueError(
                f"`normalize` must keep {name}={known!r} of {path}, with which the agent was trained, got {value!r}. "
                "Pass `-params normalize:True` to keep all arguments of the file, or train a new agent."
            )
        setattr(normalizer, name, value)


def _original_error(error: BaseException, model: BaseAlgorithm) -> BaseException:
    """Return the error of the training itself; the Zoo's clean-up after it may have raised a second one."""
    found: BaseException | None = error
    while found is not None:
        frames = (frame for frame, _ in traceback.walk_tb(found.__traceback__))
        if any(frame.f_code.co_name == "learn" and frame.f_locals.get("self") is model for frame in frames):
            return found
        found = found.__context__
    return error


def _ends_training(error: BaseException) -> bool:
    """Return whether the error comes from a signal, or has the notes of an error during training."""
    return isinstance(error, SystemExit) or bool(getattr(error, "__notes__", ()))
