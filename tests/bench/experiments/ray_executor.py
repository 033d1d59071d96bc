"""Runs as tasks of a Ray cluster: that of an address, or one of this machine that ends with the command."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.bench.experiments.executors import Finished, LocalExecutor
from tests.bench.experiments.runs import RECORD_FILE, RunSpec, differing, prepare_folder, this_machine
from tests.bench.results import clone_environment

_SECONDS_TO_END = 60.0
"""Time for interrupted runs to write a last checkpoint."""


class RayExecutor:
    """
    Makes runs on the nodes of a Ray cluster, one core each.

    A node needs the clone at the path that it has here, and the same versions of all packages. Run folders are the
    node's own, or those of a file system that nodes share; only then does another node resume an interrupted run.

    :param address: address of a running cluster, as ``ray.init`` takes it; "": a new one on this machine
    :param jobs: parallel runs
    :raises ImportError: if Ray is not installed
    :raises ValueError: if there is no cluster at the address
    """

    def __init__(self, address: str, jobs: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a benchmark reports nothing to others
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"`--ray` needs Ray: {error}. Install it: pip install 'sb3_clipvf[ray]'.") from error
        self._ray, self._jobs = ray, jobs
        options: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": jobs}
        if not address:
            options["include_dashboard"] = False
        variables = {"PYTHONPATH": clone_environment()["PYTHONPATH"]}
        try:
            _check_listens(address)
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"`--ray` must be the address of a running Ray cluster, got {address!r} ({error}). Start one with "
                "`ray start --head`, or leave the address out."
            ) from error

    def run(self, specs: Sequence[RunSpec]) -> Generator[Finished, None, None]:
        """Make the runs. Closing the iterator, and an interruption, end those that have begun; they can be resumed."""
        ray, waiting = self._ray, list(specs)
        task = ray.remote(num_cpus=1, max_retries=0)(make_on_node)
        running: dict[Any, RunSpec] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._jobs:
                    spec = waiting.pop(0)
                    running[task.remote(spec, this_machine()["versions"])] = spec
                (ended, *_), _ = ray.wait(list(running))
                if (finished := self._finished(running.pop(ended), ended)) is not None:
                    yield finished
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_END)
            ray.shutdown()

    def _finished(self, spec: RunSpec, reference: Any) -> Finished | None:
        try:
            finished: Finished | None = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Finished(spec, None, str(error).strip().splitlines()[-1], 0.0)
        if finished is None or finished.record is None:
            return finished
        # A node knows its own run alone.
        record = replace(finished.record, jobs=self._jobs) if finished.seconds > 0 else finished.record
        # Here too, if nodes have folders of their own.
        prepare_folder(spec, self._jobs)
        record.write(spec.folder / RECORD_FILE)
        return replace(finished, record=record)


def _check_listens(address: str) -> None:
    """Check that something listens at ``host:port``; Ray itself tries for minutes. Other forms are left to Ray."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10):
            pass


def make_on_node(spec: RunSpec, versions: Mapping[str, str]) -> Finished | None:
    """
    Make a run in a process of its own, if this node has these versions; None if another command makes it.

    Cancelling the task interrupts the run.
    """
    difference = differing(this_machine()["versions"], versions)
    if difference:
        raise ValueError(f"node {os.uname().nodename} has {difference}: install the same versions there")
    found = list(LocalExecutor(1).run([spec]))
    return found[0] if found else None
