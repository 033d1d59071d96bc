"""Runs of the Zoo's train command: finding them, and evaluating them as trained."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo import main, runs
from sb3_clipvf.zoo.runs import Evaluation, Run, evaluate_run, find_run, load_model, make_env, read_hyperparams
from sb3_clipvf.zoo.training_curve import read_training_curve


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of Pendulum with an argument of the environment and normalisation, 400 steps: one episode per env."""
    folder = tmp_path_factory.mktemp("logs")
    command = f"train --env Pendulum-v1 -n 400 --eval-freq -1 --device cpu --verbose 0 -f {folder} --env-kwargs g:5.0"
    params = "normalize:True n_envs:2 n_steps:100 batch_size:50 n_epochs:1"
    for seed in (1, 2):
        assert main([*command.split(), "--seed", str(seed), "-params", *params.split()]) == 0
    return folder


# --- finding


def test_newest_run_is_found_and_others_by_number(logs: Path) -> None:
    newest = find_run(logs, "Pendulum-v1")
    assert newest.folder == logs / "clipppo" / "Pendulum-v1_2"
    assert newest.model_path == newest.folder / "Pendulum-v1.zip"
    assert newest.settings_folder == newest.folder / "Pendulum-v1"
    assert find_run(str(logs), "Pendulum-v1", exp_id=1).folder == logs / "clipppo" / "Pendulum-v1_1"


def test_ids_with_a_slash_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "clipppo" / "ALE-Pong-v5_3"
    folder.mkdir(parents=True)
    (folder / "ALE-Pong-v5.zip").touch()
    run = find_run(tmp_path, "ALE/Pong-v5")
    assert run.folder == folder
    assert run.settings_folder == folder / "ALE-Pong-v5"


