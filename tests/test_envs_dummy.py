"""FastDummyVecEnv returns what SB3's DummyVecEnv returns, in copies that nothing else writes to."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize
from sb3_clipvf.envs.episode_ends import EpisodeEnds

BOX = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (8, 8, 3), np.uint8)
MIXED = spaces.Dict({"b": BOX, "a": spaces.Box(-1, 1, (2, 2), np.float64), "kind": spaces.Discrete(4), "image": IMAGE})
PICTURES = spaces.Dict({"box": BOX, "image": IMAGE})
PAIR = spaces.Tuple((spaces.MultiBinary(3), BOX))
SPACES = [
    BOX,
    spaces.Box(-1, 1, (2, 2), np.float64),
    spaces.Box(-1, 1, (0,)),
    IMAGE,
    spaces.Discrete(5),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(4),
    MIXED,
    spaces.Dict({"only": BOX}),
    PAIR,
]

Infos = Callable[[Any], dict[Any, Any]]


class Point:
    """An object in infos, changed by the environment at every step."""

    def __init__(self, x: Any) -> None:
        self.x = x


class Scripted(gym.Env[Any, Any]):
    """Random observations, rewards and ends of episodes, equal for equal numbers; ``infos`` makes the infos."""

    action_space = spaces.Discrete(3)

    def __init__(self, number: int, space: spaces.Space[Any] = BOX, infos: Infos | None = None) -> None:
        self.number, self.infos = number, infos
        self.observation_space = copy.deepcopy(space)
        self.observation_space.seed(number)
        self.rng = np.random.default_rng(number)
        self.n_steps = 0
        self.resets: list[tuple[int | None, dict[str, Any] | None]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.resets.append((seed, options))
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        info = {"n_resets": len(self.resets), "seed": seed, "options": options, "drawn": self.rng.normal(size=2)}
        return self.observation_space.sample(), info

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        terminated, truncated = self.rng.random(2) < 0.15  # NumPy's bools, as many environments return them
        if self.number % 2:
            terminated, truncated = bool(terminated), bool(truncated)
        info = {} if self.infos is None else self.infos(self)
        # No float32: the buffer rounds it.
        return self.observation_space.sample(), self.rng.normal() + float(action), terminated, truncated, info


def plain(env: Scripted) -> dict[Any, Any]:
    """Return values that the fast copy handles itself."""
    drawn = env.rng.normal(size=(2, 3))
    return {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "none": None,
        "text": "text",
        "bytes": b"bytes",
        "complex": 1j,
        "numpy": {
            kind: np.ones((), kind)[()] for kind in ("f2", "f4", "f8", "i1", "i8", "u4", "?", "c8", "U1", "M8[s]")
        },
        "array": drawn,
        "columns": np.asfortranarray(drawn),
        "strided": drawn[:, ::2],
        "scalar": np.array(env.rng.normal()),
        "empty": np.zeros((0, 2), np.float32),
        "nested": {"deeper": {"array": drawn + 1, "n": env.n_steps}, "nothing": {}},
        3: "not a text",
        ("key", 1): "nor this one",
    }


def general(env: Scripted) -> dict[Any, Any]:
    """Return values that only ``copy.deepcopy`` handles; some appear twice, and the dict contains itself."""
    array, point, inner = env.rng.normal(size=2), Point([env.n_steps]), {"x": 1}
    read_only = env.rng.normal(size=2)
    read_only.flags.writeable = False
    objects = np.empty(2, object)
    objects[0], objects[1] = point, [array]
    record = np.array([(env.n_steps, 0.5)], [("n", "i8"), ("x", "f4")])
    info: dict[Any, Any] = {
        "list": [1, [array], {"a": array}],
        "tuple": (1, array, point),
        "constant": (1, "a"),
        "set": {1, 2},
        "ordered": OrderedDict(b=inner, a=array),
        "point": point,
        "type": Point,
        "array": array,
        "same": {"array": array, "inner": inner},
        "read_only": read_only,
        "objects": objects,
        "records": record,
        "record": record[0],
        "own": array.view(OwnArray),
        (Point, frozenset({1})): inner,
    }
    info["self"] = info
    return info


class PointKey(Point):
    """A key that can be changed."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and bool(self.x == other.x)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.x)


