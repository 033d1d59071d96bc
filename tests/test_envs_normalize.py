"""FastVecNormalize returns what SB3's VecNormalize returns, and reads and writes the same files."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecNormalize,
    sync_envs_normalization,
    unwrap_vec_normalize,
)

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastVecNormalize, normalize


class Scripted(VecEnv):
    """Random observations, rewards and ends of episodes, equal for equal seeds; returned values are recorded."""

    marker = "scripted"

    def __init__(
        self,
        space: spaces.Space[Any],
        n_envs: int = 3,
        *,
        seed: int = 0,
        p_done: float = 0.1,
        reward_dtype: Any = np.float32,
        read_only: bool = False,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.p_done, self.reward_dtype, self.read_only = p_done, reward_dtype, read_only
        self.last_obs: Any = None
        super().__init__(n_envs, space, spaces.Discrete(2))

    def _draw(self, space: spaces.Space[Any], shape: tuple[int, ...]) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._draw(part, shape) for key, part in space.spaces.items()}
        shape += space.shape or ()
        if np.issubdtype(space.dtype, np.integer):
            return self.rng.integers(0, 200, shape).astype(space.dtype)
        # Elements of different location and scale, some of them constant.
        scale = (np.arange(1.0, 1 + np.prod(space.shape)) % 5).reshape(space.shape or ())
        drawn = (100 + scale * self.rng.normal(size=shape)).astype(space.dtype)
        drawn.flags.writeable = not self.read_only
        return drawn

    def reset(self) -> Any:
        self.last_obs = self._draw(self.observation_space, (self.num_envs,))
        return self.last_obs

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        self.last_obs = self._draw(self.observation_space, (self.num_envs,))
        rewards = (5 * self.rng.normal(2, 3, self.num_envs)).astype(self.reward_dtype)
        dones = self.rng.random(self.num_envs) < self.p_done
        final = [{"terminal_observation": self._draw(self.observation_space, ())} if done else {} for done in dones]
        return self.last_obs, rewards, dones, final

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    low, high = (0, 255) if np.issubdtype(dtype, np.integer) else (-np.inf, np.inf)
    return spaces.Box(low, high, shape, dtype)


MIXED = spaces.Dict({"b": box(3), "a": box(2, 2, dtype=np.float64), "kind": spaces.Discrete(4)})


def same(ours: Any, theirs: Any) -> None:
    """Check equal structure, types and values, to the last bit: operations and their order are NumPy's."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, RunningMeanStd):
        same(vars(ours), vars(theirs))
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_equal(ours, theirs)


def same_state(ours: VecNormalize, theirs: VecNormalize) -> None:
    assert hasattr(ours, "obs_rms") == hasattr(theirs, "obs_rms")
    if hasattr(theirs, "obs_rms"):
        same(ours.obs_rms, theirs.obs_rms)
    same(ours.ret_rms, theirs.ret_rms)
    same(ours.returns, theirs.returns)
    assert ours.observation_space == theirs.observation_space


def step_both(ours: VecNormalize, theirs: VecNormalize) -> None:
    """Step both, and check that the four results are the same."""
    for got, wanted in zip(ours.step(np.zeros(1)), theirs.step(np.zeros(1)), strict=True):
        if isinstance(wanted, list):
            assert len(got) == len(wanted)
            for index in range(len(wanted)):
                same(got[index], wanted[index])
        else:
            same(got, wanted)


def run_both(ours: VecNormalize, theirs: VecNormalize, n_steps: int = 300) -> None:
    for step in range(n_steps):
        if step % 100 == 0:
            same(ours.reset(), theirs.reset())
        step_both(ours, theirs)
    same_state(ours, theirs)
    same(ours.get_original_obs(), theirs.get_original_obs())
    same(ours.get_original_reward(), theirs.get_original_reward())
    obs, reward = ours.normalize_obs(ours.get_original_obs()), ours.normalize_reward(ours.get_original_reward())
    same(ours.unnormalize_obs(obs), theirs.unnormalize_obs(obs))
    same(ours.unnormalize_reward(reward), theirs.unnormalize_reward(reward))


