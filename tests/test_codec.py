"""Trees of plain values as JSON and arrays: equal to the last bit after a round trip, and nothing but plain values."""

import io
import math
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_clipvf.files import codec


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
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    found = round_trip(value)
    assert found == value
    assert type(found) is type(value)
    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
    assert getattr(found, "maxlen", None) == getattr(value, "maxlen", None)


def test_nan_and_the_sign_of_zero_come_back() -> None:
    assert math.isnan(round_trip(math.nan))
    assert math.copysign(1.0, round_trip(-0.0)) == -1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64, bool, "U5", ">f8"])
def test_arrays_come_back_equal_to_the_last_bit(dtype: Any) -> None:
    array = np.arange(6).reshape(2, 3).T.astype(dtype)
    found = round_trip({"array": array, "scalar": np.array(1, dtype)})
    assert found["array"].dtype == array.dtype
    assert found["array"].tobytes() == np.ascontiguousarray(array).tobytes()
    assert found["scalar"].shape == ()


def test_tensors_come_back_as_tensors() -> None:
    found = round_trip([th.get_rng_state(), th.zeros(2, 0), th.tensor(3.0)])
    assert all(isinstance(tensor, th.Tensor) for tensor in found)
    assert th.equal(found[0], th.get_rng_state())
    assert found[1].shape == (2, 0)
    assert found[2].dtype == th.float32


def test_frozen_trees_share_nothing_that_can_change() -> None:
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
def test_anything_else_is_an_error(text: bytes, archive: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        codec.from_bytes(text, archive)


def test_arrays_of_objects_are_not_unpickled() -> None:
    stream = io.BytesIO()
    np.savez(stream, a0=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        codec.from_bytes(b'{"~":"array","v":"a0"}', stream.getvalue())
