"""
The processes of the fault campaign: forked from a server that has imported everything, watched, and ended.

A process that is started anew spends seconds on imports. The server has done them once, has run nothing, and has one
thread, so that what it forks is as good as new.
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
"""Wall-clock time after which a process is taken for one that hangs: the machine may have little time to spare."""

KEPT_FAILURES = 20
"""Failures of a row that are described in the results; all are counted."""

_PRELOADED = ("tests.bench.faults_preload",)


@dataclass
class Tally:
    """
    What came of attempts to break something.

    :param attempts: How often it was tried.
    :param survived: How often it ended as it should.
    :param lost: How often more was lost than what came after the last checkpoint.
    :param wrong: How often something else came out, and nothing told so.
    :param unclear: How often there was an error that does not help, a crash or a hang.
    :param counts: What else was counted, by name.
    :param failures: Descriptions of the first ones that did not survive.
    """

    attempts: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    unclear: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, failure: str = "") -> None:
        """
        Count one attempt.

        :param outcome: "survived", "lost", "wrong" or "unclear".
        :param failure: What happened, where it did not survive.
        """
        self.attempts += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if failure and len(self.failures) < KEPT_FAILURES:
            self.failures.append(failure)

    def merge(self, other: Tally) -> None:
        """
        Add what another tally has counted.

        :param other: It stays as it is.
        """
        for name in ("attempts", "survived", "lost", "wrong", "unclear"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.counts.update(other.counts)
        self.failures = [*self.failures, *other.failures][:KEPT_FAILURES]

    def as_json(self) -> dict[str, Any]:
        """:return: what :meth:`from_json` takes"""
        return {**asdict(self), "counts": dict(sorted(self.counts.items()))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """:return: the tally of which :meth:`as_json` gave the values, among others"""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "counts": Counter(own["counts"])})


def start_server() -> None:
    """Start the server that forks: with one thread for numerical libraries, which a fork does not copy."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_PRELOADED))
    with patched_environment({"OMP_NUM_THREADS": "1"}, replace=True):
        forkserver.ensure_running()


def start(target: Callable[..., None], report: Path, *args: Any) -> ForkServerProcess:
    """
    Start a process in a group of its own.

    :param target: Called there with ``report`` and ``args``.
    :param report: File to which it appends lines by :func:`tell`; an error's text goes there as well.
    :param args: What can be pickled.
    :return: The process.
    """
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(target, report, args))
    process.start()
    return process


def end(process: ForkServerProcess) -> None:
    """
    Kill a process, and what it has started.

    :param process: From :func:`start`; it may have ended already.
    """
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def finish(process: ForkServerProcess) -> int | None:
    """
    Wait for the end of a process.

    :param process: From :func:`start`.
    :return: Its exit code, negative where a signal ended it; None where it did not end and was killed.
    """
    try:
        process.join(LIMIT_SECONDS)
        return process.exitcode
    finally:
        end(process)


def tell(report: Path, **values: Any) -> None:
    """
    Append a line to a report. It is there even if the process is killed right after.

    :param report: The file.
    :param values: What the line says.
    """
    descriptor = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(values, default=str).encode() + b"\n")
    finally:
        os.close(descriptor)


def lines_of(report: Path) -> list[dict[str, Any]]:
    """
    Read a report.

    :param report: The file; it need not exist.
    :return: Its lines.
    """
    if not report.exists():
        return []
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


def limit_memory(more: int) -> None:
    """
    Let this process grow by no more than so much.

    :param more: Bytes of address space.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_processor(seconds: float) -> None:
    """
    Have this process end by SIGPROF unless this is called again before so much of the processor's time is used up.

    :param seconds: Time of the processor; 0 lifts the limit.
    """
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
        tell(report, event="error", text=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
        raise SystemExit(1) from None
