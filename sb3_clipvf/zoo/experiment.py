"""
How the RL Zoo builds a ClipPPO: its experiment manager, with ClipPPO's keys checked and its schedules left alone.
"""

import difflib
import inspect
import logging
import shutil
import sys
import traceback
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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
from sb3_clipvf.envs import FastDummyVecEnv
from sb3_clipvf.zoo.defaults import ALGORITHM, hyperparams_path
from sb3_clipvf.zoo.entries import ZOO_KEYS, counted, drop_null
from sb3_clipvf.zoo.models import find_statistics, load_normalizer
from sb3_clipvf.zoo.resume import ResumedRun
from sb3_clipvf.zoo.runs import CHECKPOINTS
from sb3_clipvf.zoo.settings import check_imports, check_saved, check_setting, readable_config
from sb3_clipvf.zoo.terminal import WholeProgressBar, timed_tables
from sb3_clipvf.zoo.tuning import CheckedSearch
from sb3_clipvf.zoo.vec_env import EnvSettings, growing_files, known_keywords, make_vec_env, stacks_frames, wrapper_list

COMMAND_LINE_KEYS = {
    "device": "`--device`",
    "env": "`--env`",
    "seed": "`--seed`",
    "tensorboard_log": "`--tensorboard-log`",
    "verbose": "`--verbose`",
}
"""Arguments of ClipPPO that the RL Zoo sets from its command line, so that an entry may not."""

_PREPROCESSED_BY_ZOO = ("learning_rate", "clip_range", "clip_range_vf")


def constructor_keys() -> frozenset[str]:
    """
    List the arguments of ClipPPO that an entry of the settings may set.

    :return: Names of the constructor's arguments, without those that the RL Zoo sets itself.
    """
    names = inspect.signature(ClipPPO.__init__).parameters
    return frozenset(names) - {"self", "_init_setup_model", *COMMAND_LINE_KEYS}


