"""Trainings in SB3's own DummyVecEnv and VecNormalize: the same numbers at less cost; replaced methods are called."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.envs import dummy, normalize


class OwnDummy(DummyVecEnv):
    """Not recognised, since it might override anything."""


class OwnNormalize(VecNormalize):
    """Not recognised, either."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the calls of this package's code."""
    counts = {"dummy": 0, "normalize": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(dummy, "step_envs", counted("dummy", dummy.step_envs))
    monkeypatch.setattr(normalize, "normalized", counted("normalize", normalize.normalized))
    return counts


def make(cls: type[DummyVecEnv] = DummyVecEnv, wrapper: type[VecNormalize] | None = VecNormalize, **kwargs: Any) -> Any:
    """9 environments, since NumPy adds 8 or more numbers pairwise; episodes end within the rollouts."""
    venv = make_vec_env("Pendulum-v1", 9, seed=0, vec_env_cls=cls, env_kwargs={"max_episode_steps": 7})
    return venv if wrapper is None else wrapper(venv, gamma=0.9, **kwargs)


def trained(venv: Any, callback: Any = None, **kwargs: Any) -> ClipPPO:
    model = ClipPPO("MlpPolicy", venv, n_steps=32, batch_size=96, n_epochs=2, seed=0, device="cpu", **kwargs)
    return model.learn(3 * 9 * 32, callback=callback)


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("kwargs", [{}, {"training": False}, {"norm_obs": False}, {"norm_reward": False}], ids=str)
def test_same_numbers_as_sb3s_code(engine: str, kwargs: dict[str, Any], calls: dict[str, int]) -> None:
    theirs, ours = make(OwnDummy, OwnNormalize, **kwargs), make(**kwargs)
    wanted = trained(theirs, engine=engine)
    assert calls == {"dummy": 0, "normalize": 0}
    got = trained(ours, engine=engine)
    assert calls == {"dummy": 96, "normalize": 96}
    for name, tensor in got.policy.state_dict().items():
        assert th.equal(tensor, wanted.policy.state_dict()[name])
    for name in ("obs_rms", "ret_rms"):
        if hasattr(theirs, name):
            np.testing.assert_equal(vars(getattr(ours, name)), vars(getattr(theirs, name)))
    np.testing.assert_array_equal(ours.returns, theirs.returns)
    np.testing.assert_array_equal(ours.get_original_obs(), theirs.get_original_obs())
    np.testing.assert_array_equal(ours.get_original_reward(), theirs.get_original_reward())
    assert [info["r"] for info in got.ep_info_buffer] == [info["r"] for info in wanted.ep_info_buffer]


def test_a_rollout_on_the_device_steps_them_too(calls: dict[str, int]) -> None:
    trained(make(), engine="autograd", rollout_buffer_class=DeviceRolloutBuffer)
    assert calls == {"dummy": 96, "normalize": 96}


def test_below_other_wrappers(calls: dict[str, int]) -> None:
    trained(VecFrameStack(make(wrapper=None), 2))
    trained(VecFrameStack(make(), 2))
    assert calls == {"dummy": 2 * 96, "normalize": 0}


def count(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace a method by one that calls it, and return a list that grows with each call."""
    original, n_calls = getattr(owner, name), []

    def own(*args: Any) -> Any:
        n_calls.append(1)
        return original(*args)

    monkeypatch.setattr(owner, name, own)
    return n_calls


class TestCodeOfTheUser:
    @pytest.mark.parametrize(
        ("owner", "name", "ours"),
        [
            (DummyVecEnv, "step_wait", {"dummy": 0, "normalize": 96}),
            (DummyVecEnv, "_obs_from_buf", {"dummy": 0, "normalize": 96}),
            (VecNormalize, "step_wait", {"dummy": 96, "normalize": 0}),
            (VecNormalize, "_normalize_obs", {"dummy": 96, "normalize": 0}),
            (RunningMeanStd, "update", {"dummy": 96, "normalize": 96}),
        ],
    )
    def test_methods_replaced_in_an_object_run(
        self, owner: type[Any], name: str, ours: dict[str, int], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        venv = make()
        target = {DummyVecEnv: venv.venv, VecNormalize: venv, RunningMeanStd: venv.obs_rms}[owner]
        n_calls = count(target, name, monkeypatch)
        trained(venv)
        assert len(n_calls) >= 96
        assert calls == ours

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (DummyVecEnv, "step_wait"),
            (DummyVecEnv, "_obs_from_buf"),
            (VecNormalize, "step_wait"),
            (VecNormalize, "_normalize_obs"),
            (RunningMeanStd, "update"),
        ],
    )
    def test_methods_replaced_in_a_class_run(
        self, owner: type[Any], name: str, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        n_calls = count(owner, name, monkeypatch)
        trained(make())
        assert len(n_calls) >= 96
        assert calls == {"dummy": 0, "normalize": 0}

    def test_a_method_added_to_a_class_runs(self, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        n_calls = count(DummyVecEnv, "step", monkeypatch)
        trained(make(wrapper=None))
        assert len(n_calls) == 96
        assert calls["dummy"] == 0


def test_objects_and_files_stay_sb3s(tmp_path: Path) -> None:
    class Look(BaseCallback):
        def _on_step(self) -> bool:
            venv = self.training_env
            assert type(venv) is VecNormalize
            assert "step_wait" not in vars(venv)
            if self.n_calls == 40:
                np.testing.assert_array_equal(venv.normalize_obs(venv.get_original_obs()), self.locals["new_obs"])
                self.copied = copy.deepcopy(venv.venv)
            return True

    look, venv = Look(), make()
    trained(venv, [look, CheckpointCallback(32, str(tmp_path), save_vecnormalize=True)])
    assert "step_wait" not in vars(venv.venv)
    look.copied.reset()
    assert look.copied.step(np.zeros((9, 1)))[0].shape == (9, 3)
    for path in tmp_path.glob("*vecnormalize*.pkl"):
        loaded = VecNormalize.load(str(path), make(wrapper=None))
        assert type(loaded) is VecNormalize
        assert "step_wait" not in vars(loaded)
