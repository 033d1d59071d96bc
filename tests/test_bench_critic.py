"""``python -m tests.bench critic``: what it measures of an update, and what the command keeps, tabulates and draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_clipvf.objectives import value_loss_clipped_max, value_loss_clipped_prediction
from tests.bench import critic
from tests.bench.critic import NUMBERS, SETTINGS, Row, lacks_gradient
from tests.bench.results import ROOT, Results

LOSSES = {"max": value_loss_clipped_max, "prediction": value_loss_clipped_prediction}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, and trainings of three rollouts of Acrobot."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(critic, "N_TIMESTEPS", 3 * 16 * 256)
    return tmp_path


@pytest.mark.parametrize("vf_clip", LOSSES)
def test_transitions_without_gradient_are_those_of_the_loss(vf_clip: str) -> None:
    rng = np.random.default_rng(0)
    values, old_values, returns = 2 * rng.standard_normal((3, 500))
    tensor = th.tensor(values, requires_grad=True)
    LOSSES[vf_clip](tensor, th.tensor(old_values), th.tensor(returns), 0.5).backward()
    assert tensor.grad is not None
    found = lacks_gradient(values, old_values, returns, 0.5, vf_clip)
    np.testing.assert_array_equal(found, tensor.grad.numpy() == 0)
    assert 0.1 < found.mean() < 0.9
    assert not lacks_gradient(values, old_values, returns, None, vf_clip).any()
    # In the form max, a return within the range keeps its gradient.
    is_near = np.abs(returns - old_values) <= 0.5
    assert found[is_near].any() == (vf_clip == "prediction")


def test_numbers_of_the_updates_are_those_that_the_model_logs(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[dict[str, Any]] = []
    learn = critic.ClipPPO.train

    def train(self: Any) -> None:
        learn(self)
        logged.append(dict(self.logger.name_to_value) | {"buffer": self.rollout_buffer.returns.copy()})

    monkeypatch.setattr(critic.ClipPPO, "train", train)
    found = critic.train(Row("Acrobot-v1", "max-0.2"), seed=0)
    updates = found["updates"]
    assert set(updates) == set(NUMBERS)
    assert {len(numbers) for numbers in updates.values()} == {3}
    for index, log in enumerate(logged):
        # 1 - Var(errors) / sigma^2, by the mean square and the mean.
        unexplained = updates["error"][index] ** 2 - updates["bias"][index] ** 2
        assert 1 - unexplained == pytest.approx(log["train/explained_variance"], abs=1e-2)
        assert log["train/clip_range_vf"] == pytest.approx(0.2 * np.std(log["buffer"]))
        # The log has the share of values beyond the range in the last epoch, whose minibatches move them further.
        assert 0 < updates["no_gradient"][index] <= updates["beyond"][index]
        assert updates["no_gradient"][index] <= log["train/vf_clip_fraction"] + 0.15


def test_measuring_does_not_change_the_training(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[th.Tensor] = []
    learn = critic.ClipPPO.learn

    def keep(self: Any, total: int, callback: Any) -> None:
        if not trained:
            learn(self, total, callback)
        else:
            learn(self, total)
        trained.append(th.nn.utils.parameters_to_vector(self.policy.parameters()).detach())

    monkeypatch.setattr(critic.ClipPPO, "learn", keep)
    for _ in range(2):
        critic.train(Row("Acrobot-v1", "max-1"), seed=0)
    assert th.equal(*trained)


def test_it_trains_each_row_once_and_writes_table_and_figure(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", "out.json", "--seeds", "0", "--only", "Acrobot-v1-none", "Acrobot-v1-max-1"]
    assert critic.main(options) == 0
    runs = Results(short / "out.json").runs
    assert [run["name"] for run in runs] == ["Acrobot-v1-max-1", "Acrobot-v1-none"]
    # Both begin with the same rollout and critic.
    assert runs[0]["updates"]["error"][0] == runs[1]["updates"]["error"][0]
    table = (short / "out.md").read_text()
    assert table.startswith("Made by `python -m tests.bench critic --seeds 0`.")
    assert "| Acrobot-v1 | none |" in table
    assert "| | max, 0.2 | not run |".replace("| |", "|  |") in table
    assert (short / "out.png").stat().st_size > 10_000
    capsys.readouterr()
    assert critic.main(options) == 0
    assert "Acrobot-v1-none, seed 0:" not in capsys.readouterr().out


def test_settings_are_those_of_clip_ppo() -> None:
    assert [name for name, (_, changes, _, _) in SETTINGS.items() if not changes] == ["none"]
    settings = Row("Acrobot-v1", "max-3").settings()
    assert settings["n_envs"] == 16  # as in the suite of the defaults
    assert [settings[name] for name in ("clip_range", "clip_range_vf", "vf_clip")] == [0.2, 3.0, "max"]


def test_results_of_changed_settings_are_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(ROOT / "docs/results/critic.json")
    assert all(results.find(row.run(seed)) is not None for row in critic.ROWS for seed in (0, 1))
    monkeypatch.setitem(critic._COMMON, "clip_range", 0.1)
    assert not any(results.find(row.run(0)) for row in critic.ROWS)
    assert all(set(changes) <= {"clip_range_vf", "vf_clip"} for _, changes, _, _ in SETTINGS.values())
