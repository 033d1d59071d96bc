"""Groups of runs that differ only in their seeds, their names, and the settings in which they differ."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.comparison.records import RunRecord

MISSING = "–"
"""Text in place of a setting that a run does not have."""

# Endings of folders that number the runs of one setting, such as `seed_3`, `PPO_2`, `CartPole-v1_4`, `<name>_4_<uuid>`,
# `seed_3-<digest>`.
_UUID = r"(?:_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|-[0-9a-f]{12})?$"
_NUMBER = re.compile(rf"(?:^|[_-])(?:seed|run)?[_-]?\d+{_UUID}")
_SEED_OR_RUN = re.compile(rf"(?:^|[_-])(?:seed|run)[_-]?\d+{_UUID}")
# Names under which SB3, SB3-Contrib and this package log by default.
_LOG_NAMES = "A2C ARS ClipPPO CrossQ DDPG DQN MaskablePPO PPO QRDQN RecurrentPPO SAC TD3 TQC TRPO".split()
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
    records: tuple[RunRecord, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the runs."""
        return self.records[0].settings


def group_records(records: Sequence[RunRecord]) -> list[Group]:
    """Return the runs in groups, sorted by environment; groups of an environment keep the order of the runs."""
    folders = dict(zip(map(id, records), _distinct_parts(records), strict=True))
    members: dict[tuple[str, ...], list[RunRecord]] = {}
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
        groups.append(Group(printable(name), printable(env_id), tuple(sorted(found, key=_seed))))
    return sorted(_with_short_names(groups), key=lambda group: group.env_id)


def printable(text: str) -> str:
    """Return a text that UTF-8 can encode: names of folders may hold bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """Return a message about each seed that several runs of a group have."""
    found = []
    for group in groups:
        folders: dict[int, list[str]] = {}
        for record in group.records:
            if record.seed is not None:
                folders.setdefault(record.seed, []).append(str(record.folder))
        found += [
            f"{group.name} in {group.env_id} has several runs of seed {seed}, which its means count as independent: "
            f"{', '.join(names)}. Move those that do not belong to it."
            for seed, names in folders.items()
            if len(names) > 1
        ]
    return found


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


def _distinct_parts(records: Sequence[RunRecord]) -> list[str]:
    """Return, for each run, the part of its path that sets its setting apart from others, "" if nothing does."""
    paths = _without_shared([list(Path(os.path.abspath(record.folder)).parts) for record in records])
    for place, record in enumerate(records):
        parts = (_without_number(part, record) for part in paths[place])
        # The environment and the algorithm have their own places in names.
        own = {"", record.env_id.replace("/", "-"), record.algo}
        paths[place] = [part for part in parts if part not in own]
    return ["/".join(path) for path in _without_shared(paths)]


def _without_number(part: str, record: RunRecord) -> str:
    """Return the name of a folder without the number of its run; without settings, other numbers may be settings."""
    if record.settings:
        return _NUMBER.sub("", part)
    names = [*_LOG_NAMES, record.algo, record.env_id.replace("/", "-")]
    named = "|".join(re.escape(name) for name in names if name)
    part = re.sub(rf"((?:^|[_-])(?:{named}))_\d+{_UUID}", r"\1", part, flags=re.IGNORECASE)
    return _SEED_OR_RUN.sub("", part)


def _without_shared(paths: list[list[str]]) -> list[list[str]]:
    """Return paths without the first and the last parts that all share."""
    while paths and all(paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    while paths and all(paths) and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return paths


def _with_short_names(groups: list[Group]) -> list[Group]:
    """Replace names that are too long to read in a legend with numbered ones; the settings tell them apart."""
    names: dict[str, str] = {}
    for group in groups:
        is_long = len(group.name) > _LONGEST_NAME
        names.setdefault(
            group.name, f"{group.name[: _LONGEST_NAME - 6].rstrip(', ')} … {len(names) + 1}" if is_long else group.name
        )
    return [Group(names[group.name], group.env_id, group.records) for group in groups]


def _seed(record: RunRecord) -> tuple[float, str]:
    return (float("inf") if record.seed is None else record.seed, str(record.folder))
