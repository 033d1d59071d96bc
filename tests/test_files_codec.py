"""Values as JSON: which attributes of models are JSON or pickles, exact round trips, hostile and damaged JSON."""

import enum
import io
import json
import math
import os
import pickletools
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hostile import entries_of, pack, with_data
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_clipvf import ClipPPO, UnsafeFileError
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.files import codec
from sb3_clipvf.files.allowlist import NotAllowedError
from sb3_clipvf.files.model import read_model
from sb3_clipvf.files.trust import trust_of

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
NET = {"net_arch": [4]}


@pytest.fixture(autouse=True)
def _no_earlier_warnings() -> None:
    codec._warn_about_pickles.cache_clear()


def own_schedule(progress_remaining: float) -> float:
    return 1e-4 * progress_remaining


class OwnExtractor(FlattenExtractor):
    """A user's class."""


def make(env: Any = "CartPole-v1", policy: Any = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    return ClipPPO(policy, env, **{**SMALL, "policy_kwargs": NET, **kwargs})


def on_cheetah(**kwargs: Any) -> ClipPPO:
    return make("HalfCheetah-v5", **kwargs)


def resumed(folder: Path) -> ClipPPO:
    env = make_vec_env("CartPole-v1", 2)
    make(env).learn(64, callback=TrainingCheckpoint(32, folder / "checkpoints", on_signal=False))
    model = ClipPPO.resume(folder / "checkpoints", make_vec_env("CartPole-v1", 2), device="cpu")
    return model.learn(32, reset_num_timesteps=False)


MODELS: dict[str, tuple[Callable[[Path], ClipPPO], set[str]]] = {
    "the default": (lambda _: ClipPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(64), set()),
    "strings": (lambda _: on_cheetah(learning_rate="lin_0.001", ent_coef="cos_0.01").learn(16), set()),
    "SB3's schedules": (lambda _: on_cheetah(learning_rate=LinearSchedule(1e-3, 1e-4, 0.5)), set()),
    "functions": (
        lambda _: on_cheetah(learning_rate=own_schedule, clip_range=lambda p: 0.2 * p),
        {"learning_rate", "clip_range"},
    ),
    "dicts": (lambda _: make(SimpleMultiObsEnv(), "MultiInputPolicy").learn(16), set()),
    "SB3's and torch's classes": (
        lambda _: make(
            policy_kwargs={
                "net_arch": {"pi": [4], "vf": (5,)},
                "activation_fn": nn.ReLU,
                "optimizer_class": th.optim.AdamW,
                "features_extractor_class": FlattenExtractor,
            }
        ),
        set(),
    ),
    "own extractor": (lambda _: make(policy_kwargs={"features_extractor_class": OwnExtractor}), {"policy_kwargs"}),
    "gSDE": (lambda _: make("Pendulum-v1", use_sde=True, sde_sample_freq=4).learn(16), set()),
    "controllers": (lambda _: make(kl_coef=1.0, adaptive_kl_target=0.01, lr_kl_target=0.01).learn(16), set()),
    "resumed": (resumed, set()),
    "paths": (lambda folder: make(tensorboard_log=folder / "logs"), set()),
}


def attributes_in(file: Any) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        data = json.loads(archive.read("data"))
    assert isinstance(data, dict)
    return data


def pickled_in(file: Any) -> set[str]:
    """Return the attributes that are pickles, and check that no other text in the file is one."""
    data = attributes_in(file)
    found = {name for name, item in data.items() if isinstance(item, dict) and ":serialized:" in item}
    assert ":serialized:" not in json.dumps({name: item for name, item in data.items() if name not in found})
    assert data[codec.NOTE] == {":serialized:": None}
    return found - {codec.NOTE}


def same(first: Any, second: Any) -> bool:
    """Return whether values, types and contents of containers are equal to the last bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple | deque):
        lengths = getattr(first, "maxlen", None) == getattr(second, "maxlen", None) and len(first) == len(second)
        return lengths and all(map(same, first, second))
    if isinstance(first, np.random.Generator):
        return bool(first.bit_generator.state == second.bit_generator.state)
    if isinstance(first, spaces.Space | LinearSchedule):
        return same(vars(first), vars(second))
    return bool(first == second)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_users_own_objects_are_pickled(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build, expected = MODELS[name]
    model = build(tmp_path)
    caplog.clear()
    model.save(tmp_path / "model")
    assert pickled_in(tmp_path / "model.zip") == expected
    warnings = [text for text in caplog.messages if "Saved as pickles" in text]
    assert len(warnings) == bool(expected)
    assert all(f"`{attribute}`" in warnings[0] for attribute in expected)
    model.save(tmp_path / "model")
    assert caplog.text.count("Saved as pickles") == bool(expected)


@pytest.mark.parametrize("name", MODELS)
def test_all_saved_attributes_are_loaded(name: str, tmp_path: Path) -> None:
    build, _ = MODELS[name]
    model = build(tmp_path)
    model.action_space.seed(7)  # its random state is saved, too
    model.save(tmp_path / "model")
    file, ours = read_model(tmp_path / "model"), model._saved_attributes()
    theirs = {**(file.data or {}), **file.unpickled(trust_of(True), ())}
    assert theirs.pop(codec.NOTE) is None
    assert ours.keys() == theirs.keys()
    # A lambda is loaded as another object.
    assert [key for key in ours if not same(ours[key], theirs[key])] == ["clip_range"] * (name == "functions")
    loaded = ClipPPO.load(tmp_path / "model", device="cpu", trust_pickle=True)
    assert loaded._saved_attributes().keys() == ours.keys()
    for key, weights in model.policy.state_dict().items():
        assert th.equal(weights, loaded.policy.state_dict()[key])
    assert str(model.policy.optimizer.state_dict()) == str(loaded.policy.optimizer.state_dict())


def test_statistics_and_observations_are_loaded(tmp_path: Path) -> None:
    model = make(make_vec_env("CartPole-v1", 3)).learn(200)
    model.save(tmp_path / "model")
    loaded = ClipPPO.load(tmp_path / "model", device="cpu")
    assert len(loaded.ep_info_buffer) > 1
    assert loaded.ep_info_buffer == model.ep_info_buffer
    assert loaded.ep_info_buffer.maxlen == 100
    assert loaded._last_obs.shape == (3, 4)
    np.testing.assert_array_equal(loaded._last_obs, model._last_obs)
    loaded._last_obs[0] = 0  # arrays are writeable


def test_a_default_model_holds_only_torchs_pickles(tmp_path: Path) -> None:
    MODELS["the default"][0](tmp_path).save(tmp_path / "model")
    entries = entries_of(tmp_path / "model.zip")
    assert entries.keys() == {
        *("data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"),
        *("_stable_baselines3_version", "system_info.txt"),
    }
    for name, raw in entries.items():
        if name.endswith(".pth"):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                streams = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
            assert len(streams) == 1
        else:
            raw.decode("utf-8")
    # Texts of `data` that are pickles in base64 begin with the instruction PROTO.
    assert "gAS" not in entries["data"].decode()
    assert "gAU" not in entries["data"].decode()
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(entries["data"]))


def test_plain_values_are_readable(tmp_path: Path) -> None:
    make(clip_range="cos_0.3").save(tmp_path / "model")
    data = attributes_in(tmp_path / "model.zip")
    assert (data["clip_range"], data["n_steps"], data["policy_kwargs"]) == ("cos_0.3", 16, {"net_arch": [4]})
    assert data["policy_class"]["value"] == {"~": "class", "v": "stable_baselines3.common.policies.ActorCriticPolicy"}
    assert data["observation_space"][":type:"] == "<class 'gymnasium.spaces.box.Box'>"


@pytest.mark.parametrize(
    "value",
    [
        {"~": 1},
        {":serialized:": "gASVBAAAAAAAAABdlC4="},
        {":clipvf:": 1, "value": 2},
        {"deep": [{":serialized:": ""}]},
        {1: (2, [b"\x00"])},
        OrderedDict(b={"~": 1}, a=(2,)),
        float("inf"),
        np.float64(0.5),
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 3), np.float16),
        np.dtype(">f4"),
        th.Size([3, 4]),
        {"a": (np.str_("text"), [th.Size([])])},
        th.zeros(2, 3),
        nn.Tanh,
        spaces.Tuple([spaces.MultiBinary([2, 3]), spaces.MultiDiscrete([2, 3]), spaces.Discrete(3, start=-1)]),
        spaces.Dict({"b": spaces.Box(0, 255, (2, 2), np.uint8, seed=3), "a": spaces.Box(-np.inf, 1.0, (2,))}),
    ],
    ids=repr,
)
def test_ambiguous_and_rare_values(value: Any) -> None:
    written = json.loads(json.dumps(codec.encoded({"key": value}), allow_nan=False))["key"]
    assert not (isinstance(written, dict) and ":serialized:" in written)
    found = codec.decoded(written)
    assert th.equal(found, value) if isinstance(value, th.Tensor) else same(found, value)


@pytest.mark.parametrize(
    "value",
    [
        *({1, 2}, np.array([None]), np.array(["text"]), th.zeros(1, requires_grad=True)),
        *(
            len,
            own_schedule,
            os.system,
            OrderedDict,
            ActorCriticPolicy.predict,
            np.random.Generator(np.random.MT19937()),
        ),
        *(hostile, object(), type("Box", (spaces.Box,), {})(0, 1, (2,))),
    ],
    ids=lambda value: str(type(value)),
)
def test_other_values_are_left_to_pickle(value: Any) -> None:
    assert codec.encoded({"key": value})["key"] is value
    assert codec.encoded({"key": [value]})["key"][0] is value


class Mode(enum.IntEnum):
    """Values that JSON writes as numbers."""

    A = 1


class Word(enum.StrEnum):
    """Values that JSON writes as text."""

    B = "b"


class Point(NamedTuple):
    """A value that JSON writes as a list."""

    x: float
    y: float


@pytest.mark.parametrize("value", [Mode.A, Word.B, Point(1.0, 2.0), Counter("aab"), defaultdict(list, a=[1])], ids=repr)
def test_subclasses_of_plain_types_come_back_as_they_are(
    value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    model.own, model.dict_of_it = value, {"a": [value, (1,)]}
    model.save(tmp_path / "model")
    assert "pickles, since JSON cannot express them: `own`" in caplog.text
    assert pickled_in(tmp_path / "model.zip") == {"own", "dict_of_it"}
    loaded = ClipPPO.load(tmp_path / "model", device="cpu", trust_pickle=True)
    assert same(loaded.own, value) and same(loaded.dict_of_it, {"a": [value, (1,)]})
    with pytest.raises(UnsafeFileError, match="`own` in"):
        ClipPPO.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("seed", [None, 3, [1, 2**70], np.random.SeedSequence(5, spawn_key=(1, 2))], ids=str)
def test_generators_keep_what_they_spawn_from(seed: Any) -> None:
    generator = np.random.default_rng(seed)
    generator.spawn(2)
    written = json.loads(json.dumps(codec.encoded({"key": [generator]}), allow_nan=False))["key"]
    first, second = (codec.decoded(written)[0] for _ in range(2))
    assert generator.random() == first.random() == second.random()
    assert generator.spawn(1)[0].random() == first.spawn(1)[0].random() == second.spawn(1)[0].random()
    written["value"][0]["seeds"][2] = "x"
    with pytest.raises(NotAllowedError, match="SeedSequence"):
        codec.decoded(written)
    del written["value"][0]["seeds"]  # files of older versions
    assert codec.decoded(written)[0].bit_generator.state["bit_generator"] == "PCG64"


def test_attributes_are_excluded_and_included(tmp_path: Path) -> None:
    model = make(gamma=0.5)
    model.save(tmp_path / "without", exclude=["gamma"])
    assert "gamma" not in attributes_in(tmp_path / "without.zip")
    model.save(tmp_path / "with", exclude=["gamma"], include=["gamma", "_engine_choice"])
    assert {"gamma", "_engine_choice"} <= attributes_in(tmp_path / "with.zip").keys()
    model.save(tmp_path / "never", include=["policy"])
    assert "policy" not in attributes_in(tmp_path / "never.zip")


def test_a_checkpoint_has_the_same_form(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2)
    make(env).learn(32, callback=TrainingCheckpoint(32, tmp_path, on_signal=False))
    assert pickled_in(tmp_path / "checkpoint_32.zip") == set()


# ---------------------------------------------------------------- other readers


def test_models_of_older_versions_load(tmp_path: Path) -> None:
    """Their `data` has SB3's form: a pickle for each value that is no JSON."""
    model = make().learn(16)
    super(type(model).__mro__[1], model).save(tmp_path / "old")
    data = attributes_in(tmp_path / "old.zip")
    assert all(":serialized:" in data[name] for name in ("policy_class", "observation_space", "ep_info_buffer"))
    ours, theirs = model._saved_attributes(), ClipPPO.load(tmp_path / "old", device="cpu")._saved_attributes()
    assert [key for key in ours if not same(ours[key], theirs[key])] == []


def test_sb3_takes_weights_and_numbers_from_the_file(tmp_path: Path) -> None:
    model = make(seed=3).learn(16)
    model.save(tmp_path / "model")
    host = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, device="cpu")
    host.set_parameters(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert same(host.predict(observations, deterministic=True), model.predict(observations, deterministic=True))
    assert str(host.policy.optimizer.state_dict()["state"]) == str(model.policy.optimizer.state_dict()["state"])
    with pytest.warns(UserWarning, match="this file was saved by sb3_clipvf.ClipPPO"):
        data, parameters, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert data is not None
    assert (data["num_timesteps"], data["n_steps"], data["seed"]) == (16, 16, 3)
    assert parameters.keys() == {"policy", "policy.optimizer"}


@pytest.mark.parametrize("name", ["checkpoints/checkpoint_32", "model"])
def test_ppo_load_warns_of_the_right_reader(name: str, tmp_path: Path) -> None:
    make().learn(32, callback=TrainingCheckpoint(32, tmp_path / "checkpoints", on_signal=False)).save(
        tmp_path / "model"
    )
    with (
        pytest.warns(UserWarning, match=r"saved by sb3_clipvf.ClipPPO. Load it with ClipPPO.load, or .*set_parameters"),
        pytest.raises(ValueError, match="OpenAI Gym"),  # SB3's message about a space that it cannot read
    ):
        PPO.load(tmp_path / name, device="cpu")
    # The note's advice works, the loaded model has no note, and the next file has one.
    PPO("MlpPolicy", "CartPole-v1", policy_kwargs=NET, device="cpu").set_parameters(tmp_path / name)
    model = ClipPPO.load(tmp_path / name, device="cpu")
    assert codec.NOTE not in vars(model)
    model.save(tmp_path / "again")
    assert list(attributes_in(tmp_path / "again.zip")).count(codec.NOTE) == 1


def test_a_pickle_instead_of_the_note_is_not_read(tmp_path: Path) -> None:
    make().save(tmp_path / "model")
    with_data(tmp_path / "model.zip", **{codec.NOTE: hostile.os_system(tmp_path / "mark")})
    ClipPPO.load(tmp_path / "model", device="cpu")
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------- hostile and damaged JSON


def marked(tree: Any, version: Any = codec.FORMAT) -> dict[str, Any]:
    return {codec.ENCODED: version, "value": tree}


def array(shape: list[Any], dtype: str = "<f4", raw: str = "") -> dict[str, Any]:
    return {"~": "array", "v": raw, "dtype": dtype, "shape": shape}


NAMED = [
    {"~": "class", "v": "os.system"},
    {"~": "class", "v": "builtins.eval"},
    {"~": "class", "v": "stable_baselines3.common.policies.warnings.sys.modules"},
    {"~": "class", "v": "collections.OrderedDict"},
    {"~": "object", "class": "subprocess.Popen", "v": {}},
    {"~": "object", "class": "stable_baselines3.common.policies.ActorCriticPolicy", "v": {}},
    {"~": "object", "class": "gymnasium.spaces.box.Box", "v": [1]},
    array([1], "|O"),
    array([1], "<f4,<f4"),
    array([2**40]),
    array([-1]),
    array(["x"]),
    {"~": "generator", "v": {"bit_generator": "MT19937"}},
]

DAMAGED = [
    {"~": "object", "class": "gymnasium.spaces.box.Box", "v": {"_shape": {"~": "tuple", "v": [2]}}},
    {"~": "nothing", "v": 1},
    {"~": "nothing"},
    {"~": "array", "v": "?", "dtype": "<f4", "shape": [1]},
    {"~": "dict", "v": [[[], 1]]},
    {"~": "dict", "v": 3},
    {"~": "float", "v": "x"},
    {"~": "class", "v": "stable_baselines3.common.policies.Gone"},
    {"~": "generator", "v": {"bit_generator": "PCG64"}},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    make().save(path)
    return path


@pytest.mark.parametrize("key", ["learning_rate", "observation_space", "of_its_own"])
@pytest.mark.parametrize("tree", NAMED, ids=str)
def test_json_that_names_what_is_not_on_the_list_is_refused(tree: Any, key: str, model_path: Path) -> None:
    with_data(model_path, **{key: marked(tree)})
    for trust in (False, True):
        with pytest.raises(UnsafeFileError, match=f"`{key}` in .*model.zip must hold only classes that are known"):
            ClipPPO.load(model_path, device="cpu", trust_pickle=trust)


@pytest.mark.parametrize("tree", DAMAGED, ids=str)
def test_damaged_json_is_an_error(tree: Any, model_path: Path) -> None:
    with_data(model_path, gamma=marked(tree))
    with pytest.raises(ValueError, match=r"`gamma` in .*model.zip could not be read: .*custom_objects=\{'gamma'"):
        ClipPPO.load(model_path, device="cpu")
    assert ClipPPO.load(model_path, device="cpu", custom_objects={"gamma": 0.5}).gamma == 0.5


def test_json_of_another_version_and_without_a_value(model_path: Path) -> None:
    with_data(model_path, gamma=marked(0.5, version=2))
    with pytest.raises(ValueError, match=r"its format is 2, and this version of sb3_clipvf reads 1"):
        ClipPPO.load(model_path, device="cpu")
    with_data(model_path, gamma={codec.ENCODED: 1})
    with pytest.raises(ValueError, match=r"`gamma` in .* could not be read: KeyError"):
        ClipPPO.load(model_path, device="cpu")


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deep_json_is_refused(depth: int, model_path: Path) -> None:
    deep = '{"~":"tuple","v":[' * depth + "1" + "]}" * depth
    entries = entries_of(model_path)
    raw = json.dumps({**json.loads(entries["data"]), "gamma": "@"}).replace('"@"', f'{{":clipvf:":1,"value":{deep}}}')
    pack(model_path, {**entries, "data": raw.encode()})
    with pytest.raises(ValueError, match=r"RecursionError"):
        ClipPPO.load(model_path, device="cpu")


def test_json_of_many_values_is_refused_before_it_is_parsed(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(model_path)
    data = json.dumps({**json.loads(entries["data"]), "gamma": marked([[]] * 1_000_000)}, separators=(",", ":"))
    pack(model_path, {**entries, "data": data.encode()})
    monkeypatch.setattr("sb3_clipvf.files.archive.free_memory", lambda: 100 * 2**20)
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match="the values of `data` in .* must be small enough to be loaded, got 19. MiB"):
        ClipPPO.load(model_path, device="cpu")


# ---------------------------------------------------------------- trees as bytes


def round_trip(tree: Any) -> Any:
    return codec.from_bytes(*codec.to_bytes(codec.frozen(tree)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        2**130,
        0.1 + 0.2,
        5e-324,
        math.inf,
        -math.inf,
        "naïve ~",
        b"",
        b"\x00\xff",
        np.float32(0.1),
        np.int8(-5),
        np.bool_(True),
        [],
        (),
        {},
        (1, (2.5, [None])),
        [{"a": (1,)}],
        {1: "one", (2, 3): "two", None: []},
        {"~": "tuple", "v": [1]},
        deque([1, 2], maxlen=2),
        OrderedDict([("~", 1), (2, (3,))]),
        deque([(1,)]),
    ],
    ids=repr,
)
def test_values_are_equal_and_of_the_same_type(value: Any) -> None:
    found = round_trip(value)
    assert found == value
    assert type(found) is type(value)
    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
    assert getattr(found, "maxlen", None) == getattr(value, "maxlen", None)


def test_nan_and_the_sign_of_zero_are_kept() -> None:
    assert math.isnan(round_trip(math.nan))
    assert math.copysign(1.0, round_trip(-0.0)) == -1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64, bool, "U5", ">f8"])
