"""Groups of runs that differ only in their seeds, their names, and the settings in which they differ."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.comparison.records import Record

MISSING = "–"
"""Text in place of a setting that a run does not have."""

# Endings of folders that number the runs of one setting, such as `seed_3`, `PPO_2`, `CartPole-v1_4`, `<name>_4_<uuid>`.
_NUMBER = re.compile(r"(?:^|[_-])(?:seed|run)?[_-]?\d+(?:_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})?$")
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Group:
    """
    Runs of one environment, algorithm and setting.

    :param name: Name of the setting, which groups of other environments share.
    :param env_id: Id of the environment, "" if unknown.
    :param records: The runs, by seed.
    """

    name: str
    env_id: str
    records: tuple[Record, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the runs."""
        return self.records[0].settings


def group_records(records: Sequence[Record]) -> list[Group]:
    """Return the runs in groups, sorted by environment; groups of an environment keep the order of the runs."""
    folders = dict(zip(map(id, records), _distinct_parts(records), strict=True))
    members: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        texts = json.dumps({key: value_text(value) for key, value in record.settings.items()})
        key = (record.env_id, folders[id(record)], record.algo, texts)
        members.setdefault(key, []).append(record)
    groups = []
    for (env_id, folder, algo, _), found in members.items():
        rivals = [other[0] for key, other in members.items() if key[:2] == (env_id, folder)]
        parts = [folder] if folder else []
        if len({one.algo for one in rivals}) > 1:
            parts.append(algo or "unknown algorithm")
        rivals = [one for one in rivals if one.algo == algo]
        keys = differing_keys([one.settings for one in rivals])
        own = [f"{key} {value_text(found[0].settings[key])}" for key in keys if key in found[0].settings]
        parts += own if own or not keys else ["default"]
        name = ", ".join(parts) or algo or found[0].folder.resolve().name
        groups.append(Group(name, env_id, tuple(sorted(found, key=_seed))))
    return sorted(_with_short_names(groups), key=lambda group: group.env_id)


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ, sorted; a missing key differs from every value."""
    keys = sorted({key for one in settings for key in one})
    return [key for key in keys if len({value_text(one.get(key, MISSING)) for one in settings}) > 1]


def value_text(value: Any) -> str:
    """Return a value of the settings as text, the same for equal numbers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return str(value)


def _distinct_parts(records: Sequence[Record]) -> list[str]:
    """Return, for each run, the part of its path that sets its setting apart from others, "" if nothing does."""
    paths = []
    for record in records:
        parts = (_NUMBER.sub("", part) for part in Path(os.path.abspath(record.folder)).parts)
        # The environment and the algorithm have their own places in names.
        own = {"", record.env_id.replace("/", "-"), record.algo}
        paths.append([part for part in parts if part not in own])
    while paths and all(paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    while paths and all(paths) and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return ["/".join(path) for path in paths]


def _with_short_names(groups: list[Group]) -> list[Group]:
    """Replace names that are too long to read in a legend by numbered ones; the settings tell them apart."""
    names: dict[str, str] = {}
    for group in groups:
        is_long = len(group.name) > _LONGEST_NAME
        names.setdefault(
            group.name, f"{group.name[: _LONGEST_NAME - 6].rstrip(', ')} … {len(names) + 1}" if is_long else group.name
        )
    return [Group(names[group.name], group.env_id, group.records) for group in groups]


def _seed(record: Record) -> tuple[float, str]:
    return (float("inf") if record.seed is None else record.seed, str(record.folder))
