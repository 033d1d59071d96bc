"""The adapters to SB3's VecEnv over gymnasium's classes: scripted traces in every mode, parity with DummyVecEnv."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import ClipReward as ClipRewardOfOne
from gymnasium.wrappers import RecordEpisodeStatistics as RecordStatisticsOfOne
from gymnasium.wrappers.vector import ClipReward, DictInfoToList, NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import as_vec_env

MODES = list(AutoresetMode)
mode_cases = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)

SCRIPTS = (
    ((2, "terminated"), (3, "truncated"), (1, "both")),
    ((4, "truncated"), (1, "terminated")),
    ((3, "both"), (2, "terminated")),
)
"""For each environment the length and end of each of its episodes; the last one repeats."""


class Scripted(gym.Env[Any, Any]):
    """Observes (own number, episode, step), rewards 10 * episode + step + 0.25, and puts both into its infos."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    action_space = spaces.Discrete(2)

    def __init__(self, number: int, as_dict: bool = False, render_mode: str | None = None) -> None:
        self.number, self.as_dict, self.render_mode = number, as_dict, render_mode
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = spaces.Dict({"a": box, "b": spaces.Discrete(100)}) if as_dict else box
        self.episode, self.step_number, self.colour, self.last_options = -1, 0, 7, None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_number, self.last_options = self.episode + 1, 0, options
        return self._obs(), {"began": self.episode}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        script = SCRIPTS[self.number]
        length, end = script[min(self.episode, len(script) - 1)]
        self.step_number += 1
        ended = self.step_number == length
        info = {"at": self.step_number, "vector": np.array([self.step_number, int(action)])}
        reward = 10 * self.episode + self.step_number + 0.25
        return self._obs(), reward, ended and end != "truncated", ended and end != "terminated", info

    def _obs(self) -> Any:
        box = np.array([self.number, self.episode, self.step_number], np.float32)
        return {"a": box, "b": self.step_number} if self.as_dict else box

    def render(self) -> Any:
        return np.full((2, 2, 3), self.number, np.uint8)

    def double(self, value: int) -> int:
        return 2 * value + self.number

    def advance(self) -> int:
        self.colour += 1
        return self.colour

    def named(self, name: str) -> str:
        return f"{name} {self.number}"


class Unsendable(Scripted):
    """Has an attribute that cannot be pickled."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.shaping: Any = lambda: 1

    def shaped(self) -> int:
        return self.shaping() if callable(self.shaping) else self.shaping


class OwnReturns(Scripted):
    """Has attributes of its own under names that statistics wrappers use, too."""

    episode_returns = rewards = return_queue = ()


class ScriptedBatch(VectorEnv[Any, Any, Any]):
    """The same as one natively vectorised class, in NEXT_STEP mode; it honours a reset mask or not."""

    def __init__(self, mode: AutoresetMode = AutoresetMode.NEXT_STEP, masks: bool = True) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.inner = SyncVectorEnv([lambda i=i: Scripted(i) for i in range(3)], autoreset_mode=mode)
        self.masks = masks
        self.num_envs = 3
        self.single_observation_space = self.inner.single_observation_space
        self.observation_space = batch_space(self.single_observation_space, 3)
        self.single_action_space = self.inner.single_action_space
        self.action_space = batch_space(self.single_action_space, 3)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.inner.reset(seed=seed, options=options if self.masks else None)

    def step(self, actions: Any) -> Any:
        return self.inner.step(actions)


class DoubleBatch(ScriptedBatch):
    """The same with float64 observations, where the space has float32."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        obs, infos = super().reset(seed=seed, options=options)
        return obs.astype(np.float64) * (1 + 1e-12), infos

    def step(self, actions: Any) -> Any:
        obs, *rest = super().step(actions)
        return (obs.astype(np.float64) * (1 + 1e-12), *rest)


def scripted(mode: AutoresetMode, cls: Any = SyncVectorEnv, as_dict: bool = False, **kwargs: Any) -> Any:
    return cls([lambda i=i: Scripted(i, as_dict) for i in range(3)], autoreset_mode=mode, **kwargs)


