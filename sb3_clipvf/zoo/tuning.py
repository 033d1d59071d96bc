"""
Hyperparameter search with the RL Zoo: the distributions that ``-optimize`` draws ClipPPO's arguments from, and the
arguments of a finished trial.

Each trial draws every parameter, even those that its objective does not use. The search space is then the same for all
trials of a length, as Optuna's multivariate sampler requires.
"""

from copy import copy
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from sb3_clipvf.clip_ppo import ClipPPO
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.patching import replaced

OBJECTIVES = ("clip", "fixed_kl", "adaptive_kl", "clip_and_adaptive_kl")
"""Objectives that the search chooses from."""

MIN_UPDATES = 10
"""Fewest updates of a trial, whose evaluations would otherwise compare policies that have not learned; rollouts of 32
steps are never shortened."""

NET_ARCHS: dict[str, dict[str, list[int]]] = {
    "tiny": {"pi": [64], "vf": [64]},
    "small": {"pi": [64, 64], "vf": [64, 64]},
    "medium": {"pi": [256, 256], "vf": [256, 256]},
}

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}

_UNCHANGED = ("ent_coef", "vf_coef", "n_epochs", "max_grad_norm", "clip_range_vf", "vf_clip_units", "advantage_scope")
"""Drawn parameters that are arguments of ClipPPO as they are."""

DRAWN = (
    *("n_steps", "batch_size", "gamma", "gae_lambda", "learning_rate", "lr_kl_target", "policy_kwargs"),
    *("clip_range", "kl_coef", "adaptive_kl_target", *_UNCHANGED),
)
"""Arguments of ClipPPO that each trial sets."""


class CheckedSearch(ExperimentManager):
    """The RL Zoo's experiment manager with errors about studies and trials that name the option."""

    _was_interrupted = False

    def load_trial(
        self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True
    ) -> dict[str, Any]:
        """
        Return the hyperparameters of a trial (None: the best one), converted to the algorithm's arguments.

        Those of ClipPPO include ``n_envs`` of the trial, which ``-params`` may override.
        """
        _check_trial(storage, study_name, trial_id)
        try:
            if self.algo != ALGORITHM or not convert:
                return super().load_trial(storage, study_name, trial_id, convert)
            params = super().load_trial(storage, study_name, trial_id, convert=False)
            n_envs = (self.custom_hyperparams or {}).get("n_envs")
            if isinstance(n_envs, int):  # keep the number of minibatches
                params = {**params, "n_envs": n_envs}
            return {**convert_clipppo_params(params), "n_envs": params["n_envs"]}
        except KeyError as error:
            raise ValueError(
                f"`--trial-id` must be a trial that searched for {self.algo}, got {trial_id}, which has no {error}. "
                "`--algo` names another algorithm."
            ) from error

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """Build environments and model; first raise a ValueError if a search cannot use its storage."""
        if self.optimize_hyperparameters and self.storage is not None:
            _open_storage(self.storage)
        return super().setup_experiment()

    def objective(self, trial: optuna.Trial) -> float:
        """
        Run a trial and return its mean return.

        The trial records its number of steps, which bounds its rollouts. Rewards are normalised with its ``gamma``.
        """
        manager = self
        if self.algo == ALGORITHM:
            trial.set_user_attr("n_timesteps", self.n_timesteps)
            # The Zoo draws again, and Optuna then returns the same values.
            drawn = HYPERPARAMS_SAMPLER[self.algo](trial, self.n_actions, self.n_envs, {})
            if "gamma" in drawn:
                manager = copy(self)  # other trials may run in threads
                manager.normalize_kwargs = {**self.normalize_kwargs, "gamma": drawn["gamma"]}
        try:
            return super(CheckedSearch, manager).objective(trial)
        except KeyboardInterrupt:  # the Zoo ends the search
            self._was_interrupted = True
            raise

    def hyperparameters_optimization(self) -> None:
        """Search hyperparameters; raise a ValueError if no trial completes."""
        if self.algo == ALGORITHM and self.n_evaluations == 1:
            self.pruner = "none"  # the only evaluation ends the trial, so that pruning saves nothing
        try:
            # Skip the warning about short runs: the search chooses the trials.
            with replaced(ClipPPO, "_warned_of_early_end", True):
                super().hyperparameters_optimization()
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            if self._was_interrupted:
                raise ValueError(
                    "The search was interrupted before a trial was completed. With `--storage` and `--study-name`, "
                    "the same command continues it."
                ) from error
            raise ValueError(
                "No trial was completed: all were pruned or failed. Use a larger `--n-trials`, or `--pruner none`."
            ) from error


