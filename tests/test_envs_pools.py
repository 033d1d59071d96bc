"""The adapters over EnvPool and ale-py return the pool's own transitions, and no resets as transitions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers.vector import ClipReward
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import as_vec_env

# Gymnasium warns about EnvPool's spaces.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")

Stream = list[list[tuple[Any, ...]]]
"""For each environment its transitions: observation, action, reward, terminated, truncated, next observation."""


def native_stream(env: Any, first_obs: Any, n_envs: int, n_steps: int, act: Callable[[Any], Any]) -> Stream:
    """Step an environment of NEXT_STEP mode without an adapter, and drop the rows that reset."""
    stream: Stream = [[] for _ in range(n_envs)]
    obs = np.array(first_obs)
    resets = np.zeros(n_envs, bool)
    for _ in range(n_steps):
        actions = np.array([act(row) for row in obs])
        new_obs, rewards, terminated, truncated, _ = env.step(actions)
        new_obs = np.array(new_obs)
        for i in np.flatnonzero(~resets):
            ends = bool(terminated[i]), bool(truncated[i])
            stream[i].append((obs[i], actions[i], float(rewards[i]), *ends, new_obs[i]))
        resets = terminated | truncated
        obs = new_obs
    return stream


def adapted_stream(venv: Any, n_steps: int, act: Callable[[Any], Any]) -> Stream:
    stream: Stream = [[] for _ in range(venv.num_envs)]
    obs = venv.reset()
    for _ in range(n_steps):
        actions = np.array([act(row) for row in obs])
        new_obs, rewards, dones, infos = venv.step(actions)
        for i, info in enumerate(infos):
            truncated = info["TimeLimit.truncated"]
            next_obs = info["terminal_observation"] if dones[i] else new_obs[i]
            ends = bool(dones[i]) and not truncated, truncated
            stream[i].append((obs[i], actions[i], float(rewards[i]), *ends, next_obs))
        obs = new_obs
    return stream


def assert_same_streams(adapted: Stream, native: Stream, n_ends: int) -> None:
    """Check equal streams; the native ones are shorter by the steps of their resets."""
    ends = 0
    for own, other in zip(adapted, native, strict=True):
        assert 0 < len(other) <= len(own)
        for step, expected in zip(own, other, strict=False):
            for got, wanted in zip(step, expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
            ends += expected[3] or expected[4]
    assert ends >= n_ends


def follow_pole(obs: Any) -> int:
    return int(obs[2] > 0.02)


def any_of_four(obs: Any) -> int:
    return int(obs.astype(np.int64).sum() % 4)


@pytest.fixture
def make_pool(request: pytest.FixtureRequest) -> Callable[..., Any]:
    envpool = pytest.importorskip("envpool")

    def make(task: str = "CartPole-v1", **kwargs: Any) -> Any:
        pool = envpool.make_gymnasium(task, **{"num_envs": 3, "seed": 2, **kwargs})
        request.addfinalizer(pool.close)
        return pool

    return make


class TestEnvPool:
    @pytest.fixture
    def make(self, make_pool: Callable[..., Any]) -> Callable[..., Any]:
        return make_pool

    @pytest.mark.parametrize("limit", [20, 500])
    def test_stream_is_the_pools_without_resets(self, make: Callable[..., Any], limit: int) -> None:
        pool = make(max_episode_steps=limit)
        native = native_stream(pool, pool.reset()[0], 3, 400, follow_pole)
        adapted = adapted_stream(as_vec_env(make(max_episode_steps=limit)), 400, follow_pole)
        assert_same_streams(adapted, native, n_ends=15)
        assert any(step[4] for step in native[0]) is (limit == 20)

    def test_steps_as_dummy_vec_env(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(num_envs=4, max_episode_steps=25))
        reference = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1", max_episode_steps=25))] * 4)
        obs = venv.reset()
        reference.reset()
        rng = np.random.default_rng(0)
        n_compared = 0
        for _ in range(60):
            for row in range(4):
                reference.envs[row].unwrapped.state = tuple(obs[row].astype(np.float64))
            actions = rng.integers(2, size=4)
            obs, rewards, dones, infos = venv.step(actions)
            expected_obs, expected_rewards, expected_dones, expected_infos = reference.step(actions)
            # The pool keeps float64 states and returns float32: steps from the returned states differ by that rounding.
            np.testing.assert_allclose(obs[~dones], expected_obs[~dones], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(rewards, expected_rewards)
            np.testing.assert_array_equal(dones, expected_dones)
            for row in np.flatnonzero(dones):
                info, expected = infos[row], expected_infos[row]
                np.testing.assert_allclose(
                    info["terminal_observation"], expected["terminal_observation"], rtol=1e-5, atol=1e-6
                )
                assert info["TimeLimit.truncated"] == expected["TimeLimit.truncated"]
                assert (info["episode"]["r"], info["episode"]["l"]) == (
                    expected["episode"]["r"],
                    expected["episode"]["l"],
                )
                assert info.keys() == expected.keys()
                n_compared += 1
        assert n_compared > 8

    @pytest.mark.parametrize("spares", [False, True])
    def test_returned_arrays_do_not_change(self, make: Callable[..., Any], spares: bool) -> None:
        venv = as_vec_env(make(num_envs=8 * (1 + spares)), spares=spares)
        given = [venv.reset()]
        for _ in range(50):
            obs, rewards, dones, infos = venv.step(np.ones(8, np.int64))
            given += [obs, rewards, dones]
            given += [info["terminal_observation"] for info in infos if "terminal_observation" in info]
        before = [array.copy() for array in given]
        for _ in range(50):
            venv.step(np.ones(8, np.int64))
        for array, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, copy)
        # Pushed one way, the pole falls some 5 times in 50 steps.
        assert len(given) > 151 + 8 * 4

    def test_seeds(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(seed=2))
        first = venv.reset()
        venv.seed(9)
        seeded = venv.reset()
        assert not np.array_equal(first, seeded)
        for _ in range(20):
            venv.step(np.ones(3, np.int64))
        venv.seed(9)
        np.testing.assert_array_equal(venv.reset(), seeded)
        assert not np.array_equal(venv.reset(), seeded)
        np.testing.assert_array_equal(make(seed=9).reset()[0], seeded)
        # SB3 draws seeds up to 2**32 if none is given.
        venv.seed(2**32 - 2)
        assert venv.reset().shape == (3, 4)

    def test_the_seeded_pool_is_otherwise_the_same(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(max_episode_steps=7, render_mode="rgb_array"))
        venv.seed(1)
        venv.reset()
        assert venv.env.config["max_episode_steps"] == 7
        assert venv.env.render_mode == venv.render_mode == "rgb_array"

    def test_infos_of_the_environment(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make("HalfCheetah-v5", num_envs=2, max_episode_steps=3))
        venv.reset()
        for _ in range(3):
            _, rewards, dones, infos = venv.step(np.full((2, 6), 0.5, np.float32))
        assert rewards.dtype == np.float32
        assert dones.tolist() == [True, True]
        for info in infos:
            assert info["TimeLimit.truncated"] is True
            assert isinstance(info["x_velocity"], float)
            assert not {"env_id", "players", "elapsed_step"} & info.keys()
            assert info["reward_run"] + info["reward_ctrl"] == pytest.approx(rewards[infos.index(info)], rel=1e-5)
        assert [info.keys() for info in venv.reset_infos] == [
            {"reward_run", "reward_ctrl", "x_position", "x_velocity"},
        ] * 2

    def test_a_lost_life_ends_the_row_and_not_the_game(self, make: Callable[..., Any]) -> None:
        settings = {"episodic_life": True, "reward_clip": True, "noop_max": 1, "max_episode_steps": 130}
        pool = make("Breakout-v5", **settings)
        native = native_stream(pool, pool.reset()[0], 3, 150, any_of_four)
        venv = as_vec_env(make("Breakout-v5", **settings))
        assert_same_streams(adapted_stream(venv, 150, any_of_four), native, n_ends=8)
        obs, lost, over = venv.reset(), 0, 0
        for _ in range(131):
            obs, _, dones, infos = venv.step(np.array([any_of_four(row) for row in obs]))
            for done, info in zip(dones, infos, strict=True):
                game_over = bool(info["terminated"]) or info["TimeLimit.truncated"]
                assert ("episode" in info) == (done and game_over)
                over += game_over
                lost += done and not game_over
        assert lost >= 6
        assert over >= 3

    def test_true_returns_of_whole_games(self, make: Callable[..., Any]) -> None:
        # Rewards of Ms. Pac-Man are 10 and more; the first come after some 65 steps of music.
        venv = as_vec_env(make("MsPacman-v5", num_envs=2, episodic_life=True, reward_clip=True, max_episode_steps=90))
        venv.reset()
        returns, clipped = np.zeros(2), np.zeros(2)
        for t in range(90):
            _, rewards, dones, infos = venv.step(np.array([2, 3]))
            clipped += rewards
            returns += [info["reward"] for info in infos]
            assert all(("episode" in info) == (t == 89) for info in infos)
        assert dones.all()
        assert (returns >= 10 * clipped).all() and (clipped > 0).all()
        assert [info["episode"]["r"] for info in infos] == returns.tolist()
        assert [info["episode"]["l"] for info in infos] == [90, 90]

    def test_trains(self, make: Callable[..., Any]) -> None:
        venv = VecNormalize(as_vec_env(make("HalfCheetah-v5", num_envs=4, max_episode_steps=20)))
        model = ClipPPO("MlpPolicy", venv, n_steps=32, batch_size=64, n_epochs=1, seed=1, device="cpu")
        model.learn(256)
        assert [episode["l"] for episode in model.ep_info_buffer] == [20] * 12

    def test_attributes(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make())
        assert venv.get_attr("render_mode") == [None] * 3
        assert venv.env_is_wrapped(Monitor) == [True] * 3
        with pytest.raises(AttributeError, match="`double` must belong to separate environments"):
            venv.env_method("double")

    def test_refusals(self, make: Callable[..., Any]) -> None:
        import envpool

        with pytest.raises(ValueError, match="`batch_size` must be `num_envs`, got 2 of 3"):
            as_vec_env(make(batch_size=2))
        with pytest.raises(ValueError, match="`env_type` must be 'gymnasium', got CartPoleDMEnvPool"):
            as_vec_env(envpool.make_dm("CartPole-v1", num_envs=2))
        with pytest.raises(TypeError, match="must be the EnvPool itself, got it inside ClipReward"):
            as_vec_env(ClipReward(make(), 0.0, 1.0))
        venv = as_vec_env(make())
        venv.set_options({"wind": 2})
        with pytest.raises(ValueError, match="`options` must be empty for an EnvPool"):
            venv.reset()


class TestSpares:
    @pytest.fixture
    def make(self, make_pool: Callable[..., Any]) -> Callable[..., Any]:
        return partial(make_pool, num_envs=6)

    @pytest.mark.parametrize("limit", [1, 2, 20, 500])
    def test_episodes_are_those_of_two_environments_in_turn(self, make: Callable[..., Any], limit: int) -> None:
        pool = make(max_episode_steps=limit)
        native = [episodes(stream) for stream in native_stream(pool, pool.reset()[0], 6, 400, follow_pole)]
        rows = adapted_stream(as_vec_env(make(max_episode_steps=limit), spares=True), 400, follow_pole)
        for row, stream in enumerate(rows):
            assert len(stream) == 400
            own = episodes(stream)
            assert len(own) > 7
            for number, episode in enumerate(own):
                expected = native[row + 3 * (number % 2)][number // 2]
                for step, native_step in zip(episode, expected, strict=number < len(own) - 1):
                    for got, wanted in zip(step, native_step, strict=True):
                        np.testing.assert_array_equal(got, wanted)

    def test_threads_do_not_matter(self, make: Callable[..., Any]) -> None:
        one, many = (
            adapted_stream(as_vec_env(make("LunarLander-v3", num_threads=n), spares=True), 200, lambda _: 0)
            for n in (1, 2)
        )
        assert_same_streams(one, many, n_ends=3)

    def test_seeds_of_rows_are_those_without_spares(self, make: Callable[..., Any]) -> None:
        venv, plain = as_vec_env(make(), spares=True), as_vec_env(make(num_envs=3))
        np.testing.assert_array_equal(venv.reset(), plain.reset())
        for env in (venv, plain):
            env.seed(9)
        seeded = venv.reset()
        np.testing.assert_array_equal(seeded, plain.reset())
        first = adapted_stream(venv, 60, follow_pole)
        for _ in range(2):
            venv.seed(9)
            np.testing.assert_array_equal(venv.reset(), seeded)
            assert_same_streams(adapted_stream(venv, 60, follow_pole), first, n_ends=3)

    def test_seeds_of_spares_are_not_those_of_further_rows(self, make: Callable[..., Any]) -> None:
        """Another process has these."""
        venv, further = as_vec_env(make(), spares=True), as_vec_env(make(num_envs=6))
        venv.seed(9)
        further.seed(9 + 3)
        venv.reset()
        firsts = {row.tobytes() for row in further.reset()}
        assert not firsts & {row.tobytes() for row in venv._first_obs}

    def test_a_reset_within_an_episode_begins_again(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(max_episode_steps=7), spares=True)
        venv.reset()
        for n_steps in (3, 7, 8, 20):
            for _ in range(n_steps):
                venv.step(np.zeros(3, np.int64))
            venv.reset()
            lengths = [venv.step(np.arange(3) % 2)[2].tolist() for _ in range(7)]
            assert lengths == [[False] * 3] * 6 + [[True] * 3]

    def test_infos_and_statistics(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make("HalfCheetah-v5", num_envs=4, max_episode_steps=3), spares=True)
        venv.reset()
        for step in range(1, 10):
            _, rewards, dones, infos = venv.step(np.full((2, 6), 0.5, np.float32))
            assert dones.tolist() == [step % 3 == 0] * 2
            for info, reward in zip(infos, rewards, strict=True):
                assert info["TimeLimit.truncated"] is (step % 3 == 0)
                assert info["reward_run"] + info["reward_ctrl"] == pytest.approx(reward, rel=1e-5)
                assert ("episode" in info) == (step % 3 == 0)
            assert [info.keys() for info in venv.reset_infos] == [
                {"reward_run", "reward_ctrl", "x_position", "x_velocity"},
            ] * 2
        assert [info["episode"]["l"] for info in infos] == [3, 3]

    def test_infos_are_those_of_the_environment_that_plays(self, make: Callable[..., Any]) -> None:
        """Rows end at different steps, so the pool returns resets of some rows before the steps of all."""
        falls = np.ones((6, 3))
        pool = make("Hopper-v5")
        # The episodes of each environment, each with the infos of its reset first.
        native = [[[position]] for position in pool.reset()[1]["x_position"].tolist()]
        over = np.zeros(6, bool)
        for _ in range(200):
            _, _, terminated, truncated, infos = pool.step(falls)
            for index, position in enumerate(infos["x_position"].tolist()):
                if over[index]:
                    native[index].append([])
                native[index][-1].append(position)
            over = terminated | truncated
        venv = as_vec_env(make("Hopper-v5"), spares=True)
        venv.reset()
        rows = [[[info["x_position"]]] for info in venv.reset_infos]
        for _ in range(200):
            _, _, dones, infos = venv.step(falls[:3])
            for row, done, info, reset_info in zip(rows, dones, infos, venv.reset_infos, strict=True):
                row[-1].append(info["x_position"])
                if done:
                    row.append([reset_info["x_position"]])
        assert len({len(row[0]) for row in rows}) > 1
        for index, row in enumerate(rows):
            assert len(row) > 3
            for number, episode in enumerate(row):
                assert episode == native[index + 3 * (number % 2)][number // 2][: len(episode)]

    def test_true_returns_of_clipped_rewards(self, make: Callable[..., Any]) -> None:
        settings = {"num_envs": 4, "episodic_life": False, "reward_clip": True, "max_episode_steps": 90}
        venv = as_vec_env(make("MsPacman-v5", **settings), spares=True)
        venv.reset()
        for _ in range(2):
            returns = np.zeros(2)
            for _ in range(90):
                _, _, dones, infos = venv.step(np.array([2, 3]))
                returns += [info["reward"] for info in infos]
            assert dones.all()
            assert (returns >= 10).all()
            assert [info["episode"]["r"] for info in infos] == returns.tolist()

    def test_images_are_of_the_environments_that_play(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(num_envs=4, max_episode_steps=2, render_mode="rgb_array"), spares=True)
        asked = []
        venv.env.render = lambda env_ids: asked.append(env_ids.tolist()) or np.zeros((len(env_ids), 2, 2, 3))
        venv.reset()
        for _ in range(4):
            assert len(venv.get_images()) == 2
            venv.step(np.zeros(2, np.int64))
        assert asked == [[0, 1], [0, 1], [2, 3], [2, 3]]

    def test_trains(self, make: Callable[..., Any]) -> None:
        venv = VecNormalize(as_vec_env(make("HalfCheetah-v5", num_envs=8, max_episode_steps=20), spares=True))
        model = ClipPPO("MlpPolicy", venv, n_steps=32, batch_size=64, n_epochs=1, seed=1, device="cpu")
        model.learn(256)
        assert [episode["l"] for episode in model.ep_info_buffer] == [20] * 12

    def test_refusals(self, make: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`num_envs` must be even with `spares`, got 3"):
            as_vec_env(make(num_envs=3), spares=True)
        with pytest.raises(ValueError, match="`spares` must be False for a pool with `episodic_life`"):
            as_vec_env(make("Breakout-v5", episodic_life=True), spares=True, monitor_path=tmp_path / "kept")
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="`spares` must be False for CartPoleVectorEnv"):
            as_vec_env(gym.make_vec("CartPole-v1", num_envs=2), spares=True)


def episodes(stream: list[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Cut a stream where its episodes end; the last one may be incomplete."""
    cut: list[list[tuple[Any, ...]]] = [[]]
    for step in stream:
        if cut[-1] and (cut[-1][-1][3] or cut[-1][-1][4]):
            cut.append([])
        cut[-1].append(step)
    return cut


