"""``IsolatedEvalCallback``: evaluations do not change the training, and the best model keeps its statistics."""

import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.callbacks import IsolatedEvalCallback, WholeProgressBar
from sb3_clipvf.checkpoint import SaveBestTrainingReward, TrainingCheckpoint
from sb3_clipvf.checkpoint.best_model import read_score, write_best_model
from sb3_clipvf.envs import FastVecNormalize

MakeEnv = Callable[[], Any]


class Short(gym.Env[Any, Any]):
    """Ten steps of reward 3, with observations that drift away; its end is a success."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: ClassVar[spaces.Space[Any]] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        done = self.count >= 10
        return (
            self._observation(),
            3.0,
            done,
            False,
            {"is_success": bool(self.np_random.random() < 0.5)} if done else {},
        )

    def _observation(self) -> np.ndarray:
        return (self.count + self.np_random.normal(size=2)).astype(np.float32)


DRAWS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
    "torch": lambda: float(th.rand(1)),
    # One object for all environments of the class.
    "space": lambda: float(Short.action_space.sample()),
}


class Drawing(Short):
    """Draws from the random generator of the training."""

    def __init__(self, source: str) -> None:
        self.draw = DRAWS[source]

    def _observation(self) -> np.ndarray:
        return np.full(2, self.draw(), np.float32)


class RestlessPolicy(ActorCriticPolicy):
    """Resets its noise before each prediction."""

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        self.reset_noise(5)
        return super()._predict(observation, deterministic)


def pendulums() -> Any:
    return make_vec_env("Pendulum-v1", 2, seed=0, env_kwargs={"max_episode_steps": 30})


def trained(
    make: MakeEnv, callback: BaseCallback | None, policy: Any = "MlpPolicy", steps: int = 192, **arguments: Any
) -> ClipPPO:
    Short.action_space.seed(0)
    common = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    model = ClipPPO(policy, make(), **{**common, **arguments})
    model.learn(steps, callback=callback)
    return model


def evaluation(make: MakeEnv, cls: Any = IsolatedEvalCallback, **arguments: Any) -> Any:
    # Every 13 calls: also in the middle of rollouts.
    return cls(make(), **{"n_eval_episodes": 2, "eval_freq": 13, "verbose": 0, **arguments})


def same_weights(first: ClipPPO, second: ClipPPO) -> bool:
    pairs = zip(first.policy.state_dict().values(), second.policy.state_dict().values(), strict=True)
    return all(th.equal(one, other) for one, other in pairs)


CASES: dict[str, tuple[MakeEnv, dict[str, Any]]] = {
    "native": (lambda: make_vec_env("CartPole-v1", 2, seed=0), {"engine": "native"}),
    "autograd": (lambda: make_vec_env("CartPole-v1", 2, seed=0), {"engine": "autograd"}),
    "continuous": (pendulums, {"engine": "native"}),
    "gsde": (pendulums, {"use_sde": True, "sde_sample_freq": 7}),
    "restless": (pendulums, {"use_sde": True, "policy": RestlessPolicy}),
    "normalized": (lambda: VecNormalize(pendulums()), {}),
}


# ------------------------------------------------------------------ the training


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_training_ends_with_the_same_weights_as_without_evaluations(name: str, deterministic: bool) -> None:
    make, arguments = CASES[name]
    callback = evaluation(make, deterministic=deterministic)
    evaluated, plain = trained(make, callback, **arguments), trained(make, None, **arguments)
    assert callback.last_mean_reward > -np.inf
    assert same_weights(evaluated, plain)
    if name == "normalized":
        assert evaluated.env.obs_rms.mean.tolist() == plain.env.obs_rms.mean.tolist()
        assert evaluated.env.ret_rms.var == plain.env.ret_rms.var


@pytest.mark.parametrize("name", ["native", "autograd", "continuous"])
def test_with_sb3s_callback_the_weights_differ(name: str) -> None:
    """The tests above would notice a difference."""
    make, arguments = CASES[name]
    callback = evaluation(make, EvalCallback, deterministic=False)
    assert not same_weights(trained(make, callback, **arguments), trained(make, None, **arguments))


@pytest.mark.parametrize("source", DRAWS)
def test_environments_may_draw_from_shared_generators(source: str) -> None:
    def make() -> Any:
        return make_vec_env(lambda: Drawing(source), 2, seed=0)

    plain = trained(make, None)
    assert same_weights(trained(make, evaluation(make)), plain)
    assert not same_weights(trained(make, evaluation(make, EvalCallback)), plain)


@pytest.mark.parametrize("mode", [False, True])
def test_the_policys_mode_is_kept(mode: bool) -> None:
    make = CASES["autograd"][0]
    callback = evaluation(make, eval_freq=1)
    model = trained(make, None)
    callback.init_callback(model)
    model.policy.set_training_mode(mode)
    callback.on_step()
    assert {module.training for module in model.policy.modules()} == {mode}


# ------------------------------------------------------------------ statistics and rewards


def without_monitor() -> VecNormalize:
    """Return environments whose normaliser would update its statistics, and normalise rewards."""
    return VecNormalize(DummyVecEnv([Short]))


def test_statistics_are_frozen_and_rewards_are_not_normalized() -> None:
    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            counts.append((self.parent.eval_env.obs_rms.count, self.training_env.obs_rms.count))
            return True

    counts: list[tuple[float, float]] = []
    callback = evaluation(without_monitor, callback_after_eval=Watch(), warn=False)
    trained(without_monitor, callback)
    assert callback.last_mean_reward == 30.0
    assert len(counts) == 192 // 13
    assert all(mine == theirs for mine, theirs in counts)
    assert (callback.eval_env.training, callback.eval_env.norm_reward) == (True, True)


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_episodes_that_end_outside_of_monitor_are_refused(wrap: Any) -> None:
    def make() -> Any:
        return wrap(make_vec_env(Short, 2, wrapper_class=lambda env: TimeLimit(env, 4)))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"`eval_env` must report .* outside of Monitor ended after 4 steps.* Put Mon"):
        trained(lambda: wrap(make_vec_env(Short)), evaluation(make))
    callback = evaluation(lambda: wrap(VecMonitor(DummyVecEnv([lambda: TimeLimit(Short(), 4)]))))
    trained(lambda: wrap(VecMonitor(DummyVecEnv([Short]))), callback)
    assert callback.last_mean_reward == 12.0


def test_environments_of_the_training_are_refused() -> None:
    env = make_vec_env(Short)
    with pytest.raises(ValueError, match="`eval_env` must not share environments with the training"):
        trained(lambda: env, evaluation(lambda: env))


def test_statistics_that_the_training_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`eval_env` must have a VecNormalize if and only if .* got a VecNormalize\."):
        trained(lambda: make_vec_env(Short), evaluation(lambda: VecNormalize(make_vec_env(Short))))


def test_environments_without_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="`eval_env` must have a VecNormalize if and only if .* got no VecNormalize"):
        trained(lambda: VecNormalize(make_vec_env(Short)), evaluation(lambda: make_vec_env(Short)))


# ------------------------------------------------------------------ what SB3's callback does


@pytest.mark.parametrize("patience", [1, 99])
def test_logs_and_files_are_as_with_sb3s(patience: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Any:
        return make_vec_env(Short, 2, seed=0)

    seen = {}
    for cls in (EvalCallback, IsolatedEvalCallback):
        folder = str(tmp_path / cls.__name__)
        callback = evaluation(
            make,
            cls,
            verbose=1,
            log_path=folder,
            best_model_save_path=folder,
            callback_after_eval=StopTrainingOnNoModelImprovement(patience, verbose=1),
            callback_on_new_best=StopTrainingOnRewardThreshold(99.0),
        )
        model = trained(make, callback)
        with np.load(f"{folder}/evaluations.npz") as history:
            arrays = {name: history[name].tolist() for name in history.files}
        best = ClipPPO.load(f"{folder}/best_model", device="cpu").num_timesteps
        seen[cls] = (capsys.readouterr().out, arrays, best, model.num_timesteps, callback.best_mean_reward)
        assert "successes" in arrays
    assert seen[EvalCallback] == seen[IsolatedEvalCallback]


class Succeeding(Short):
    """Reports successes only, in the given episodes, counted from the first one played."""

    def __init__(self, successes: set[int]) -> None:
        self.successes, self.episode = successes, -1

    def reset(self, **kwargs: Any) -> Any:
        self.episode += 1
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        obs, reward, done, truncated, _ = super().step(action)
        return obs, reward, done, truncated, {"is_success": True} if self.episode in self.successes else {}


def history_of(folder: Path) -> dict[str, Any]:
    with np.load(folder / "evaluations.npz") as history:
        return {name: history[name] for name in history.files}


@pytest.mark.parametrize("wrap", [Monitor, lambda env: env], ids=["monitor", "no monitor"])
@pytest.mark.parametrize(
    ("successes", "expected"),
    [
        ({1}, [[0, 1], [0, 0], [0, 0]]),
        ({0, 3, 4, 5}, [[1, 0], [0, 1], [1, 1]]),
        # The first evaluations report no success.
        ({5}, [[0, 0], [0, 0], [0, 1]]),
        (set(), None),
    ],
)
def test_episodes_that_report_no_success_are_failures(
    wrap: Any, successes: set[int], expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An evaluation resets the environment once more at its end.
    played = {episode + episode // 2 for episode in successes}
    callback = evaluation(
        lambda: DummyVecEnv([lambda: wrap(Succeeding(played))]),
        log_path=str(tmp_path),
        warn=False,
        eval_freq=64,
        verbose=1,
    )
    trained(lambda: make_vec_env(Short), callback, n_steps=64)
    history = history_of(tmp_path)
    assert history["results"].shape == (3, 2)
    rates = [float(rate) / 100 for rate in re.findall(r"Success rate: ([\d.]+)%", capsys.readouterr().out)]
    if expected is None:
        assert "successes" not in history
        assert rates == []
    else:
        assert history["successes"].tolist() == expected
        first = next(index for index, row in enumerate(expected) if any(row))
        assert rates == [np.mean(row) for row in expected[first:]]


def test_another_number_of_episodes_does_not_end_the_training(tmp_path: Path) -> None:
    callback = evaluation(lambda: make_vec_env(Short), log_path=str(tmp_path), eval_freq=64)
    model = trained(lambda: make_vec_env(Short), callback, steps=64)
    callback.n_eval_episodes = 3
    model.learn(64, callback=callback, reset_num_timesteps=False)
    history = history_of(tmp_path)
    assert np.isnan(history["results"]).tolist() == [[False, False, True], [False] * 3]
    assert np.isnan(history["ep_lengths"]).tolist() == np.isnan(history["successes"]).tolist()
    assert history["timesteps"].tolist() == [64, 128]


def test_a_threshold_stops_the_training(tmp_path: Path) -> None:
    callback = evaluation(lambda: make_vec_env(Short), callback_on_new_best=StopTrainingOnRewardThreshold(20.0))
    assert trained(lambda: make_vec_env(Short), callback).num_timesteps == 13


# ------------------------------------------------------------------ the best model


def best_of(folder: Path) -> tuple[ClipPPO, float, float]:
    with zipfile.ZipFile(folder / "best_model.zip") as archive:
        (folder / "inner.pkl").write_bytes(archive.read("vecnormalize.pkl"))
    inner, beside = (
        VecNormalize.load(str(folder / name), DummyVecEnv([Short])) for name in ("inner.pkl", "best_vecnormalize.pkl")
    )
    return ClipPPO.load(folder / "best_model", device="cpu"), inner.obs_rms.count, beside.obs_rms.count


def test_the_best_model_has_its_own_statistics(tmp_path: Path) -> None:
    # All evaluations have the same return: the first one stays the best.
    callback = evaluation(without_monitor, best_model_save_path=str(tmp_path), warn=False)
    model = trained(without_monitor, callback)
    best, inner, beside = best_of(tmp_path)
    assert best.num_timesteps == 13
    # One reset and 13 steps; VecNormalize begins at 1e-4.
    assert inner == beside == pytest.approx(14.0001, abs=1e-6)
    assert model.env.obs_rms.count > 100
    trained(lambda: make_vec_env(Short), evaluation(lambda: make_vec_env(Short), best_model_save_path=str(tmp_path)))
    assert not (tmp_path / "best_vecnormalize.pkl").exists()


def test_what_killed_writes_left_is_removed_at_the_start(tmp_path: Path) -> None:
    names = ("best_model.zip", "best_vecnormalize.pkl", "evaluations.npz", "notes.txt")
    for name in names:
        (tmp_path / f".{name}.99-0123abcd.tmp").write_bytes(b"half")
        os.utime(tmp_path / f".{name}.99-0123abcd.tmp", (0, 0))
    folder = str(tmp_path)
    trained(
        lambda: make_vec_env(Short),
        evaluation(lambda: make_vec_env(Short), best_model_save_path=folder, log_path=folder),
    )
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.txt.99-0123abcd.tmp"]


@pytest.mark.parametrize(("training", "stays"), [("this", True), ("another", False), (None, False)])
def test_a_better_model_of_the_same_training_is_kept(training: str | None, stays: bool, tmp_path: Path) -> None:
    def make() -> Any:
        return make_vec_env(Short)

    def callback(reward: float) -> Any:
        made = evaluation(make, best_model_save_path=str(tmp_path), eval_freq=10**6)
        made.last_mean_reward = reward
        return made

    model = ClipPPO("MlpPolicy", make(), n_steps=32, batch_size=32, device="cpu")
    for owner, reward, steps in ((training, 5.0, 1), ("this", 4.0, 2), ("this", 6.0, 3)):
        model._training_id, model.num_timesteps = owner, steps
        saving = callback(reward)
        saving.model = model
        saving._save_best(tmp_path)
        kept = ClipPPO.load(tmp_path / "best_model", device="cpu").num_timesteps
        assert kept == (1 if steps == 2 and stays else steps)


@pytest.mark.parametrize("start", ["load", "learn again"])
def test_another_training_of_the_same_model_replaces_the_best_model(start: str, tmp_path: Path) -> None:
    def callback() -> Any:
        return evaluation(lambda: make_vec_env(Short), best_model_save_path=str(tmp_path), eval_freq=32)

    path = tmp_path / "best_model.zip"
    model = ClipPPO("MlpPolicy", make_vec_env(Short), n_steps=32, batch_size=32, device="cpu")
    model.learn(32, callback=[TrainingCheckpoint(32, tmp_path / "checkpoints"), callback()])
    score = {"mean_reward": 1e9, "num_timesteps": 1, "training": model._training_id}
    write_best_model(path, model, score)
    assert score["training"] is not None
    if start == "load":
        model = ClipPPO.load(path, make_vec_env(Short), device="cpu")
    model.learn(32, callback=callback())
    assert read_score(path) != score


def test_a_resumed_training_completes_the_copy_of_the_statistics(tmp_path: Path) -> None:
    callback = evaluation(without_monitor, best_model_save_path=str(tmp_path), warn=False)
    model = trained(without_monitor, callback, steps=32)
    model._training_id, callback.last_mean_reward = "this", 5.0
    callback._save_best(tmp_path)
    (tmp_path / "best_vecnormalize.pkl").write_bytes(b"of an earlier model, since a kill came before the copy")
    callback.last_mean_reward = 4.0
    callback._save_best(tmp_path)
    _, inner, beside = best_of(tmp_path)
    assert inner == beside


BROKEN: dict[str, bytes] = {
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "no return": b'{"training": "this"}',
    "a text": b'{"training": "this", "mean_reward": "99"}',
    "no text": b"\xff",
    "too many values": b'{"training": "this", "mean_reward": 99.0, "more": [' + b"0," * 2**22 + b"0]}",
    "too long": b'{"training": "this", "mean_reward": 99.0}' + b" " * 2**24,
}


@pytest.mark.parametrize("name", [*BROKEN, "no zip", "cut short"])
def test_a_best_model_that_cannot_be_read_is_replaced(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_clipvf.files.archive.free_memory", lambda: 2**28)
    path = tmp_path / "best_model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("evaluation.json", BROKEN.get(name, b'{"training": "this", "mean_reward": 99.0}'))
    if name in ("no zip", "cut short"):
        path.write_bytes(b"PK" if name == "no zip" else path.read_bytes()[:50])
    callback = evaluation(lambda: make_vec_env(Short), best_model_save_path=str(tmp_path))
    callback.model = ClipPPO("MlpPolicy", make_vec_env(Short), n_steps=32, batch_size=32, device="cpu")
    callback.model._training_id, callback.last_mean_reward = "this", 5.0
    callback._save_best(tmp_path)
    (record,) = caplog.records
    assert f"{path} is replaced: the evaluation in it could not be read" in record.getMessage()
    ClipPPO.load(path, device="cpu")
    callback.last_mean_reward = 4.0
    with caplog.at_level("INFO", logger="sb3_clipvf"):
        callback._save_best(tmp_path)
    assert f"{path} is kept: its mean return is 5.0, of step 0" in caplog.text


def test_a_best_model_of_sb3s_callback_is_replaced_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = CASES["native"][0]
    for cls in (EvalCallback, IsolatedEvalCallback):
        trained(make, evaluation(make, cls, best_model_save_path=str(tmp_path)), steps=64)
    assert "evaluation.json" in zipfile.ZipFile(tmp_path / "best_model.zip").namelist()
    assert "is replaced" not in caplog.text


@pytest.mark.parametrize("cls", [VecNormalize, FastVecNormalize])
def test_statistics_are_not_written_over_a_file_that_is_open(
    cls: type[VecNormalize], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows forbids it; elsewhere the synced file would no longer have a name."""
    links: list[int] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        links.append(os.fstat(descriptor).st_nlink)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)

    def make() -> Any:
        return cls(make_vec_env(Short))

    trained(make, evaluation(make, best_model_save_path=str(tmp_path)), steps=32)
    trained(make, SaveBestTrainingReward(tmp_path / "training", min_episodes=1), steps=32)
    assert len(links) > 4
    assert all(links)
    for path in (tmp_path / "best_vecnormalize.pkl", tmp_path / "training" / "vecnormalize.pkl"):
        assert cls.load(str(path), make_vec_env(Short)).obs_rms.count > 1


