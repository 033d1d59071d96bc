"""Quantities of a run over its training, read from the files that SB3 and the RL Zoo write. No torch at import."""

from __future__ import annotations

import csv
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EVENT_FILES = "events.out.tfevents.*"
_CLOCKS = ("time/total_timesteps", "time/time_elapsed", "time/iterations", "train/n_updates")


@dataclass(frozen=True)
class Series:
    """
    A quantity over the training of a run.

    :param steps: Environment steps of each value, ``(n,)``, in ascending order.
    :param seconds: Seconds since the start of training, ``(n,)``; NaN where unknown.
    :param values: The values, ``(n,)``; NaN where the file has one.
    """

    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, points: list[tuple[float, float, float]]) -> Series:
        """Return the series of points (step, seconds, value), sorted by step."""
        columns = np.array(sorted(points, key=lambda point: point[0]), dtype=np.float64).reshape(-1, 3).T
        return cls(columns[0], columns[1], columns[2])

    def timed(self, clock: Series) -> Series:
        """Return the series with the seconds at which another series of the run was at its steps."""
        if len(clock.steps) == 0:
            return self
        return Series(self.steps, np.interp(self.steps, clock.steps, clock.seconds), self.values)

    def without_seconds(self) -> Series:
        """Return the series without times."""
        return Series(self.steps, np.full(len(self.steps), np.nan), self.values)


def read_evaluations(path: Path) -> dict[str, np.ndarray]:
    """
    Read the arrays of ``evaluations.npz``, as an ``EvalCallback`` writes it.

    :return: Arrays by name, among them ``timesteps``, ``(n,)``, and the returns ``results``, ``(n, n_episodes)``,
        float64. Others that cannot be read, such as pickled ones, are omitted.
    :raises ValueError: If the file is damaged or holds something else.
    """
    try:
        # NumPy leaves a damaged file open that it opened itself.
        with path.open("rb") as file, np.load(file) as data:
            steps, results = data["timesteps"], data["results"].astype(np.float64)
            arrays = {"timesteps": steps, "results": results}
            for name in [name for name in data.files if name not in arrays]:
                with suppress(ValueError, zipfile.BadZipFile):
                    arrays[name] = data[name]
        if results.ndim != 2 or steps.shape != results.shape[:1] or results.size == 0:
            raise ValueError(f"shapes {steps.shape} and {results.shape}")
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} must hold evaluations of SB3's EvalCallback, but is damaged ({error}). Remove it, or train again."
        ) from error
    return arrays


def mean_evaluations(path: Path) -> Series:
    """
    Read the mean return of each evaluation from ``evaluations.npz``.

    :raises ValueError: If the file is damaged or holds something else.
    """
    arrays = read_evaluations(path)
    results = arrays["results"]
    # IsolatedEvalCallback fills rows with fewer episodes than others with NaN. A row of NaN alone has no mean.
    with np.errstate(invalid="ignore"):
        means = np.nansum(results, axis=1) / np.sum(~np.isnan(results), axis=1)
    return Series.of(
        [(float(step), np.nan, float(mean)) for step, mean in zip(arrays["timesteps"], means, strict=True)]
    )


def files_of(folder: Path, name: str, inner: Sequence[Path]) -> list[Path]:
    """Return the files of this name in a folder at any depth, sorted, without those in ``inner`` (real paths)."""
    paths = [(path, Path(os.path.realpath(path))) for path in sorted(folder.rglob(name))]
    return [path for path, real_path in paths if not any(map(real_path.is_relative_to, inner))]


def earlier_logs(folder: Path, inner: Sequence[Path]) -> list[Path]:
    """Return the real paths of log folders ``<name>_<number>`` beside which the same name has a higher number."""
    logs = {Path(os.path.realpath(file.parent)) for name in _READERS for file in files_of(folder, name, inner)}
    found: dict[Path, list[tuple[int, Path]]] = {}
    for path in logs:
        name, _, number = path.name.rpartition("_")
        if number.isdecimal():
            found.setdefault(path.with_name(f"{name}_"), []).append((int(number), path))
    return sorted(path for numbered in found.values() for _, path in sorted(numbered)[:-1])


def read_logs(folder: Path, inner: Sequence[Path] = ()) -> dict[str, Series]:
    """
    Read what SB3's logger wrote into a folder and the folders in it: ``progress.json``, ``progress.csv``, TensorBoard.

    :param folder: Folder of a run.
    :param inner: Real paths of folders in it that belong to other runs.
    :return: Series by their keys, such as ``train/value_loss``; {} without a log.
    :raises ValueError: If a file is damaged at its beginning; a cut end is left out.
    """
    points: dict[str, dict[float, tuple[float, float, float]]] = {}
    for name, read in _READERS.items():
        for file in files_of(folder, name, inner):
            for step, seconds, row in read(file):
                for key, value in row.items():
                    # A resumed run repeats the steps after its checkpoint: the later row counts.
                    points.setdefault(key, {})[step] = (step, seconds, value)
    return {key: Series.of(list(found.values())) for key, found in points.items() if key not in _CLOCKS}


def _json_rows(path: Path) -> Iterator[tuple[float, float, dict[str, float]]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            yield from _row(row)
        except (ValueError, AttributeError) as error:
            if number == 0:
                raise ValueError(
                    f"{path} must hold a row of SB3's JSON log in each line, but is damaged ({error}). Remove it."
                ) from error


def _csv_rows(path: Path) -> Iterator[tuple[float, float, dict[str, float]]]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            # A kill may have cut the last line.
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                yield from _row(row)
        except csv.Error as error:
            raise ValueError(f"{path} must be SB3's log as CSV, but is damaged ({error}). Remove it.") from error


def _row(row: dict[str, Any]) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Yield the numbers of a row of SB3's log with its step and seconds, if it has a step."""
    numbers = {}
    for key, value in row.items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):  # a text, an empty cell, or the cut end of a file
            continue
    if _CLOCKS[0] in numbers:
        yield numbers[_CLOCKS[0]], numbers.get(_CLOCKS[1], np.nan), numbers


def _event_rows(path: Path) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Yield the scalars of a TensorBoard file; its format is protocol buffers ``Event`` in records of TensorFlow."""
    content, start, position = path.read_bytes(), None, 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        record = content[position + 12 : position + 12 + length]
        position += length + 16
        if len(record) < length:  # a kill has cut the file
            return
        try:
            event = dict(_fields(record))
            seconds, step = struct.unpack("<d", event.get(1, bytes(8)))[0], event.get(2, 0)
            start = seconds if start is None else start
            scalars = dict(_scalars(event.get(5, b"")))
        except (IndexError, KeyError, struct.error, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} must hold events of TensorBoard, but is damaged ({reason}). Remove it."
            ) from error
        if scalars:
            yield float(step), seconds - start, scalars


def _scalars(summary: bytes) -> Iterator[tuple[str, float]]:
    for number, value in _fields(summary):
        if number == 1:
            entry = dict(_fields(value))
            if 2 in entry:  # `simple_value`; others are pictures, texts, histograms
                yield entry[1].decode(), struct.unpack("<f", entry[2])[0]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer: an int, or bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}[kind] if kind in (1, 5) else len(message)
        if position + length > len(message):
            raise ValueError("a field is longer than its record")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position


_READERS = {"progress.json": _json_rows, "progress.csv": _csv_rows, EVENT_FILES: _event_rows}
