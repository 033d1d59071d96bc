"""Entries of settings that name classes, in all forms that the RL Zoo knows."""

from typing import Any

import pytest

from sb3_clipvf.zoo.entries import items, with_arguments


@pytest.mark.parametrize(
    ("value", "listed", "taken_apart"),
    [
        (None, [], []),
        ("a.B", ["a.B"], [("a.B", {})]),
        ({"a.B": {"x": 1}}, [{"a.B": {"x": 1}}], [("a.B", {"x": 1})]),
        (["a.B", {"c.D": {"y": 2}}], ["a.B", {"c.D": {"y": 2}}], [("a.B", {}), ("c.D", {"y": 2})]),
        ([], [], []),
        ({}, [{}], [(None, {})]),
        ([{}, int], [{}, int], [(None, {}), (int, {})]),
    ],
)
def test_forms(value: Any, listed: list[Any], taken_apart: list[Any]) -> None:
    assert items(value) == listed
    assert with_arguments(value) == taken_apart