def pair(
    space: spaces.Space[Any], n_envs: int = 3, *, venv: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[FastVecNormalize, VecNormalize]:
    ours = FastVecNormalize(Scripted(space, n_envs, **(venv or {})), **kwargs)
    return ours, VecNormalize(Scripted(space, n_envs, **(venv or {})), **kwargs)


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make SB3's own arithmetic of observations fail in our class: the stream must come from the kernels."""

    def refuse(*_: Any) -> None:
        raise AssertionError("not a kernel")

    monkeypatch.setattr(FastVecNormalize, "_normalize_obs", refuse)
    yield


class TestEqualStreams:
    # NumPy adds up to 7 numbers of a column one after the other, up to 128 in eight sums, and more of them in halves.
    @pytest.mark.parametrize("n_envs", [1, 2, 7, 8, 9, 33, 128, 129, 300])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
    def test_of_every_type_and_number_of_environments(self, dtype: Any, n_envs: int, only_kernels: None) -> None:
        run_both(*pair(box(5, dtype=dtype), n_envs))
        run_both(*pair(box(1, dtype=dtype), n_envs))

    @pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 2, 3, 4)])
    def test_of_every_shape(self, shape: tuple[int, ...], only_kernels: None) -> None:
        run_both(*pair(box(*shape)))
        run_both(*pair(box(*shape, dtype=np.float64), 33))

    def test_of_thousands_of_steps(self) -> None:
        run_both(*pair(box(18), 1), n_steps=5000)

    def test_of_images(self, only_kernels: None) -> None:
        ours, theirs = pair(box(8, 8, 3, dtype=np.uint8))
        run_both(ours, theirs, 100)
        assert ours.observation_space.dtype == np.float32

    def test_of_a_dict(self) -> None:
        run_both(*pair(MIXED, norm_obs_keys=["a", "b"]))
        run_both(*pair(MIXED, norm_obs_keys=["b"]))
        run_both(*pair(spaces.Dict({"x": box(2), "y": box(3, dtype=np.uint8)})))

    @pytest.mark.parametrize(
        "settings",
        [
            {"norm_obs": False},
            {"norm_reward": False},
            {"norm_obs": False, "norm_reward": False},
            {"training": False},
            {"clip_obs": 0.5, "clip_reward": 0.1},
            {"clip_obs": 1, "clip_reward": 2, "epsilon": 1, "gamma": 1},
            {"clip_obs": np.inf, "epsilon": 0.5, "gamma": 0.0},
            {"clip_obs": np.array([0.1, 0.2, 0.3])},
        ],
        ids=str,
    )
    def test_of_every_setting(self, settings: dict[str, Any]) -> None:
        run_both(*pair(box(3), **settings))

    @pytest.mark.parametrize("settings", [{"norm_obs": False}, {"training": False}, {"clip_obs": 0.5}], ids=str)
    def test_of_a_dict_with_settings(self, settings: dict[str, Any]) -> None:
        run_both(*pair(spaces.Dict({"x": box(2), "y": box(3)}), **settings))

    @pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.float16])
    def test_of_every_type_of_rewards(self, dtype: Any) -> None:
        run_both(*pair(box(3), venv={"reward_dtype": dtype}))

    def test_of_read_only_arrays(self, only_kernels: None) -> None:
        run_both(*pair(box(3), venv={"read_only": True}))

    def test_of_arrays_in_any_order_of_memory(self, only_kernels: None) -> None:
        ours, theirs = pair(box(3))
        obs = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
        same(ours.normalize_obs(obs), theirs.normalize_obs(obs))

    @pytest.mark.parametrize(
        "change",
        [
            lambda array: array.astype(array.dtype.newbyteorder()),
            lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
            lambda array: array[::-1],
            lambda array: np.frombuffer(b"." + array.tobytes(), array.dtype, offset=1).reshape(array.shape),
            lambda array: array.astype(np.longdouble),
            lambda array: array > 0,
        ],
        ids=["byte order", "strided", "reversed", "misaligned", "long", "bool"],
    )
    def test_of_arrays_of_any_type(self, change: Callable[[Any], Any]) -> None:
        """Kernels are not compiled for them: they are cast, or left to SB3's code."""

        class Changed(Scripted):
            def reset(self) -> Any:
                return change(super().reset())

            def step_wait(self) -> Any:
                obs, rewards, dones, infos = super().step_wait()
                return change(obs), change(rewards), dones, infos

        kernels = (normalize._scale_rows, normalize._scale_rewards)
        before = [list(kernel.signatures) for kernel in kernels]
        theirs, ours = VecNormalize(Changed(box(3))), FastVecNormalize(Changed(box(3)))
        run_both(ours, theirs)
        assert [list(kernel.signatures) for kernel in kernels] == before
        assert list(map(len, before)) == [2, 2]

    def test_of_values_that_only_sb3s_code_handles(self) -> None:
        run_both(*pair(box(3, dtype=np.float16)))
        run_both(*pair(box(0)))

    @pytest.mark.parametrize(
        "change",
        [
            lambda dones: dones.astype(int),
            lambda dones: 255 * dones.astype(np.uint8),
            lambda dones: dones.astype(np.float32),
            lambda dones: dones.astype(int).tolist(),
        ],
        ids=["int", "uint8", "float", "list"],
    )
    @pytest.mark.parametrize("reward_dtype", [np.float32, np.float16], ids=["kernel", "sb3s code"])
    def test_of_dones_that_are_numbers(self, change: Callable[[Any], Any], reward_dtype: Any) -> None:
        class Numbers(Scripted):
            def step_wait(self) -> Any:
                obs, rewards, dones, infos = super().step_wait()
                return obs, rewards, change(dones), infos

        kwargs = {"p_done": 0.3, "reward_dtype": reward_dtype}
        theirs, ours = VecNormalize(Scripted(box(4), **kwargs)), FastVecNormalize(Numbers(box(4), **kwargs))
        same(ours.reset(), theirs.reset())
        for _ in range(100):
            their_step, our_step = (venv.step(np.zeros(3)) for venv in (theirs, ours))
            for ours_part, theirs_part in zip(our_step[:2], their_step[:2], strict=True):
                same(ours_part, theirs_part)
            for our_info, their_info in zip(our_step[3], their_step[3], strict=True):
                same(our_info, their_info)
            np.testing.assert_array_equal(np.asarray(our_step[2]) != 0, their_step[2])
            same(ours.returns, theirs.returns)
        same(ours.ret_rms, theirs.ret_rms)

    def test_of_episodes_that_all_end_at_once(self) -> None:
        ours, theirs = pair(box(2), venv={"p_done": 1.0})
        run_both(ours, theirs)
        np.testing.assert_array_equal(ours.returns, np.zeros(3))

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_of_nan_and_infinite_observations(self, value: float) -> None:
        ours, theirs = pair(box(2), 2)
        obs, rewards = np.array([[1, value], [2, 3]], np.float32), np.array([1, value], np.float32)
        for env in (ours, theirs):
            env.reset()
            env.venv.step_wait = lambda: (obs.copy(), rewards.copy(), np.zeros(2, bool), [{}, {}])
        for _ in range(3):
            step_both(ours, theirs)

    @pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
    def test_of_a_division_by_zero(self) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 3)
        for env in (ours, theirs):
            env.training, env.epsilon = False, 0.0
            env.obs_rms.var, env.ret_rms.var = np.zeros(3), np.float64(0)  # type: ignore[assignment, union-attr]
        step_both(ours, theirs)