def sample_clipppo_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Draw one trial's arguments of ClipPPO; the RL Zoo's sampler for ``clipppo``.

    :param trial: Optuna's trial. Its user attribute ``n_timesteps``, if any, is the number of steps of its training.
    :param n_actions: Unused; the Zoo passes it for the noise of off-policy algorithms.
    :param n_envs: Number of environments. The trial records it, since the minibatch size depends on it.
    :param additional_args: Unused; the Zoo passes it for replay buffers.
    :return: Keyword arguments of ClipPPO.
    """
    max_n_steps_pow = 12
    if (n_timesteps := trial.user_attrs.get("n_timesteps")) is not None:
        max_n_steps = n_timesteps // (MIN_UPDATES * n_envs)
        max_n_steps_pow = min(12, max(5, max_n_steps.bit_length() - 1))
    drawn = {
        "n_envs": trial.suggest_int("n_envs", n_envs, n_envs),
        "n_steps_pow": trial.suggest_int("n_steps_pow", 5, max_n_steps_pow),
        "n_minibatches_pow": trial.suggest_int("n_minibatches_pow", 0, 6),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "lr_schedule": trial.suggest_categorical("lr_schedule", ["const", "lin"]),
        "objective": trial.suggest_categorical("objective", list(OBJECTIVES)),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4]),
        "clip_schedule": trial.suggest_categorical("clip_schedule", ["const", "lin"]),
        # Table 1 of the paper: fixed beta 0.3 to 10, targets 0.003 to 0.03.
        "kl_coef": trial.suggest_float("kl_coef", 0.1, 10.0, log=True),
        "adaptive_kl_target": trial.suggest_float("adaptive_kl_target", 0.003, 0.05, log=True),
        "clip_range_vf": trial.suggest_categorical("clip_range_vf", [None, 0.2, 0.5, 1.0, 2.0]),
        "vf_clip_units": trial.suggest_categorical("vf_clip_units", ["return_std", "absolute"]),
        "advantage_scope": trial.suggest_categorical("advantage_scope", ["minibatch", "rollout"]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "vf_coef": trial.suggest_float("vf_coef", 0.1, 1.0, log=True),
        "n_epochs": trial.suggest_categorical("n_epochs", [1, 5, 10, 20]),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 5.0, log=True),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(ACTIVATIONS)),
    }
    hyperparams = convert_clipppo_params(drawn)
    # For readers of the study: these were drawn in a different form.
    for name in ("n_steps", "batch_size", "gamma", "gae_lambda"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_clipppo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert a trial's parameters to ClipPPO's arguments; the RL Zoo's converter for ``clipppo``.

    :param sampled_params: A trial's ``params``.
    :return: Keyword arguments of ClipPPO, the same that the sampler returned for that trial. ``batch_size`` divides
        ``n_steps * n_envs``.
    """
    n_steps = 2 ** sampled_params["n_steps_pow"]
    # A minibatch holds at least 8 steps of each environment.
    n_minibatches = 2 ** min(sampled_params["n_minibatches_pow"], sampled_params["n_steps_pow"] - 3)
    learning_rate = sampled_params["learning_rate"]
    return {
        "n_steps": n_steps,
        "batch_size": n_steps * sampled_params["n_envs"] // n_minibatches,
        "gamma": 1 - sampled_params["one_minus_gamma"],
        "gae_lambda": 1 - sampled_params["one_minus_gae_lambda"],
        "learning_rate": learning_rate if sampled_params["lr_schedule"] == "const" else f"lin_{learning_rate}",
        # ClipPPO takes either a schedule of the learning rate, which the search draws, or a KL-adaptive rate.
        "lr_kl_target": None,
        **_objective(sampled_params),
        **{name: sampled_params[name] for name in _UNCHANGED},
        "policy_kwargs": {
            "net_arch": NET_ARCHS[sampled_params["net_arch"]],
            "activation_fn": ACTIVATIONS[sampled_params["activation_fn"]],
        },
    }


def _objective(sampled_params: dict[str, Any]) -> dict[str, Any]:
    form = sampled_params["objective"]
    clips = form in ("clip", "clip_and_adaptive_kl")
    adapts = form in ("adaptive_kl", "clip_and_adaptive_kl")
    return {
        "clip_range": f"{sampled_params['clip_schedule']}_{sampled_params['clip_range']}" if clips else None,
        "kl_coef": 0.0 if form == "clip" else sampled_params["kl_coef"],
        "adaptive_kl_target": sampled_params["adaptive_kl_target"] if adapts else None,
    }


def _open_storage(storage: str) -> BaseStorage:
    """Open a study's storage: a database, or a file whose name ends in ``.log``."""
    try:
        if storage.endswith(".log"):
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(storage))
        return get_storage(storage)
    except Exception as error:  # each database has its own errors
        text = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"`--storage` must be a storage of Optuna, got {storage!r}: {text}. Pass a file such as logs/study.log, or "
            "a database such as sqlite:///logs/study.db, in a folder that exists."
        ) from error


def _check_trial(storage: str, study_name: str, trial_id: int | None) -> None:
    """Check that a study has the trial of this number; None stands for the best one."""
    opened = _open_storage(storage)
    names = optuna.get_all_study_names(opened)
    if study_name not in names:
        raise ValueError(
            f"`--study-name` must be a study in {storage}, got {study_name!r}. It has {', '.join(names) or 'none'}."
        )
    if trial_id is None:
        return
    numbers = [
        str(trial.number) for trial in optuna.load_study(study_name=study_name, storage=opened).trials if trial.params
    ]
    if str(trial_id) not in numbers:
        raise ValueError(
            f"`--trial-id` must be a trial of {study_name!r} that drew hyperparameters, got {trial_id}. These did: "
            f"{', '.join(numbers) or 'none'}."
        )
