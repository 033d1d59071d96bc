"""Executors make runs: here, in processes of this machine, a given number at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from tests.bench.experiments.runs import (
    IN_PROGRESS_CODE,
    LOG_FILE,
    RECORD_FILE,
    Record,
    RunInProgressError,
    RunSpec,
    prepare_folder,
    process_variables,
)
from tests.bench.results import clone_environment

# Makes the run of the folder that follows it. Tests replace this by a quick command.
RUN_COMMAND: tuple[str, ...] = (sys.executable, "-m", "tests.bench.experiments.runs")


@dataclass(frozen=True)
class Finished:
    """
    A run that ended.

    :param record: what is kept of it; None if it failed
    :param error: reason of the failure
    :param seconds: time of its last process; 0 if it was made before
    """

    spec: RunSpec
    record: Record | None
    error: str
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether one process made the run now, so that its steps took these seconds."""
        return self.seconds > 0 and self.record is not None and self.record.scores.get("run_seconds") is not None

    def time_text(self) -> str:
        """Return the time in words."""
        if self.seconds == 0:
            return "made before"
        text = f"{self.seconds:,.0f} s"
        return text if self.is_whole or self.record is None else f"{text} since it was resumed"


class Executor(Protocol):
    """Makes runs, each in a process of its own: :class:`LocalExecutor` here, ``RayExecutor`` on a cluster."""

    def run(self, specs: Sequence[RunSpec]) -> Generator[Finished, None, None]:
        """
        Make the runs, begin them in this order, and yield each when it ends. A failed run does not end others.

        Runs that another command makes at the same time are left out.
        """


class LocalExecutor:
    """Makes runs on this machine, ``jobs`` of them in parallel."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._stop = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def run(self, specs: Sequence[RunSpec]) -> Generator[Finished, None, None]:
        """Make the runs. Closing the iterator, and an interruption, end those that have begun; they can be resumed."""
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                pending = {pool.submit(self._run_one, spec) for spec in specs}
                while pending:
                    # Ray cancels a task by a flag, which Python reads when it wakes.
                    ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    yield from (finished for future in ended if (finished := future.result()) is not None)
            except BaseException:
                self._stop.set()
                for process in list(self._processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise

    def _run_one(self, spec: RunSpec) -> Finished | None:
        if self._stop.is_set():
            return None
        was_made = (spec.folder / RECORD_FILE).exists()
        started = time.perf_counter()
        record, error = None, ""
        try:
            record = self._record(spec)
        except RunInProgressError:
            return None
        except (OSError, ValueError) as reason:
            if self._stop.is_set():
                return None
            error = str(reason)
        return Finished(spec, record, error, 0.0 if was_made else time.perf_counter() - started)

    def _record(self, spec: RunSpec) -> Record:
        prepare_folder(spec, self._jobs)
        path, log_path = spec.folder / RECORD_FILE, spec.folder / LOG_FILE
        if not path.exists():
            # Earlier tracebacks stay.
            with log_path.open("ab") as log:
                written = log.tell()
                code = self._process(spec, log)
            if code == IN_PROGRESS_CODE:
                raise RunInProgressError(f"another process makes the run in {spec.folder}")
            if code != 0:
                raise ValueError(f"{_last_line(log_path, written)} (code {code}), see {log_path}")
        return Record.read(path)

    def _process(self, spec: RunSpec, log: IO[bytes]) -> int:
        environment = clone_environment() | process_variables(spec)
        # In a group of its own, so that Ctrl-C reaches this process alone, which then ends the run by SIGTERM: that
        # writes a last checkpoint.
        process = subprocess.Popen(
            [*RUN_COMMAND, os.fspath(spec.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,
        )
        self._processes.add(process)
        try:
            if self._stop.is_set():  # set between the earlier check and the process's start
                process.terminate()
            return process.wait()
        finally:
            self._processes.discard(process)


def _last_line(log_path: Path, start: int) -> str:
    """Return the last line written to a log after byte ``start``. For a traceback, this is the error."""
    text = log_path.read_bytes()[start:].decode(errors="replace").strip()
    return text.splitlines()[-1].strip() if text else "the process ended without a message"