class TestState:
    def test_settings_and_statistics_may_be_assigned_at_any_time(self) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 3)
        changes: list[tuple[str, Any]] = [
            ("training", False),
            ("norm_reward", False),
            ("norm_obs", False),
            ("training", True),
            ("norm_obs", True),
            ("norm_reward", True),
            ("gamma", 0.5),
            ("epsilon", 0.3),
            ("clip_obs", 1),
            ("clip_reward", 0.5),
            ("training", 1),
            ("returns", np.array([1, 2, 3])),
            ("returns", np.array([1.0])),
            ("obs_rms", RunningMeanStd(shape=(3,))),
            ("ret_rms", RunningMeanStd()),
        ]
        for name, value in changes:
            for env in (ours, theirs):
                setattr(env, name, copy.deepcopy(value))
            for _ in range(3):
                step_both(ours, theirs)
            same_state(ours, theirs)

    @pytest.mark.parametrize(
        "moments",
        [
            {"mean": np.full(3, 99.0), "var": np.full(3, 2.0), "count": 5},
            {"mean": [98.0, 99.0, 97.0]},
            {"var": np.array([4, 5, 6])},
            {"mean": np.arange(6.0)[::2], "var": np.ones(3, np.float32)},
        ],
        ids=str,
    )
    def test_moments_may_be_assigned_at_any_time(self, moments: dict[str, Any]) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 5)
        for name, value in moments.items():
            for env in (ours, theirs):
                setattr(env.obs_rms, name, value)
        for _ in range(3):
            step_both(ours, theirs)
        same_state(ours, theirs)

    def test_keys_may_be_assigned_at_any_time(self) -> None:
        ours, theirs = pair(MIXED, norm_obs_keys=["a", "b"])
        for keys in (["b"], [], ["b", "a"]):
            ours.norm_obs_keys = theirs.norm_obs_keys = keys
            run_both(ours, theirs, 3)

    def test_numbers_may_be_assigned_to_the_moments_of_returns(self) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 5)
        for env in (ours, theirs):
            env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count = 3, 4.0, np.float32(2)
        run_both(ours, theirs, 5)

    def test_statistics_of_another_class_are_called(self) -> None:
        class Frozen(RunningMeanStd):
            def update(self, arr: np.ndarray) -> None:
                pass

        ours, theirs = pair(box(3))
        for env in (ours, theirs):
            env.obs_rms, env.ret_rms = Frozen(shape=(3,)), Frozen()  # type: ignore[assignment]
            env.ret_rms.mean, env.ret_rms.var = np.float64(0), np.float64(1)  # type: ignore[assignment]
        run_both(ours, theirs)
        assert ours.obs_rms.count == ours.ret_rms.count == 1e-4  # RunningMeanStd's start

    def test_a_shape_that_does_not_fit_is_refused(self) -> None:
        ours, _ = pair(box(3))
        ours.obs_rms = RunningMeanStd(shape=(4,))  # type: ignore[assignment]
        with pytest.raises(ValueError, match="could not be broadcast"):
            ours.reset()
        with pytest.raises(ValueError, match="could not be broadcast"):
            ours.normalize_obs(np.zeros((2, 2, 3), np.float32))

    def test_arrays_are_new_at_every_step(self) -> None:
        ours, _ = pair(box(3))
        ours.reset()
        ours.step(np.zeros(1))
        rms = ours.obs_rms
        held = [*ours.step(np.zeros(1))[:2], rms.mean, rms.var, ours.returns]  # type: ignore[union-attr]
        before = copy.deepcopy(held)
        ours.step(np.zeros(1))
        for array, copied in zip(held, before, strict=True):
            np.testing.assert_array_equal(array, copied)

    def test_observations_of_the_environments_do_not_change(self) -> None:
        ours, theirs = pair(MIXED, norm_obs_keys=["a"])
        ours.reset()
        assert ours.old_obs is ours.venv.last_obs  # type: ignore[attr-defined]
        got = ours.step(np.zeros(1))[0]
        same(ours.get_original_obs(), ours.venv.last_obs)  # type: ignore[attr-defined]
        assert ours.old_obs is ours.venv.last_obs  # type: ignore[attr-defined]
        assert not any(np.shares_memory(got[key], value) for key, value in ours.old_obs.items())  # type: ignore[union-attr]

    def test_observations_that_are_not_normalised_are_copied(self) -> None:
        ours, _ = pair(box(3), norm_obs=False)
        assert not np.shares_memory(ours.reset(), ours.old_obs)  # type: ignore[arg-type]

    def test_wrappers_around_environments_are_seen_through(self) -> None:
        ours, _ = pair(box(3))
        assert ours.marker == "scripted"
        with pytest.raises(AttributeError):
            ours.no_such_thing  # noqa: B018

        class Outer(VecEnvWrapper):
            def reset(self) -> Any:
                return self.venv.reset()

            def step_wait(self) -> Any:
                return self.venv.step_wait()

        assert unwrap_vec_normalize(Outer(ours)) is ours

    def test_evaluation_takes_over_the_statistics(self) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 10)
        for evaluated in pair(box(3), 1, training=False):
            sync_envs_normalization(ours, evaluated)
            same(evaluated.obs_rms, theirs.obs_rms)
            assert evaluated.obs_rms is not ours.obs_rms
            obs = np.full((1, 3), 99, np.float32)
            same(evaluated.normalize_obs(obs), theirs.normalize_obs(obs))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
    def test_a_copy_continues_as_sb3s_does(self, copied: Any) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 10)
        mine, other = copied(ours), copied(theirs)
        assert type(mine) is FastVecNormalize
        assert mine.venv is None
        mine.set_venv(Scripted(box(3), seed=1))
        other.set_venv(Scripted(box(3), seed=1))
        run_both(mine, other, 10)
        same_state(ours, theirs)
        with pytest.raises(ValueError, match="already initialized"):
            mine.set_venv(Scripted(box(3)))


