"""``python -m tests.bench pitfalls``: each fault is the one that its name says, and the table shows its effect."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.distributions import sum_independent_dims

from sb3_clipvf.policies import SquashedActorCriticPolicy
from tests.bench import pitfalls
from tests.bench.pitfalls import DensityAtSquashed, DrawnAgain, EntropyWithoutJacobian
from tests.bench.results import Results


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, and trainings of two rollouts of one environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pitfalls, "N_ENVS", 1)
    monkeypatch.setattr(pitfalls, "N_TIMESTEPS", 512)
    return tmp_path


def evaluated(policy_class: type[SquashedActorCriticPolicy]) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor]:
    """A policy's Gaussian, the actions and log-probabilities of a rollout, and what the update gets for them."""
    th.manual_seed(0)
    env = gym.make(pitfalls.ENV_ID)
    policy = policy_class(env.observation_space, env.action_space, lambda _: 1e-3)
    observations = th.rand(64, 3)
    actions, _, old_log_prob = policy(observations)
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    assert entropy is not None
    return policy.action_dist.distribution, actions, log_prob - old_log_prob, entropy


@pytest.mark.parametrize("policy_class", [SquashedActorCriticPolicy, EntropyWithoutJacobian, DensityAtSquashed])
def test_ratios_of_an_unchanged_policy_are_one(policy_class: type[SquashedActorCriticPolicy]) -> None:
    _, _, log_ratio, _ = evaluated(policy_class)
    assert log_ratio.abs().max() == 0


def test_ratios_of_actions_drawn_again_are_not_one() -> None:
    _, _, log_ratio, _ = evaluated(DrawnAgain)
    assert log_ratio.abs().mean() > 0.1


def test_only_the_named_fault_changes_the_entropy() -> None:
    gaussian, _, _, entropy = evaluated(EntropyWithoutJacobian)
    assert th.equal(entropy, sum_independent_dims(gaussian.entropy()))
    for policy_class in (SquashedActorCriticPolicy, DensityAtSquashed, DrawnAgain):
        gaussian, _, _, entropy = evaluated(policy_class)
        assert (entropy < sum_independent_dims(gaussian.entropy())).all(), policy_class


def test_the_density_is_that_of_the_gaussian_at_the_squashed_action() -> None:
    env = gym.make(pitfalls.ENV_ID)
    policy = DensityAtSquashed(env.observation_space, env.action_space, lambda _: 1e-3)
    observations, actions = th.rand(8, 3), th.linspace(-0.9, 0.9, 8)[:, None]
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    gaussian: Any = policy.action_dist.distribution
    assert th.equal(log_prob, gaussian.log_prob(actions)[:, 0])


def test_it_trains_each_row_once_and_writes_the_table(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", "out.json", "--seeds", "1000", "1001", "--only", "correct", "density"]
    assert pitfalls.main(options) == 0
    runs = Results(short / "out.json").runs
    assert [(run["name"], run["seed"]) for run in runs] == [
        ("correct", 1000),
        ("correct", 1001),
        ("density", 1000),
        ("density", 1001),
    ]
    # Both rows begin with the same policy, and then differ.
    assert runs[0]["first_return"] == runs[2]["first_return"] != runs[1]["first_return"]
    assert runs[0]["last_return"] != runs[2]["last_return"]
    table = (short / "out.md").read_text()
    assert "| actions drawn again in the update | 0 | not run |" in table
    assert "| 0 of 2 |" in table
    capsys.readouterr()
    assert pitfalls.main(options) == 0
    assert "seed 1000: return" not in capsys.readouterr().out


def test_results_of_other_settings_are_stale(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = pitfalls.ROWS[0]
    results = Results(short / "out.json")
    results.add(row.run(1000))
    assert results.find(row.run(1000)) is not None
    for change in ({"ent_coef": 0.5}, {"policy": DrawnAgain}):
        assert results.find(replace(row, **change).run(1000)) is None  # type: ignore[arg-type]
    monkeypatch.setitem(pitfalls._SETTINGS, "gamma", 0.5)
    assert results.find(row.run(1000)) is None


def test_a_training_that_is_not_finite_counts_as_ended_early(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DensityAtSquashed, "_build", _with_infinite_ratios)
    assert pitfalls.main(["--out", "out.json", "--seeds", "1000", "--only", "density"]) == 0
    assert Results(short / "out.json").runs[0]["num_timesteps"] == 256
    assert "| 1 of 1 |" in (short / "out.md").read_text()


def _with_infinite_ratios(self: DensityAtSquashed, lr_schedule: Any) -> None:
    SquashedActorCriticPolicy._build(self, lr_schedule)
    evaluate = self.evaluate_actions

    def shifted(obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = evaluate(obs, actions)
        return values, log_prob + 1e3, entropy

    self.evaluate_actions = shifted  # type: ignore[method-assign]
