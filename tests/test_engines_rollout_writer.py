"""Rollouts that the native engine writes into the buffer itself: equality with the usual ones, and where they run."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf import ClipPPO, collection
from sb3_clipvf.callbacks import IsolatedEvalCallback
from sb3_clipvf.checkpoint.best_training import SaveBestTrainingReward
from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint
from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.engines.rollout_writer import RolloutWriter, Target, writer_for
from sb3_clipvf.envs.dummy import FastDummyVecEnv
from sb3_clipvf.envs.normalize import FastVecNormalize
from sb3_clipvf.policies import SquashedActorCriticPolicy
from sb3_clipvf.rollout import TensorRolloutBuffer

ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(np.array([-0.5, 0.0], np.float32), np.array([0.5, 0.1], np.float32)),
    "matrix": spaces.Box(-0.5, 0.5, (2, 3), np.float32),
    "float64": spaces.Box(-0.5, 0.5, (2,), np.float64),
    "whole": spaces.Box(-1, 1, (2,), np.int64),
}


class Echo(gym.Env[np.ndarray, Any]):
    """Its observations, float64, and rewards depend on the actions; every fifth step ends or truncates an episode."""

    observation_space = spaces.Box(-9.0, 9.0, (2, 2), np.float64)

    def __init__(self, actions: str) -> None:
        self.action_space = ACTIONS[actions]
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.normal(size=(2, 2)), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        assert self.action_space.contains(action if self.action_space.shape else int(action))
        total = float(np.sum(action))
        obs = self.np_random.normal(size=(2, 2)) + total
        return obs, total, self.n_steps % 10 == 0, self.n_steps % 10 == 5, {"is_success": total > 0}


def environments(actions: str, n_envs: int, *, normalizes: bool) -> VecEnv:
    venv = FastDummyVecEnv([lambda: Monitor(Echo(actions))] * n_envs)
    return FastVecNormalize(venv) if normalizes else venv


def make(venv: VecEnv, policy: Any = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 1, "device": "cpu", **kwargs}
    return ClipPPO(policy, venv, policy_kwargs={"net_arch": [8]}, **arguments)


def trained(monkeypatch: pytest.MonkeyPatch, model: ClipPPO, *, usual: bool, callback: Any = None) -> dict[str, Any]:
    """Return what training leaves, with the usual rollouts or those that the engine writes."""
    used = []

    def spy(*args: Any) -> RolloutWriter | None:
        used.append(None if usual else writer_for(*args))
        return used[-1]

    monkeypatch.setattr(collection, "writer_for", spy)
    n = model.n_steps * model.n_envs
    model.learn(3 * n, callback=callback)
    assert len(used) == 3 and all((written is None) == usual for written in used)
    buffer = model.rollout_buffer
    names = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "dist_params", "returns")
    return {
        **{name: getattr(buffer, name).copy() for name in names},
        "weights": th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().numpy(),
        "last_obs": model._last_obs,
        "episodes": [(info["r"], info["l"]) for info in model.ep_info_buffer or ()],
        "successes": list(model.ep_success_buffer or ()),
        "random_state": th.get_rng_state().numpy(),
    }


@pytest.mark.parametrize("n_envs", [1, 3, 40])
@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("actions", ["discrete", "multi_discrete", "multi_binary", "box", "matrix"])
def test_they_are_the_usual_ones(monkeypatch: pytest.MonkeyPatch, actions: str, normalizes: bool, n_envs: int) -> None:
    runs = [
        trained(monkeypatch, make(environments(actions, n_envs, normalizes=normalizes)), usual=usual)
        for usual in (True, False)
    ]
    assert runs[0]["successes"] and runs[0]["episodes"]
    for name, wanted in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], wanted, err_msg=name)


@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
def test_they_are_the_usual_ones_with_gsde(monkeypatch: pytest.MonkeyPatch, sde_sample_freq: int) -> None:
    kwargs: dict[str, Any] = {"use_sde": True, "sde_sample_freq": sde_sample_freq}
    runs = [
        trained(monkeypatch, make(environments("box", 2, normalizes=True), **kwargs), usual=usual)
        for usual in (True, False)
    ]
    for name, wanted in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], wanted, err_msg=name)


def known_callbacks(venv: VecEnv, folder: Path) -> dict[str, Any]:
    """Callbacks that read no actions, one of each kind of nesting."""
    return {
        "function": ConvertCallback(None),
        "evaluations": EvalCallback(venv, callback_on_new_best=StopTrainingOnRewardThreshold(1e9), eval_freq=10),
        "isolated evaluations": IsolatedEvalCallback(venv, eval_freq=10, verbose=0),
        "list": [
            CallbackList([EveryNTimesteps(8, CheckpointCallback(8, str(folder / "zips")))]),
            StopTrainingOnMaxEpisodes(1000),
            SaveBestTrainingReward(folder / "best"),
            TrainingCheckpoint(every_timesteps=20, path=folder / "checkpoints"),
        ],
    }


class Nothing(BaseCallback):
    def _on_step(self) -> bool:
        return True


class Own(TensorRolloutBuffer):
    """A class of the user's."""