class TestRefusals:
    def test_observations_that_are_no_boxes(self) -> None:
        with pytest.raises(ValueError, match="only supports"):
            FastVecNormalize(Scripted(spaces.Discrete(3)))
        with pytest.raises(ValueError, match="norm_obs_keys"):
            FastVecNormalize(Scripted(MIXED))

    def test_subclasses_are_not_replaced(self, tmp_path: Path) -> None:
        own = Own(Scripted(box(3)))
        with pytest.raises(TypeError, match="`vec_normalize` must be a VecNormalize .* got Own. Keep the wrapper"):
            FastVecNormalize.from_sb3(own)
        own.save(str(tmp_path / "own.pkl"))
        with pytest.raises(TypeError, match="got Own"):
            FastVecNormalize.load(str(tmp_path / "own.pkl"), Scripted(box(3)), trust_pickle=[Own])


class Own(VecNormalize):
    """A user's subclass; at module level, to be pickled."""


LOAD_WITH_SB3_ONLY = """
import sys
sys.modules["sb3_clipvf"] = None  # an import of it fails
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
env = VecNormalize.load(sys.argv[1], make_vec_env("CartPole-v1", n_envs=2))
assert type(env) is VecNormalize
assert env.obs_rms.count == 40.0001 and env.gamma == 0.9, (env.obs_rms.count, env.gamma)
env.reset()
env.step(np.zeros(2, int))
env.save(sys.argv[2])
"""