@pytest.mark.parametrize(
    "exp_id, algo, match",
    [
        (0, "clipppo", r"There is no run of Acrobot-v1 in .*clipppo\. Train one with `sb3-clipvf "),
        (7, "clipppo", r"There is no run 7 of Acrobot-v1 in .* `sb3-clipvf train --env Acrobot-v1 -f "),
        (-1, "clipppo", r"There is no run -1 of Acrobot-v1"),
        (0, "ppo", r"in .*ppo\. Train one with `sb3-clipvf train --algo ppo --env Acrobot-v1 -f "),
    ],
)
def test_missing_run_names_the_folder_and_the_train_command(tmp_path: Path, exp_id: int, algo: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_run(tmp_path, "Acrobot-v1", algo, exp_id)


def test_a_model_that_was_not_evaluated_while_training_is_refused(logs: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no best_model\.zip\. It was trained without evaluations"):
        find_run(logs, "Pendulum-v1", load_best=True)


@pytest.mark.parametrize("load_best", [False, True])
def test_the_error_for_a_training_that_did_not_end_has_one_hint(tmp_path: Path, load_best: bool) -> None:
    folder = tmp_path / "clipppo" / "E-v0_1"
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"did not end\. Train again with `sb3-clipvf train --env E-v0 -f \S+`\.$"):
        find_run(tmp_path, "E-v0", load_best=load_best)
    (folder / "checkpoints" / "checkpoint_64.zip").touch()
    with pytest.raises(ValueError, match=rf"did not end: `sb3-clipvf train --resume {folder}` resumes it\.$"):
        find_run(tmp_path, "E-v0", load_best=load_best)
    (folder / "E-v0").mkdir()
    (folder / "E-v0" / "args.yml").write_text("n_processes: 2")
    with pytest.raises(ValueError, match=r": `torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --resume "):
        find_run(tmp_path, "E-v0", load_best=load_best)
    (folder / "E-v0" / "args.yml").write_text("n_processes: [")  # damaged options do not mask the missing model
    with pytest.raises(ValueError, match=rf"did not end: `sb3-clipvf train --resume {folder}` resumes it\.$"):
        find_run(tmp_path, "E-v0", load_best=load_best)


def test_a_newer_run_without_a_model_is_skipped(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "clipppo" / "Pendulum-v1_3").mkdir()
    assert find_run(tmp_path, "Pendulum-v1").folder == tmp_path / "clipppo" / "Pendulum-v1_2"
    assert "Pendulum-v1_3 does not hold the model: using" in capsys.readouterr().out


# --- settings


def test_environment_has_the_arguments_and_the_frozen_statistics_of_the_training(logs: Path) -> None:
    run = find_run(logs, "Pendulum-v1")
    env = make_env(run, 3, seed=0)
    assert env.get_attr("g") == [5.0, 5.0, 5.0]
    assert isinstance(env, VecNormalize)
    # 400 steps and the reset of two environments; VecNormalize starts its count at 1e-4.
    assert env.obs_rms.count == pytest.approx(402.0001)
    env.reset()
    env.step(np.zeros((3, 1)))
    assert env.obs_rms.count == pytest.approx(402.0001)
    env.close()


def test_hyperparams_are_those_of_the_yaml_file_with_the_changes(logs: Path) -> None:
    hyperparams = read_hyperparams(find_run(logs, "Pendulum-v1"))
    assert hyperparams["n_steps"] == 100
    assert hyperparams["policy"] == "MlpPolicy"
    assert read_hyperparams(Run("clipppo", "Pendulum-v1", logs / "none", logs / "none.zip")) == {}


def test_packages_of_the_training_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"  # not beside the run, where it may have come with it
    packages.mkdir()
    (packages / "registering_package.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('FromPackage-v0', entry_point='gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(packages)
    folder = tmp_path / "logs/clipppo/FromPackage-v0_1"
    run = Run("clipppo", "FromPackage-v0", folder, folder / "model.zip")
    run.settings_folder.mkdir(parents=True)
    arguments = {"gym_packages": ["registering_package"], "env_kwargs": None}
    (run.settings_folder / "args.yml").write_text(yaml.dump(arguments))
    (run.settings_folder / "config.yml").write_text(yaml.dump({"env_kwargs": {"g": 3.0}}))
    try:
        env = make_env(run, 1, seed=0)
        assert env.get_attr("g") == [3.0]
        env.close()
    finally:
        del gym.registry["FromPackage-v0"], sys.modules["registering_package"]


@pytest.mark.parametrize(
    "settings",
    [
        "gym_packages: !!python/tuple [brought_module]",
        "gym_packages: !!set {brought_module}",
        "[[gym_packages, [brought_module]]]",
    ],
)
def test_packages_beside_the_run_are_not_imported(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("clipppo", "CartPole-v1", tmp_path / "clipppo" / "run", tmp_path / "model.zip")
    run.settings_folder.mkdir(parents=True)
    (run.folder / "brought_module.py").write_text("raise SystemExit('imported')")
    (run.settings_folder / "args.yml").write_text(settings)
    monkeypatch.syspath_prepend(run.folder)
    with pytest.raises(ValueError, match=r"must (be a list of names of modules|hold the settings of a run)"):
        make_env(run, 1, seed=0)


def test_off_policy_models_load_without_their_replay_buffer(tmp_path: Path) -> None:
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10_000, policy_kwargs={"net_arch": [4]}).save(tmp_path / "m.zip")
    model = load_model(Run("dqn", "CartPole-v1", tmp_path, tmp_path / "m.zip"), 0, "cpu")
    assert isinstance(model, DQN)
    assert model.buffer_size == 1


# --- evaluation


def test_returns_are_the_environments_own_and_the_policy_sees_normalised_observations(logs: Path) -> None:
    run = find_run(logs, "Pendulum-v1")
    evaluation = evaluate_run(run, n_episodes=2, n_envs=1, seed=5, device="cpu")

    # The same by hand: an unwrapped environment, and the statistics of the file applied to its observations.
    model = ClipPPO.load(run.model_path, device="cpu")
    normalize = VecNormalize.load(
        str(run.settings_folder / "vecnormalize.pkl"), DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    )
    env = gym.make("Pendulum-v1", g=5.0)
    expected = []
    observation, _ = env.reset(seed=5)
    for _ in range(2):
        total, truncated = 0.0, False
        while not truncated:
            action, _ = model.predict(normalize.normalize_obs(observation[None]), deterministic=True)
            observation, reward, _, truncated, _ = env.step(action[0])
            total += float(reward)
        expected.append(total)
        observation, _ = env.reset()
    # Monitor rounds to six decimals.
    assert evaluation.returns == pytest.approx(expected, abs=1e-6)
    assert evaluation.lengths == (200, 200)
    assert (evaluation.num_timesteps, evaluation.deterministic, evaluation.seed) == (400, True, 5)


def test_evaluation_repeats_with_its_seed_and_samples_when_asked(logs: Path) -> None:
    run = find_run(logs, "Pendulum-v1")
    first, again = (evaluate_run(run, 3, n_envs=2, seed=1, device="cpu") for _ in range(2))
    assert len(first.returns) == 3
    assert first == again
    sampled = evaluate_run(run, 3, n_envs=2, seed=1, deterministic=False, device="cpu")
    assert not sampled.deterministic
    assert sampled.returns != first.returns


class EndsAll(VecEnvWrapper):
    """Ends all episodes after five steps."""

    def reset(self) -> Any:
        self.count = 0
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        self.count += 1
        return (self.reset(), rewards, np.ones_like(dones), infos) if self.count == 5 else (obs, rewards, dones, infos)


def test_an_evaluation_whose_episodes_are_not_reported_is_refused(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs, tmp_path / "logs")
    run = find_run(tmp_path / "logs", "Pendulum-v1")
    settings = {**read_hyperparams(run), "vec_env_wrapper": "test_zoo_runs.EndsAll"}
    (run.settings_folder / "config.yml").write_text(yaml.dump(settings))
    with pytest.raises(ValueError, match="must report the end of each episode, .* outside of Monitor ended after 5 st"):
        evaluate_run(run, 2, device="cpu")


def test_mean_and_std_are_over_the_episodes() -> None:
    evaluation = Evaluation((1.0, 2.0, 6.0), (5, 5, 5), True, 10, 0)
    assert evaluation.mean == 3.0
    assert evaluation.std == pytest.approx((14 / 3) ** 0.5)  # squared distances 4, 1, 9


@pytest.mark.parametrize("name", ["n_episodes", "n_envs"])
def test_evaluation_refuses_counts_below_one(logs: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number of at least 1, got 0\."):
        evaluate_run(find_run(logs, "Pendulum-v1"), **{name: 0})


def test_missing_statistics_are_refused(logs: Path, tmp_path: Path) -> None:
    run = Run("clipppo", "Pendulum-v1", tmp_path, find_run(logs, "Pendulum-v1").model_path)
    run.settings_folder.mkdir()
    (run.settings_folder / "config.yml").write_text("normalize: true\n")
    with pytest.raises(ValueError, match=r"VecNormalize stats .*vecnormalize\.pkl not found"):
        evaluate_run(run, 1)


def test_the_start_of_a_training_is_that_of_its_model(logs: Path) -> None:
    run = find_run(logs, "Pendulum-v1")
    model = load_model(run, 0, "cpu")
    started = evaluate_run(run, 1, device="cpu").started
    assert started == model.start_time / 1e9
    t_start = json.loads((run.folder / "0.monitor.csv").read_text().split("\n")[0][1:])["t_start"]
    assert started > t_start
    # One that was resumed is part of a longer one.
    model._num_timesteps_at_start = 200
    assert runs._start_of_training(model) is None


def test_curve_of_a_real_run(logs: Path) -> None:
    curve = read_training_curve(find_run(logs, "Pendulum-v1").folder, 400)
    np.testing.assert_array_equal(curve.steps, [400, 400])
