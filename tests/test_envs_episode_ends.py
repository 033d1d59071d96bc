"""``EpisodeEnds``: episodes that wrappers outside of ``Monitor`` end are reported, and nothing else changes."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_clipvf.checkpoint import ResumableEnv
from sb3_clipvf.checkpoint.vec_env_state import describe_vec_env, restore_vec_env, vec_env_state
from sb3_clipvf.envs import FastDummyVecEnv, as_vec_env
from sb3_clipvf.envs.episode_ends import EpisodeEnds, UnreportedEnd, unreported_end


class Walk(gym.Env[Any, Any]):
    """Reward 1 a step; ends after seven steps, with one of two lives lost after three. Observes a random number."""

    observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self._observation(), 1.0, self.count >= 7, False, {"is_success": True}

    def _observation(self) -> np.ndarray:
        return np.array([self.np_random.random()], np.float32)

    # EpisodicLifeEnv calls it.
    @property
    def ale(self) -> Any:
        return self

    def lives(self) -> int:
        return 2 if self.count < 3 else 1


class Scaled(gym.RewardWrapper[Any, Any]):
    """A wrapper that changes the rewards."""

    def reward(self, reward: Any) -> Any:
        return 10.0 * reward


class Stepping(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that steps in each reset."""

    def reset(self, **kwargs: Any) -> Any:
        self.env.reset(**kwargs)
        return self.env.step(0)[0], {}


class OwnInfo(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that replaces the info, so that ``Monitor``'s report is lost."""

    def step(self, action: Any) -> Any:
        return (*self.env.step(action)[:4], {})


def episodes(venv: VecEnv, n_steps: int) -> list[tuple[int, float, int]]:
    """Return step, return and length of each reported episode."""
    venv.seed(3)
    venv.reset()
    found = []
    for step in range(1, n_steps + 1):
        _, _, _, infos = venv.step(np.zeros(1, np.int64))
        if "episode" in infos[0]:
            found.append((step, float(infos[0]["episode"]["r"]), int(infos[0]["episode"]["l"])))
    venv.close()
    return found


def limited(limit: int) -> gym.Env[Any, Any]:
    return EpisodeEnds(Scaled(TimeLimit(Monitor(Walk(), info_keywords=("is_success",)), limit)))


def _gymnasium(env: gym.Env[Any, Any]) -> VecEnv:
    return as_vec_env(SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP))


@pytest.mark.parametrize("make", [lambda env: DummyVecEnv([lambda: env]), lambda env: FastDummyVecEnv([lambda: env])])
@pytest.mark.parametrize(
    ("limit", "expected"),
    # Rewards are those of Monitor, before they are scaled; an episode's own end comes first where it is earlier.
    [
        (5, [(5, 5.0, 5), (10, 5.0, 5), (15, 5.0, 5)]),
        (7, [(7, 7.0, 7), (14, 7.0, 7)]),
        (9, [(7, 7.0, 7), (14, 7.0, 7)]),
    ],
)
def test_episodes_of_an_outer_time_limit_are_reported(
    make: Any, limit: int, expected: list[tuple[int, float, int]]
) -> None:
    assert episodes(make(limited(limit)), 16) == expected


def test_gymnasiums_vector_environments_report_them() -> None:
    assert episodes(_gymnasium(limited(5)), 11) == [(5, 5.0, 5), (10, 5.0, 5)]


@pytest.mark.parametrize("outer", [lambda env: env, ResumableEnv])
def test_steps_and_random_numbers_are_those_without_it(outer: Any) -> None:
    seen = []
    for wrapped in (lambda env: env, lambda env: outer(EpisodeEnds(env))):
        venv = FastDummyVecEnv([lambda wrapped=wrapped: wrapped(TimeLimit(Monitor(Walk()), 5))])  # type: ignore[misc]
        venv.seed(3)
        rows = [venv.reset()[0, 0]]
        for _ in range(12):
            obs, rewards, dones, infos = venv.step(np.zeros(1, np.int64))
            rows += [obs[0, 0], rewards[0], dones[0], infos[0]["TimeLimit.truncated"]]
            rows.append(infos[0].get("terminal_observation", [None])[0])
        venv.seed(4)  # a reset with a seed begins a game of its own
        rows.append(venv.reset()[0, 0])
        seen.append(rows)
    assert seen[0] == seen[1]


