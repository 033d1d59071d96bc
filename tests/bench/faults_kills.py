"""Trainings that are killed at random moments and resumed; they must end as the one that was never killed."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from tests.bench.faults_processes import Tally, append_line, end, finish, read_lines, start
from tests.bench.faults_training import Training, digest

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from sb3_clipvf.checkpoint import TrainingCheckpoint

KILLS_IN_A_LIFE = 2
"""A kill comes after a random processor time, at most that of an unbroken training divided by this."""

AIMED_SHARE = 0.25
"""Share of the kills that are aimed at a write: writes take milliseconds, so other kills seldom hit one."""

_AFTER_WRITE = 1.25
"""Upper bound of the share of a file's bytes that are written before a kill; above 1, it has been renamed."""

_MORE_SECONDS = 0.02
"""Upper bound of further wall-clock seconds before a kill, since waiting for the disk takes no processor time."""


@dataclass(frozen=True)
class _Unbroken:
    """A training that is not killed."""

    digest: dict[str, str]  # of its end, without checkpoints
    seconds: float  # of the processor, with checkpoints
    n_writes: int  # number of checkpoints


@dataclass
class KillCampaign:
    """Kills of the trainings in one environment, which take turns."""

    trainings: tuple[Training, ...]
    folder: Path
    seed: int
    _unbroken: dict[str, _Unbroken] = field(default_factory=dict)

    def run(self, index: int, wanted: int) -> Tally:
        """Train once, with at most ``wanted`` kills before its end, and count their outcomes."""
        training = self.trainings[index % len(self.trainings)]
        unbroken = self._reference(training)
        folder = self._empty(f"{training.name}-killed")
        generator = np.random.default_rng((self.seed, index))
        n_kills, counts = 0, Tally()
        while True:
            is_aimed = n_kills < wanted and generator.random() < AIMED_SHARE
            n_writes = int(generator.integers(max(1, unbroken.n_writes // KILLS_IN_A_LIFE)))
            death = (n_writes, generator.uniform(0, _AFTER_WRITE)) if is_aimed else None
            process = start(train, folder / "report", training, folder, True, death)
            if n_kills < wanted and not is_aimed:
                _wait(process, generator.uniform(0, unbroken.seconds / KILLS_IN_A_LIFE))
                process.join(generator.uniform(0, _MORE_SECONDS))
                if process.is_alive():
                    end(process)
                    n_kills += 1
                    counts.counts["kills at any moment"] += 1
                    continue
            code = finish(process)
            if not (is_aimed and code == -signal.SIGKILL):
                break
            n_kills += 1
            is_halfway = any((folder / "checkpoints").glob(f".*.{process.pid}-*.tmp"))
            counts.counts["kills inside a write" if is_halfway else "kills right after a write"] += 1
        lines = read_lines(folder / "report")
        outcome, failure = judge(lines, code, unbroken.digest)
        counts.counts[f"runs of {training.name}"] += 1
        counts.counts["checkpoints written"] += sum(line["event"] == "written" for line in lines)
        if n_kills == 0 and outcome != "survived":
            counts.add(outcome, f"{training.name}, training {index} without a kill: {failure}")
        for kill in range(n_kills):
            # The end of a training does not show which kill broke it, so one kill is counted as failed.
            has_failed = outcome != "survived" and kill == n_kills - 1
            text = f"{training.name}, training {index} with {n_kills} kills: {failure}"
            counts.add(outcome if has_failed else "survived", text if has_failed else "")
        return counts

    def _reference(self, training: Training) -> _Unbroken:
        """Train without and with checkpoints, which must not change the digest of the end."""
        if training.name not in self._unbroken:
            found = []
            for with_checkpoints in (False, True):
                folder = self._empty(f"{training.name}-unbroken")
                code = finish(start(train, folder / "report", training, folder, with_checkpoints))
                lines = read_lines(folder / "report")
                if code != 0:
                    raise RuntimeError(f"{training.name} does not end without kills: {lines or code}")
                found.append(lines[-1])
            n_writes = sum(line["event"] == "written" for line in lines)
            self._unbroken[training.name] = _Unbroken(found[0]["digest"], found[1]["seconds"], n_writes)
        return self._unbroken[training.name]

    def _empty(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _wait(process: ForkServerProcess, seconds: float) -> None:
    """Wait until a process has used this processor time, or has ended."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        watched = psutil.Process(process.pid)
        while process.is_alive() and sum(watched.cpu_times()[:2]) < seconds:
            process.join(0.003)


def judge(lines: list[dict[str, Any]], code: int | None, expected: dict[str, str]) -> tuple[str, str]:
    """Return the outcome of a training and its kills, from its processes' lines and the last exit code, and why."""
    written = 0
    for line in lines:
        if line["event"] == "written":
            written = line["step"]
        elif line["event"] == "begins" and line["step"] < written:
            return "lost", f"it resumed at step {line['step']}, after the checkpoint of step {written} was written"
    last: dict[str, Any] = lines[-1] if lines else {"event": "nothing"}
    if last["event"] == "error":
        return "unclear", last["text"]
    if code != 0 or last["event"] != "end":
        return "unclear", f"the process ended with code {code} after the line {last}"
    found: dict[str, str] = last["digest"]
    differing = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    return ("wrong", f"{', '.join(sorted(differing))} differ") if differing else ("survived", "")


def train(
    report: Path, training: Training, folder: Path, with_checkpoints: bool, death: tuple[int, float] | None = None
) -> None:
    """
    Train from the last checkpoint, or from the start if there is none, in a separate process.

    ``death`` is the number of writes, and the share of the bytes of the next one, after which the process is killed.
    """
    from sb3_clipvf import ClipPPO

    if death is not None:
        _die_in_write(*death)
    checkpoints = folder / "checkpoints"
    callback = _reporting(report, checkpoints) if with_checkpoints else None
    env = training.make_env(folder)
    if any(checkpoints.glob("checkpoint_*.zip")):
        model = ClipPPO.resume(checkpoints, env, device="cpu")
        append_line(report, event="begins", step=model.num_timesteps)
        model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=callback)
    else:
        append_line(report, event="begins", step=0)
        model = training.make_model(env)
        model.learn(training.total_timesteps, callback=callback)
    append_line(report, event="end", digest=digest(model, folder), seconds=time.process_time())
    env.close()


def _die_in_write(n_writes: int, share: float) -> None:
    """Kill this process with SIGKILL after ``n_writes`` writes, and a share of the bytes of the next one."""
    from sb3_clipvf.checkpoint import training_checkpoint
    from sb3_clipvf.files.atomic import atomic_write

    left = iter(range(n_writes))

    class Dying:
        def __init__(self, file: io.BufferedWriter) -> None:
            self._file = file

        def write(self, content: bytes) -> None:
            self._file.write(content[: int(share * len(content))])
            self._file.flush()
            if share < 1:
                signal.raise_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def dying(path: Path) -> Iterator[Any]:
        is_last = next(left, None) is None
        with atomic_write(path) as file:
            yield Dying(file) if is_last else file
        if is_last:
            signal.raise_signal(signal.SIGKILL)

    mock.patch.object(training_checkpoint, "atomic_write", dying).start()


def _reporting(report: Path, checkpoints: Path) -> TrainingCheckpoint:
    """Return a TrainingCheckpoint that reports each file after it was written."""
    from sb3_clipvf.checkpoint import TrainingCheckpoint

    class Reporting(TrainingCheckpoint):
        def _save_and_reset(self) -> None:
            super()._save_and_reset()
            append_line(report, event="written", step=self.num_timesteps)

    return Reporting(1, checkpoints, on_error="raise", on_signal=False)
