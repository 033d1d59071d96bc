"""Runs of the Zoo's train command: finding them, evaluating them as trained, reading curves from monitor files."""

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
from sb3_clipvf.zoo.runs import (
    Evaluation,
    Run,
    TrainingCurve,
    evaluate_run,
    find_run,
    load_model,
    make_env,
    read_hyperparams,
    read_training_curve,
)


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
    (tmp_path / "registering_package.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('FromPackage-v0', entry_point='gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = Run("clipppo", "FromPackage-v0", tmp_path / "run", tmp_path / "run" / "model.zip")
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


# --- training curve


def write_monitor(folder: Path, index: int, start: float, rows: str) -> None:
    (folder / f"{index}.monitor.csv").write_text(f'#{{"t_start": {start}, "env_id": "E"}}\nr,l,t\n{rows}')


def test_curve_orders_episodes_by_their_end_and_counts_all_environments(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 100.0, "1.0,10,1.0\n2.0,30,4.0\n")
    write_monitor(tmp_path, 1, 100.5, "5.0,20,1.5\n")
    curve = read_training_curve(tmp_path)
    # Environment 0 ends episodes at its own steps 10 and 40, environment 1 at 20; times two environments.
    np.testing.assert_array_equal(curve.steps, [20, 40, 80])
    np.testing.assert_array_equal(curve.returns, [1.0, 5.0, 2.0])
    np.testing.assert_array_equal(curve.seconds, [1.0, 2.0, 4.0])
    assert (curve.training_seconds, curve.steps_per_second) == (4.0, 20.0)


def test_a_curve_counts_the_steps_of_all_processes(tmp_path: Path) -> None:
    # Only the first process keeps the files of its environments.
    write_monitor(tmp_path, 0, 100.0, "1.0,10,1.0\n2.0,30,4.0\n")
    write_monitor(tmp_path, 1, 100.0, "5.0,20,2.0\n")
    curve = read_training_curve(tmp_path, 250, n_processes=3)
    np.testing.assert_array_equal(curve.steps, [60, 120, 240])
    assert curve.steps_per_second == 60


def test_a_file_of_all_environments_has_the_steps_of_the_training(tmp_path: Path) -> None:
    # Environment 0 ends episodes at its own steps 10 and 40, environment 1 at 25. The last line is cut.
    rows = "1.0,10,1.0,20\n2.0,25,2.0,50\n3.0,30,3.0,80\n4.0,30,3.1,1"
    (tmp_path / "0.monitor.csv").write_text(f'#{{"t_start": 0.0}}\nr,l,t,total_timesteps\n{rows}')
    np.testing.assert_array_equal(read_training_curve(tmp_path, 90).steps, [20, 50, 80])
    np.testing.assert_array_equal(read_training_curve(tmp_path, 180, n_processes=2).steps, [40, 100, 160])


def test_the_seconds_of_a_curve_count_from_the_start_of_the_training(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 100.0, "1.0,10,6.0\n2.0,30,10.0\n")
    curve = read_training_curve(tmp_path, started=106.0)
    np.testing.assert_array_equal(curve.seconds, [0.0, 4.0])
    assert (curve.training_seconds, curve.steps_per_second) == (4.0, 10.0)
    # Kernels were compiled after the last episode.
    late = read_training_curve(tmp_path, started=111.0)
    assert (late.training_seconds, late.steps_per_second) == (None, None)


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


def test_curve_counts_the_trainings_steps_where_monitor_counts_frames(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "0.0,400,1.0\n0.0,3580,9.0\n")
    np.testing.assert_array_equal(read_training_curve(tmp_path, 1000).steps, [100, 995])
    np.testing.assert_array_equal(read_training_curve(tmp_path, 4000).steps, [400, 3980])
    # More steps than the files hold: a training that went on from another run.
    np.testing.assert_array_equal(read_training_curve(tmp_path, 100_000).steps, [400, 3980])


def test_a_continued_file_keeps_its_order_and_has_no_times(tmp_path: Path) -> None:
    # As Monitor(..., override_existing=False) writes it: the clock of the second part starts again.
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n2.0,10,9.0\n3.0,10,0.5\n4.0,10,5.0\n")
    curve = read_training_curve(tmp_path)
    np.testing.assert_array_equal(curve.returns, [1, 2, 3, 4])
    np.testing.assert_array_equal(curve.steps, [10, 20, 30, 40])
    assert np.isnan(curve.seconds).all() and curve.training_seconds is None


def test_the_steps_of_several_environments_ascend_after_new_episodes(tmp_path: Path) -> None:
    # A resume has begun new episodes: environment 0 lost more steps than environment 1.
    write_monitor(tmp_path, 0, 0.0, "1.0,100,10.0\n2.0,100,110.0\n")
    write_monitor(tmp_path, 1, 0.0, "3.0,95,9.5\n4.0,50,15.0\n5.0,95,109.5\n")
    curve = read_training_curve(tmp_path)
    np.testing.assert_array_equal(curve.steps, [190, 200, 290, 400, 480])
    np.testing.assert_array_equal(curve.returns, [3, 1, 4, 2, 5])


@pytest.mark.parametrize(
    "starts",
    [(0.0, 0.2), (0.0, 100.0)],  # an evaluation with longer episodes; one seed after another
)
def test_files_of_several_trainings_are_refused(starts: tuple[float, float], tmp_path: Path) -> None:
    for index, start in enumerate(starts):
        length = 500 if start == 0.2 else 100
        write_monitor(tmp_path, index, start, "".join(f"1.0,{length},{n}.0\n" for n in range(1, 51)))
    with pytest.raises(
        ValueError, match=r"must hold one training, .* [01]\.monitor\.csv and [01]\.monitor.* Keep each"
    ):
        read_training_curve(tmp_path)


def test_an_environment_may_be_in_one_episode_while_others_end_many(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "".join(f"1.0,10,{n}.0\n" for n in range(1, 51)))
    write_monitor(tmp_path, 1, 0.0, "")
    write_monitor(tmp_path, 2, 0.0, "1.0,490,49.0\n")
    assert read_training_curve(tmp_path).steps[-1] == 1500


def test_files_of_evaluations_are_no_environments(tmp_path: Path) -> None:
    for name in ("train", "eval", "test_0"):
        write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n")
        (tmp_path / "0.monitor.csv").rename(tmp_path / f"{name}.monitor.csv")
    np.testing.assert_array_equal(read_training_curve(tmp_path).steps, [10])
    (tmp_path / "train.monitor.csv").unlink()
    np.testing.assert_array_equal(read_training_curve(tmp_path).steps, [20, 20])


@pytest.mark.parametrize("rest", ["7.0,1", "7.0,", "7.0,1,", "7.0,1\n"])
def test_curve_ends_before_a_line_cut_short(tmp_path: Path, rest: str) -> None:
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n" + rest)
    np.testing.assert_array_equal(read_training_curve(tmp_path).returns, [1.0])


def test_a_damaged_row_before_others_is_refused(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n2.0,1\0\0\n3.0,10,3.0\n")
    with pytest.raises(ValueError, match=r"0\.monitor\.csv must have the columns .* \(line 4: .*Remove the line"):
        read_training_curve(tmp_path)


def test_empty_curve_has_no_speed(tmp_path: Path) -> None:
    empty = TrainingCurve(np.array([]), np.array([]), np.array([]))
    assert (empty.training_seconds, empty.steps_per_second) == (None, None)
    write_monitor(tmp_path, 0, 0.0, "")
    assert len(read_training_curve(tmp_path, 100).steps) == 0
    assert len(read_training_curve(tmp_path / "none").steps) == 0
