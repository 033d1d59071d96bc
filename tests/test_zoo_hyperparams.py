"""The packaged settings: legal keys, sources, and a model for each environment that can be made here."""

import inspect
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import rl_zoo3
import rl_zoo3.import_envs  # registers the environments of optional packages
import yaml

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo import commands, register
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.settings import check_hyperparams
from tests.bench import curves, learning

register()

TEXT = commands.hyperparams_path().read_text(encoding="utf-8")
SETTINGS: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)
ENV_IDS = [entry for entry in SETTINGS if entry not in ("default", "atari")] + ["BreakoutNoFrameskip-v4", "ALE/Pong-v5"]

# What the RL Zoo's entries leave open, and so do ours.
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(ClipPPO.__init__).parameters.items()}

# Environments of the RL Zoo's settings that no installable package provides.
UNAVAILABLE = {"MinitaurBulletEnv-v0", "MinitaurBulletDuckEnv-v0"}

MUJOCO = (
    "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher Swimmer "
    "Walker2d"
).split()


@pytest.mark.parametrize("entry", SETTINGS)
def test_keys_are_legal(entry: str) -> None:
    check_hyperparams(SETTINGS[entry], (), entry)


def test_each_environment_of_the_zoos_settings_is_covered() -> None:
    zoo_file = Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml"
    zoo_entries = set(yaml.safe_load(zoo_file.read_text())) - UNAVAILABLE
    assert {re.sub("-v2$", "-v5", entry) for entry in zoo_entries} <= set(SETTINGS)
    assert {f"{name}-v5" for name in MUJOCO} <= set(SETTINGS)


def test_each_value_that_is_not_the_default_names_its_source() -> None:
    entry = ""
    for number, line in enumerate(TEXT.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        if not line.startswith(" "):
            entry = line.split(":")[0]
            continue
        key, _, rest = line.strip().partition(":")
        # The heads of lists and merged entries have no value; `policy` is no tuned value.
        if key in ("policy", "<<", "env_wrapper") and "#" not in line or key.startswith("- ") and not rest:
            continue
        where = f"line {number}, {entry}: {key}"
        assert re.search(r"  # .*(RL Zoo|PPO paper|Measured)", line), where
        assert key not in DEFAULTS or SETTINGS[entry][key] != DEFAULTS[key] or _overrides_merged(entry), where


def _overrides_merged(entry: str) -> bool:
    block = re.search(rf"^{re.escape(entry)}:.*\n((?:  .*\n?)*)", TEXT, re.MULTILINE)
    return block is not None and "<<:" in block[1]


# The rows of the benchmarks `learning` and `curves`, whatever ClipPPO's defaults are.
MEASURED = {
    "CartPole-v1": ("lin_0.2", None),
    "MountainCarContinuous-v0": (0.2, None),
    "Pendulum-v1": (0.2, None),
    "Acrobot-v1": (0.2, None),
    "LunarLander-v3": (0.2, None),
    "BipedalWalker-v3": (0.18, None),
    "HalfCheetah-v5": (0.1, None),
    "Hopper-v5": (0.2, None),
    "Walker2d-v5": (0.1, None),
}


def test_the_tables_were_measured_with_these_settings() -> None:
    names = ("clip_range", "clip_range_vf")
    assert {entry: tuple({**DEFAULTS, **SETTINGS[entry]}[name] for name in names) for entry in MEASURED} == MEASURED
    assert {row.env_id for row in (*learning.ROWS, *curves.ROWS)} == set(MEASURED)


def test_minibatches_fit_the_rollout() -> None:
    for entry, settings in SETTINGS.items():
        rollout = settings.get("n_steps", DEFAULTS["n_steps"]) * settings.get("n_envs", 1)
        batch_size = settings.get("batch_size", DEFAULTS["batch_size"])
        assert rollout % batch_size == 0, f"{entry}: rollout of {rollout}, minibatches of {batch_size}"


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_clipppo_is_built_from_each_entry(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo may write a log into the working folder
    if env_id not in gym.registry:
        pytest.skip(f"the package that registers {env_id} is not installed")
    manager = ClipPPOExperimentManager(
        Namespace(),
        "clipppo",
        env_id,
        "logs",
        # One environment and a short rollout: this tests the entry, not the machine's memory.
        hyperparams={"n_envs": 1, "n_steps": 4, "batch_size": 4},
        eval_freq=-1,
        verbose=0,
        device="cpu",
    )
    try:
        result = manager.setup_experiment()
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        pytest.skip(f"{env_id}: {error}")
    assert result is not None
    model = result[0]
    model.env.close()
    entry = SETTINGS.get(env_id, SETTINGS["atari"])
    assert isinstance(model, ClipPPO)
    own = set(entry) & set(DEFAULTS) - {"policy", "policy_kwargs", "n_steps", "batch_size"}
    assert {key: getattr(model, key) for key in own} == {key: entry[key] for key in own}


def test_an_installation_without_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "files", lambda name: tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match=r"clipppo.yml must come with sb3_clipvf, but .* does not exist.*--conf-file"
    ):
        commands.hyperparams_path()
    (tmp_path / "sb3_clipvf" / "hyperparams").mkdir(parents=True)
    (tmp_path / "sb3_clipvf" / "hyperparams" / "clipppo.yml").touch()
    assert commands.hyperparams_path() == tmp_path / "sb3_clipvf" / "hyperparams" / "clipppo.yml"