ATOMS = (type(None), bool, int, float, complex, str, bytes, type, np.bool_, np.number, np.character, np.datetime64)


def same(ours: Any, theirs: Any, seen: dict[int, Any] | None = None) -> None:
    """Check equal structure, types, order, memory layout and values, and which objects are identical."""
    seen = {} if seen is None else seen
    assert type(ours) is type(theirs)
    if isinstance(theirs, ATOMS):
        assert ours == theirs
        return
    visited = id(theirs) in seen
    assert seen.setdefault(id(theirs), ours) is ours
    assert seen.setdefault(id(ours), theirs) is theirs
    if visited:
        return
    if isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape, ours.strides) == (theirs.dtype, theirs.shape, theirs.strides)
        assert ours.flags.writeable == theirs.flags.writeable
        if theirs.dtype == object:
            same(list(ours.flat), list(theirs.flat), seen)
        else:
            np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        same(list(ours), list(theirs), seen)
        same(list(ours.values()), list(theirs.values()), seen)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, seen)
    elif isinstance(theirs, Point):
        same(vars(ours), vars(theirs), seen)
    else:
        assert ours == theirs


def same_buffers(ours: DummyVecEnv, theirs: DummyVecEnv) -> None:
    for name in ("buf_obs", "buf_rews", "buf_dones", "buf_infos", "reset_infos"):
        same(getattr(ours, name), getattr(theirs, name))


def pair(make: Callable[[int], gym.Env[Any, Any]], n_envs: int = 3) -> tuple[FastDummyVecEnv, DummyVecEnv]:
    """Return the same environments in our class and in SB3's."""
    ours, theirs = (cls([lambda i=i: make(i) for i in range(n_envs)]) for cls in (FastDummyVecEnv, DummyVecEnv))
    return ours, theirs  # type: ignore[return-value]


def run_both(ours: VecEnv, theirs: VecEnv, n_steps: int = 60) -> None:
    """Check that both return the same, with at least 3 ends of episodes."""
    rng = np.random.default_rng(0)
    same(ours.reset(), theirs.reset())
    same(ours.reset_infos, theirs.reset_infos)
    n_ends = 0
    for _ in range(n_steps):
        actions = rng.integers(2, size=theirs.num_envs)
        wanted = theirs.step(actions)
        same(ours.step(actions), wanted)
        n_ends += int(wanted[2].sum())
    assert n_ends >= 3
    same_buffers(ours.unwrapped, theirs.unwrapped)  # type: ignore[arg-type]


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Monitor's episodes take no time."""
    monkeypatch.setattr("stable_baselines3.common.monitor.time", SimpleNamespace(time=lambda: 0.0))