def adapted(request: pytest.FixtureRequest, env: Any, **kwargs: Any) -> Any:
    venv = as_vec_env(env, **kwargs)
    request.addfinalizer(venv.close)
    return venv


def assert_same(first: Any, second: Any) -> None:
    """Check equal values, dtypes of arrays and keys, except times of episodes."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            if not (key == "t" and "l" in first):
                assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(first, second)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype


def assert_same_stream(venv: VecEnv, reference: VecEnv, n_steps: int) -> None:
    rng = np.random.default_rng(0)
    assert_same(venv.reset(), reference.reset())
    assert_same(venv.reset_infos, reference.reset_infos)
    n_ends = 0
    for _ in range(n_steps):
        actions = rng.integers(2, size=venv.num_envs)
        got, expected = venv.step(actions), reference.step(actions)
        assert_same(got, expected)
        assert_same(venv.reset_infos, reference.reset_infos)
        n_ends += int(got[2].sum())
    assert n_ends > 5


class Informed(Scripted):
    """Has infos with keys that are not strings, and with a list that later steps append to."""

    def reset(self, **kwargs: Any) -> Any:
        self.trace: list[int] = []
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        self.trace.append(self.step_number)
        return *rest, {**info, 3: self.number, "agents": {0: 1.5, (1, "x"): 2.5}, "trace": self.trace}


class TestInfos:
    @mode_cases
    def test_keys_of_any_type_and_objects(self, request: pytest.FixtureRequest, mode: AutoresetMode) -> None:
        venv = adapted(request, SyncVectorEnv([lambda i=i: Informed(i) for i in range(3)], autoreset_mode=mode))
        reference = DummyVecEnv([lambda i=i: Monitor(Informed(i)) for i in range(3)])
        streams = []
        for env in (venv, reference):
            env.reset()
            # Compared after the last step: environments must not change infos of earlier ones.
            streams.append([(env.step(np.zeros(3, np.int64))[3], list(env.reset_infos)) for _ in range(9)])
        assert_same(*streams)


class TestScripted:
    @mode_cases
    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_trace(self, request: pytest.FixtureRequest, mode: AutoresetMode, cls: Any) -> None:
        venv = adapted(request, scripted(mode, cls))
        trace = [venv.reset().tolist()]
        ends = []
        for _ in range(4):
            obs, rewards, dones, infos = venv.step(np.zeros(3, np.int64))
            trace.append([obs.tolist(), rewards.tolist(), dones.tolist()])
            ends.append(
                {
                    i: (info["terminal_observation"].tolist(), info["TimeLimit.truncated"], info["episode"]["r"])
                    for i, info in enumerate(infos)
                    if "terminal_observation" in info
                }
            )
        # Written out from SCRIPTS: a row that ends has the reward of the last step and the next first observation.
        assert trace == [
            [[0, 0, 0], [1, 0, 0], [2, 0, 0]],
            [[[0, 0, 1], [1, 0, 1], [2, 0, 1]], [1.25, 1.25, 1.25], [False, False, False]],
            [[[0, 1, 0], [1, 0, 2], [2, 0, 2]], [2.25, 2.25, 2.25], [True, False, False]],
            [[[0, 1, 1], [1, 0, 3], [2, 1, 0]], [11.25, 3.25, 3.25], [False, False, True]],
            [[[0, 1, 2], [1, 1, 0], [2, 1, 1]], [12.25, 4.25, 11.25], [False, True, False]],
        ]
        assert ends == [
            {},
            {0: ([0, 0, 2], False, 3.5)},
            {2: ([2, 0, 3], False, 6.75)},
            {1: ([1, 0, 4], True, 11.0)},
        ]

    @mode_cases
    @pytest.mark.parametrize("as_dict", [False, True], ids=["box", "dict"])
    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_stream_is_dummy_vec_envs(
        self, request: pytest.FixtureRequest, mode: AutoresetMode, as_dict: bool, cls: Any
    ) -> None:
        venv = adapted(request, scripted(mode, cls, as_dict))
        assert_same_stream(venv, DummyVecEnv([lambda i=i: Monitor(Scripted(i, as_dict)) for i in range(3)]), 30)

    @mode_cases
    def test_a_native_class(self, request: pytest.FixtureRequest, mode: AutoresetMode) -> None:
        venv = adapted(request, ScriptedBatch(mode))
        assert_same_stream(venv, DummyVecEnv([lambda i=i: Monitor(Scripted(i)) for i in range(3)]), 30)

    def test_a_native_class_that_resets_all_rows_is_refused(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, ScriptedBatch(masks=False))
        venv.reset()
        venv.step(np.zeros(3, np.int64))
        with pytest.raises(ValueError, match="must reset only the rows of .*ScriptedBatch that changes others too"):
            venv.step(np.zeros(3, np.int64))

    def test_a_native_class_may_return_another_dtype_than_its_space(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, DoubleBatch())
        assert_same_stream(venv, DummyVecEnv([lambda i=i: Monitor(Scripted(i)) for i in range(3)]), 30)

    @mode_cases
    def test_returned_arrays_do_not_change(self, request: pytest.FixtureRequest, mode: AutoresetMode) -> None:
        # copy=False: gymnasium writes each observation into the same memory.
        venv = adapted(request, scripted(mode, copy=False))
        given = [venv.reset()]
        terminal = []
        for _ in range(6):
            obs, _, _, infos = venv.step(np.zeros(3, np.int64))
            given.append(obs)
            terminal += [info["terminal_observation"] for info in infos if "terminal_observation" in info]
        assert [obs[0].tolist() for obs in given[:4]] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
        assert [obs.tolist() for obs in terminal[:3]] == [[0, 0, 2], [2, 0, 3], [1, 0, 4]]

    @mode_cases
    def test_reset_in_the_middle_begins_all_episodes_again(
        self, request: pytest.FixtureRequest, mode: AutoresetMode
    ) -> None:
        venv = adapted(request, scripted(mode))
        venv.reset()
        venv.step(np.zeros(3, np.int64))
        assert venv.reset()[:, 2].tolist() == [0, 0, 0]
        venv.step(np.zeros(3, np.int64))
        venv.step(np.zeros(3, np.int64))
        # Environment 0 is in its second episode, of length 3.
        _, _, dones, infos = venv.step(np.zeros(3, np.int64))
        assert dones[0]
        assert (infos[0]["episode"]["l"], infos[0]["episode"]["r"]) == (3, 11.25 + 12.25 + 13.25)


class TestCartPole:
    @mode_cases
    @pytest.mark.parametrize("max_episode_steps", [15, 500])
    def test_stream_is_dummy_vec_envs(
        self, request: pytest.FixtureRequest, mode: AutoresetMode, max_episode_steps: int
    ) -> None:
        def make() -> gym.Env[Any, Any]:
            return gym.make("CartPole-v1", max_episode_steps=max_episode_steps)

        venv = adapted(request, SyncVectorEnv([make] * 4, autoreset_mode=mode))
        reference = DummyVecEnv([lambda: Monitor(make())] * 4)
        venv.seed(7)
        reference.seed(7)
        assert_same_stream(venv, reference, 120)

    def test_native_class_steps_as_dummy_vec_env_from_the_same_states(self, request: pytest.FixtureRequest) -> None:
        # It has one random stream for all rows, so only the first states of episodes differ.
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=6, max_episode_steps=18))
        reference = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1", max_episode_steps=18))] * 6)
        venv.seed(3)
        obs = venv.reset()
        reference.reset()

        def copy_states(rows: Any) -> None:
            for row in rows:
                reference.envs[row].unwrapped.state = tuple(venv.env.state[:, row])

        rng = np.random.default_rng(1)
        copy_states(range(6))
        truncated = 0
        for _ in range(150):
            actions = rng.integers(2, size=6)
            obs, rewards, dones, infos = venv.step(actions)
            expected_obs, expected_rewards, expected_dones, expected_infos = reference.step(actions)
            np.testing.assert_array_equal(rewards, expected_rewards)
            np.testing.assert_array_equal(dones, expected_dones)
            # numpy's cos and sin against the math module's: the last bit of float64, then rounded to float32.
            np.testing.assert_allclose(obs[~dones], expected_obs[~dones], rtol=1e-6, atol=1e-7)
            for row in range(6):
                assert infos[row].keys() == expected_infos[row].keys()
                assert infos[row]["TimeLimit.truncated"] == expected_infos[row]["TimeLimit.truncated"]
                truncated += infos[row]["TimeLimit.truncated"]
            for row in np.flatnonzero(dones):
                final, expected = infos[row]["terminal_observation"], expected_infos[row]["terminal_observation"]
                np.testing.assert_allclose(final, expected, rtol=1e-6, atol=1e-7)
                assert_same(infos[row]["episode"], expected_infos[row]["episode"])
                assert np.abs(obs[row]).max() <= 0.05
            copy_states(np.flatnonzero(dones))
        assert truncated > 2

    def test_native_class_draws_the_states_its_own_reset_would(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=5))
        native = gym.make_vec("CartPole-v1", num_envs=5)
        venv.seed(11)
        np.testing.assert_array_equal(venv.reset(), native.reset(seed=11)[0])
        actions = np.ones(5, np.int64)
        for _ in range(30):
            obs, _, dones, _ = venv.step(actions)
            _, _, terminated, _, _ = native.step(actions)
            np.testing.assert_array_equal(dones, terminated)
            if dones.any():
                break
        np.testing.assert_array_equal(obs[dones], native.step(actions)[0][dones])

    def test_trains(self, request: pytest.FixtureRequest) -> None:
        venv = VecNormalize(adapted(request, gym.make_vec("CartPole-v1", num_envs=8)))
        model = ClipPPO("MlpPolicy", venv, n_steps=16, batch_size=64, n_epochs=1, seed=1, device="cpu")
        model.learn(512)
        assert model.num_timesteps == 512
        # Random actions hold the pole for some 20 steps.
        assert 5 < np.mean([episode["l"] for episode in model.ep_info_buffer]) < 60
        mean, _ = evaluate_policy(model, venv, n_eval_episodes=3)
        assert np.isfinite(mean)


class TestStatistics:
    @mode_cases
    def test_true_returns_where_rewards_are_clipped(self, request: pytest.FixtureRequest, mode: AutoresetMode) -> None:
        venv = adapted(request, scripted(mode), clip_rewards=True)
        venv.reset()
        for _ in range(2):
            _, rewards, _, infos = venv.step(np.zeros(3, np.int64))
            assert rewards.tolist() == [1.0, 1.0, 1.0]
        assert infos[0]["episode"]["r"] == 3.5

    @mode_cases
    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    @pytest.mark.parametrize("wrapper", [Monitor, RecordStatisticsOfOne])
    def test_statistics_of_inner_wrappers_are_kept(
        self, request: pytest.FixtureRequest, mode: AutoresetMode, cls: Any, wrapper: Any
    ) -> None:
        def make(i: int) -> Any:
            return ClipRewardOfOne(wrapper(Scripted(i)), 0.0, 1.0)

        venv = adapted(request, cls([lambda i=i: make(i) for i in range(3)], autoreset_mode=mode))
        assert_same_stream(venv, DummyVecEnv([lambda i=i: make(i) for i in range(3)]), 20)

    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    @pytest.mark.parametrize(
        "make",
        [lambda: OwnReturns(0), lambda: RecordStatisticsOfOne(Scripted(0), stats_key="stats")],
        ids=["attribute", "other key"],
    )
    def test_an_attribute_of_environments_does_not_turn_them_off(
        self, request: pytest.FixtureRequest, make: Any, cls: Any
    ) -> None:
        venv = adapted(request, cls([make]))
        venv.reset()
        venv.step(np.zeros(1, np.int64))
        _, _, dones, infos = venv.step(np.zeros(1, np.int64))
        assert dones[0]
        assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (3.5, 2)

    def test_statistics_of_gymnasium_are_kept(self, request: pytest.FixtureRequest) -> None:
        env = ClipReward(RecordEpisodeStatistics(scripted(AutoresetMode.SAME_STEP)), 0.0, 1.0)
        venv = adapted(request, env)
        venv.reset()
        venv.step(np.zeros(3, np.int64))
        _, rewards, _, infos = venv.step(np.zeros(3, np.int64))
        assert rewards[0] == 1.0
        assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (3.5, 2)

    def test_file_of_episodes(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP), monitor_path=tmp_path / "training")
        venv.reset()
        for _ in range(4):
            venv.step(np.zeros(3, np.int64))
        venv.close()
        results = load_results(str(tmp_path))
        rows = results[["r", "l", "total_timesteps"]].to_numpy().tolist()
        assert rows == [[3.5, 2, 6], [6.75, 3, 9], [11.0, 4, 12]]
        assert (tmp_path / "training.monitor.csv").is_file()

    def test_evaluate_policy_uses_them(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP), clip_rewards=True)
        model = ClipPPO("MlpPolicy", venv, n_steps=8, batch_size=24, device="cpu")
        returns, lengths = evaluate_policy(model, venv, n_eval_episodes=3, return_episode_rewards=True, warn=True)
        # One episode of each environment, in the order of their ends.
        assert (returns, lengths) == ([3.5, 6.75, 11.0], [2, 3, 4])


class TestSeeds:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: gym.make_vec("CartPole-v1", num_envs=3),
            lambda: gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync"),
        ],
        ids=["native", "sync"],
    )
    def test_a_seed_applies_to_the_next_reset(self, request: pytest.FixtureRequest, make: Callable[[], Any]) -> None:
        venv = adapted(request, make())
        assert venv.seed(5) == [5, 6, 7]
        first = venv.reset()
        assert not np.array_equal(venv.reset(), first)
        venv.seed(5)
        np.testing.assert_array_equal(venv.reset(), first)
        venv.seed(6)
        assert not np.array_equal(venv.reset(), first)

    def test_one_seed_per_environment(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync"))
        venv.seed(5)
        for row, obs in enumerate(venv.reset()):
            np.testing.assert_array_equal(obs, gym.make("CartPole-v1").reset(seed=5 + row)[0])

    def test_options_reach_the_next_reset_only(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP))
        venv.set_options({"wind": 2})
        venv.reset()
        assert venv.get_attr("last_options") == [{"wind": 2}] * 3
        venv.reset()
        assert venv.get_attr("last_options") == [None] * 3

    def test_options_may_hold_arrays(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP))
        options = [{"goal": np.arange(2), "more": [np.ones(1), {"name": "x"}]} for _ in range(3)]
        venv.set_options(options)
        venv.reset()
        assert_same(venv.get_attr("last_options"), options)
        for other in (np.arange(3), np.ones(2), None):
            venv.set_options([*options[:2], {**options[2], "goal": other}])
            with pytest.raises(ValueError, match="`options` must be the same for all environments"):
                venv.reset()

    def test_different_options_are_refused(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP))
        venv.set_options([{"wind": 1}, {"wind": 2}, {"wind": 1}])
        with pytest.raises(ValueError, match="`options` must be the same for all environments"):
            venv.reset()


class TestAttributes:
    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_of_separate_environments(self, request: pytest.FixtureRequest, cls: Any) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP, cls))
        assert venv.get_attr("number") == [0, 1, 2]
        assert venv.get_attr("number", [2, 0]) == [2, 0]
        venv.set_attr("colour", 9, 1)
        assert venv.get_attr("colour") == [7, 9, 7]
        venv.set_attr("colour", [1, 2])
        assert venv.get_attr("colour", 0) == [[1, 2]]
        assert venv.env_method("double", 5) == [10, 11, 12]
        assert venv.has_attr("colour") and not venv.has_attr("colours")
        # The failed reads did no harm.
        venv.reset()
        assert venv.get_attr("episode") == [0, 0, 0]

    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_reading_calls_nothing(self, request: pytest.FixtureRequest, cls: Any) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP, cls))
        assert venv.has_attr("advance") and venv.has_attr("double") and venv.has_attr("step")
        assert [method.__name__ for method in venv.get_attr("advance", [1])] == ["advance"]
        assert venv.get_attr("colour") == [7, 7, 7]
        venv.reset()
        venv.step(np.zeros(3, np.int64))

    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_setting_some_leaves_the_others(self, request: pytest.FixtureRequest, cls: Any) -> None:
        venv = adapted(request, cls([lambda i=i: Unsendable(i) for i in range(3)]))
        venv.set_attr("shaping", 3, indices=-1)
        venv.set_attr("of_one", 5, indices=[0])
        assert venv.env_method("shaped") == [1, 1, 3]
        assert not venv.has_attr("of_one")
        venv.reset()

    @pytest.mark.filterwarnings("ignore:.*(Received the following|Traceback|Raising the last):UserWarning")
    def test_what_processes_cannot_send_is_refused(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, AsyncVectorEnv([lambda i=i: Unsendable(i) for i in range(2)]))
        assert venv.has_attr("shaping")
        with pytest.raises(RuntimeError, match="`shaping` must be an attribute that worker processes can send, got .*"):
            venv.get_attr("shaping")

    @pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
    def test_methods_may_have_an_argument_called_name(self, request: pytest.FixtureRequest, cls: Any) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP, cls))
        assert venv.env_method("named", name="x") == ["x 0", "x 1", "x 2"]

    def test_methods_of_some_environments(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP))
        assert venv.env_method("double", 5, indices=[2]) == [12]
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP, AsyncVectorEnv))
        with pytest.raises(ValueError, match="`indices` must be None for an AsyncVectorEnv"):
            venv.env_method("double", 5, indices=[2])

    def test_of_a_class_without_separate_environments(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=3))
        assert venv.get_attr("gravity", [0, 1]) == [9.8, 9.8]
        assert [spec.id for spec in venv.get_attr("spec")] == ["CartPole-v1"] * 3
        assert not venv.has_attr("nothing_of_the_kind")
        with pytest.raises(AttributeError, match="got an array of CartPoleVectorEnv"):
            venv.get_attr("steps")
        with pytest.raises(AttributeError, match="`gravity` must belong to separate environments to be set"):
            venv.set_attr("gravity", 1.6)
        with pytest.raises(AttributeError, match="`render` must belong to separate environments to be called"):
            venv.env_method("render")

    def test_env_is_wrapped(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"))
        assert venv.env_is_wrapped(Monitor) == [True, True]
        assert venv.env_is_wrapped(gym.wrappers.TimeLimit, [1]) == [True]
        assert venv.env_is_wrapped(ClipRewardOfOne) == [False, False]
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP, AsyncVectorEnv))
        assert venv.env_is_wrapped(Monitor, 0) == [True]
        with pytest.raises(ValueError, match="`wrapper_class` must be Monitor for an AsyncVectorEnv, got ClipReward"):
            venv.env_is_wrapped(ClipRewardOfOne)

    def test_images(self, request: pytest.FixtureRequest) -> None:
        envs = [lambda i=i: Scripted(i, render_mode="rgb_array") for i in range(3)]
        venv = adapted(request, SyncVectorEnv(envs))
        assert venv.render_mode == "rgb_array"
        assert [int(image[0, 0, 0]) for image in venv.get_images()] == [0, 1, 2]
        assert venv.render().shape == (4, 4, 3)
        venv = adapted(request, scripted(AutoresetMode.NEXT_STEP))
        with pytest.warns(UserWarning, match="render mode must be rgb_array"):
            assert venv.get_images() == [None, None, None]

    @pytest.mark.parametrize("mode", ["sync", "async", "vector_entry_point"])
    def test_metadata(self, request: pytest.FixtureRequest, mode: str) -> None:
        venv = adapted(request, gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode=mode))
        # SB3's VecVideoRecorder reads it.
        assert venv.metadata["render_fps"] == gym.make("CartPole-v1").metadata["render_fps"] == 50

    def test_close(self) -> None:
        env = scripted(AutoresetMode.NEXT_STEP)
        venv = as_vec_env(env)
        venv.close()
        assert env.closed
        venv.close()


class Silent(ScriptedBatch):
    """Has no autoreset mode of its own, and inherits gymnasium's shared metadata."""

    def __init__(self) -> None:
        super().__init__()
        del self.metadata