def test_arrays_are_equal_to_the_last_bit(dtype: Any) -> None:
    array = np.arange(6).reshape(2, 3).T.astype(dtype)
    found = round_trip({"array": array, "scalar": np.array(1, dtype)})
    assert found["array"].dtype == array.dtype
    assert found["array"].tobytes() == np.ascontiguousarray(array).tobytes()
    assert found["scalar"].shape == ()


@pytest.mark.parametrize("values", [th.tensor(1.5), th.arange(6.0).reshape(2, 3).T, th.zeros(2, 0)])
def test_tensors_of_bfloat16_are_kept(values: th.Tensor) -> None:
    tensor = values.bfloat16()
    (encoded,) = [value for name, value in codec.encoded({"own": tensor}).items() if name == "own"]
    for found in (*round_trip([tensor]), codec.decoded(json.loads(json.dumps(encoded)))):
        assert found.dtype is th.bfloat16 and th.equal(found, tensor)


@pytest.mark.parametrize("tensor", [th.zeros(2, dtype=th.float8_e4m3fn), th.zeros(2, 3).to_sparse()])
def test_other_tensors_are_refused_by_name(tensor: th.Tensor) -> None:
    with pytest.raises(TypeError, match=r"`state\['own'\]` must be a dense tensor of .*, got torch\."):
        codec.frozen({"own": tensor})


