"""Results of a suite: a CSV of all runs, one of those that failed, and a compressed CSV of each run's episodes."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf.files.atomic import atomic_write
from tests.bench.experiments.episodes import EPISODES
from tests.bench.experiments.runs import MORE_PACKAGES, Record, RunSpec, differing, this_machine
from tests.bench.results import csv_text, locked_folder, write_text

_SCORES = (
    "last_return",
    "mean_return",
    "evaluation_mean",
    "evaluation_std",
    "n_episodes",
    "num_timesteps",
    "seconds",
    "cpu_seconds",
    "run_seconds",
)
_IDENTITY = ("env", "setting", "seed")
# The same columns on every machine; a package that is not installed has an empty cell.
_VERSIONS = (
    "python",
    "sb3_clipvf",
    "stable_baselines3",
    "rl_zoo3",
    "gymnasium",
    "torch",
    "numpy",
    *MORE_PACKAGES,
)
_COLUMNS = (
    "suite",
    *_IDENTITY,
    "steps",
    *_SCORES,
    "digest",
    "jobs",
    "cpu",
    "cores",
    *(f"{n}_version" for n in _VERSIONS),
)

_FAILED_COLUMNS = (*_IDENTITY, "digest", "error")
_LONGEST_ERROR = 300

_Rows = dict[tuple[str, ...], dict[str, str]]
"""Rows by environment, setting and seed."""

_HINT = "Move it away, or name another folder with `--out`."


class SuiteTable:
    """
    The runs of a suite in ``<folder>/<suite>.csv``, with their episodes in ``<folder>/<suite>/<env>/<setting>/``.

    Runs that failed are in ``<folder>/<suite>-failed.csv`` until they succeed. Several commands may add runs at once.

    :param folder: folder of all suites' results
    :param suite: name of the suite
    :raises ValueError: if the file holds something else
    """

    def __init__(self, folder: Path, suite: str) -> None:
        self.path, self._suite = folder / f"{suite}.csv", suite
        self.failed_path = folder / f"{suite}-failed.csv"
        self._rows = self._read()
        self._failed = self._read_failed()

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows, by environment, setting and seed."""
        return list(self._rows.values())

    def episodes_path(self, setting: str, spec: RunSpec) -> Path:
        """Return the file of a run's episodes."""
        return self.path.with_suffix("") / spec.env_id / setting / f"{spec.seed}.csv.gz"

    def check(self, runs: Iterable[tuple[str, RunSpec]]) -> None:
        """
        Check that the rows were made with today's versions, and with the settings of the runs that they stand for.

        :raises ValueError: with the first difference
        """
        for row in self.rows:
            difference = differing(_versions(row), _versions(_where_made(this_machine())))
            if difference:
                raise ValueError(f"{self.path} must hold runs of one set of versions, but has {difference}. {_HINT}")
        self._check_settings(runs)

    def check_alike(self, runs: Iterable[tuple[str, RunSpec]]) -> None:
        """
        Check that the rows were made with one set of versions, whatever today's are, and as in :meth:`check`.

        :raises ValueError: with the first difference
        """
        for name in _versions(self.rows[0]) if self.rows else ():
            found = sorted({row[name] for row in self.rows})
            if len(found) > 1:
                raise ValueError(
                    f"{self.path} must hold runs of one set of versions, but {name} is "
                    f"{' and '.join(map(repr, found))}. Remove the rows of all but one, and make these runs again."
                )
        self._check_settings(runs)

    def _check_settings(self, runs: Iterable[tuple[str, RunSpec]]) -> None:
        for setting, spec in runs:
            found = self.find(setting, spec)
            if found is not None and found["digest"] != spec.digest():
                raise ValueError(
                    f"{self.path} must hold runs of the suite's settings, but {spec.label} was made with others "
                    f"({found['digest']}, now {spec.digest()}). {_HINT}"
                )

    def find(self, setting: str, spec: RunSpec) -> dict[str, str] | None:
        """Return the row of a run, or None."""
        return self._rows.get(_key_of(setting, spec))

    def is_done(self, setting: str, spec: RunSpec) -> bool:
        """Return whether the run has its row and its file of episodes."""
        return self.find(setting, spec) is not None and self.episodes_path(setting, spec).exists()

    def error(self, setting: str, spec: RunSpec) -> str | None:
        """Return why the last attempt at a run failed, or None if it did not fail with these settings."""
        if self.is_done(setting, spec):
            return None
        row = self._failed.get(_key_of(setting, spec))
        return row["error"] if row is not None and row["digest"] == spec.digest() else None

    def episodes(self, setting: str, spec: RunSpec) -> dict[str, np.ndarray]:
        """
        Return the columns of a run's file of episodes; an empty cell is NaN.

        :raises ValueError: if the file is damaged
        """
        path = self.episodes_path(setting, spec)
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                header, *lines = csv.reader(file)
            cells = np.array([[float(cell or "nan") for cell in line] for line in lines]).reshape(-1, len(EPISODES))
            if header != list(EPISODES):
                raise ValueError(f"columns {header}")
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise ValueError(
                f"{path} must hold the episodes of a run, but is damaged ({error}). Remove it, and make the run again."
            ) from error
        return dict(zip(EPISODES, cells.T, strict=True))

    def add(self, setting: str, spec: RunSpec, record: Record, jobs: int) -> None:
        """Write the run's episodes, then its row, replacing an earlier one."""
        path = self.episodes_path(setting, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = record.episodes
        with atomic_write(path) as file:
            # The same episodes make the same bytes.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                packed.write(csv_text(list(columns), zip(*columns.values(), strict=True)).encode())
        row = {
            "suite": self._suite,
            "env": spec.env_id,
            "setting": setting,
            "seed": str(spec.seed),
            "steps": str(spec.n_timesteps),
            **{name: _text(record.scores.get(name)) for name in _SCORES},
            "digest": spec.digest(),
            "jobs": str(jobs),
            **_where_made(record.machine),
        }
        with locked_folder(self.path.parent):
            # Read again: another command may have added to the files since.
            self._rows = _with(self._read(), row)
            write_text(self.path, csv_text(_COLUMNS, ([one[name] for name in _COLUMNS] for one in self.rows)))
            self._failed = self._read_failed()
            self._failed.pop(_key(row), None)
            self._write_failed()

    def add_failure(self, setting: str, spec: RunSpec, error: str) -> None:
        """Write why a run failed."""
        values = (*_key_of(setting, spec), spec.digest(), " ".join(error.split())[:_LONGEST_ERROR])
        with locked_folder(self.path.parent):
            self._failed = _with(self._read_failed(), dict(zip(_FAILED_COLUMNS, values, strict=True)))
            self._write_failed()

    def _write_failed(self) -> None:
        if self._failed:
            write_text(self.failed_path, csv_text(_FAILED_COLUMNS, (row.values() for row in self._failed.values())))
        else:
            self.failed_path.unlink(missing_ok=True)

    def _read_failed(self) -> _Rows:
        return _rows_of(self.failed_path, _FAILED_COLUMNS)

    def _read(self) -> _Rows:
        return _rows_of(self.path, _COLUMNS)


def _rows_of(path: Path, columns: Sequence[str]) -> _Rows:
    """Return the rows of a file of this module."""
    if not path.exists():
        return {}
    reader = csv.DictReader(path.read_text(encoding="utf-8", errors="replace").splitlines(), strict=True)
    rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns) or any(None in (*row, *row.values()) for row in rows):
        raise ValueError(
            f"`--out` must be a folder of results of suites, but {path} has other columns. Move it away, or name "
            "another folder."
        )
    return {_key(row): row for row in rows}


def _with(rows: _Rows, row: dict[str, str]) -> _Rows:
    """Return the rows, sorted, in which this one replaces an earlier one of the same run."""
    found = sorted(({**rows, _key(row): row}).items(), key=lambda item: (*item[0][:2], int(item[0][2])))
    return dict(found)


def made_on(row: Mapping[str, str]) -> dict[str, Any]:
    """Return processor, cores, versions and parallel runs of a row, as of :func:`tests.bench.results.machine`."""
    versions = {name.removesuffix("_version"): value for name, value in _versions(row).items() if value}
    return {"cpu": row["cpu"], "cores": row["cores"], "jobs": int(row["jobs"]), "versions": versions}


def _where_made(found: Mapping[str, Any]) -> dict[str, str]:
    """Return processor, cores and versions as columns."""
    versions = {f"{name}_version": found["versions"].get(name, "") for name in _VERSIONS}
    return {"cpu": found["cpu"], "cores": str(found["cores"]), **versions}


def _versions(row: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name.endswith("_version")}


def _key_of(setting: str, spec: RunSpec) -> tuple[str, ...]:
    return (spec.env_id, setting, str(spec.seed))


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
