"""Registration of ClipPPO with the RL Zoo: its table of algorithms, its search, its experiment managers."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3.train as zoo_train
from rl_zoo3 import ALGOS, exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3 import PPO

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo import register


def test_register_adds_clipppo_once() -> None:
    register()
    others = {name: algo for name, algo in ALGOS.items() if name != "clipppo"}
    register()
    assert ALGOS == {**others, "clipppo": ClipPPO}
    assert ALGOS["ppo"] is PPO
    assert "clipppo" in HYPERPARAMS_SAMPLER
    assert "clipppo" in HYPERPARAMS_CONVERTER


class OwnManager(exp_manager.ExperimentManager):
    """Of a user, imported before ``register``."""


@pytest.mark.parametrize("manager", [exp_manager.ExperimentManager, zoo_train.ExperimentManager, OwnManager])
def test_each_experiment_manager_knows_clipppo(
    manager: type[exp_manager.ExperimentManager], in_empty_folder: Path
) -> None:
    register()
    Path("settings.yml").write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 8, n_steps: 8, batch_size: 8, clip_range: cos_0.2, "
        "clip_range_vf: null}"
    )
    made = manager(Namespace(), "clipppo", "CartPole-v1", "logs", config="settings.yml", eval_freq=-1, device="cpu")
    assert isinstance(made, manager)
    result = made.setup_experiment()
    assert result is not None
    model: Any = result[0]
    assert (model.clip_range, model.clip_range_vf) == ("cos_0.2", None)
    model.env.close()


def test_the_zoos_own_script_trains_clipppo(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    command = "train --algo clipppo -n 64 --device cpu --eval-freq -1 --verbose 0 -params clip_range:'cos_0.2'"
    monkeypatch.setattr(sys, "argv", command.split())
    zoo_train.train()
    assert ClipPPO.load("logs/clipppo/CartPole-v1_1/CartPole-v1.zip", device="cpu").clip_range == "cos_0.2"