class TestFiles:
    def test_files_are_read_and_written_without_this_package(self, tmp_path: Path) -> None:
        ours = FastVecNormalize(make_vec_env("CartPole-v1", n_envs=2), gamma=0.9)
        ours.reset()
        for _ in range(19):
            ours.step(np.zeros(2, int))
        ours.save(str(tmp_path / "ours.pkl"))
        assert b"sb3_clipvf" not in (tmp_path / "ours.pkl").read_bytes()
        script = [sys.executable, "-c", LOAD_WITH_SB3_ONLY, str(tmp_path / "ours.pkl"), str(tmp_path / "sb3s.pkl")]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        back = FastVecNormalize.load(str(tmp_path / "sb3s.pkl"), make_vec_env("CartPole-v1", n_envs=1))
        assert type(back) is FastVecNormalize
        # 2 environments: 40 observations and 38 rewards before, 4 and 2 in the other process; 1e-4 is the start.
        assert (back.obs_rms.count, back.ret_rms.count) == pytest.approx((44.0001, 40.0001), rel=1e-12)
        assert back.reset().shape == (1, 4)
        assert type(ours) is FastVecNormalize
        ours.step(np.zeros(2, int))

    def test_damage_at_any_byte_is_refused(self, tmp_path: Path) -> None:
        path, env = tmp_path / "vecnormalize.pkl", make_vec_env("CartPole-v1", n_envs=1)
        FastVecNormalize(env).save(str(path))
        content = path.read_bytes()
        end = content.index(b".# SHA-256 of the pickle: ") + 1
        changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))]
        changed += [content[:at] for at in range(len(content)) if at != end]
        changed += [content[:at] + b"." + content[at:] for at in range(0, len(content), 9)]
        changed += [content + b".", content + b"\n"]
        for number, damaged in enumerate(changed):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="vecnormalize.pkl"):
                FastVecNormalize.load(path, env, trust_pickle=number % 2 == 0)

    def test_a_file_without_a_digest_loads(self, tmp_path: Path) -> None:
        path, env = tmp_path / "vecnormalize.pkl", make_vec_env("CartPole-v1", n_envs=1)
        FastVecNormalize(env, gamma=0.7).save(str(path))
        path.write_bytes(path.read_bytes()[: -len("# SHA-256 of the pickle: ") - 64])
        assert FastVecNormalize.load(path, env).gamma == 0.7
        VecNormalize(env, gamma=0.8).save(str(path))
        assert FastVecNormalize.load(path, env).gamma == 0.8

    @pytest.mark.parametrize("space", [box(3), MIXED], ids=["box", "dict"])
    def test_a_loaded_one_continues_as_sb3s_does(self, tmp_path: Path, space: Any) -> None:
        kwargs = {"norm_obs_keys": ["a"]} if space is MIXED else {}
        ours, theirs = pair(space, **kwargs)
        run_both(ours, theirs, 10)
        path = str(tmp_path / "file.pkl")
        for saved in (ours, theirs):
            saved.save(path)
            mine = FastVecNormalize.load(path, Scripted(space, 2, seed=1))
            other = VecNormalize.load(path, Scripted(space, 2, seed=1))
            assert (type(mine), type(other)) == (FastVecNormalize, VecNormalize)
            run_both(mine, other, 10)

    def test_a_pickle_of_ours_loads(self, tmp_path: Path) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 10)
        path = tmp_path / "file.pkl"
        path.write_bytes(pickle.dumps(ours))
        loaded = FastVecNormalize.load(str(path), Scripted(box(3)))
        same(loaded.obs_rms, theirs.obs_rms)
        assert loaded.class_attributes["step_wait"] is FastVecNormalize.step_wait

    def test_sb3s_is_replaced_with_its_state(self) -> None:
        ours, theirs = pair(box(3))
        run_both(ours, theirs, 10)
        replaced = FastVecNormalize.from_sb3(theirs)
        assert replaced.obs_rms is theirs.obs_rms
        replaced.step(np.zeros(1))
        ours.step(np.zeros(1))
        same_state(replaced, ours)
        assert replaced.class_attributes["step_wait"] is FastVecNormalize.step_wait


