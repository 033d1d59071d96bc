"""Shared by all benchmarks: results files, facts about the machine, and Markdown tables."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sb3_clipvf
from sb3_clipvf.common.versions import installed_versions
from sb3_clipvf.files.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[2]
"""The clone, from which processes of benchmarks import ``sb3_clipvf`` and ``tests.bench``."""

_FORMAT = 1
_PACKAGES = ("stable_baselines3", "rl_zoo3", "gymnasium", "torch", "numpy")


def clone_environment() -> dict[str, str]:
    """Return this process's environment variables, with the clone on the path of Python's modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


class Results:
    """
    The JSON file of a benchmark's results, one line a run.

    :param path: the file; its folder is created
    :param key: names of the entries that identify a run; a new run replaces the one with the same values
    :raises ValueError: if the file holds something else
    """

    def __init__(self, path: Path, key: Sequence[str] = ("name", "seed")) -> None:
        self.path, self._key = path, tuple(key)
        self.runs = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            runs = list(content["runs"])
            for run in runs:
                self._key_of(run)
            return runs
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`--out` must be a results file of this benchmark (format {_FORMAT}) or a new one, but {self.path} "
                f"holds something else ({type(error).__name__}: {error}). Move it away, or name another file."
            ) from error

    def _key_of(self, run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in self._key)

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the run with all of these values, or None if there is none or it was made with other settings."""
        for run in self.runs:
            if all(run.get(name) == value for name, value in wanted.items()):
                return run
        return None

    def add(self, run: dict[str, Any]) -> None:
        """Add a run, replacing an older one with the same key, and write the file."""
        self._replace(lambda other: self._key_of(other) == self._key_of(run), [run])

    def remove(self, is_unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Remove runs, and write the file."""
        self._replace(is_unwanted, [])

    def _replace(self, is_unwanted: Callable[[dict[str, Any]], bool], added: list[dict[str, Any]]) -> None:
        with locked_folder(self.path.parent):
            # Read again: another benchmark may have added to the file since.
            others = [other for other in self._read() if not is_unwanted(other)]
            self.runs = sorted([*others, *added], key=self._key_of)
            lines = ",\n".join(json.dumps(run, default=str) for run in self.runs)
            write_text(self.path, f'{{"format": {_FORMAT}, "runs": [\n{lines}\n]}}\n')


def digest(entries: Mapping[str, Any]) -> str:
    """Return a short name of entries of JSON's types, whatever their order."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:12]


def machine(more_packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the CPU model, the number of cores, and the versions of the installed packages that affect results."""
    versions = {"sb3_clipvf": sb3_clipvf.__version__} | installed_versions((*_PACKAGES, *more_packages))
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "versions": versions}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def same_machine(run: Mapping[str, Any], *others: Mapping[str, Any]) -> bool:
    """Return whether runs were made on one machine, with the same versions."""
    return all(run.get(key) == other.get(key) for other in others for key in ("cpu", "cores", "gpu", "versions"))


def machines_text(runs: Iterable[Mapping[str, Any]], how: Callable[[Mapping[str, Any]], str]) -> str:
    """Return Markdown that lists the machines and versions of runs, and how each was made there."""
    lines = set()
    for run in runs:
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        gpu = f", {run['gpu']}" if "gpu" in run else ""
        lines.add(f"- {run['cpu']}, {run['cores']} cores{gpu}, {how(run)}; {versions}\n")
    return f"Machines and versions:\n\n{''.join(sorted(lines))}"


def markdown_table(header: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; ``alignment`` has an ``l`` or ``r`` for each column."""
    lines = [header, [{"l": "---", "r": "---:"}[side] for side in alignment], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return the text of a CSV file; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and hold its lock, so that one process at a time reads and replaces the files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)  # which ends the lock


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())
