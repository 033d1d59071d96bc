"""Files of models and statistics: hostile ones run no code, damaged ones are errors, and saving is atomic."""

import errno
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import hostile
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hostile import entries_of, pack, with_data
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_clipvf import ClipPPO, UnsafeFileError
from sb3_clipvf.envs import FastVecNormalize
from sb3_clipvf.files.archive import SMALL as SMALL_BYTES
from sb3_clipvf.files.archive import check_inner_zip
from sb3_clipvf.files.model import read_model
from sb3_clipvf.files.statistics import load_vec_normalize, read_pickle
from sb3_clipvf.files.trust import TRUST_VARIABLE

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
NET = {"net_arch": [4]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, seed=1, **SMALL).learn(16).save(path)
    return path


def load(path: Any, **kwargs: Any) -> ClipPPO:
    return ClipPPO.load(path, device="cpu", **kwargs)


def same_weights(first: Any, second: Any) -> bool:
    ours, theirs = first.policy.state_dict(), second.policy.state_dict()
    return ours.keys() == theirs.keys() and all(th.equal(ours[key], theirs[key]) for key in ours)


def own_schedule(progress_remaining: float) -> float:
    return 0.1 * progress_remaining


class OwnExtractor(FlattenExtractor):
    """A user's class."""


class OwnPolicy(ActorCriticPolicy):
    """A user's class."""


# ---------------------------------------------------------------- hostile files