class TestAtari:
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[..., Any]:
        vector_env = pytest.importorskip("ale_py.vector_env")

        def make_atari(game: str = "breakout", **kwargs: Any) -> Any:
            settings = {"num_envs": 3, "reward_clipping": False, "num_threads": 1, **kwargs}
            env = vector_env.AtariVectorEnv(game, **settings)
            request.addfinalizer(env.close)
            return env

        return make_atari

    @pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
    def test_stream_is_the_environments_without_resets(self, make: Callable[..., Any], mode: str) -> None:
        limits = {"max_num_frames_per_episode": 160, "noop_max": 3}
        env = make(**limits)
        native = native_stream(env, env.reset(seed=4)[0], 3, 130, any_of_four)
        venv = as_vec_env(make(autoreset_mode=mode, **limits))
        venv.seed(4)
        assert_same_streams(adapted_stream(venv, 130, any_of_four), native, n_ends=6)

    def test_a_lost_life_ends_the_row_and_not_the_game(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(autoreset_mode="SameStep", life_loss_info=True, noop_max=0))
        reference = make(life_loss_info=False, noop_max=0)
        venv.seed(4)
        obs = venv.reset()
        expected_obs, expected_infos = reference.reset(seed=4)
        lives, lost, lengths = expected_infos["lives"], 0, [[], [], []]
        for t in range(150):
            actions = np.array([0, 2 + t % 2, 1])
            obs, _, dones, infos = venv.step(actions)
            expected_obs, _, terminated, _, expected_infos = reference.step(actions)
            np.testing.assert_array_equal(dones, expected_infos["lives"] < lives)
            lives = expected_infos["lives"]
            for i, info in enumerate(infos):
                assert ("terminal_observation" in info) == dones[i]
                assert ("episode" in info) == terminated[i]
                if dones[i]:
                    np.testing.assert_array_equal(info["terminal_observation"], expected_obs[i])
                    lost += not terminated[i]
                if "episode" in info:
                    lengths[i].append(info["episode"]["l"])
            if terminated.any():
                break
            np.testing.assert_array_equal(obs, expected_obs)
        # Five lives, and the game's length in steps.
        assert lost > 3
        assert sorted(sum(lengths, [])) == [t + 1] * int(terminated.sum())

    def test_true_returns_where_rewards_are_clipped(self, make: Callable[..., Any]) -> None:
        env = make("ms_pacman", max_num_frames_per_episode=400, num_envs=2)
        venv = as_vec_env(env, clip_rewards=True)
        venv.reset()
        clipped = np.zeros(2)
        for _ in range(110):
            _, rewards, dones, infos = venv.step(np.array([2, 3]))
            clipped += rewards
            assert np.abs(rewards).max() <= 1 and rewards.dtype == np.float32
            if dones.any():
                break
        assert infos[0]["TimeLimit.truncated"]
        # A pellet gives 10.
        assert infos[0]["episode"]["r"] >= 10 * clipped[0] > 0

    def test_clipped_returns_are_warned_of(self) -> None:
        pytest.importorskip("ale_py")
        env = gym.make_vec("ALE/Breakout-v5", num_envs=2)
        with pytest.warns(UserWarning, match="returns in info\\['episode'\\] are those of clipped ones"):
            as_vec_env(env)
        env.close()

    def test_seeds(self, make: Callable[..., Any]) -> None:
        venv = as_vec_env(make(noop_max=30))
        frames = []
        for seed in (5, 5, 6):
            venv.seed(seed)
            venv.reset()
            frames.append([info["episode_frame_number"] for info in venv.reset_infos])
        assert frames[0] == frames[1] != frames[2]
        # One seed per environment, counted from the first.
        assert frames[0][1:] == frames[2][:2]
        venv.seed(2**32 - 2)
        assert venv.reset().shape == (3, 4, 84, 84)

    def test_refusals(self, make: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="`batch_size` must be `num_envs` or 0, got 2 of 3"):
            as_vec_env(make(batch_size=2))
        venv = as_vec_env(make(life_loss_info=True, noop_max=0))
        venv.reset()
        with pytest.raises(ValueError, match="`autoreset_mode` must be SAME_STEP if episodes end with lives left"):
            for _ in range(60):
                venv.step(np.array([0, 2, 3]))
