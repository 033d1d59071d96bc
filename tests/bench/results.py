"""What the benchmarks share: the JSON file of measurements, facts of the machine, whole files, ends by signals."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sb3_clipvf.common.versions import installed_versions

ROOT = Path(__file__).resolve().parents[2]
"""The clone, from which processes of benchmarks import ``sb3_clipvf`` and ``tests.bench``."""

_FORMAT = 1
_PACKAGES = ("sb3_clipvf", "stable_baselines3", "rl_zoo3", "gymnasium", "torch", "numpy")


def clone_environment() -> dict[str, str]:
    """Return this process's environment variables, with the clone on the path of Python's modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(more_packages: Iterable[str] = ()) -> dict[str, Any]:
    """
    Describe where a run was made.

    :param more_packages: names of further packages that decide on the numbers; those not installed are left out
    :return: CPU model, number of cores, and versions of Python and of the packages that decide on the numbers
    """
    versions = installed_versions((*_PACKAGES, *more_packages))
    if "sb3_clipvf" not in versions:  # run from a source tree that is not installed
        import sb3_clipvf

        versions["sb3_clipvf"] = sb3_clipvf.__version__
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "versions": versions}


def machine_text(run: Mapping[str, Any], how: str) -> str:
    """
    Describe where a run was made, in a line.

    :param run: holds what :func:`machine` gives
    :param how: how runs were made there
    :return: the line
    """
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return f"{run['cpu']}, {run['cores']} cores, {how}; {versions}"


class Results:
    """
    The JSON file of a benchmark's results: a list of runs.

    :param path: the file; its folder is made
    :param key: names of the entries that tell runs apart; a new run takes the place of one with the same values
    :raises ValueError: where the file holds something else
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
        """
        Find a result.

        :param wanted: the values of the key, and of the settings that decide on the result
        :return: the result that has them all, None where there is none or it was made with other settings
        """
        for run in self.runs:
            if all(run.get(name) == value for name, value in wanted.items()):
                return run
        return None

    def add(self, run: dict[str, Any]) -> None:
        """
        Put a result in the place of an older one with the same key, and write the file.

        :param run: the result
        :raises OSError: where the file cannot be written; it then holds what it held before
        :raises ValueError: where it holds something else by now
        """
        # Read again: another benchmark may have added to the file since.
        others = [other for other in self._read() if self._key_of(other) != self._key_of(run)]
        self.runs = sorted([*others, run], key=self._key_of)
        lines = ",\n".join(json.dumps(run, default=str) for run in self.runs)
        write_text(self.path, f'{{"format": {_FORMAT}, "runs": [\n{lines}\n]}}\n')


def write_text(path: Path, text: str) -> None:
    """
    Write a file as a whole or not at all.

    :param path: the file; its folder is made
    :param text: its content
    :raises OSError: where it cannot be written; it then holds what it held before
    """
    from sb3_clipvf.files.atomic import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let an ordinary kill, too, raise KeyboardInterrupt, so that a benchmark ends the processes it started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_row_names(option: str, names: Sequence[str], known: Iterable[str], command: str) -> None:
    """
    Refuse names of rows that do not exist.

    :param option: the option they were given to
    :param names: what the user gave
    :param known: names of all rows
    :param command: the benchmark's command, which takes ``--list``
    :raises ValueError: where a name is not known
    """
    rows = set(known)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(
            f"`{option}` must name rows of the benchmark, got {', '.join(unknown)}. `{command} --list` lists them."
        )
