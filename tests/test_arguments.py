"""ClipPPO's arguments as coefficients of an update: returns without spread, and warnings about schedules."""

import logging
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as HostLinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_clipvf import ClipPPO

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
    arguments = {"n_steps": N_STEPS, "batch_size": 8, "n_epochs": 2, "seed": 0}
    arguments |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
    return ClipPPO("MlpPolicy", DummyVecEnv([OneStep]), **{**arguments, **kwargs})


def test_returns_without_spread_leave_the_critic_unclipped() -> None:
    """A standard deviation of 0 is not a unit: clipping at 0 would freeze the critic after the first minibatch."""
    model = make()
    model.learn(N_STEPS)
    assert np.ptp(model.rollout_buffer.returns) == 0
    assert model._update_coefficients().clip_range_vf is None
    model.rollout_buffer.returns[0] += 1.0
    assert model._update_coefficients().clip_range_vf == pytest.approx(np.std(model.rollout_buffer.returns))


def warnings_of(caplog: pytest.LogCaptureFixture, model: ClipPPO, *calls: dict[str, Any]) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        for call in calls:
            model.learn(**{"total_timesteps": N_STEPS, **call})
    return [record.getMessage() for record in caplog.records if "schedules end with each call" in record.getMessage()]


ONE_ROLLOUT = "learn() collects one rollout: {} in its only update. As in SB3, schedules end with each call. "
HINT = (
    "If you train in several calls, pass schedule_timesteps=<all steps> to the first one and "
    "reset_num_timesteps=False to the others. Or use constant values: {}."
)


@pytest.mark.parametrize(
    ("arguments", "values", "constants"),
    [
        ({}, "`clip_range` is 0", "clip_range=0.2"),
        (
            {"clip_range": "exp_0.3", "learning_rate": "cos_0.001", "ent_coef": HostLinearSchedule(0.02, 0.01, 1.0)},
            "`learning_rate` is 0 and `clip_range` is 0.003 and `ent_coef` is 0.01",
            "learning_rate=0.001, clip_range=0.3, ent_coef=0.02",
        ),
    ],
)
def test_a_call_of_one_rollout_names_the_values_of_its_only_update(
    arguments: dict[str, Any], values: str, constants: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = warnings_of(caplog, make(**arguments), {}, {})
    assert found == [ONE_ROLLOUT.format(values) + HINT.format(constants)]


def test_a_call_that_continues_names_the_values_of_its_first_and_last_update(caplog: pytest.LogCaptureFixture) -> None:
    calls = [{"total_timesteps": 3 * N_STEPS}, {"total_timesteps": 2 * N_STEPS, "reset_num_timesteps": False}]
    found = warnings_of(caplog, make(clip_range_vf="lin_2"), *calls)
    values = "`clip_range` is 0.04 in its first update and 0 in its last, `clip_range_vf` is 0.4"
    assert [message for message in found if values in message]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ({}, {"schedule_timesteps": 64}),
        ({"clip_range": 0.2}, {}),
        ({"clip_range": FloatSchedule(0.2), "ent_coef": "const_0.1"}, {}),
        ({}, {"total_timesteps": 4 * N_STEPS}),
        ({}, {"total_timesteps": 0}),
    ],
)
def test_no_warning_if_schedules_run_from_their_start(
    arguments: dict[str, Any], call: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert not warnings_of(caplog, make(**arguments), call)


def test_no_warning_for_a_long_call_that_continues(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    model.learn(N_STEPS, schedule_timesteps=1000)
    model._schedule_timesteps = None
    assert not warnings_of(caplog, model, {"total_timesteps": 7 * N_STEPS, "reset_num_timesteps": False})