class Forgetting(ScriptedBatch):
    """Has SAME_STEP mode, but returns no final observation."""

    def step(self, actions: Any) -> Any:
        *rest, infos = super().step(actions)
        infos.pop("final_obs", None)
        return *rest, infos


class TestRefusals:
    @pytest.mark.parametrize(
        ("env", "hint"),
        [
            ("CartPole-v1", r"gymnasium.make_vec\('CartPole-v1'"),
            (gym.make("CartPole-v1"), "Pass a single environment directly to the algorithm"),
            (DummyVecEnv([lambda: gym.make("CartPole-v1")]), "It is an SB3 VecEnv already"),
            (3, "Create one with"),
        ],
        ids=["id", "single", "sb3", "number"],
    )
    def test_of_other_objects(self, env: Any, hint: str) -> None:
        with pytest.raises(TypeError, match=f"`env` must be a gymnasium VectorEnv.*{hint}"):
            as_vec_env(env)

    def test_of_an_async_env_that_would_reset_twice(self, request: pytest.FixtureRequest) -> None:
        env = scripted(AutoresetMode.NEXT_STEP, AsyncVectorEnv, shared_memory=False)
        request.addfinalizer(env.close)
        with pytest.raises(ValueError, match="`shared_memory` must be True"):
            as_vec_env(env)

    @pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.value)
    def test_that_env_is_accepted_in_other_modes(self, request: pytest.FixtureRequest, mode: AutoresetMode) -> None:
        venv = adapted(request, scripted(mode, AsyncVectorEnv, shared_memory=False))
        assert_same_stream(venv, DummyVecEnv([lambda i=i: Monitor(Scripted(i)) for i in range(3)]), 20)

    @pytest.mark.parametrize("wrapper", [RecordEpisodeStatistics, NormalizeReward])
    @pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.value)
    def test_of_wrappers_that_reset_all_rows(self, wrapper: Any, mode: AutoresetMode) -> None:
        with pytest.raises(ValueError, match=f"must not be wrapped in {wrapper.__name__}"):
            as_vec_env(ClipReward(wrapper(scripted(mode)), 0.0, 1.0))

    def test_of_wrappers_that_convert_infos(self, request: pytest.FixtureRequest) -> None:
        venv = adapted(request, DictInfoToList(scripted(AutoresetMode.NEXT_STEP)))
        with pytest.raises(TypeError, match="must return infos as one dict of the batch, got .*list. Omit wrappers"):
            venv.reset()

    def test_of_a_wrapped_cart_pole(self) -> None:
        env = ClipReward(gym.make_vec("CartPole-v1", num_envs=2), 0.0, 1.0)
        with pytest.raises(ValueError, match="must be a CartPoleVectorEnv without wrappers, got it inside ClipReward"):
            as_vec_env(env)

    def test_of_a_class_without_autoreset_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # AtariVectorEnv leaves its mode in the metadata that all classes share.
        monkeypatch.setitem(VectorEnv.metadata, "autoreset_mode", AutoresetMode.SAME_STEP)
        with pytest.raises(ValueError, match=r"`env.metadata\['autoreset_mode'\]` must be an AutoresetMode, got None"):
            as_vec_env(Silent())

    def test_of_a_missing_final_observation(self) -> None:
        venv = as_vec_env(Forgetting(AutoresetMode.SAME_STEP))
        venv.reset()
        venv.step(np.zeros(3, np.int64))
        with pytest.raises(RuntimeError, match="Forgetting must put `final_obs` into the infos"):
            venv.step(np.zeros(3, np.int64))

    def test_of_a_step_before_the_first_reset(self) -> None:
        with pytest.raises(RuntimeError, match="`reset` must be called before `step`"):
            as_vec_env(scripted(AutoresetMode.NEXT_STEP)).step(np.zeros(3, np.int64))