class TestEqualStreams:
    @pytest.mark.parametrize("n_envs", [1, 8])
    def test_of_monitored_environments(self, n_envs: int, still_clock: None) -> None:
        ours = make_vec_env("CartPole-v1", n_envs, seed=3, vec_env_cls=FastDummyVecEnv)
        assert type(ours) is FastDummyVecEnv
        assert ours.env_is_wrapped(Monitor) == [True] * n_envs
        run_both(ours, make_vec_env("CartPole-v1", n_envs, seed=3), 200)

    def test_of_truncated_episodes(self, still_clock: None) -> None:
        def make(number: int) -> gym.Env[Any, Any]:
            env = Monitor(gym.make("CartPole-v1", max_episode_steps=9 + number))
            env.action_space.seed(number)
            return env

        ours, theirs = pair(make)
        for venv in (ours, theirs):
            venv.seed(0)
        run_both(ours, theirs)

    @pytest.mark.parametrize("space", SPACES, ids=str)
    def test_of_every_space(self, space: spaces.Space[Any]) -> None:
        run_both(*pair(lambda number: Scripted(number, space)))

    @pytest.mark.parametrize("infos", [plain, general, lambda env: {PointKey(env.n_steps): 1}, lambda env: Own(a=[1])])
    def test_of_infos_of_every_kind(self, infos: Infos) -> None:
        run_both(*pair(lambda number: Scripted(number, infos=infos)))

    @pytest.mark.parametrize("reward", [1, True, np.float64(0.1), np.float32(0.1), np.array(0.1), 1e300])
    @pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
    def test_of_rewards_of_every_type(self, reward: Any) -> None:
        ours, theirs = pair(lambda number: gym.wrappers.TransformReward(Scripted(number), lambda _: reward))
        run_both(ours, theirs)

    def test_of_an_object_that_all_infos_share(self) -> None:
        def make_all(cls: type[DummyVecEnv]) -> DummyVecEnv:
            shared: dict[str, Any] = {"n": 0, "array": np.zeros(2)}

            def infos(_: Any) -> dict[Any, Any]:
                # Objects that earlier environments returned in this step change, too.
                shared["n"] += 1
                shared["array"] += 1
                return {"shared": shared, "array": shared["array"], "list": [shared]}

            return cls([lambda i=i: Scripted(i, infos=infos) for i in range(3)])

        ours, theirs = make_all(FastDummyVecEnv), make_all(DummyVecEnv)
        run_both(ours, theirs, n_steps=60)
        infos = ours.step(np.zeros(3, int))[3]
        assert infos[0]["shared"] is infos[2]["list"][0]
        assert infos[0]["shared"]["n"] == 3 * 61

    def test_of_one_info_for_all(self) -> None:
        def make_all(cls: type[DummyVecEnv]) -> DummyVecEnv:
            info = {"given": "to all"}
            return cls([lambda i=i: Scripted(i, infos=lambda env: info) for i in range(3)])

        ours, theirs = make_all(FastDummyVecEnv), make_all(DummyVecEnv)
        run_both(ours, theirs)
        infos = ours.step(np.zeros(3, int))[3]
        assert infos[0] is infos[1]


class Own(dict[Any, Any]):
    """A dict whose copies ``copy.deepcopy`` makes."""


class OwnArray(np.ndarray):
    """An array that defines its own copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return [float(self.sum())]


class Reusing(Scripted):
    """An environment that writes to the same arrays and the same info at every step and reset."""

    keeps_final = False  # whether a reset leaves the final observation as it is

    def __init__(self, number: int, space: spaces.Space[Any] = BOX) -> None:
        super().__init__(number, space)
        self.obs = self.observation_space.sample()
        self.info: dict[str, Any] = {
            "n": 0,
            "array": np.zeros(2),
            "nested": {"array": np.zeros(2)},
            "point": Point([0]),
        }

    def _rewritten(self, obs: Any) -> Any:
        if isinstance(obs, dict):
            for key in obs:
                self.obs[key][...] = obs[key]
        else:
            self.obs[...] = obs
        return self.obs

    def reset(self, **kwargs: Any) -> Any:
        obs, _ = super().reset(**kwargs)
        return self._rewritten(obs), self.info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        self.info["n"] += 1
        self.info["point"].x.append(self.n_steps)
        for info in (self.info, self.info["nested"]):
            info["array"] += 1
        obs = self._rewritten(obs)
        ended = self.keeps_final and (terminated or truncated)
        return copy.deepcopy(obs) if ended else obs, reward, terminated, truncated, self.info


def right(venvs: tuple[Any, DummyVecEnv]) -> tuple[Any, DummyVecEnv]:
    """Let SB3's environments keep their final observations, since SB3 copies these after the reset."""
    for env in venvs[1].envs:
        env.keeps_final = True  # type: ignore[attr-defined]
    return venvs


