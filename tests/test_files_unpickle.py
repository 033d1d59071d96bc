"""The pickle machine: what it rebuilds, what it refuses, and that it never runs what it refuses."""

import io
import pathlib
import pickle
import pickletools
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import hostile
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import policies, torch_layers
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

import sb3_clipvf
from sb3_clipvf import schedules
from sb3_clipvf.files.allowlist import NotAllowedError
from sb3_clipvf.files.trust import TRUST_VARIABLE, Trust, UnsafeFileError, trust_of
from sb3_clipvf.files.unpickle import unpickle
from sb3_clipvf.policies import SquashedActorCriticPolicy

PLAIN: list[Any] = [
    None,
    [True, False, -1, 10**30, 0.5, "text", b"bytes", (), (1,), (1, 2, 3, 4)],
    {"a": {"b": [1]}, 2: {3}, None: frozenset({4})},
    OrderedDict(b=1, a=2),
    deque([{"r": 1.5, "l": 3}], maxlen=100),
    deque([1, 2]),
    pathlib.Path("/some/folder"),
    "x" * 300,
]
CLASSES = [
    policies.ActorCriticPolicy,
    SquashedActorCriticPolicy,
    torch_layers.NatureCNN,
    th.nn.Tanh,
    th.nn.Identity,
    th.optim.AdamW,
    th.float32,
    np.float32,
]
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(6).reshape(2, 3)[:, ::-1],
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([True, False]),
    np.zeros((0, 3)),
    np.float64(0.25),
    np.int64(3),
    np.uint8(7),
    np.array(2.5, ">f8"),
]
SPACES = [
    spaces.Box(-1.0, np.inf, (3,)),
    spaces.Box(0, 255, (2, 2, 3), np.uint8),
    spaces.Discrete(4, start=1),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary(3),
    spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (2,))}),
    spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))),
]
SCHEDULES = [
    FloatSchedule(LinearSchedule(1e-3, 0.0, 0.5)),
    ConstantSchedule(0.1),
    *(schedules.make_schedule(f"{kind}_0.2", "clip_range") for kind in ("lin", "cos", "exp", "const")),
    schedules.make_schedule(ConstantSchedule(0.1), "clip_range"),
]


