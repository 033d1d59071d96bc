"""The coefficients of an update: None, returns without spread, and schedules that end with a call of learn()."""

import logging
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.coefficients import update_coefficients

N_STEPS = 16


class OneStep(gym.Env[np.ndarray, Any]):
    """Every episode is one step with the reward 100."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 100.0, True, False, {}


def make(**kwargs: Any) -> ClipPPO:
    return ClipPPO("MlpPolicy", DummyVecEnv([OneStep]), n_steps=N_STEPS, batch_size=8, n_epochs=2, seed=0, **kwargs)


@pytest.mark.parametrize("name", ["ent_coef", "vf_coef", "kl_coef"])
def test_none_is_refused_where_zero_switches_off(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be a number, a function of progress or a string, got None"):
        make(**{name: None})


def test_returns_without_spread_leave_the_critic_unclipped() -> None:
    """Their standard deviation is no unit: clipping at 0 would freeze the critic after the first minibatch."""
    model = make()
    model.learn(N_STEPS)
    assert np.ptp(model.rollout_buffer.returns) == 0
    assert update_coefficients(model).clip_range_vf is None
    model.rollout_buffer.returns[0] += 1.0
    assert update_coefficients(model).clip_range_vf == pytest.approx(np.std(model.rollout_buffer.returns))


@pytest.mark.parametrize("calls", [[{}], [{"total_timesteps": 64}, {"reset_num_timesteps": False}]])
def test_schedules_that_end_at_once_are_named(calls: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        for call in calls:
            model.learn(**{"total_timesteps": N_STEPS, **call})
    assert [record.message for record in caplog.records if "ends the schedules of clip_range" in record.message]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [({}, {"schedule_timesteps": 64}), ({"clip_range": 0.2}, {}), ({}, {"total_timesteps": 4 * N_STEPS})],
)
def test_no_warning_where_schedules_have_time(
    arguments: dict[str, Any], call: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        make(**arguments).learn(**{"total_timesteps": N_STEPS, **call})
    assert not [record for record in caplog.records if "ends the schedules" in record.message]