def test_tensors_stay_tensors() -> None:
    found = round_trip([th.get_rng_state(), th.zeros(2, 0), th.tensor(3.0)])
    assert all(isinstance(tensor, th.Tensor) for tensor in found)
    assert th.equal(found[0], th.get_rng_state())
    assert found[1].shape == (2, 0)
    assert found[2].dtype == th.float32


def test_frozen_trees_share_no_memory() -> None:
    rewards, array, tensor = [1.0], np.zeros(2), th.zeros(2)
    frozen = codec.frozen({"rewards": rewards, "nested": [[rewards]], "array": array, "tensor": tensor})
    rewards.append(2.0)
    array[0] = tensor[0] = 5
    assert frozen["rewards"] == [1.0]
    assert frozen["nested"] == [[[1.0]]]
    assert frozen["array"].tolist() == frozen["tensor"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "named"),
    [(object(), "builtins.object"), ({"a": [len]}, r"state\['a'\]\[0\]"), (np.array([None]), "object")],
)
def test_other_objects_are_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        codec.frozen(value)


@pytest.mark.parametrize(
    ("text", "archive", "error"),
    [
        (b"{", codec.to_bytes({})[1], ValueError),
        (b'{"~":"array","v":"a7"}', codec.to_bytes({})[1], KeyError),
        (b'{"~":"object","v":"a0"}', codec.to_bytes([np.zeros(1)])[1], ValueError),
        (b"{}", b"no archive", ValueError),
        (b"[" * 100_000, codec.to_bytes({})[1], RecursionError),
    ],
    ids=["cut short", "no such array", "no such kind", "no archive", "too deep"],
)
def test_other_bytes_are_an_error(text: bytes, archive: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        codec.from_bytes(text, archive)


def test_arrays_of_objects_are_not_unpickled() -> None:
    stream = io.BytesIO()
    np.savez(stream, a0=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        codec.from_bytes(b'{"~":"array","v":"a0"}', stream.getvalue())