class Counting(gym.Env[Any, Any]):
    """Counts its steps in an array of its own, and is truncated after five."""

    observation_space, action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)

    def __init__(self) -> None:
        self.count = np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.count[:] = 0
        return self.count, {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self.count, 0.0, False, bool(self.count[0] == 5), {}


class TestMemory:
    @pytest.mark.parametrize("space", [BOX, PICTURES], ids=str)
    def test_environments_may_change_returned_objects(self, space: spaces.Space[Any]) -> None:
        ours, theirs = right(pair(lambda number: Reusing(number, space)))
        run_both(ours, theirs)
        assert ours.buf_infos[1] is ours.envs[1].info  # type: ignore[attr-defined]

    @pytest.mark.parametrize("space", [BOX, PICTURES, PAIR], ids=str)
    def test_returned_values_do_not_change(self, space: spaces.Space[Any]) -> None:
        ours, _ = pair(lambda number: Scripted(number, space, general) if space is PAIR else Reusing(number, space))
        held = [ours.reset(), *(ours.step(np.ones(3, int)) for _ in range(30))]
        held_then = copy.deepcopy(held)
        for _ in range(30):
            ours.step(np.zeros(3, int))
        ours.reset()
        same(held, held_then)

    def test_returned_values_may_be_changed(self) -> None:
        ours, theirs = right(pair(Reusing))
        given: list[Any] = [ours.reset()]
        same(given[0], theirs.reset())
        given[0][:] = 99
        for _ in range(30):
            obs, rewards, dones, infos = ours.step(np.zeros(3, int))
            same((obs, rewards, dones, infos), theirs.step(np.zeros(3, int)))
            for array in (obs, rewards, dones):
                array[:] = 1
            for info in infos:
                info["array"][:] = 99
                info["nested"]["array"][:] = 99
                info["nested"]["more"] = 1
                info["point"].x.clear()
                info.clear()
            same_buffers(ours, theirs)
        same(ours.reset(), theirs.reset())

    @pytest.mark.parametrize("cls", [FastDummyVecEnv, DummyVecEnv])
    def test_records_and_keys_are_copies(self, cls: type[DummyVecEnv]) -> None:
        def infos(env: Any) -> dict[Any, Any]:
            return {PointKey(env.n_steps): np.zeros(1, [("n", "i8")])[0]}

        venv = cls([lambda: Scripted(0, infos=infos)])
        venv.reset()
        (given,) = venv.step(np.zeros(1, int))[3]
        key, own_key = next(iter(given)), next(iter(venv.buf_infos[0]))
        assert key == own_key
        assert key is not own_key
        given[key]["n"] = 99
        assert venv.buf_infos[0][own_key]["n"] == 0

    @pytest.mark.parametrize("cls", [FastDummyVecEnv, DummyVecEnv])
    @pytest.mark.parametrize("wrap", [Monitor, lambda env: EpisodeEnds(TimeLimit(Monitor(env), 3))])
    def test_a_reset_does_not_overwrite_final_observations(self, cls: type[DummyVecEnv], wrap: Any) -> None:
        finals = []

        def keep(given: dict[str, Any], _: dict[str, Any]) -> bool:
            finals.extend(info["terminal_observation"] for info in given["infos"] if "episode" in info)
            return True

        venv = cls([lambda: wrap(Counting())])
        ClipPPO("MlpPolicy", venv, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16, callback=keep)
        assert [final.tolist() for final in finals] == ([[5]] * 3 if wrap is Monitor else [[3]] * 5)

    def test_final_observations_are_copies(self) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        n_ends = 0
        for _ in range(30):
            _, _, dones, infos = ours.step(np.zeros(3, int))
            for index in np.flatnonzero(dones):
                n_ends += 1
                final = infos[index]["terminal_observation"]
                assert not np.shares_memory(final, ours.buf_infos[index]["terminal_observation"])
        assert n_ends > 3


class TestResets:
    def test_seeds_and_options_apply_to_one_reset(self) -> None:
        ours, theirs = pair(Scripted)
        for venv in (ours, theirs):
            venv.seed(7)
            venv.set_options([{"a": 1}, {}, {"b": np.ones(2)}])
        run_both(ours, theirs)
        run_both(ours, theirs)
        resets = [env.resets for env in ours.envs]  # type: ignore[attr-defined]
        same(resets, [env.resets for env in theirs.envs])  # type: ignore[attr-defined]
        assert [calls[0][0] for calls in resets] == [7, 8, 9]
        assert [calls[0][1] for calls in resets[:2]] == [{"a": 1}, None]
        assert all(call == (None, None) for calls in resets for call in calls[1:])

    def test_infos_of_resets_are_the_environments_own(self) -> None:
        ours, theirs = pair(Scripted)
        for venv in (ours, theirs):
            venv.reset()
        for _ in range(40):
            dones = ours.step(np.zeros(3, int))[2]
            theirs.step(np.zeros(3, int))
            same(ours.reset_infos, theirs.reset_infos)
            for index in np.flatnonzero(dones):
                n_resets = len(ours.envs[index].resets)  # type: ignore[attr-defined]
                assert ours.reset_infos[index]["n_resets"] == n_resets


class TestRefusals:
    def test_one_environment_twice(self) -> None:
        env = Scripted(0)
        messages = []
        for cls in (FastDummyVecEnv, DummyVecEnv):
            with pytest.raises(ValueError, match="returned the same instance") as refused:
                cls([lambda: env] * 2)
            messages.append(str(refused.value))
        assert messages[0] == messages[1]

    def test_too_few_actions(self) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        with pytest.raises(IndexError):
            ours.step(np.zeros(2, int))

    def test_observations_of_another_shape(self) -> None:
        for venv, text in zip(pair(Scripted), ("of its space's shape", "could not broadcast"), strict=True):
            venv.reset()
            venv.envs[1].observation_space = spaces.Box(-1, 1, (4,))
            with pytest.raises(ValueError, match=text):
                venv.step(np.zeros(3, int))


class TestAroundIt:
    @pytest.mark.parametrize("dumped", [pickle.dumps, cloudpickle.dumps])
    def test_a_pickled_copy_continues_as_sb3s_does(self, dumped: Callable[[Any], bytes]) -> None:
        ours, theirs = pair(lambda number: Scripted(number, infos=plain))
        run_both(ours, theirs)
        loaded = pickle.loads(dumped(ours))
        assert type(loaded) is FastDummyVecEnv
        run_both(loaded, pickle.loads(dumped(theirs)))

    @pytest.mark.parametrize(
        ("space", "wrap"),
        [
            (BOX, VecNormalize),
            (BOX, lambda venv: VecFrameStack(venv, 3)),
            (IMAGE, VecTransposeImage),
            (PICTURES, lambda venv: VecTransposeImage(VecFrameStack(venv, 2))),
            (MIXED, lambda venv: VecNormalize(venv, norm_obs_keys=["a", "b"])),
        ],
    )
    def test_sb3s_wrappers(self, space: spaces.Space[Any], wrap: Callable[[VecEnv], VecEnv], still_clock: None) -> None:
        ours, theirs = pair(lambda number: Monitor(Scripted(number, space)))
        run_both(wrap(ours), wrap(theirs))

    def test_clip_ppo_learns_the_same(self) -> None:
        models = []
        for cls in (FastDummyVecEnv, DummyVecEnv):
            env = FastVecNormalize(make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=cls))
            settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0}
            models.append(ClipPPO("MlpPolicy", env, **settings, device="cpu", engine="autograd").learn(256))
        assert type(models[0].env.unwrapped) is FastDummyVecEnv
        for name, wanted in models[1].policy.state_dict().items():
            # The same numbers in the same order: no difference at all.
            th.testing.assert_close(models[0].policy.state_dict()[name], wanted, rtol=0, atol=0)

    def test_sb3_evaluates_without_a_warning(self) -> None:
        training = make_vec_env("CartPole-v1", 2, vec_env_cls=FastDummyVecEnv)
        callback = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=32, n_eval_episodes=1, verbose=0)
        ClipPPO("MlpPolicy", training, n_steps=32, batch_size=32, device="cpu").learn(64, callback=callback)
        assert callback.last_mean_reward > 0