# ---------------------------------------------------------------- the progress bar


@pytest.mark.parametrize("first_step", [0, 1000])
def test_the_progress_bar_counts_all_steps_and_ends_at_its_total(first_step: int) -> None:
    bar = WholeProgressBar()
    bar.model = SimpleNamespace(get_env=lambda: SimpleNamespace(num_envs=4), num_timesteps=first_step)
    bar.locals = {"total_timesteps": first_step + 100}
    bar.pbar = SimpleNamespace(total=100, n=0)
    bar.pbar.update = lambda steps: vars(bar.pbar).update(n=bar.pbar.n + steps)
    seen = []
    for _ in range(15):
        bar.model.num_timesteps += 8  # of two processes with four environments each
        assert bar.on_step()
        seen.append(bar.pbar.n)
    assert seen[:2] == [8, 16] and seen[11:] == [96, 100, 100, 100]


class OwnBar(ProgressBarCallback):
    """A class of the user's."""


@pytest.mark.parametrize("place", ["argument", "alone", "list", "nested list"])
def test_sb3s_progress_bars_count_all_steps(place: str) -> None:
    bar, own = ProgressBarCallback(), OwnBar()
    callbacks: dict[str, Any] = {"argument": None, "alone": bar, "list": [own, bar]}
    callbacks["nested list"] = [CallbackList([bar]), own]
    model = ClipPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    seen: list[Any] = []

    class Kept(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            seen.append(self.locals["callback"])

    if place == "argument":
        model.learn(12, callback=Kept(), progress_bar=True)
        bar = seen[0].callbacks[-1]
    else:
        model.learn(12, callback=callbacks[place])
    assert type(bar) is WholeProgressBar and (bar.pbar.n, bar.pbar.total) == (12, 12)
    assert type(own) is OwnBar