class TestTraining:
    def _model(self, normalize: type[VecNormalize]) -> ClipPPO:
        env = normalize(make_vec_env("Pendulum-v1", n_envs=2), gamma=0.9)
        settings = {"n_steps": 256, "batch_size": 64, "n_epochs": 2, "seed": 0}
        return ClipPPO("MlpPolicy", env, **settings, device="cpu", engine="autograd")

    def test_clip_ppo_learns_the_same(self) -> None:
        # Two rollouts; episodes of 200 steps, so that each environment is truncated twice.
        fast, slow = (self._model(normalize).learn(2 * 512) for normalize in (FastVecNormalize, VecNormalize))
        assert type(fast.get_vec_normalize_env()) is FastVecNormalize
        same_state(fast.get_vec_normalize_env(), slow.get_vec_normalize_env())  # type: ignore[arg-type]
        for name, wanted in slow.policy.state_dict().items():
            # 2 * 16 steps of Adam at 3e-4: float32 differences of inputs stay this far below one step.
            th.testing.assert_close(fast.policy.state_dict()[name], wanted, rtol=1e-5, atol=1e-6)

    def test_callbacks_of_sb3_evaluate_and_save(self, tmp_path: Path) -> None:
        evaluated = FastVecNormalize(make_vec_env("Pendulum-v1"), training=False, norm_reward=False)
        model = self._model(FastVecNormalize)
        evaluation = EvalCallback(evaluated, eval_freq=256, n_eval_episodes=1, warn=False, verbose=0)
        saving = CheckpointCallback(256, str(tmp_path), save_vecnormalize=True)
        model.learn(512, callback=[evaluation, saving])
        assert evaluated.obs_rms.count == model.get_vec_normalize_env().obs_rms.count  # type: ignore[union-attr]
        saved = next(tmp_path.glob("*vecnormalize*.pkl"))
        assert type(VecNormalize.load(str(saved), make_vec_env("Pendulum-v1"))) is VecNormalize
