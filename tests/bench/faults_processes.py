"""
The processes of the fault campaign: forked from a server that has imported everything, watched, and ended.

A fresh interpreter spends seconds on imports. The server has made them, has run nothing else, and has one thread, so
its forks are equivalent to fresh processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.process import patched_environment

LIMIT_SECONDS = 4 * 3600.0
"""Wall-clock time after which a process counts as hanging; the machine may be busy."""

KEPT_FAILURES = 20
"""Failures of a row that are described in the results; all are counted."""

_PRELOADED = ("tests.bench.faults_preload",)


@dataclass
class Tally:
    """
    Outcomes of attempts to break something.

    :param survived: attempts that ended as they should
    :param lost: attempts that lost more than what came after the last checkpoint
    :param wrong: attempts with a wrong result and no error
    :param unclear: attempts with an error that does not help, a crash or a hang
    :param counts: further counts by name
    :param failures: descriptions of the first attempts that did not survive
    """

    attempts: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    unclear: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, failure: str = "") -> None:
        """Count one attempt, and describe its failure."""
        self.attempts += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if failure and len(self.failures) < KEPT_FAILURES:
            self.failures.append(failure)

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name in ("attempts", "survived", "lost", "wrong", "unclear"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.counts.update(other.counts)
        self.failures = [*self.failures, *other.failures][:KEPT_FAILURES]

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return {**asdict(self), "counts": dict(sorted(self.counts.items()))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """Return the tally with the values of :meth:`as_json`; other entries are ignored."""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "counts": Counter(own["counts"])})


def start_server() -> None:
    """Start the server that forks, with one thread for numerical libraries: forks do not copy threads."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_PRELOADED))
    with patched_environment({"OMP_NUM_THREADS": "1"}, replace=True):
        forkserver.ensure_running()


def start(target: Callable[..., None], report: Path, *args: Any) -> ForkServerProcess:
    """Call ``target(report, *args)`` in a process with its own group; an error is appended to the report."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(target, report, args))
    process.start()
    return process


def end(process: ForkServerProcess) -> None:
    """Kill a process, which may have ended already, and what it has started."""
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def finish(process: ForkServerProcess) -> int | None:
    """Wait for a process, and return its exit code: negative after a signal, None if it hung and was killed."""
    try:
        process.join(LIMIT_SECONDS)
        return process.exitcode
    finally:
        end(process)


def append_line(report: Path, **values: Any) -> None:
    """Append a line to a report, so that a later kill of the process cannot lose it."""
    descriptor = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(values, default=str).encode() + b"\n")
    finally:
        os.close(descriptor)


def read_lines(report: Path) -> list[dict[str, Any]]:
    """Return the lines of a report, none if there is no such file."""
    if not report.exists():
        return []
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


def limit_memory(more: int) -> None:
    """Bound the address space of this process to its present size and ``more`` bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_processor(seconds: float) -> None:
    """End this process with SIGPROF after this many further seconds of processor time; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _run(target: Callable[..., None], report: Path, args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    import logging
    import warnings

    import torch as th

    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("sb3_clipvf").setLevel(logging.CRITICAL)
    try:
        target(report, *args)
    except Exception as error:
        append_line(report, event="error", text=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
        raise SystemExit(1) from None
