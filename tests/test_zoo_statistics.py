"""``train -i``: a model continues with its own statistics of ``VecNormalize``, or is refused."""

import pickle
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint.model_statistics import load_statistics
from sb3_clipvf.zoo import main
from sb3_clipvf.zoo.checked_files import read_settings
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.runs import find_run, make_env

RUN = Path("logs") / "clipppo" / "CartPole-v1_1"
# Two environments see one observation more each at the start.
AT_START = 2
SETTINGS: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_timesteps": 256,
    "n_envs": 2,
    "n_steps": 32,
    "batch_size": 64,
    "n_epochs": 1,
    "normalize": "dict(clip_obs=5.0)",
}
PLAIN = {**SETTINGS, "normalize": False}


def _train(folder: Path, settings: dict[str, Any], *options: str) -> int:
    (folder / "settings.yml").write_text(yaml.safe_dump({"CartPole-v1": settings}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        # Evaluated once, in the middle.
        command = (
            "train --env CartPole-v1 --conf-file settings.yml --seed 1 --device cpu --verbose 0 --eval-freq 192 "
            "--eval-episodes 1 --checkpoint-freq 64 --save-freq 64"
        )
        return main([*command.split(), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert _train(folder, SETTINGS) == 0
    return folder


@pytest.fixture
def run(in_trained: Path) -> Path:
    """A copy of the run, in the working folder."""
    return RUN


def _continued(model: Path | str, settings: dict[str, Any] = SETTINGS) -> Any:
    """Return the environments of a training that continues from a model, and those of its evaluation."""
    Path("settings.yml").write_text(yaml.safe_dump({"CartPole-v1": settings}))
    manager = ClipPPOExperimentManager(
        Namespace(), "clipppo", "CartPole-v1", "more", trained_agent=str(model), config="settings.yml", device="cpu"
    )
    result = manager.setup_experiment()
    assert result is not None
    evaluation: Any = manager.callbacks[-1]
    venvs: Any = result[0].env, evaluation.eval_env
    for venv in venvs:
        venv.close()
    return venvs


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("CartPole-v1.zip", 256),
        ("best_model.zip", 192),
        ("checkpoints/checkpoint_128.zip", 128),
        ("checkpoints/checkpoint_192.zip", 192),
        ("elsewhere/checkpoint_128.zip", 128),
        ("elsewhere/best_model.zip", 192),
    ],
)
def test_a_model_continues_with_its_own_statistics(name: str, steps: int, run: Path) -> None:
    (run / "elsewhere").mkdir()
    for source in ("checkpoints/checkpoint_128.zip", "best_model.zip"):
        shutil.copy(run / source, run / "elsewhere")
    training, evaluation = _continued(run / name)
    assert [venv.obs_rms.count for venv in (training, evaluation)] == pytest.approx([steps + AT_START] * 2, abs=0.001)
    assert [venv.clip_obs for venv in (training, evaluation)] == [5.0, 5.0]
    assert [(venv.training, venv.norm_reward) for venv in (training, evaluation)] == [(True, True), (False, False)]


def test_settings_of_a_models_statistics_are_its_own(run: Path) -> None:
    training, _ = _continued(run / "best_model.zip", {**SETTINGS, "normalize": True})
    assert training.clip_obs == 5.0
    assert _saved_normalize() == {"clip_obs": 5.0}


def _saved_normalize() -> Any:
    return read_settings("more/clipppo/CartPole-v1_1/CartPole-v1/config.yml")["normalize"]


def test_settings_of_rewards_replace_those_of_a_models_statistics(run: Path) -> None:
    given = {"normalize": "dict(norm_reward=False, clip_reward=3.0)", "gamma": 0.9}
    training, evaluation = _continued(run / "CartPole-v1.zip", {**SETTINGS, **given})
    assert (training.norm_reward, training.clip_reward, training.gamma, training.clip_obs) == (False, 3.0, 0.9, 5.0)
    assert (training.training, evaluation.training, evaluation.norm_reward) == (True, False, False)
    assert _saved_normalize() == {"norm_reward": False, "clip_reward": 3.0, "gamma": 0.9, "clip_obs": 5.0}


@pytest.mark.parametrize(("name", "value", "known"), [("clip_obs", 3.0, 5.0), ("norm_obs", False, True)])
def test_settings_of_observations_must_be_those_of_a_models_statistics(
    run: Path, name: str, value: Any, known: Any
) -> None:
    with pytest.raises(ValueError, match=rf"`normalize` must keep {name}={known} .*, got {value}. Pass `-params norm"):
        _continued(run / "CartPole-v1.zip", {**SETTINGS, "normalize": {name: value}})
    assert not list(Path("more").glob("*/*"))


@pytest.mark.parametrize(
    ("normalize", "flags"),
    [(True, (True, True)), ("dict(norm_reward=False)", (True, False)), ("dict(training=False)", (False, True))],
)
def test_statistics_of_an_evaluation_are_trained_as_the_settings_say(
    normalize: Any, flags: tuple[bool, bool], run: Path
) -> None:
    path = run / "CartPole-v1" / "vecnormalize.pkl"
    venv = VecNormalize.load(str(path), make_vec_env("CartPole-v1"))
    venv.training = venv.norm_reward = False  # as `push_to_hub` saves them
    venv.save(str(path))
    training, evaluation = _continued(run / "CartPole-v1.zip", {**SETTINGS, "normalize": normalize})
    assert [(one.training, one.norm_reward) for one in (training, evaluation)] == [flags, (False, False)]


@pytest.mark.parametrize("name", ["rl_model_128_steps.zip", "best_model.zip"])
def test_statistics_of_another_step_are_refused(name: str, run: Path) -> None:
    if name == "best_model.zip":  # as one of SB3's EvalCallback, which has none
        shutil.copy(run / "rl_model_128_steps.zip", run / name)
    with pytest.raises(ValueError, match=r"whose statistics .* are known, got .* holds those of another step\. Use"):
        _continued(run / name)
    assert not Path("more").exists()


def test_a_model_without_statistics_is_refused_where_settings_normalise(run: Path) -> None:
    ClipPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu").save("own.zip")
    with pytest.raises(ValueError, match=r"must be a model with statistics .* got own.zip without any\. Copy them to"):
        _continued("own.zip")
    venvs = _continued("own.zip", PLAIN)
    assert not any(isinstance(venv, VecNormalize) for venv in venvs)
    shutil.copytree(run / "CartPole-v1", "CartPole-v1")
    assert _continued("own.zip")[0].obs_rms.count == pytest.approx(256 + AT_START, abs=0.001)


@pytest.mark.parametrize("name", ["CartPole-v1.zip", "best_model.zip", "checkpoints/checkpoint_128.zip"])
def test_a_model_of_normalised_environments_is_refused_in_others(name: str, run: Path) -> None:
    with pytest.raises(ValueError, match=r"`normalize` must be set for .* Pass `-params normalize:True`"):
        _continued(run / name, PLAIN)


def test_a_model_of_plain_environments_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _train(tmp_path, PLAIN) == 0
    monkeypatch.chdir(tmp_path)
    for name in ("CartPole-v1.zip", "best_model.zip", "rl_model_128_steps.zip", "checkpoints/checkpoint_128.zip"):
        assert not any(isinstance(venv, VecNormalize) for venv in _continued(RUN / name, PLAIN))


def test_a_new_training_does_not_take_statistics_of_the_working_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    training, _ = _continued("")
    assert training.obs_rms.count < 1


@pytest.mark.parametrize(("load_best", "steps"), [(True, 192), (False, 256)])
def test_evaluations_in_python_take_the_models_own_statistics(load_best: bool, steps: int, run: Path) -> None:
    venv: Any = make_env(find_run("logs", "CartPole-v1", load_best=load_best), 1, seed=0)
    assert venv.obs_rms.count == pytest.approx(steps + AT_START, abs=0.001)
    assert (venv.training, venv.norm_reward) == (False, False)
    venv.close()


def test_an_evaluation_with_statistics_of_another_step_warns(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(run / "rl_model_128_steps.zip", run / "best_model.zip")  # as of SB3's EvalCallback
    make_env(find_run("logs", "CartPole-v1", load_best=True), 1, seed=0).close()
    assert "best_model.zip has no statistics of VecNormalize: those of another step" in caplog.text


def test_an_error_in_the_statistics_of_a_best_model_names_its_zip(tmp_path: Path) -> None:
    path = tmp_path / "best_model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "{}")
        archive.writestr("vecnormalize.pkl", pickle.dumps([1.0]))
    expected = f"vecnormalize.pkl in {path} must hold a VecNormalize, got list"
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_statistics(path, make_vec_env("CartPole-v1"))


def test_statistics_continue_from_those_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run / "checkpoints" / "checkpoint_128.zip"
    assert _train(Path.cwd(), SETTINGS, "-i", str(model), "-n", "64") == 0
    ended = VecNormalize.load(
        str(RUN.with_name("CartPole-v1_2") / "CartPole-v1" / "vecnormalize.pkl"), make_vec_env("CartPole-v1")
    )
    assert ended.obs_rms.count == pytest.approx(128 + 64 + 2 * AT_START, abs=0.001)


def test_rewards_are_normalised_if_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = []
    for option in ((), ("--norm-reward",)):
        assert main(["enjoy", "--no-render", "-n", "200", "--device", "cpu", *option]) == 0
        out = capsys.readouterr().out
        assert f"'norm_reward': {bool(option)}" in out
        means.append(float(re.findall(r"Mean reward: ([\d.]+)", out)[0]))
    statistics = load_statistics(run / "checkpoints" / "checkpoint_256.zip", make_vec_env("CartPole-v1"))
    assert means[1] == pytest.approx(means[0] / statistics.ret_rms.var**0.5, abs=0.02)  # two digits are printed
    assert means[1] != pytest.approx(means[0], abs=0.02)