@pytest.fixture(params=[3, 4, 5])
def rebuilt(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return lambda value: unpickle(pickle.dumps(value, request.param), Trust())


class TestWhatIsRebuilt:
    @pytest.mark.parametrize("value", PLAIN, ids=repr)
    def test_plain_data(self, value: Any) -> None:
        for protocol in (4, 5):
            back = unpickle(pickle.dumps(value, protocol), Trust())
            assert back == value
            assert type(back) is type(value)
            assert getattr(back, "maxlen", None) == getattr(value, "maxlen", None)

    def test_shared_objects_stay_shared(self, rebuilt: Callable[[Any], Any]) -> None:
        shared = [1]
        first, second = rebuilt([shared, shared])
        assert first is second

    @pytest.mark.parametrize("value", CLASSES)
    def test_classes_are_named(self, value: Any, rebuilt: Callable[[Any], Any]) -> None:
        assert rebuilt(value) is value

    @pytest.mark.parametrize("value", ARRAYS, ids=repr)
    def test_arrays_and_numbers_of_numpy(self, value: Any, rebuilt: Callable[[Any], Any]) -> None:
        back = rebuilt(value)
        assert type(back) is type(value)
        # Some protocols convert numbers to the machine's byte order.
        assert (back.shape, back.dtype.newbyteorder("=")) == (value.shape, value.dtype.newbyteorder("="))
        np.testing.assert_array_equal(back, value)

    @pytest.mark.parametrize("space", SPACES, ids=repr)
    def test_spaces_with_their_random_state(self, space: spaces.Space[Any], rebuilt: Callable[[Any], Any]) -> None:
        space.seed(3)
        space.sample()
        back = rebuilt(space)
        assert back == space
        assert repr(back.sample()) == repr(space.sample())

    def test_random_generators(self, rebuilt: Callable[[Any], Any]) -> None:
        generator = np.random.default_rng(3)
        generator.random(5)
        back = rebuilt(generator)
        assert back.random() == generator.random()
        assert back.bit_generator.seed_seq.spawn(1)[0].entropy == 3

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
    def test_schedules(self, schedule: Any, rebuilt: Callable[[Any], Any]) -> None:
        back = rebuilt(schedule)
        assert type(back) is type(schedule)
        assert [back(p) for p in (1.0, 0.3)] == [schedule(p) for p in (1.0, 0.3)]

    def test_tensors(self, rebuilt: Callable[[Any], Any]) -> None:
        matrix = th.arange(6.0).reshape(2, 3).T
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torch warns when it pickles a storage
            back, parameter, device, size = rebuilt(
                [matrix, th.nn.Parameter(th.ones(2)), th.device("cpu"), th.Size([2])]
            )
        assert th.equal(back, matrix) and back.stride() == matrix.stride()
        assert type(parameter) is th.nn.Parameter and parameter.requires_grad
        assert (device, size) == (th.device("cpu"), th.Size([2]))

    def test_controllers(self, rebuilt: Callable[[Any], Any]) -> None:
        for state in (schedules.AdaptiveKL(0.5, 0.01), schedules.KLAdaptiveLR(1e-3, 0.01)):
            assert rebuilt(state) == state

    def test_by_cloudpickle(self) -> None:
        value = {"activation_fn": th.nn.ELU, "net_arch": {"pi": [4], "vf": [4]}}
        assert unpickle(cloudpickle.dumps(value), Trust()) == value


class TestWhatIsRefused:
    @pytest.mark.parametrize("make", hostile.REFUSED, ids=lambda make: make.__name__)
    def test_hostile_pickles(self, make: Callable[[Path], bytes], tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        before = policies.BasePolicy.__dict__.copy()
        with pytest.raises(Exception) as caught:  # noqa: PT011, torch refuses pickles inside its own bytes
            unpickle(make(mark), Trust())
        assert isinstance(caught.value, NotAllowedError) or make is hostile.torch_in_torch
        assert not mark.exists()
        assert policies.BasePolicy.__dict__ == before

    @pytest.mark.parametrize("make", hostile.RUNNING, ids=lambda make: make.__name__)
    def test_python_would_run_them(self, make: Callable[[Path], bytes], tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        pickle.loads(make(mark))
        assert mark.exists()

    @pytest.mark.parametrize(
        ("raw", "what"),
        [
            (pickle.dumps(np.array(["text"])), r"numpy\.dtype\('U4'\)"),
            (pickle.dumps(np.random.RandomState(0)), "numpy.random._pickle.__randomstate_ctor"),
            (pickle.dumps(np.random.default_rng(np.random.MT19937(0))), "MT19937"),
            (pickle.dumps({((1, (2,)), 3): 4}), "a key of the type builtins.tuple"),
            (pickle.dumps(Path.exists), "pathlib"),
            (b"\x80\x02\x82\x01.", "the pickle instruction EXT1"),
            (b"\x80\x02K\x01Q.", "the pickle instruction BINPERSID"),
            (b"\x80\x04]]\x93.", "a name that is not text"),
            (b"\x80\x04" + hostile.named("builtins", "bytes") + b"K\x01a.", "appending to an object"),
            (b"\x80\x04]K\x01K\x02s.", "setting items to an object of the type builtins.list"),
            (b"\x80\x04]}b.", "a change of an object of builtins.list"),
            (b"\x80\x04" + hostile.named("builtins", "list") + b")\x81.", "an object of builtins.list"),
            (b"\x80\x04" + hostile.named("collections", "deque") + b"K\x01R.", "without a tuple of arguments"),
        ],
        ids=str,
    )
    def test_the_reason(self, raw: bytes, what: str) -> None:
        with pytest.raises(NotAllowedError, match=what):
            unpickle(raw, Trust())

    def test_states_that_would_break_numpy(self) -> None:
        array = np.arange(4.0)
        reduced = array.__reduce__()[2]
        for state in (
            (reduced[0], (5,), *reduced[2:]),  # more elements than bytes
            (*reduced[:4], [1.0, 2.0, 3.0, 4.0]),  # objects in place of bytes
            (reduced[0], (-4,), *reduced[2:]),
        ):
            raw = pickle.dumps(hostile_array(state))
            with pytest.raises((NotAllowedError, ValueError)):
                unpickle(raw, Trust())

    def test_flags_of_a_dtype(self) -> None:
        raw = pickle.dumps(np.dtype("f4"), 3)
        assert unpickle(raw, Trust()) == np.dtype("f4")
        # The last number holds flags: 1 means that the elements are pointers to objects.
        position = next(at for op, arg, at in reversed(list(pickletools.genops(raw))) if op.name == "BININT1")
        hostile_raw = raw[:position] + b"K\x01" + raw[position + 2 :]
        with pytest.raises(NotAllowedError, match="unusual arguments of numpy.dtype"):
            unpickle(hostile_raw, Trust())

    def test_lengths_beyond_the_end_take_no_memory(self) -> None:
        for instruction in (b"\x96", b"\x8e", b"\x8d"):  # BYTEARRAY8, BINBYTES8, BINUNICODE8
            with pytest.raises(ValueError, match="expected 1099511627776 bytes"):
                unpickle(b"\x80\x05" + instruction + (2**40).to_bytes(8, "little") + b"abc", Trust())

    @pytest.mark.parametrize(
        "raw",
        [
            b"](" + b"\x8f" * 2**14 + b"e.",  # sets
            b"]("
            + hostile.named("collections", "deque")
            + b"\x94"
            + b"("
            + b"N" * 1000
            + b"t\x85\x940"
            + b"h\x00h\x01R" * 200
            + b"e.",
        ],
        ids=["many objects", "many copies"],
    )
    def test_values_that_take_much_more_memory_than_the_bytes(
        self, raw: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sb3_clipvf.files.unpickle.memory_limit", lambda: 2**20)
        with pytest.raises(ValueError, match="its values take more than 1 MiB"):
            unpickle(b"\x80\x04" + raw, Trust())

    @pytest.mark.parametrize("kind", [list, tuple, lambda parts: {"a": parts[0], "b": parts[1]}])
    def test_shared_parts_that_double_at_each_level(self, kind: Callable[[Any], Any]) -> None:
        value: Any = [1]
        for _ in range(16):
            value = kind((value, value))
        for whole in (value, spaces_with(value)):
            with pytest.raises(ValueError, match=r"it has more than 10\d,\d+ parts, since it names the same ones"):
                unpickle(pickle.dumps(whole), Trust())
        shared = [[1] * 50] * 50
        assert unpickle(pickle.dumps(shared), Trust()) == shared

    def test_bytes_of_torch_that_expand(self) -> None:
        zipped = io.BytesIO()
        th.save(th.zeros(2).untyped_storage(), zipped)
        raw = pickle.dumps(hostile.Call(th.storage._load_from_bytes, zipped.getvalue()))
        with pytest.raises(NotAllowedError, match=r"unusual arguments of torch\.storage\._load_from_bytes"):
            unpickle(raw, Trust())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torch warns when it pickles a storage
            with pytest.raises(NotAllowedError, match=r"unusual arguments of torch\._utils\._rebuild_tensor_v2"):
                unpickle(pickle.dumps(th.zeros(1).expand(10**9)), Trust())


def spaces_with(value: Any) -> Any:
    space = spaces.Discrete(2)
    space.extra = value
    return space


class hostile_array(np.ndarray):  # noqa: N801
    """Pickled as a plain array with a state of its own."""

    def __new__(cls, state: Any) -> Any:
        made = np.ndarray.__new__(cls, (0,))
        made.state = state
        return made

    def __reduce__(self) -> Any:
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state  # type: ignore[attr-defined]


class Own:
    """A class of the user's."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and other.number == self.number


class Called(Own):
    """One that is pickled as a call."""

    def __reduce__(self) -> Any:
        return Called, (self.number,)


def own_schedule(progress_remaining: float) -> float:
    return progress_remaining


class TestTrust:
    def test_single_classes_and_functions(self) -> None:
        trust = trust_of([Own, Called, own_schedule])
        assert not trust.everything
        value = [Own(3), Called(4), own_schedule]
        assert unpickle(pickle.dumps(value), trust) == value

    def test_they_allow_nothing_else(self, tmp_path: Path) -> None:
        with pytest.raises(NotAllowedError, match=r"test_files_unpickle\.Called"):
            unpickle(pickle.dumps([Own(3), Called(4)]), trust_of([Own]))
        with pytest.raises(NotAllowedError, match=r"posix\.system|nt\.system"):
            unpickle(hostile.os_system(tmp_path / "mark"), trust_of([Own]))
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize(("value", "trusted"), [("", False), ("0", False), ("1", True)])
    def test_the_variable(self, value: str, trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TRUST_VARIABLE, value)
        assert trust_of(None).everything is trusted
        assert trust_of(True).everything
        assert not trust_of(False).everything
        monkeypatch.delenv(TRUST_VARIABLE)
        assert not trust_of(None).everything

    def test_other_values_of_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TRUST_VARIABLE, "yes")
        with pytest.raises(ValueError, match="`SB3_CLIPVF_TRUST_PICKLE` must be 0 or 1, got 'yes'"):
            trust_of(None)

    @pytest.mark.parametrize("value", ["Own", 1, 0.5, [1], ["Own"]])
    def test_other_values_of_trust_pickle(self, value: Any) -> None:
        with pytest.raises(TypeError, match="`trust_pickle` must"):
            trust_of(value)

    def test_code_of_the_file_cannot_be_named(self) -> None:
        class Local:
            pass

        for value in (lambda p: p, Local):
            with pytest.raises(ValueError, match="the file holds its code, not its name"):
                trust_of([value])

    def test_the_error_is_a_public_name(self) -> None:
        assert sb3_clipvf.UnsafeFileError is UnsafeFileError
        assert issubclass(UnsafeFileError, ValueError)
