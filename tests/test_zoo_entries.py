"""The forms of entries in the settings: null, names of classes, with or without arguments."""

from typing import Any

import pytest

from sb3_clipvf.envs.episode_ends import EpisodeEnds
from sb3_clipvf.zoo.entries import add_episode_ends, drop_null, items, with_arguments


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
def test_each_form_of_an_entry(value: Any, listed: list[Any], taken_apart: list[Any]) -> None:
    assert items(value) == listed
    assert with_arguments(value) == taken_apart


def test_null_keys_of_the_zoo_are_dropped_and_arguments_of_clipppo_kept() -> None:
    settings: dict[str, Any] = {"frame_stack": None, "normalize": None, "n_envs": 2, "clip_range": None}
    drop_null(settings)
    assert settings == {"n_envs": 2, "clip_range": None}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({"env_wrapper": None}, {"env_wrapper": None}),
        ({"env_wrapper": []}, {"env_wrapper": []}),
        ({"env_wrapper": "a.B"}, {"env_wrapper": ["a.B", EpisodeEnds]}),
        ({"env_wrapper": [{"a.B": {"x": 1}}]}, {"env_wrapper": [{"a.B": {"x": 1}}, EpisodeEnds]}),
    ],
)
def test_episodes_are_counted_outside_of_wrappers_once(before: dict[str, Any], after: dict[str, Any]) -> None:
    entry = before.get("env_wrapper")
    for _ in range(2):
        add_episode_ends(before)
        assert before == after
    assert EpisodeEnds not in items(entry)