def written_by(model: ClipPPO) -> RolloutWriter | None:
    model.rollout_buffer.reset()
    return writer_for(model._current_engine(), model.rollout_buffer, model.action_space)


class TestWhereTheyAreUsed:
    @pytest.mark.parametrize("kind", ["subclass", "method", "function", "child", "grandchild"])
    def test_not_with_callbacks_that_may_read_actions(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        venv = environments("box", 1, normalizes=False)
        changed = StopTrainingOnMaxEpisodes(1000)
        vars(changed)["_on_step"] = lambda: True
        callbacks: dict[str, Any] = {
            "subclass": Nothing(),
            "method": changed,
            "function": lambda locals_, globals_: True,
            "child": EvalCallback(venv, callback_on_new_best=Nothing()),
            "grandchild": [EveryNTimesteps(8, CallbackList([Nothing()]))],
        }
        calls = []
        monkeypatch.setattr(collection, "writer_for", lambda *args: (calls.append(args), writer_for(*args))[1])
        model = make(venv)
        model.learn(16, callback=callbacks[kind])
        assert calls == []
        model.learn(16)
        assert len(calls) == 1

    @pytest.mark.parametrize("kind", ["function", "evaluations", "isolated evaluations", "list"])
    def test_with_callbacks_that_read_no_actions(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
    ) -> None:
        runs = []
        for usual in (True, False):
            callback = known_callbacks(environments("box", 1, normalizes=True), tmp_path / str(usual))[kind]
            model = make(environments("box", 1, normalizes=True))
            runs.append(trained(monkeypatch, model, usual=usual, callback=callback))
        for name, wanted in runs[0].items():
            np.testing.assert_array_equal(runs[1][name], wanted, err_msg=name)

    @pytest.mark.parametrize("actions", ["float64", "whole"])
    def test_not_for_boxes_of_other_numbers(self, actions: str) -> None:
        assert written_by(make(environments(actions, 1, normalizes=False))) is None

    def test_not_for_squashing_policies(self) -> None:
        venv = environments("box", 1, normalizes=False)
        assert written_by(make(venv, SquashedActorCriticPolicy)) is None

    def test_not_for_policies_of_other_actions(self) -> None:
        model = make(environments("box", 1, normalizes=False))
        model.policy = make(environments("matrix", 1, normalizes=False)).policy
        assert isinstance(model._current_engine(), NativeEngine)
        assert written_by(model) is None

    @pytest.mark.parametrize("engine", ["autograd", "fused"])
    def test_not_for_other_engines(self, engine: str) -> None:
        assert written_by(make(environments("box", 1, normalizes=False), engine=engine)) is None

    def test_not_for_buffers_of_the_users(self) -> None:
        model = make(environments("box", 1, normalizes=False), rollout_buffer_class=Own)
        assert isinstance(model._current_engine(), NativeEngine)
        assert written_by(model) is None

    def test_not_for_a_replaced_add(self) -> None:
        model = make(environments("box", 1, normalizes=False))
        assert written_by(model) is not None
        model.rollout_buffer.add = lambda *_, **__: None
        assert written_by(model) is None

    @pytest.mark.parametrize("name", ["values", "log_probs", "dist_params", "actions"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda array: array.astype(np.float64),
            np.asfortranarray,
            lambda array: array[:-1],
            lambda array: np.broadcast_to(array, array.shape),  # read-only
        ],
    )
    def test_not_for_arrays_that_kernels_cannot_write(self, name: str, change: Any) -> None:
        model = make(environments("box", 2, normalizes=False))
        model.rollout_buffer.reset()
        setattr(model.rollout_buffer, name, change(getattr(model.rollout_buffer, name)))
        assert writer_for(model._current_engine(), model.rollout_buffer, model.action_space) is None


@pytest.mark.parametrize(("step", "n_envs", "width"), [(4, 2, 3), (0, 1, 3), (0, 2, 4)])
def test_steps_that_do_not_fit_are_refused(step: int, n_envs: int, width: int) -> None:
    cells = (4, 2)
    target = Target(np.zeros(cells, np.float32), np.zeros(cells, np.float32), np.zeros((*cells, 3), np.float32))
    target.check(3, 2, 3)
    with pytest.raises(ValueError, match=r"must fit arrays of shape \(4, 2, 3\), got"):
        target.check(step, n_envs, width)