def check_hyperparams(hyperparams: dict[str, Any], overrides: Iterable[str], source: str) -> None:
    """
    Refuse settings that neither the RL Zoo nor ClipPPO would use.

    :param hyperparams: Settings of one environment, overrides included.
    :param overrides: Keys of those that were given on the command line.
    :param source: Where the others come from, for messages.
    :raises ValueError: If a key is unknown, missing or reserved, a number was written so that YAML reads it as text, or
        a value that the RL Zoo reads is out of range.
    :raises TypeError: If such a value is of another type.
    """
    legal = constructor_keys() | ZOO_KEYS
    overridden = set(overrides)
    for key, value in hyperparams.items():
        where = "`-params`" if key in overridden else source
        if key in COMMAND_LINE_KEYS:
            raise ValueError(
                f"`{key}` must be given by the option {COMMAND_LINE_KEYS[key]}, got it in {where}. Remove it there."
            )
        if key not in legal:
            near = difflib.get_close_matches(str(key), sorted(legal), n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"The keys are: {', '.join(sorted(legal))}."
            raise ValueError(
                f"`{key}` must be an argument of ClipPPO or a key of the RL Zoo, got it in {where}. {hint}"
            )
        if isinstance(value, str) and _is_number(value):
            way_out = f"YAML needs a point in it, as in 1.0e-3, or a tag: !!float {value}."
            if key in overridden:
                way_out = f"Write `{key}:{value}`."
            raise ValueError(f"`{key}` must be a number, got the text {value!r} in {where}. {way_out}")
        check_setting(key, value, where)
    for key in ("policy", "n_timesteps"):
        if key not in hyperparams:
            raise ValueError(
                f"`{key}` must be set for each environment, got none in {source}. Add a line `{key}: ...`."
            )


def new_manager(cls: type[ExperimentManager], *args: Any, **kwargs: Any) -> ExperimentManager:
    """
    Create an experiment manager that knows ClipPPO, as ``ExperimentManager.__new__``.

    :param cls: Class that was called.
    :param args: Arguments of its constructor.
    :param kwargs: More of them.
    :return: Instance of :func:`experiment_manager` of the class, not initialised.
    """
    return object.__new__(experiment_manager(cls))


def experiment_manager(base: type[ExperimentManager]) -> type[ExperimentManager]:
    """
    Make an experiment manager know ClipPPO.

    :param base: The RL Zoo's experiment manager, or a subclass of it.
    :return: Subclass of ``base`` that treats ``clipppo`` as described in :class:`ClipPPOExperimentManager` and every
        other algorithm as ``base`` does; ``base`` itself if it does so already.
    """
    if issubclass(base, ClipPPOExperimentManager):
        return base
    if issubclass(ClipPPOExperimentManager, base):
        return ClipPPOExperimentManager
    return type(f"ClipPPO{base.__name__}", (ClipPPOExperimentManager, base), {})


class ClipPPOExperimentManager(CheckedSearch):
    """
    The RL Zoo's experiment manager, where ``clipppo`` gets the packaged settings by default, unknown keys are refused,
    coefficients reach ClipPPO as written (the Zoo would make each string a linear schedule and refuse ``null``),
    ``FastDummyVecEnv`` stands for ``DummyVecEnv``, ``FastVecNormalize`` normalises, and ``IsolatedEvalCallback``
    evaluates.

    :param args: The Zoo's command-line arguments.
    :param algo: Algorithm's name in the Zoo.
    :param rest: As in the Zoo's class.
    :param config: Settings file or module; None takes ``clipppo.yml`` of this package, or the Zoo's own file for
        another algorithm.
    :param kwargs: As in the Zoo's class.
    """

    vec_env: ClassVar[str | None] = None
    """One of ``sb3_clipvf.zoo.vec_env.VEC_ENVS`` for the training environments; None leaves them to the Zoo."""

    checkpoint_freq: ClassVar[int] = -1
    """Environment steps between two checkpoints of the whole training; none where it is not positive."""

    resumed: ClassVar[ResumedRun | None] = None
    """The run that goes on; None begins a new one."""

    def __init__(self, args: Namespace, algo: str, *rest: Any, config: str | None = None, **kwargs: Any) -> None:
        if algo == ALGORITHM and not config:
            config = str(hyperparams_path())
        super().__init__(args, algo, *rest, config=config, **kwargs)  # type: ignore[misc]
        if algo == ALGORITHM and self.vec_env_class is DummyVecEnv:
            self.vec_env_class = FastDummyVecEnv
        self._wrappers: Any = None
        self._found: Path | None = None  # statistics of the model that the training goes on from
        if self.vec_env is not None:
            args.vec_env = self.vec_env  # for args.yml of the run
        self._keeps_checkpoints = algo == ALGORITHM and self.checkpoint_freq > 0 and not self.optimize_hyperparameters
        if self._keeps_checkpoints:
            args.checkpoint_freq = self.checkpoint_freq
        if self.resumed is not None:
            self._take_over(self.resumed)

    def _take_over(self, run: ResumedRun) -> None:
        self.save_path, self.params_path = str(run.folder), str(run.settings_folder)
        self.env_kwargs = run.args.get("env_kwargs") or {}
        self._eval_env_kwargs_args = run.args.get("eval_env_kwargs")
        # Its model is in a file.
        self.continue_training = True

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        Read the settings and build environments and model.

        :return: The model and the settings to save; None where hyperparameters are to be searched.
        :raises ValueError: If a setting is refused. No run folder is left then, which `enjoy` would take for a run.
        """
        existed = Path(self.save_path).exists()
        try:
            return super().setup_experiment()
        except Exception:
            # A run that was started at the same time may have taken the same number, and have its settings there.
            is_other_run = any(Path(self.save_path).rglob("config.yml"))
            if self.algo == ALGORITHM and not existed and not is_other_run:
                shutil.rmtree(self.save_path, ignore_errors=True)
            raise

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read and check the settings of this environment.

        :return: The settings, and a sorted copy to be saved with the run.
        :raises ValueError: If a key is unknown or missing, a value is refused, or the file has no entry that fits.
        :raises TypeError: If a value is of the wrong type.
        :raises ImportError: If a class that is named cannot be imported.
        """
        env_id = self.env_name.gym_id
        if self.algo != ALGORITHM:
            with readable_config(self.config, env_id):
                return super().read_hyperparameters()
        if self.resumed is not None:
            return dict(self.resumed.hyperparams), OrderedDict(self.resumed.hyperparams)
        overrides = dict(self.custom_hyperparams or {})
        if self.trial_id == 0 and self.storage and self.study_name:
            # The Zoo takes a trial of number 0 for no trial.
            self.custom_hyperparams = {**self.load_trial(self.storage, self.study_name, 0), **overrides}
        with readable_config(self.config, env_id):
            hyperparams, saved_hyperparams = super().read_hyperparameters()
        for settings in (hyperparams, saved_hyperparams):
            drop_null(settings)
        source = f"the entry for {env_id} in {self.config}"
        check_hyperparams(hyperparams, overrides, source)
        for key, value in hyperparams.items():
            where = "`-params`" if key in overrides else source
            check_imports(key, value, where)
            check_saved(key, value, where)
        for name, value in vars(self.args).items():
            check_saved(name, value, "the command line")
        return hyperparams, saved_hyperparams

    def create_callbacks(self) -> None:
        """Create the callbacks that the command line asks for, beside those of the settings."""
        if self.algo != ALGORITHM:
            super().create_callbacks()  # type: ignore[no-untyped-call]
            return
        eval_freq, self.eval_freq = self.eval_freq, -1
        super().create_callbacks()  # type: ignore[no-untyped-call]
        self.eval_freq = eval_freq
        if eval_freq > 0 and not self.optimize_hyperparameters:
            self.eval_freq = max(eval_freq // self.n_envs, 1)
            self.callbacks.append(self._evaluation())
        if self._keeps_checkpoints and not any(isinstance(one, TrainingCheckpoint) for one in self.callbacks):
            # Best models are those of evaluations here.
            folder = Path(self.save_path, CHECKPOINTS)
            checkpoint = TrainingCheckpoint(self.checkpoint_freq, folder, keep_best=False)
            checkpoint.differences_level = logging.INFO  # most environments cannot be resumed exactly
            self.callbacks.insert(0, checkpoint)
        self.callbacks = [WholeProgressBar() if type(one) is ProgressBarCallback else one for one in self.callbacks]
        # The Zoo closes the first one where a training is interrupted, which leaves no broken bar on the terminal.
        self.callbacks.sort(key=lambda callback: not isinstance(callback, ProgressBarCallback))

    def _evaluation(self) -> IsolatedEvalCallback:
        if self.verbose > 0:
            sys.stdout.write("Creating test environment\n")
        return IsolatedEvalCallback(
            self.create_envs(self.n_eval_envs, eval_env=True),
            # For the Zoo's own checkpoints, which have no statistics of their own.
            callback_on_new_best=SaveVecNormalizeCallback(save_freq=1, save_path=self.params_path),
            best_model_save_path=self.save_path,
            n_eval_episodes=self.n_eval_episodes,
            log_path=self.save_path,
            eval_freq=self.eval_freq,
            deterministic=self.deterministic_eval,
        )

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Create environments, those of the training as ``vec_env`` says. Evaluation keeps the Zoo's: its few episodes
        gain nothing from stepping together, and are then those of ``enjoy`` and ``report``.

        :param n_envs: Number of environments.
        :param eval_env: Whether they are for evaluation.
        :param no_log: Whether to write no files of episodes.
        :return: The environments with all wrappers.
        :raises ValueError: If a setting cannot be honoured with this ``vec_env``.
        :raises TypeError: If the environment does not take its arguments.
        """
        manager = self._for_envs()
        known = known_keywords(self.eval_env_kwargs if eval_env else self.env_kwargs)
        with known, nullcontext() if self.resumed is None else growing_files():
            if self.vec_env is None or eval_env:
                return super(ClipPPOExperimentManager, manager).create_envs(n_envs, eval_env, no_log)
            return manager._create_vectorised(self.vec_env, n_envs, no_log)

    def _for_envs(self) -> "ClipPPOExperimentManager":
        """:return: The manager, or a copy whose environments can be asked for their state."""
        if not (self._keeps_checkpoints and self.vec_env_class is SubprocVecEnv):
            return self
        manager = copy(self)
        manager.env_wrapper = partial(_resumable, self.env_wrapper)
        return manager

    def _create_vectorised(self, name: str, n_envs: int, no_log: bool) -> VecEnv:
        settings = EnvSettings(
            gym.spec(self.env_name.gym_id),
            self.env_kwargs,
            wrapper_list(self._wrappers),
            frame_stack=self.frame_stack,
            normalize=bool(self.normalize),
            monitor_folder=None if no_log else self.save_path,
        )
        # The Zoo seeds, normalises, stacks and transposes what this makes. A copy of the manager, since the search for
        # hyperparameters makes environments in several threads.
        manager = copy(self)
        manager.vec_env_class = lambda env_fns: make_vec_env(  # type: ignore[assignment]
            # The Zoo completes them for some environments.
            name,
            replace(settings, monitor_kwargs=manager.monitor_kwargs),
            env_fns,
        )
        if stacks_frames(name, settings):
            manager.frame_stack = None
        return super(ClipPPOExperimentManager, manager).create_envs(n_envs, no_log=no_log)

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train.

        :param model: As ``setup_experiment`` gave it.
        """
        target: Any = model
        if isinstance(model, ClipPPO):
            model._warn_of_early_end(self.n_timesteps, on_command_line=True)
        if self.resumed is not None:
            target = SimpleNamespace(env=model.env, learn=partial(model.learn, reset_num_timesteps=False))
        # An interval that the user chose is honoured.
        is_timed = self.algo == ALGORITHM and self.log_interval == -1
        try:
            with warnings.catch_warnings(), timed_tables() if is_timed else nullcontext():
                if self.vec_env is not None:
                    # Meant so, and without consequence.
                    warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
                super().learn(target)
        except (SystemExit, Exception) as error:
            ended = _ended_by(error, model)
            if self._keeps_checkpoints and _ends_training(ended):
                if sorted_checkpoints(Path(self.save_path, CHECKPOINTS)):
                    sys.stdout.write(f"To resume: sb3-clipvf train --resume {self.save_path}\n")
            if ended is error:
                raise
            raise ended from ended.__cause__

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.resumed is None:
            return super()._load_pretrained_agent(hyperparams, env)
        run = self.resumed
        model = ClipPPO.resume(run.checkpoint, env, device=self.device, verbose=self.verbose)
        self.n_timesteps = max(0, run.total_timesteps - model.num_timesteps)
        schedules_end = model._schedule_timesteps
        if run.total_timesteps != schedules_end and self.verbose > 0:
            sys.stdout.write(
                f"It ends at step {run.total_timesteps} now; schedules end at {schedules_end}, as before\n"
            )
        return model

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        # A run that goes on keeps the settings and the command that it was begun with.
        if self.resumed is None:
            super()._save_config(saved_hyperparams)

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., gym.Env[Any, Any]] | None, list[BaseCallback], Callable[..., Any] | None]:
        self._wrappers = hyperparams.get("env_wrapper")
        if self.algo != ALGORITHM:
            return super()._preprocess_hyperparams(hyperparams)
        coefficients = {key: hyperparams.pop(key) for key in _PREPROCESSED_BY_ZOO if key in hyperparams}
        counted(hyperparams)
        hyperparams, env_wrapper, callbacks, vec_env_wrapper = super()._preprocess_hyperparams(hyperparams)
        hyperparams.update(coefficients)
        # The Zoo evaluates without those of the settings.
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        if self.trained_agent:
            agent = Path(self.trained_agent)
            self._found = find_statistics(agent, self.env_name, normalizes=bool(self.normalize))
        if isinstance(hyperparams.get("rollout_buffer_class"), str):
            hyperparams["rollout_buffer_class"] = get_class_by_name(hyperparams["rollout_buffer_class"])
        return hyperparams, env_wrapper, callbacks, vec_env_wrapper

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if self.algo != ALGORITHM:
            return super()._maybe_normalize(env, eval_env)
        if not self.normalize:
            return env
        found = load_normalizer(self._found, env) if self._found else VecNormalize(env, **self.normalize_kwargs)
        if eval_env:
            found.training = found.norm_reward = False
        if type(found) is not VecNormalize:
            return found
        from sb3_clipvf.envs import FastVecNormalize  # imports numba

        return FastVecNormalize.from_sb3(found)


def _resumable(wrapper: Callable[..., gym.Env[Any, Any]] | None, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return ResumableEnv(env if wrapper is None else wrapper(env))


def _ended_by(error: BaseException, model: BaseAlgorithm) -> BaseException:
    """
    Find the error of a training: after it, the Zoo ends the first callback and closes the environments, and either may
    fail in its turn.
    """
    found: BaseException | None = error
    while found is not None:
        frames = (frame for frame, _ in traceback.walk_tb(found.__traceback__))
        if any(frame.f_code.co_name == "learn" and frame.f_locals.get("self") is model for frame in frames):
            return found
        found = found.__context__
    return error


def _ends_training(error: BaseException) -> bool:
    """Return whether it is a signal's, or has the notes that an error gets once a training has begun."""
    return isinstance(error, SystemExit) or bool(getattr(error, "__notes__", ()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