def test_the_file_of_episodes_has_them(tmp_path: Path) -> None:
    env = EpisodeEnds(TimeLimit(Monitor(Walk(), str(tmp_path / "0"), info_keywords=("is_success",)), 5))
    episodes(FastDummyVecEnv([lambda: env]), 11)
    rows = [row.split(",") for row in (tmp_path / "0.monitor.csv").read_text().splitlines()[2:]]
    assert [(row[0], row[1], row[3]) for row in rows] == [("5.0", "5", "True")] * 2


@pytest.mark.parametrize("limit", [100, 5])
def test_the_loss_of_a_life_does_not_end_an_episode(limit: int) -> None:
    # A time limit outside of lives ends no game either: the next step continues the same one.
    env = EpisodeEnds(TimeLimit(EpisodicLifeEnv(Monitor(Walk())), limit))
    found = episodes(FastDummyVecEnv([lambda: env]), 30)
    assert found
    assert {(episode_return, length) for _, episode_return, length in found} == {(7.0, 7)}


def test_an_end_whose_info_was_lost_is_reported() -> None:
    assert episodes(FastDummyVecEnv([lambda: EpisodeEnds(OwnInfo(Monitor(Walk())))]), 15) == [(7, 7.0, 7), (14, 7.0, 7)]


@pytest.mark.parametrize(
    "env", [lambda: TimeLimit(Walk(), 5), lambda: RecordEpisodeStatistics(TimeLimit(Monitor(Walk()), 5))]
)
def test_unmonitored_and_reported_episodes_are_unchanged(env: Any) -> None:
    assert episodes(FastDummyVecEnv([lambda: EpisodeEnds(env())]), 11) == episodes(FastDummyVecEnv([env]), 11)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (lambda: TimeLimit(Monitor(Walk()), 5), UnreportedEnd.LOST),
        (lambda: Stepping(TimeLimit(Monitor(Walk()), 5)), UnreportedEnd.LOST),
        (lambda: TimeLimit(EpisodicLifeEnv(Monitor(Walk())), 5), UnreportedEnd.RUNNING),
        (lambda: TimeLimit(Walk(), 5), UnreportedEnd.UNKNOWN),
    ],
)
@pytest.mark.parametrize("wrap", [lambda venv: venv, VecNormalize])
def test_unreported_ends_differ_from_lost_lives(wrap: Any, env: Any, expected: UnreportedEnd) -> None:
    venv = wrap(FastDummyVecEnv([Walk, env]))
    venv.reset()
    length = 0
    done = False
    while not done:
        done = venv.step(np.zeros(2, np.int64))[2][1]
        length += 1
    assert unreported_end(venv, 1, length) is expected


class OwnRewards(Walk):
    rewards: tuple[float, ...] = ()


@pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda env: TimeLimit(RecordEpisodeStatistics(env), 5), UnreportedEnd.LOST),
        (lambda env: TimeLimit(EpisodicLifeEnv(RecordEpisodeStatistics(env)), 5), UnreportedEnd.RUNNING),
        (lambda env: TimeLimit(Monitor(env), 5), UnreportedEnd.LOST),
    ],
    ids=["lost", "running", "monitor"],
)
def test_unreported_ends_of_gymnasiums_statistics(cls: Any, mode: AutoresetMode, wrap: Any, expected: Any) -> None:
    venv = as_vec_env(cls([lambda: wrap(OwnRewards())], autoreset_mode=mode))
    venv.reset()
    done, length, info = False, 0, {}
    while not done:
        _, _, (done,), (info,) = venv.step(np.zeros(1, np.int64))
        length += 1
    assert "episode" not in info
    assert unreported_end(venv, 0, length) is expected
    venv.close()


def test_the_state_in_unreadable_environments_is_unknown() -> None:
    venv = as_vec_env(gym.make_vec("CartPole-v1", 2))
    venv.reset()
    assert unreported_end(venv, 0) is UnreportedEnd.UNKNOWN


def test_checkpoints_are_exact_with_it() -> None:
    venvs = [
        FastDummyVecEnv([lambda: gym.make("CartPole-v1")]),
        FastDummyVecEnv([lambda: EpisodeEnds(gym.make("CartPole-v1"))]),
    ]
    for venv in venvs:
        venv.reset()
    state, unknown = vec_env_state(venvs[0])
    assert unknown == vec_env_state(venvs[1])[1] == []
    assert describe_vec_env(venvs[0]) == describe_vec_env(venvs[1])
    restore_vec_env(venvs[1], state)
    actions = np.zeros(1, np.int64)
    assert venvs[0].step(actions)[0].tolist() == venvs[1].step(actions)[0].tolist()
