"""Infos between processes keep keys, values and types, also when one end has missed a message."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from sb3_clipvf.envs.info_rows import InfoRows

Info = dict[str, Any]


def sent(infos: list[Info], ends: tuple[InfoRows, InfoRows]) -> tuple[bool, list[Info]]:
    """Return whether infos were sent as bytes, and what arrives."""
    packed = ends[0].pack(infos, ends[1].version)
    return isinstance(packed, bytes), ends[1].unpack(packed)


def same(first: list[Info], second: list[Info]) -> None:
    assert [list(info) for info in first] == [list(info) for info in second]
    for info, other in zip(first, second, strict=True):
        assert [*map(type, info.values())] == [*map(type, other.values())]
        for value, wanted in zip(info.values(), other.values(), strict=True):
            assert value == wanted or (math.isnan(value) and math.isnan(wanted))
            assert np.signbit(value) == np.signbit(wanted)


NUMBERS = [
    {"a": 1.5, "b": np.float64(0.1), "c": np.float32(0.1), "d": True, "e": np.bool_(True), "f": 2**62},
    {"a": np.int64(-(2**62)), "g": np.int32(7)},
    {},
]
OTHERS = [
    {"a": -0.0, "b": np.float64("nan"), "c": np.float32("inf"), "d": False, "e": np.bool_(False), "f": -1},
    {"a": np.int64(3), "g": np.int32(-7)},
    {},
]


def test_numbers_are_sent_as_bytes_from_the_second_time() -> None:
    ends = InfoRows(), InfoRows()
    for turn, infos in enumerate([NUMBERS, OTHERS, NUMBERS]):
        as_bytes, found = sent(infos, ends)
        assert as_bytes is (turn > 0)
        same(found, infos)


@pytest.mark.parametrize(
    "changed",
    [
        [{"a": 1.0, "b": 2.0}, {}],  # the same keys and values in other places
        [{"a": 1.0}, {"c": 2.0}],
        [{"a": 1.0}, {"b": np.float64(2.0)}],
        [{"a": True}, {"b": 2.0}],
        [{"a": 1.0}, {"b": None}],
        [{"a": 1.0}, {"b": "text"}],
        [{"a": 1.0}, {"b": 2**70}],
        [{"a": 1.0}, {np.str_("b"): 2.0}],
        [{"a": 1.0}, OrderedDict(b=2.0)],
        [{"a": 1.0}, {"b": np.float16(2)}],
    ],
    ids=str,
)
def test_other_infos_arrive_as_they_are(changed: list[Info]) -> None:
    ends = InfoRows(), InfoRows()
    first: list[Info] = [{"a": 1.0}, {"b": 2.0}]
    sent(first, ends)
    for infos in (changed, first, changed, changed, first, first):
        _, found = sent(infos, ends)
        assert found == infos
        assert [type(info) for info in found] == [type(info) for info in infos]
        assert [type(key) for info in found for key in info] == [type(key) for info in infos for key in info]
        assert [type(value) for info in found for value in info.values()] == [
            type(value) for info in infos for value in info.values()
        ]


def test_an_integer_beyond_64_bits_is_not_cut() -> None:
    ends = InfoRows(), InfoRows()
    for value in (1, 2**70, 1):
        assert sent([{"a": value}], ends)[1] == [{"a": value}]


@pytest.mark.parametrize("lost", [[{"b": 1.0}], [{"b": "text"}], [{"a": 2.0}]], ids=str)
def test_a_lost_message_does_no_harm(lost: list[Info]) -> None:
    ends = InfoRows(), InfoRows()
    sent([{"a": 1.0}], ends)
    ends[0].pack(lost, ends[1].version)
    for infos in ([{"a": "text"}], [{"b": 2.0}], [{"b": 3.0}], [{"a": 4.0}], [{"a": 5.0}]):
        assert sent(infos, ends)[1] == infos