class TestHostileModels:
    @pytest.mark.parametrize("key", ["learning_rate", "policy_kwargs", "ep_info_buffer", "an_attribute_of_its_own"])
    @pytest.mark.parametrize("make", hostile.REFUSED, ids=lambda make: make.__name__)
    def test_they_are_refused(self, make: Callable[[Path], bytes], key: str, model_path: Path, mark: Path) -> None:
        with_data(model_path, **{key: make(mark)})
        with pytest.raises(
            ValueError, match=f"`{key}` in .*model.zip (must hold only classes|could not be read)"
        ) as caught:
            load(model_path)
        assert isinstance(caught.value, UnsafeFileError) or make is hostile.torch_in_torch
        with pytest.raises(ValueError, match=key):
            load(io.BytesIO(model_path.read_bytes()), env=make_vec_env("CartPole-v1"))
        assert not mark.exists()

    @pytest.mark.parametrize("make", hostile.RUNNING, ids=lambda make: make.__name__)
    def test_they_run_where_they_are_trusted(
        self, make: Callable[[Path], bytes], model_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with_data(model_path, an_attribute_of_its_own=make(mark))
        load(model_path, trust_pickle=True)
        assert mark.exists()
        mark.unlink()
        monkeypatch.setenv(TRUST_VARIABLE, "1")
        with pytest.raises(UnsafeFileError):
            load(model_path, trust_pickle=False)
        assert not mark.exists()
        load(model_path)
        assert mark.exists()

    def test_replaced_attributes_are_skipped(self, model_path: Path, mark: Path) -> None:
        raw = hostile.os_system(mark)
        with_data(model_path, learning_rate=raw, clip_range=raw, lr_schedule=raw)
        assert load(model_path, learning_rate=0.5, custom_objects={"clip_range": 0.25}).learning_rate == 0.5
        assert not mark.exists()

    def test_the_message_gives_advice(self, model_path: Path, mark: Path) -> None:
        with_data(model_path, clip_range=hostile.os_system(mark))
        with pytest.raises(UnsafeFileError) as caught:
            load(model_path)
        for part in (
            f"`clip_range` in {model_path}",
            f"{os.name}.system" if os.name == "nt" else "posix.system",
            "trust_pickle=True",
            "SB3_CLIPVF_TRUST_PICKLE=1",
            "custom_objects={'clip_range': ...}",
        ):
            assert part in str(caught.value)

    def test_weights_are_tensors_only(self, model_path: Path, mark: Path) -> None:
        weights = io.BytesIO()
        th.save(hostile.Call(os.system, hostile.touch(mark)), weights)
        before = load(model_path)
        pack(model_path, {**entries_of(model_path), "policy.pth": weights.getvalue()})
        for trust in (None, True):
            with pytest.raises(UnsafeFileError, match=r"'policy.pth' in .* must hold tensors only, got \w+.system"):
                load(model_path, trust_pickle=trust)
        with pytest.raises(UnsafeFileError, match="must hold tensors only"):
            before.set_parameters(model_path, device="cpu")
        assert not mark.exists()

    @pytest.mark.parametrize("name", ["policy.action_net.weight.__class__", "policy_class", "own"])
    def test_further_tensors_are_those_that_the_class_declares(self, name: str, model_path: Path) -> None:
        class Declaring(ClipPPO):
            def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
                return super()._get_torch_save_params()[0], ["own"]

            def _setup_model(self) -> None:
                super()._setup_model()
                self.own = th.zeros(2)

        variables = io.BytesIO()
        th.save({name: th.ones(2)}, variables)
        pack(model_path, {**entries_of(model_path), "pytorch_variables.pth": variables.getvalue()})
        with pytest.raises(UnsafeFileError, match=f"only tensors that the algorithm declares .none., got '{name}'"):
            load(model_path)
        if name == "own":
            assert Declaring.load(model_path, device="cpu").own.tolist() == [1.0, 1.0]
        assert not {"data"} & (vars(th.nn.Parameter).keys() | vars(ActorCriticPolicy).keys())

    def test_set_parameters_reads_no_attributes(self, model_path: Path, mark: Path) -> None:
        model = load(model_path)
        with_data(model_path, learning_rate=hostile.os_system(mark))
        model.set_parameters(model_path, device="cpu")
        assert not mark.exists()

    def test_an_environment_is_refused(self, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Gymnasium imports the module before the colon.
        (tmp_path / "imported_by_name.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
        monkeypatch.syspath_prepend(tmp_path)
        for value in ("imported_by_name:CartPole-v1", pickle.dumps("imported_by_name:CartPole-v1")):
            with_data(model_path, env=value)
            with pytest.raises(UnsafeFileError, match="`env` in .* must be absent"):
                load(model_path)
        assert not (tmp_path / "mark").exists()
        load(with_data(model_path, env=None))

    @pytest.mark.parametrize("key", ["predict", "_setup_model", "__class__"])
    def test_no_attribute_replaces_a_method(self, key: str, model_path: Path) -> None:
        with pytest.raises(ValueError, match=f"`{key}` in .* must be absent: ClipPPO has a method"):
            load(with_data(model_path, **{key: 1}))

    def test_replaced_attributes_may_have_the_name_of_a_method(self, model_path: Path) -> None:
        with_data(model_path, dump_logs=1)
        assert load(model_path, custom_objects={"dump_logs": print}).dump_logs is print

    def test_the_checked_bytes_are_loaded(self, model_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_and_replace(path: Any) -> Any:
            file = read_model(path)
            with_data(model_path, learning_rate=hostile.os_system(mark))
            return file

        expected = load(model_path)
        monkeypatch.setattr("sb3_clipvf.clip_ppo.read_model", read_and_replace)
        assert same_weights(load(model_path), expected)
        assert not mark.exists()


class TestHostileStatistics:
    @pytest.mark.parametrize("make", hostile.REFUSED, ids=lambda make: make.__name__)
    def test_they_are_refused(self, make: Callable[[Path], bytes], tmp_path: Path, mark: Path) -> None:
        path = tmp_path / "vecnormalize.pkl"
        path.write_bytes(make(mark))
        for read in (FastVecNormalize.load, load_vec_normalize):
            with pytest.raises(ValueError, match="vecnormalize.pkl (must|could not be read)"):
                read(str(path), make_vec_env("CartPole-v1"))
        assert not mark.exists()

    def test_a_hostile_attribute(self, tmp_path: Path, mark: Path) -> None:
        path, env = tmp_path / "vecnormalize.pkl", make_vec_env("CartPole-v1")
        statistics = VecNormalize(env)
        statistics.extra = hostile.Call(os.system, hostile.touch(mark))
        statistics.save(str(path))
        with pytest.raises(UnsafeFileError, match=r"got \w+\.system, which could run any code"):
            FastVecNormalize.load(path, env)
        assert not mark.exists()
        FastVecNormalize.load(path, env, trust_pickle=True)
        assert mark.exists()


# ---------------------------------------------------------------- usual files


def squashed_box() -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1")


class ActionsOf(gym.Env[Any, Any]):
    """Any action space."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3, np.float32), 0.0, False, True, {}


def same_attributes(loaded: Any, model: Any, names: tuple[str, ...]) -> bool:
    return all(repr(getattr(loaded, name)) == repr(getattr(model, name)) for name in names)


class TestUsualModels:
    @pytest.mark.parametrize(
        ("policy", "make_env"),
        [
            ("MlpPolicy", lambda: gym.make("CartPole-v1")),
            ("CnnPolicy", lambda: FakeImageEnv(screen_height=40, screen_width=40)),
            ("MultiInputPolicy", lambda: SimpleMultiObsEnv(random_start=False)),
            ("SquashedMlpPolicy", squashed_box),
            ("SquashedCnnPolicy", lambda: FakeImageEnv(screen_height=40, screen_width=40, discrete=False)),
            ("SquashedMultiInputPolicy", lambda: SimpleMultiObsEnv(random_start=False, discrete_actions=False)),
            ("MlpPolicy", lambda: ActionsOf(spaces.MultiBinary(3))),
            ("MlpPolicy", lambda: ActionsOf(spaces.MultiDiscrete([2, 3]))),
        ],
    )
    def test_each_policy(self, policy: str, make_env: Callable[[], Any], tmp_path: Path) -> None:
        model = ClipPPO(policy, DummyVecEnv([make_env]), seed=0, **SMALL)
        model.learn(16)
        model.save(tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert type(loaded.policy) is type(model.policy)
        assert same_weights(loaded, model)
        assert loaded.observation_space == model.observation_space
        assert loaded.action_space == model.action_space
        assert same_attributes(loaded, model, ("ep_info_buffer", "_last_obs", "num_timesteps"))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"learning_rate": "lin_0.001", "clip_range": "cos_0.3", "ent_coef": "exp_0.01", "vf_coef": "const_0.5"},
            {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "clip_range": FloatSchedule(0.2), "clip_range_vf": None},
            {"kl_coef": 1.0, "adaptive_kl_target": 0.01, "lr_kl_target": 0.01, "learning_rate": 1e-3},
            {"learning_rate": np.float32(1e-3), "gamma": np.float64(0.9), "seed": np.int64(3)},
            {"use_sde": True, "sde_sample_freq": 4},
            {"policy_kwargs": {"activation_fn": th.nn.ELU, "optimizer_class": th.optim.SGD, "net_arch": {"pi": [4]}}},
            {
                "policy_kwargs": {
                    "features_extractor_class": FlattenExtractor,
                    "optimizer_kwargs": {"weight_decay": 0.1},
                }
            },
            {"tensorboard_log": Path("logs")},
        ],
        ids=lambda arguments: ",".join(arguments),
    )
    def test_each_kind_of_argument(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        model = ClipPPO("MlpPolicy", "Pendulum-v1", **{"seed": 0, **SMALL, **arguments})
        model.save(tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert same_weights(loaded, model)
        for name in {*arguments, "adaptive_kl", "adaptive_lr"} - {"learning_rate", "clip_range"}:
            assert getattr(loaded, name) == getattr(model, name), name
        for name in ("learning_rate", "clip_range"):
            ours, theirs = getattr(loaded, name), getattr(model, name)
            assert ours(0.3) == theirs(0.3) if callable(theirs) else ours == theirs

    @pytest.mark.filterwarnings("ignore:The file was not saved by ClipPPO")
    def test_files_of_sb3(self, tmp_path: Path) -> None:
        model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs=NET, **SMALL).learn(64)
        model.save(tmp_path / "model")
        loaded = load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
        assert same_weights(loaded, model)
        loaded.learn(16)

    @pytest.mark.parametrize("wrapper", [VecNormalize, FastVecNormalize])
    @pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", SimpleMultiObsEnv])
    def test_statistics(self, env: Any, wrapper: type[VecNormalize], tmp_path: Path) -> None:
        path = tmp_path / "vecnormalize.pkl"
        keys = ["vec"] if env is SimpleMultiObsEnv else None
        saved = wrapper(make_vec_env(env, 2, seed=0), gamma=0.9, norm_obs_keys=keys)
        saved.reset()
        saved.step(np.array([saved.action_space.sample() for _ in range(2)]))
        saved.save(str(path))
        for load_path in (path, str(path)):
            back = FastVecNormalize.load(load_path, make_vec_env(env, 3))
            assert type(back) is FastVecNormalize
            assert type(load_vec_normalize(load_path, make_vec_env(env, 3))) is VecNormalize
            assert (back.gamma, back.num_envs) == (0.9, 3)
            assert (back.ret_rms.var, back.ret_rms.count) == (saved.ret_rms.var, saved.ret_rms.count)
        with path.open("wb") as file:
            pickle.dump(saved, file)  # not by `save`
        assert FastVecNormalize.load(path, make_vec_env(env, 3)).gamma == 0.9

    def test_position_and_ownership_of_an_open_file(self, model_path: Path) -> None:
        with model_path.open("rb") as file:
            file.seek(7)
            load(file)
            assert file.tell() == 7
        buffer = io.BytesIO()
        load(model_path).save(buffer)  # leaves the position at the end
        assert same_weights(load(buffer), load(model_path))

    def test_the_suffix_may_be_omitted(self, model_path: Path) -> None:
        assert same_weights(load(model_path.with_suffix("")), load(str(model_path.with_suffix(""))))

    def test_objects_that_name_a_path(self, tmp_path: Path) -> None:
        class Named:
            def __fspath__(self) -> str:
                return str(tmp_path / "model.zip")

        model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)
        model.save(Named())  # type: ignore[arg-type]
        assert same_weights(load(Named()), model)
        model.set_parameters(Named())  # type: ignore[arg-type]


class TestClassesOfTheUser:
    def test_they_can_be_trusted_one_by_one(self, tmp_path: Path) -> None:
        kwargs = {"features_extractor_class": OwnExtractor, **NET}
        model = ClipPPO(OwnPolicy, "CartPole-v1", learning_rate=own_schedule, policy_kwargs=kwargs, **SMALL)
        model.save(tmp_path / "model")
        with pytest.raises(UnsafeFileError, match="got test_files_model.Own"):
            load(tmp_path / "model")
        with pytest.raises(UnsafeFileError, match="`learning_rate` in .* got test_files_model.own_schedule"):
            load(tmp_path / "model", trust_pickle=[OwnExtractor, OwnPolicy])
        loaded = load(tmp_path / "model", trust_pickle=[OwnExtractor, OwnPolicy, own_schedule])
        assert type(loaded.policy) is OwnPolicy
        assert type(loaded.policy.features_extractor) is OwnExtractor
        assert loaded.learning_rate is own_schedule
        replaced = {"policy_class": OwnPolicy, "policy_kwargs": kwargs, "learning_rate": own_schedule}
        assert same_weights(load(tmp_path / "model", custom_objects=replaced), model)
        assert same_weights(load(tmp_path / "model", trust_pickle=True), model)

    def test_lambdas_are_code_of_the_file(self, tmp_path: Path) -> None:
        ClipPPO("MlpPolicy", "CartPole-v1", clip_range=lambda p: 0.1 * p, **SMALL).save(tmp_path / "model")
        with pytest.raises(UnsafeFileError, match=r"`clip_range` in .* got code in the file itself \(by cloudpickle"):
            load(tmp_path / "model")
        assert load(tmp_path / "model", trust_pickle=True).clip_range(0.5) == 0.05
        assert load(tmp_path / "model", clip_range=0.3).clip_range == 0.3


class TestOtherVersions:
    """Fields that cannot be read: only the user can replace them."""

    @pytest.mark.parametrize(
        ("raw", "reason"),
        [
            (b"\x80\x04" + hostile.named("stable_baselines3.common.policies", "GonePolicy") + b".", "AttributeError"),
            (b"\x80\x04" + hostile.named("stable_baselines3.common.buffers", "Gone") + b".", "has no attribute 'Gone'"),
            (b"\x80\x04K", "ValueError"),
        ],
    )
    def test_there_is_no_silent_default(self, raw: bytes, reason: str, model_path: Path) -> None:
        with_data(model_path, gae_lambda=raw)
        for trust in (False, True):
            with pytest.raises(ValueError, match=r"`gae_lambda` in .* could not be read") as caught:
                load(model_path, trust_pickle=trust)
            assert "custom_objects={'gae_lambda': ...}" in str(caught.value)
            assert reason in str(caught.value) or trust
        assert load(model_path, custom_objects={"gae_lambda": 0.5}).gae_lambda == 0.5
        assert load(model_path, gae_lambda=0.5).gae_lambda == 0.5


# ---------------------------------------------------------------- damaged and foreign files


def outcome(content: bytes, expected: ClipPPO) -> str:
    """Load bytes; return the message of a documented error, or check the weights and return "loaded"."""
    try:
        model = load(io.BytesIO(content))
    except ValueError as error:
        return str(error)
    assert same_weights(model, expected)
    return "loaded"


class TestDamage:
    def test_truncated_files(self, saved: Path) -> None:
        content, expected = saved.read_bytes(), load(saved)
        lengths = np.linspace(0, len(content) - 1, 50).astype(int)
        messages = [outcome(content[:length], expected) for length in lengths]
        assert "wasn't a zip-file, but an empty file" in messages[0]
        assert all("cut short" in message for message in messages[1:])

    def test_flipped_bytes(self, saved: Path) -> None:
        content, expected = saved.read_bytes(), load(saved)
        rng = np.random.default_rng(0)
        # Most of the file is weights; its list of entries is at the end.
        places = [*rng.integers(len(content), size=60), *rng.integers(len(content) - 450, len(content), size=120)]
        outcomes = set()
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= int(rng.integers(1, 256))
            outcomes.add(outcome(bytes(damaged), expected).split(": ")[0])
        assert "loaded" in outcomes  # dates, versions and the like
        assert "the file is damaged or cut short" in outcomes

    @pytest.mark.parametrize("entry", ["data", "policy.pth"])
    @pytest.mark.parametrize("change", [-1, 1, 2**20])
    def test_entries_stored_in_another_number_of_bytes(self, entry: str, change: int, model_path: Path) -> None:
        content = bytearray(model_path.read_bytes())
        # The name is last in the list of entries, 46 bytes after the start of its record.
        place = content.rindex(entry.encode()) - 46 + 20
        (size,) = struct.unpack_from("<I", content, place)
        struct.pack_into("<I", content, place, size + change)
        with pytest.raises(ValueError, match=f"is damaged or cut short: '{entry}' has {size} bytes, stored in"):
            load(io.BytesIO(bytes(content)))

    def test_damage_below_the_checksums(self, model_path: Path) -> None:
        expected, entries = load(model_path), entries_of(model_path)
        rng = np.random.default_rng(1)
        for name in ("policy.pth", "policy.optimizer.pth", "data"):
            for place in rng.integers(len(entries[name]), size=40):
                damaged = bytearray(entries[name])
                damaged[place] ^= int(rng.integers(1, 256))
                pack(model_path, {**entries, name: bytes(damaged)})
                try:
                    load(model_path)
                except (ValueError, TypeError, RuntimeError) as error:
                    # Values in JSON may have a wrong type, or a network another size.
                    assert str(error)
        pack(model_path, entries)
        assert same_weights(load(model_path), expected)

    def test_damaged_pickles(self, tmp_path: Path) -> None:
        path, env = tmp_path / "vecnormalize.pkl", make_vec_env("CartPole-v1", 2)
        VecNormalize(env).save(str(path))
        content = path.read_bytes()
        rng = np.random.default_rng(0)
        for length in np.linspace(0, len(content) - 1, 40).astype(int):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="vecnormalize.pkl (could not be read|must be a pickle)"):
                FastVecNormalize.load(path, env)
        for place in rng.integers(len(content), size=200):
            damaged = bytearray(content)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                FastVecNormalize.load(path, env)
            except (ValueError, AssertionError) as error:  # SB3 asserts that the shapes agree
                assert str(error)


class TestForeignFiles:
    @pytest.mark.parametrize(
        "content", [b"", b"no zip at all", pickle.dumps([1]), b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18]
    )
    def test_other_files(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.zip"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.zip (wasn't a zip-file|is damaged|must be what `save` wrote)"):
            load(path)

    def test_other_zips(self, model_path: Path, tmp_path: Path) -> None:
        entries = entries_of(model_path)
        weights = tmp_path / "weights.zip"
        weights.write_bytes(entries["policy.pth"])
        with pytest.raises(ValueError, match="must hold no folders, got"):
            load(weights)
        for absent, what in (("data", "`data`"), ("policy.pth", "`policy.pth`"), ("policy.o", "`policy.o")):
            rest = {name: raw for name, raw in entries.items() if not name.startswith(absent.removesuffix(".pth"))}
            with pytest.raises(ValueError, match=f"must be what `save` wrote, but holds no {what}"):
                load(pack(model_path, rest))

    def test_a_folder_and_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError):
            load(tmp_path)
        with pytest.raises(FileNotFoundError, match="absent.zip"):
            load(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="absent.pkl"):
            FastVecNormalize.load(tmp_path / "absent.pkl", make_vec_env("CartPole-v1"))

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"[]", "`data` in .* must be a JSON object, got list"),
            (b"{", "`data` in .* must be JSON, but JSONDecodeError"),
            (b"\xff\xfe\x00", "`data` in .* must be JSON"),
            (b"[" * 100_000, "`data` in .* must be JSON, but RecursionError"),
            (b'{"gamma": {":serialized:": 3}}', "`gamma` in .* must be pickled as text"),
            (b'{"vf_clip": "max"}', "holds no policy_class, observation_space, action_space"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_other_data(self, data: bytes, match: str, model_path: Path) -> None:
        with pytest.raises(ValueError, match=match):
            load(pack(model_path, {**entries_of(model_path), "data": data}))

    def test_text_instead_of_a_pickle(self, model_path: Path) -> None:
        for text in ("?", "", "gAVLAS4"):
            entries = entries_of(model_path)
            data = {**json.loads(entries["data"]), "gamma": {":serialized:": text}}
            with pytest.raises(ValueError, match="`gamma` in .* could not be read"):
                load(pack(model_path, {**entries, "data": json.dumps(data).encode()}))

    @pytest.mark.parametrize("weights", [b"", b"x", b"PK\x03\x04", pickle.dumps([1])])
    def test_other_weights(self, weights: bytes, model_path: Path) -> None:
        model = load(model_path)
        pack(model_path, {**entries_of(model_path), "policy.pth": weights})
        for read in (load, model.set_parameters):
            with pytest.raises(ValueError, match=r"'policy.pth' in .* (could not be read|must hold|is damaged)"):
                read(model_path)

    @pytest.mark.parametrize("value", [3, {"a": 1}, spaces.Discrete(2)])
    def test_other_pickles(self, value: Any, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(value))
        assert read_pickle(path) == value
        with pytest.raises(ValueError, match=r"x.pkl must hold a VecNormalize, got"):
            FastVecNormalize.load(path, make_vec_env("CartPole-v1"))

    @pytest.mark.parametrize("name", ["ret_rms", "obs_rms", "gamma", "clip_obs", "observation_space"])
    @pytest.mark.parametrize("change", ["absent", "text"])
    def test_incomplete_statistics(self, name: str, change: str, tmp_path: Path) -> None:
        path, env = tmp_path / "x.pkl", make_vec_env("CartPole-v1")
        statistics = VecNormalize(env)
        delattr(statistics, name)
        if change == "text":
            setattr(statistics, name, "text")
        statistics.save(str(path))
        with pytest.raises(ValueError, match=r"x.pkl (must hold complete statistics|could not be read)"):
            FastVecNormalize.load(path, env)


# ---------------------------------------------------------------- bounds


class TestBounds:
    def test_bombs(self, model_path: Path) -> None:
        bomb = {**entries_of(model_path), "data": b" " * (SMALL_BYTES + 1)}
        pack(model_path, bomb, compression=zipfile.ZIP_DEFLATED)
        assert model_path.stat().st_size < 100_000
        with pytest.raises(ValueError, match="must not expand more than 100 times, got .* bytes that expand to 16,"):
            load(model_path)

    def test_bombs_in_the_weights(self, model_path: Path) -> None:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b" " * (SMALL_BYTES + 1))
        pack(model_path, {**entries_of(model_path), "policy.pth": inner.getvalue()})
        with pytest.raises(ValueError, match=r"'policy.pth' in .* must not expand"):
            load(model_path)

    @pytest.mark.parametrize("ending", [b"PK\x05\x06", b"PK\x05\x06" + b"\0" * 16])
    def test_bombs_in_what_only_torch_takes_for_a_zip(self, ending: bytes, model_path: Path) -> None:
        raw = entries_of(model_path)["policy.pth"] + ending
        assert isinstance(th.load(io.BytesIO(raw), weights_only=True), dict)
        with pytest.raises(ValueError, match="x is damaged or cut short"):
            check_inner_zip("x", raw)

    @pytest.mark.parametrize("change", ["locator", "offset"])
    def test_lists_of_entries_that_torch_finds_elsewhere(self, change: str, model_path: Path) -> None:
        raw = bytearray(entries_of(model_path)["policy.pth"])
        check_inner_zip("x", bytes(raw))
        end = raw.rindex(b"PK\x05\x06")
        assert raw[end - 20 : end - 16] == b"PK\x06\x07"
        raw[end - 12 if change == "locator" else end - 76 + 48] ^= 1
        with pytest.raises(ValueError, match="x is damaged or cut short: (its list|BadZipFile)"):
            check_inner_zip("x", bytes(raw))

    @pytest.mark.parametrize(
        "value",
        [th.zeros(1).expand(10_000), [[view] for view in th.zeros(5000).expand(6, 5000).unbind()]],
        ids=["one value", "many views"],
    )
    def test_tensors_larger_than_their_values(
        self, value: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sb3_clipvf.files.model.SMALL", 0)
        entries, optimizer = entries_of(model_path), io.BytesIO()
        state = th.load(io.BytesIO(entries["policy.optimizer.pth"]), weights_only=True)
        state["state"][0] = value
        th.save(state, optimizer)
        with pytest.raises(ValueError, match="'policy.optimizer.pth' .* no tensors larger than their values"):
            load(pack(model_path, {**entries, "policy.optimizer.pth": optimizer.getvalue()}))

    def test_false_sizes(self, model_path: Path) -> None:
        """No more bytes of an entry are read than its header states."""
        with zipfile.ZipFile(model_path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data", b" " * 2**20)
        content = model_path.read_bytes()
        small = content.replace((2**20).to_bytes(4, "little"), (16).to_bytes(4, "little"))
        assert small != content
        with pytest.raises(ValueError, match="is damaged or cut short: BadZipFile: Bad CRC-32"):
            load(io.BytesIO(small))

    def test_many_entries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: Path) -> None:
        monkeypatch.setattr("sb3_clipvf.files.archive.MAX_ENTRIES", 8)
        with pytest.raises(ValueError, match="must have at most 8 entries, got"):
            load(model_path)

    def test_memory(self, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sb3_clipvf.files.archive.free_memory", lambda: 3 * (SMALL_BYTES + 1000))
        with model_path.open("ab") as file:
            file.truncate(SMALL_BYTES + 2000)
        with pytest.raises(
            ValueError, match="must be small enough to be loaded, got 16 MiB. The limit is 16 MiB: a third"
        ):
            load(model_path)
        with pytest.raises(ValueError, match="must be small enough to be loaded"):
            FastVecNormalize.load(model_path, make_vec_env("CartPole-v1"))
        monkeypatch.setattr("sb3_clipvf.files.archive.free_memory", lambda: 2**20)
        with pytest.raises(ValueError, match="16 MiB: a third of the free memory, or 16 MiB if that is more"):
            load(model_path)

    @pytest.mark.parametrize("net_arch", [[100_000, 100_000], [1] * 5_000], ids=["wide", "deep"])
    def test_networks_larger_than_the_weights(
        self, model_path: Path, net_arch: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sb3_clipvf.files.model.ROOM", 2**20)
        entries = entries_of(model_path)
        data = json.loads(entries["data"])
        data["policy_kwargs"] = {"net_arch": net_arch}
        pack(model_path, {**entries, "data": json.dumps(data).encode()})
        with pytest.raises(ValueError, match=r"The policy in .* must be no larger than its weights, got a network of"):
            load(model_path)

    def test_networks_of_trusted_files_may_have_any_size(self, model_path: Path) -> None:
        model = ClipPPO.load(model_path, device="cpu", trust_pickle=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sb3_clipvf.files.model.ROOM", -(10**9))
            ClipPPO.load(model_path, device="cpu", trust_pickle=True)
            with pytest.raises(ValueError, match="no larger than its weights"):
                load(model_path)
        assert load(model_path).policy_kwargs == model.policy_kwargs

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    def test_a_name_twice(self, model_path: Path) -> None:
        with zipfile.ZipFile(model_path, "a") as archive:
            archive.writestr("data", b"{}")
        with pytest.raises(ValueError, match="must hold each entry once, got 'data' several times"):
            load(model_path)

    @pytest.mark.parametrize("name", ["../data", "/data", "__MACOSX/._policy.pth"])
    def test_paths(self, name: str, model_path: Path) -> None:
        with pytest.raises(ValueError, match="must hold no folders, got"):
            load(pack(model_path, {**entries_of(model_path), name: b""}))

    def test_encryption_and_other_compressions(self, model_path: Path) -> None:
        entries = entries_of(model_path)
        pack(model_path, entries, compression=zipfile.ZIP_BZIP2)
        with pytest.raises(ValueError, match="must be stored or deflated, got method 12"):
            load(model_path)
        pack(model_path, entries)
        content = bytearray(model_path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        with pytest.raises(ValueError, match="must not be encrypted"):
            load(io.BytesIO(bytes(content)))

    def test_deflated_models_load(self, model_path: Path) -> None:
        expected = load(model_path)
        pack(model_path, entries_of(model_path), compression=zipfile.ZIP_DEFLATED)
        assert same_weights(load(model_path), expected)


# ---------------------------------------------------------------- writing


def test_a_full_disk_leaves_the_old_file(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_path.read_bytes()
    model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"model.zip could not be written: No space left on device"):
        model.save(model_path)
    assert model_path.read_bytes() == before
    assert [path.name for path in model_path.parent.iterdir()] == ["model.zip"]


def test_an_error_while_the_model_is_read_leaves_the_old_file(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_path.read_bytes()
    model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)

    def failing(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(th, "save", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.save(model_path)
    assert model_path.read_bytes() == before


def test_suffixes_folders_and_links(tmp_path: Path) -> None:
    model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)
    model.save(tmp_path / "plain")
    model.save(str(tmp_path / "with.suffix"))
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder. Will save instead to"):
        model.save(tmp_path / "folder")
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        model.save(tmp_path / "new" / "model")
    (tmp_path / "link.zip").symlink_to(tmp_path / "plain.zip")
    (tmp_path / "plain.zip").write_bytes(b"")
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"plain.zip", "with.suffix", "folder.zip_2", "new/model.zip", "link.zip"}
    for name in names:
        assert ClipPPO.load(tmp_path / name, device="cpu").n_steps == 16


def test_attributes_that_hide_methods_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WithDefault(ClipPPO):
        net_class = FlattenExtractor

    model = WithDefault("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)
    model.dump_logs, model.net_class, model.kept = print, th.nn.Tanh, 3
    for _ in range(2):
        model.save(tmp_path / "model")
    assert [message for message in caplog.messages if "Not saved" in message] == [
        "Not saved, since WithDefault has methods, functions or classes of these names: `dump_logs`, `net_class`. A "
        "loaded model has those of its class. Use other names for attributes of the model."
    ]
    loaded = WithDefault.load(tmp_path / "model", device="cpu")
    assert (loaded.net_class, loaded.kept) == (FlattenExtractor, 3)
    assert "dump_logs" not in vars(loaded)


def test_open_files_are_written_at_their_position(tmp_path: Path) -> None:
    model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, **SMALL)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"before")
        model.save(file)
        assert not file.closed
    content = (tmp_path / "file").read_bytes()
    assert content.startswith(b"before")
    assert ClipPPO.load(io.BytesIO(content[6:]), device="cpu").n_steps == 16
    with (tmp_path / "file").open("rb") as file, pytest.raises(ValueError, match="Expected a writable file"):
        model.save(file)
