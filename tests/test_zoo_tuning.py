"""Hyperparameter search: the drawn parameters are legal, and a finished trial converts to the same arguments."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo.tuning import DRAWN, OBJECTIVES, CheckedSearch, convert_clipppo_params, sample_clipppo_params

N_TRIALS = 24


def _run_study(n_envs: int, n_trials: int, storage: str | None = None) -> tuple[optuna.Study, list[dict[str, Any]]]:
    sampled = []

    def objective(trial: optuna.Trial) -> float:
        sampled.append(sample_clipppo_params(trial, 2, n_envs, {}))
        return 0.0

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), storage=storage)
    study.optimize(objective, n_trials=n_trials)
    return study, sampled


@pytest.fixture(scope="module")
def study_and_samples() -> tuple[optuna.Study, list[dict[str, Any]]]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _run_study(3, N_TRIALS)


def test_a_finished_trial_converts_to_what_was_sampled(
    study_and_samples: tuple[optuna.Study, list[dict[str, Any]]],
) -> None:
    study, sampled = study_and_samples
    assert [convert_clipppo_params(trial.params) for trial in study.trials] == sampled


def test_all_drawn_arguments_are_listed(study_and_samples: tuple[optuna.Study, list[dict[str, Any]]]) -> None:
    assert set(study_and_samples[1][0]) == set(DRAWN)


def test_a_trial_read_from_a_database_converts_to_what_was_sampled(tmp_path: Any) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study, sampled = _run_study(1, 2, storage)
    loaded = optuna.load_study(study_name=study.study_name, storage=storage)
    assert [convert_clipppo_params(trial.params) for trial in loaded.trials] == sampled


@pytest.mark.parametrize(("overrides", "n_envs"), [(None, 3), ({"gamma": 0.9}, 3), ({"n_envs": 1}, 1)])
def test_a_trial_is_loaded_with_its_environments(overrides: dict[str, Any] | None, n_envs: int, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study, (sampled,) = _run_study(3, 1, storage)
    manager = object.__new__(CheckedSearch)
    manager.algo, manager.custom_hyperparams = "clipppo", overrides
    expected = {**sampled, "n_envs": n_envs, "batch_size": sampled["batch_size"] // 3 * n_envs}
    assert manager.load_trial(storage, study.study_name, 0) == expected
    assert manager.load_trial(storage, study.study_name, 0, convert=False) == study.trials[0].params


def test_every_draw_is_legal_for_clipppo(study_and_samples: tuple[optuna.Study, list[dict[str, Any]]]) -> None:
    _, sampled = study_and_samples
    env = make_vec_env("CartPole-v1", n_envs=3)
    for params in sampled[:12]:
        model = ClipPPO("MlpPolicy", env, device="cpu", **params)
        assert model.n_steps * model.n_envs % model.batch_size == 0
        assert model.batch_size >= 8 * model.n_envs


@pytest.mark.parametrize(
    ("n_timesteps", "n_envs", "largest"),
    [(50_000, 8, 512), (5120, 1, 512), (5119, 1, 256), (100, 8, 32), (10**6, 1, 4096), (None, 8, 4096)],
)
def test_a_trial_has_at_least_ten_updates(n_timesteps: int | None, n_envs: int, largest: int) -> None:
    trial = optuna.create_study().ask()
    if n_timesteps is not None:
        trial.set_user_attr("n_timesteps", n_timesteps)
    sample_clipppo_params(trial, 2, n_envs, {})
    assert trial.distributions["n_steps_pow"] == optuna.distributions.IntDistribution(5, largest.bit_length() - 1)


def test_all_forms_of_the_objective_are_drawn(study_and_samples: tuple[optuna.Study, list[dict[str, Any]]]) -> None:
    study, sampled = study_and_samples
    forms = {trial.params["objective"]: params for trial, params in zip(study.trials, sampled, strict=True)}
    assert set(forms) == set(OBJECTIVES)
    seen = {
        form: (params["clip_range"] is not None, params["kl_coef"] > 0, params["adaptive_kl_target"] is not None)
        for form, params in forms.items()
    }
    assert seen == {
        "clip": (True, False, False),
        "fixed_kl": (False, True, False),
        "adaptive_kl": (False, True, True),
        "clip_and_adaptive_kl": (True, True, True),
    }
    assert {params["clip_range_vf"] for params in sampled} >= {None, 1.0}


def test_the_search_space_is_the_same_in_every_trial(
    study_and_samples: tuple[optuna.Study, list[dict[str, Any]]],
) -> None:
    study, _ = study_and_samples
    assert len({json.dumps(sorted(trial.distributions)) for trial in study.trials}) == 1


def test_converted_parameters_are_stored_with_the_trial(
    study_and_samples: tuple[optuna.Study, list[dict[str, Any]]],
) -> None:
    study, sampled = study_and_samples
    for trial, params in zip(study.trials, sampled, strict=True):
        assert trial.user_attrs == {name: params[name] for name in ("n_steps", "batch_size", "gamma", "gae_lambda")}


def test_trials_do_not_warn_of_schedules_that_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def learn(*_: Any) -> None:
        model = ClipPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, clip_range="lin_0.2")
        model.learn(8)

    monkeypatch.setattr(ExperimentManager, "hyperparameters_optimization", learn)
    manager = object.__new__(CheckedSearch)
    manager.algo, manager.n_evaluations, manager.storage = "clipppo", 2, None
    manager.hyperparameters_optimization()
    assert "in its only update" not in caplog.text
    learn()
    assert "`clip_range` is 0 in its only update" in caplog.text


@pytest.mark.parametrize(
    ("algo", "n_evaluations", "pruner"),
    [
        ("clipppo", 1, optuna.pruners.NopPruner),
        ("clipppo", 2, optuna.pruners.MedianPruner),
        ("ppo", 1, optuna.pruners.MedianPruner),
    ],
)
def test_trials_of_one_evaluation_are_not_pruned(
    monkeypatch: pytest.MonkeyPatch, algo: str, n_evaluations: int, pruner: type
) -> None:
    seen = []
    monkeypatch.setattr(
        ExperimentManager,
        "hyperparameters_optimization",
        lambda self: seen.append(self._create_pruner(self.pruner)),
    )
    manager = object.__new__(CheckedSearch)
    manager.algo, manager.pruner, manager.n_evaluations, manager.n_startup_trials = algo, "median", n_evaluations, 10
    manager.hyperparameters_optimization()
    assert type(seen[0]) is pruner
