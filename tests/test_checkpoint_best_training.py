"""SaveBestTrainingReward: which model is kept, and what a kill or a full disk leaves."""

import errno
import json
import logging
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from failing import Killed, fail_at
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import (
    SaveBestTrainingReward,
    TrainingCheckpoint,
    best_training,
    load_best_training,
    read_manifest,
)

RISING = tuple(float(k) for k in range(1, 100))


class Scripted(gym.Env[np.ndarray, int]):
    """Episodes of two steps; episode ``k`` returns ``returns[k]``, whatever the agent does."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, returns: tuple[float, ...]) -> None:
        self.returns, self.episode, self.step_count = returns, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.step_count += 1
        done = self.step_count == 2
        reward = self.returns[self.episode] if done else 0.0
        return np.full(1, 0.1 * self.step_count, dtype=np.float32), reward, done, False, {}


def make_model(returns: tuple[float, ...] = RISING, normalize: bool = True, monitor: bool = True) -> ClipPPO:
    """One rollout is 8 steps, so four episodes; the window of the mean is four episodes too."""

    def make_env() -> gym.Env:
        return Monitor(Scripted(returns)) if monitor else Scripted(returns)

    env: VecEnv = DummyVecEnv([make_env])
    if normalize:
        env = VecNormalize(env)
    return ClipPPO(
        "MlpPolicy",
        clip_range=0.2,
        env=env,
        n_steps=8,
        batch_size=8,
        n_epochs=1,
        stats_window_size=4,
        seed=0,
        device="cpu",
    )


def manifest(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "best_training_model.json").read_text())
    assert isinstance(content, dict)
    return content


def steps_of(model_path: Path, statistics_path: Path | None) -> tuple[int, int | None]:
    """The environment step at which each of the two files was saved, read from the files themselves."""
    with pytest.warns(UserWarning, match="saved by sb3_clipvf"):
        data, _, _ = load_from_zip_file(model_path)
    assert data is not None
    if statistics_path is None:
        return data["num_timesteps"], None
    with open(statistics_path, "rb") as file:
        statistics = pickle.load(file)
    # VecNormalize counts the observation of the first reset too, and starts its count at 1e-4.
    return data["num_timesteps"], round(statistics.obs_rms.count) - 1


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


# --- what is kept


def test_best_window_is_kept_with_matching_statistics(tmp_path: Path) -> None:
    # Rollouts of four episodes: means 2.5, 10, 4. The second one, at step 16, is the best.
    returns = (1.0, 2.0, 3.0, 4.0, 10.0, 10.0, 10.0, 10.0, 4.0, 4.0, 4.0, 4.0, 0.0, 0.0)
    callback = SaveBestTrainingReward(tmp_path)
    make_model(returns).learn(24, callback=callback)
    assert callback.best_mean_reward == 10.0
    assert manifest(tmp_path) == {
        "best_mean_reward": 10.0,
        "num_timesteps": 16,
        "n_episodes": 4,
        "model": "best_training_model.zip",
        "vecnormalize": "vecnormalize.pkl",
        "format": 1,
    }
    pair = load_best_training(tmp_path)
    assert pair == (tmp_path / "best_training_model.zip", tmp_path / "vecnormalize.pkl")
    assert steps_of(*pair) == (16, 16)
    assert sorted(os.listdir(tmp_path)) == ["best_training_model.json", "best_training_model.zip", "vecnormalize.pkl"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_resumed_training_keeps_the_best_model_that_it_has_saved(tmp_path: Path, resume: bool, is_lost: bool) -> None:
    def callbacks() -> list[BaseCallback]:
        return [TrainingCheckpoint(8, tmp_path), SaveBestTrainingReward(tmp_path / "best", resume=resume)]

    model = make_model()
    model.learn(24, callback=callbacks())
    assert manifest(tmp_path / "best")["best_mean_reward"] == 10.5
    if is_lost:
        shutil.rmtree(tmp_path / "best")
    model = ClipPPO.resume(tmp_path, model.env, device="cpu")
    assert model.env is not None
    model.env.envs[0].unwrapped.returns = (0.0,) * 99  # type: ignore[attr-defined]
    model.learn(8, reset_num_timesteps=False, callback=callbacks())
    assert manifest(tmp_path / "best")["num_timesteps"] == (32 if is_lost else 24)


def test_a_training_that_saved_nothing_before_it_was_resumed_replaces_an_older_model(tmp_path: Path) -> None:
    make_model().learn(24, callback=SaveBestTrainingReward(tmp_path / "best"))

    def callbacks() -> list[BaseCallback]:
        return [TrainingCheckpoint(8, tmp_path), SaveBestTrainingReward(tmp_path / "best", resume=False)]

    model = make_model((0.0,) * 99)
    model.n_steps = 6  # fewer episodes than the window
    model.learn(6, callback=callbacks())
    assert manifest(tmp_path / "best")["best_mean_reward"] == 10.5
    model = ClipPPO.resume(tmp_path, model.env, device="cpu")
    model.learn(6, reset_num_timesteps=False, callback=callbacks())
    assert manifest(tmp_path / "best")["best_mean_reward"] == 0.0


def test_attributes_of_a_class_derived_from_it_are_named(tmp_path: Path) -> None:
    class Derived(SaveBestTrainingReward):
        def __init__(self) -> None:
            super().__init__(tmp_path / "best")
            self.kept = 0

    make_model().learn(8, callback=[TrainingCheckpoint(8, tmp_path), Derived()])
    assert "Derived may have unsaved state" in read_manifest(tmp_path / "checkpoint_8.zip").differences[-1]


def test_saved_model_predicts_and_trains_on_as_any_sb3_file(tmp_path: Path) -> None:
    model = make_model((1.0,) * 99)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(8, callback=SaveBestTrainingReward(str(tmp_path)))  # one rollout: saved before its update
    model_path, statistics_path = load_best_training(str(tmp_path))
    env = VecNormalize.load(str(statistics_path), DummyVecEnv([lambda: Monitor(Scripted(RISING))]))
    loaded = ClipPPO.load(model_path, env=env, device="cpu")
    for name, value in loaded.policy.state_dict().items():
        assert value.equal(before[name]), name
    loaded.learn(8, reset_num_timesteps=False)
    assert loaded.num_timesteps == 16


def test_environment_without_normalisation_has_no_statistics(tmp_path: Path) -> None:
    make_model(normalize=False).learn(16, callback=SaveBestTrainingReward(tmp_path, name_prefix="top"))
    assert load_best_training(tmp_path, name_prefix="top")[1] is None
    assert sorted(os.listdir(tmp_path)) == ["top.json", "top.zip"]


def test_statistics_of_an_earlier_model_are_removed_beside_one_without(tmp_path: Path) -> None:
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    assert (tmp_path / "vecnormalize.pkl").exists()
    make_model(tuple(100 + r for r in RISING), normalize=False).learn(8, callback=SaveBestTrainingReward(tmp_path))
    assert not (tmp_path / "vecnormalize.pkl").exists()


def test_check_freq_compares_inside_rollouts(tmp_path: Path) -> None:
    # Callbacks run before SB3 counts the step's episodes: at call 3 the episode of step 2 is known.
    callback = SaveBestTrainingReward(tmp_path, min_episodes=1, check_freq=3)
    callback._on_rollout_end = lambda: None  # type: ignore[method-assign]
    make_model().learn(4 * 8, callback=callback)
    assert manifest(tmp_path)["num_timesteps"] == 30
    # Steps 24, 26, 28 ended episodes 12, 13, 14: the window of four is 11 to 14.
    assert manifest(tmp_path)["best_mean_reward"] == 12.5


def test_min_episodes_below_the_window(tmp_path: Path) -> None:
    model = make_model()
    model.ep_info_buffer = None
    model._stats_window_size = 50
    model.learn(8, callback=SaveBestTrainingReward(tmp_path, min_episodes=4))
    assert manifest(tmp_path)["n_episodes"] == 4


@pytest.mark.parametrize("monitor, counted", [(True, 4), (False, 0)])
def test_training_that_never_fills_the_window_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monitor: bool, counted: int
) -> None:
    model = make_model(monitor=monitor)
    model._stats_window_size = 5
    callback = SaveBestTrainingReward(tmp_path)
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        model.learn(8, callback=callback)
        callback.on_training_end()  # the Zoo calls it a second time
    assert [record.getMessage().split(". ")[0] for record in caplog.records] == [
        f"SaveBestTrainingReward saved no model: {counted} training episodes ended, and 5 are needed"
    ]
    assert os.listdir(tmp_path) == []


def test_non_finite_returns_are_not_saved_and_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make_env() -> gym.Env:  # the agent sees finite rewards, so that SB3 can train; Monitor inside does not
        return gym.wrappers.TransformReward(Monitor(Scripted((math.inf,) * 99)), lambda reward: 0.0)

    model = make_model(normalize=False)
    model.set_env(DummyVecEnv([make_env]))
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        model.learn(16, callback=SaveBestTrainingReward(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "The mean training return is inf: its model is not saved. Correct the rewards."
    ]
    assert os.listdir(tmp_path) == []


def test_verbose_logs_each_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sb3_clipvf"):
        make_model().learn(8, callback=SaveBestTrainingReward(tmp_path, verbose=1))
    assert "New best mean training return 2.50 over 4 episodes at step 8" in caplog.text


# --- kills and full disks

# A save makes three renames: the model with its statistics, the copy of the statistics, the manifest.
N_RENAMES = 3


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(N_RENAMES))
def test_kill_during_a_save_leaves_a_matching_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at(N_RENAMES + call, os.replace, Killed(), after))
        # The save at step 8 passes, the one at step 16 is killed.
        with pytest.raises(Killed):
            make_model(tuple(10 + r for r in RISING)).learn(24, callback=SaveBestTrainingReward(tmp_path))
    model_steps, statistics_steps = steps_of(*load_best_training(tmp_path))
    assert model_steps == statistics_steps == manifest(tmp_path)["num_timesteps"]

    assert model_steps == (8 if (call, after) == (0, False) else 16)

    # The next training resumes from the best mean, and removes what the kill left.
    best = manifest(tmp_path)["best_mean_reward"]
    for name in ("best_training_model.zip", "vecnormalize.pkl"):
        (tmp_path / f".{name}.99-0123abcd.tmp").write_bytes(b"half")
        os.utime(tmp_path / f".{name}.99-0123abcd.tmp", (0, 0))
    callback = SaveBestTrainingReward(tmp_path)
    make_model(tuple(50 + r for r in RISING)).learn(8, callback=callback)
    assert callback.best_mean_reward == 52.5 > best
    assert steps_of(tmp_path / "best_training_model.zip", tmp_path / "vecnormalize.pkl") == (8, 8)
    assert leftovers(tmp_path) == []


def test_copies_of_what_the_model_holds_are_completed_at_the_start(tmp_path: Path) -> None:
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    before = (tmp_path / "best_training_model.json").read_bytes()
    (tmp_path / "best_training_model.json").write_bytes(b"of an earlier model")
    (tmp_path / "vecnormalize.pkl").unlink()
    make_model((0.0,) * 99).learn(8, callback=SaveBestTrainingReward(tmp_path))  # saves nothing itself
    assert (tmp_path / "best_training_model.json").read_bytes() == before
    assert steps_of(tmp_path / "best_training_model.zip", tmp_path / "vecnormalize.pkl") == (8, 8)


# A save syncs the file and its folder for each rename.
@pytest.mark.parametrize("call", range(2 * N_RENAMES))
def test_full_disk_stops_the_training_and_leaves_the_previous_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    model, callback = make_model(), SaveBestTrainingReward(tmp_path)
    model.learn(8, callback=callback)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at(call, os.fsync, full, after=False))
        with pytest.raises(OSError, match=r"No space left on device\. .*(Free space|Check that disk)"):
            model.learn(16, callback=callback, reset_num_timesteps=False)
    model_steps, statistics_steps = steps_of(*load_best_training(tmp_path))
    # After the first sync the new model is in its place.
    assert model_steps == statistics_steps == manifest(tmp_path)["num_timesteps"] == (8 if call == 0 else 16)
    assert leftovers(tmp_path) == []
    model.learn(8, callback=callback, reset_num_timesteps=False)  # there is space again: the same callback continues
    assert manifest(tmp_path)["num_timesteps"] == 24


def test_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`save_path` must be a folder that can be written to, got .*file/best': Not a"):
        make_model().learn(8, callback=SaveBestTrainingReward(tmp_path / "file" / "best"))


# --- resume


def test_resume_keeps_a_better_model_of_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model().learn(16, callback=SaveBestTrainingReward(tmp_path))
    callback = SaveBestTrainingReward(tmp_path)
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        make_model((0.0,) * 99).learn(16, callback=callback)
    assert callback.best_mean_reward == manifest(tmp_path)["best_mean_reward"] == 6.5
    assert "holds a best mean training return of 6.50; only a better one replaces it" in caplog.text


def test_resume_in_the_middle_of_a_training_is_not_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.learn(16, callback=SaveBestTrainingReward(tmp_path))
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        model.learn(8, callback=SaveBestTrainingReward(tmp_path), reset_num_timesteps=False)
    assert caplog.records == []
    assert manifest(tmp_path)["num_timesteps"] == 24


def test_without_resume_the_first_mean_replaces_the_old_best(tmp_path: Path) -> None:
    make_model().learn(16, callback=SaveBestTrainingReward(tmp_path))
    make_model((0.0,) * 99).learn(16, callback=SaveBestTrainingReward(tmp_path, resume=False))
    assert manifest(tmp_path)["best_mean_reward"] == 0.0
    assert steps_of(*load_best_training(tmp_path)) == (8, 8)


def test_one_callback_serves_several_learn_calls(tmp_path: Path) -> None:
    model, callback = make_model((9.0,) * 4 + (1.0,) * 99), SaveBestTrainingReward(tmp_path)
    model.learn(8, callback=callback)
    model.learn(8, callback=callback, reset_num_timesteps=False)
    assert manifest(tmp_path)["num_timesteps"] == 8
    assert callback.best_mean_reward == 9.0


# --- refusals


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (
            {"min_episodes": 0},
            ValueError,
            r"`min_episodes` must be a whole number of at least 1, got 0\. None means a full",
        ),
        ({"min_episodes": "all"}, TypeError, r"`min_episodes` must be a whole number, got 'all'"),
        ({"check_freq": -1}, ValueError, r"`check_freq` must be a whole number of at least 1, got -1\. None means at"),
        ({"check_freq": True}, TypeError, r"`check_freq` must be a whole number, got True"),
        ({"name_prefix": ""}, ValueError, r"`name_prefix` must be a file name without a folder, got ''"),
        ({"name_prefix": "a/b"}, ValueError, r"`save_path` takes folders"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        SaveBestTrainingReward(tmp_path, **arguments)


def test_min_episodes_above_the_window_is_refused_and_the_window_itself_is_not(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`min_episodes` must be at most the model's `stats_window_size` \(4\), got 5"
    ):
        make_model().learn(8, callback=SaveBestTrainingReward(tmp_path, min_episodes=5))
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path, min_episodes=4))
    assert manifest(tmp_path)["n_episodes"] == 4


def test_loading_from_an_empty_folder_explains_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"best_training_model\.zip was not found\. `path` must be the folder"):
        load_best_training(tmp_path)


def test_loading_a_pair_with_a_missing_file_names_it(tmp_path: Path) -> None:
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    load_best_training(tmp_path)[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.zip was not found, but .* names it as the best model"):
        load_best_training(tmp_path)


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"format": 2}', '{"model": "x.zip"}'])
def test_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "best_training_model.json").write_text(text)
    with pytest.raises(ValueError, match=r"must be a manifest of SaveBestTrainingReward \(format 1\), got different"):
        load_best_training(tmp_path)
    with pytest.raises(ValueError, match="Move the file away"):
        make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))


def test_damaged_model_is_refused(tmp_path: Path) -> None:
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    path = tmp_path / "best_training_model.zip"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"model\.zip must be a model that SaveBestTrainingReward saved.*Move it away"):
        make_model().learn(8, callback=SaveBestTrainingReward(tmp_path))
    make_model().learn(8, callback=SaveBestTrainingReward(tmp_path, resume=False))
    assert steps_of(*load_best_training(tmp_path)) == (8, 8)


# --- folders of version 0.1.0, whose models do not hold their statistics


def test_a_pair_of_an_earlier_version_is_kept_until_a_better_model_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    shutil.copytree(Path(__file__).parent / "data" / "0.1.0" / "best_training", folder)
    pair = load_best_training(folder)
    assert [path and path.parent.name for path in pair] == ["best_training_model_versions"] * 2
    best = manifest(folder)["best_mean_reward"]
    callback = SaveBestTrainingReward(folder)
    make_model(tuple(best - 100 + r / 100 for r in RISING)).learn(8, callback=callback)
    assert callback.best_mean_reward == best
    assert load_best_training(folder) == pair
    make_model().learn(8, callback=SaveBestTrainingReward(folder))
    assert load_best_training(folder) == (folder / "best_training_model.zip", folder / "vecnormalize.pkl")
    assert steps_of(*load_best_training(folder)) == (8, 8)


def test_a_save_during_a_load_is_not_replaced_by_older_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running training writes its zip and copies after the load has read the older zip."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    for folder, steps in ((older, 8), (newer, 16)):
        make_model().learn(steps, callback=SaveBestTrainingReward(folder))
    read = best_training.read_statistics

    def read_then_saved(path: Path) -> bytes | None:
        statistics = read(path)
        shutil.copytree(newer, older, dirs_exist_ok=True)
        return statistics

    monkeypatch.setattr(best_training, "read_statistics", read_then_saved)
    assert steps_of(*load_best_training(older)) == (16, 16)
    for name in ("best_training_model.zip", "best_training_model.json", "vecnormalize.pkl"):
        assert (older / name).read_bytes() == (newer / name).read_bytes()
