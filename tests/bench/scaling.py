"""
``python -m tests.bench scaling``: seconds of trainings on one and two processes, and a model of more processes.

Each measurement runs in processes of its own (``scaling_child``). ``scaling_network`` connects two by a slow network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.command import Benchmark, at_least
from tests.bench.results import clone_environment, machine, machines_text, markdown_table, same_machine
from tests.bench.scaling_network import Network, why_no_namespaces

SIZES = (1_024, 16_384, 131_072, 1_048_576, 8_388_608)
"""Bytes of the messages that are measured."""

DELAY_MS = 1.0
"""Milliseconds that each packet takes in the slow network, in each direction."""

PREDICTED = (2, 8, 64, 256, 1024)
"""Numbers of processes for which the model predicts."""

_KINDS = {
    "one": "1 process",
    "weak": "2, as many environments each",
    "strong": "2, half the environments each",
    "delayed": f"2, as many environments each, {DELAY_MS:g} ms of delay",
}


@dataclass(frozen=True)
class Workload:
    """A training of one process, with 10 epochs."""

    env_id: str
    n_envs: int
    n_steps: int
    batch_size: int
    net_arch: tuple[int, ...]

    @property
    def n_minibatches(self) -> int:
        """Steps of the optimizer after a rollout."""
        return 10 * -(-self.n_envs * self.n_steps // self.batch_size)


WORKLOADS = {
    "small": Workload("CartPole-v1", 8, 128, 256, (64, 64)),
    "large": Workload("CartPole-v1", 16, 256, 4096, (64, 64)),
    "wide": Workload("CartPole-v1", 16, 32, 512, (512, 512)),
}


@dataclass(frozen=True)
class ScalingRow:
    """A training of a workload on one or two processes, or messages between two."""

    name: str
    kind: str  # a key of _KINDS, or "messages"
    workload: Workload | None = None

    def spec(self, iterations: int) -> dict[str, Any]:
        """Return what each process does, as JSON has it."""
        if self.workload is None:
            return {"sizes": list(SIZES)}
        spec = {**asdict(self.workload), "n_epochs": 10, "iterations": iterations}
        spec["net_arch"] = list(self.workload.net_arch)
        if self.kind == "strong":
            spec["n_envs"] //= 2
            spec["batch_size"] //= 2
        return spec

    def missing(self) -> str | None:
        """Return why this machine cannot make the row, or None."""
        return why_no_namespaces() if self.kind == "delayed" else None


ROWS = (
    ScalingRow("messages", "messages"),
    ScalingRow("messages-delayed", "delayed"),
    *(
        ScalingRow(f"{name}-{kind}", kind, workload)
        for name, workload in WORKLOADS.items()
        for kind in _KINDS
        if kind != "delayed" or name == "large"
    ),
)


@dataclass(frozen=True)
class Link:
    """
    Time of messages in one direction between two processes.

    :param latency: seconds of an empty message
    :param bandwidth: bytes per second
    """

    latency: float
    bandwidth: float

    @classmethod
    def of(cls, seconds_by_bytes: Mapping[str, float]) -> Link:
        """Return the link that explains the all-reduces of the smallest and the largest size between two processes."""
        points = sorted((int(n_bytes), seconds) for n_bytes, seconds in seconds_by_bytes.items())
        (small, fast), (large, slow) = points[0], points[-1]
        return cls(fast / 2, (large - small) / (slow - fast))

    def all_reduce(self, n_processes: int, n_bytes: float) -> float:
        """
        Return the seconds of a ring all-reduce: 2 (K - 1) steps, each with 1/K of the bytes.

        Source: Patarasuk and Yuan 2009, Journal of Parallel and Distributed Computing 69(2), section 3.
        """
        return 2 * (n_processes - 1) * (self.latency + n_bytes / (n_processes * self.bandwidth))


@dataclass(frozen=True)
class Model:
    """
    Seconds of an iteration on K processes with as many environments each, from measurements of one and of two.

    :param one: numbers of one process
    :param pair: numbers of the first of two processes
    :param link: link between these two
    """

    workload: Workload
    one: Mapping[str, Any]
    pair: Mapping[str, Any]
    link: Link

    def efficiency(self, n_processes: int, link: Link) -> float:
        """Return the steps per second of K processes over a link as a share of K times those of one process."""
        alone = self.one["rollout_seconds"] + self.one["update_seconds"]
        apart = self.pair["rollout_seconds"] + self.pair["update_seconds"]
        # Waiting and the other messages of the pair, with more latencies for each of these messages
        others = self.pair["message_seconds"] - self._reduce_seconds(2, self.link)
        n_others = self.pair["messages"] - self.workload.n_minibatches
        others += n_others * ((n_processes - 1) * link.latency - self.link.latency)
        return float(alone / (apart + self._reduce_seconds(n_processes, link) + others))

    def _reduce_seconds(self, n_processes: int, link: Link) -> float:
        return self.workload.n_minibatches * link.all_reduce(n_processes, 4 * self.one["parameters"])


class ScalingBenchmark(Benchmark[ScalingRow]):
    """Measures the rows that are missing, one after the other."""

    name = "scaling"
    description = "Measure training and messages in one and two processes, and predict larger numbers of processes."
    log_folder = "logs/bench/scaling"
    key = ("name",)
    deciding = ("iterations",)

    def __init__(self, rows: Sequence[ScalingRow], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        self._machine = machine(("numba", "scipy"))

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the number of iterations."""
        about = "rollouts and updates that are measured (default: %(default)s)"
        parser.add_argument("--iterations", type=at_least(1), default=3, help=about)

    def listed(self, row: ScalingRow) -> str:
        """Return whether the row is done, or why it cannot be made."""
        return row.missing() or ("done" if self._is_done(row) else "to do")

    def run(self) -> None:
        """Measure the missing rows."""
        for row in self.selected:
            if row.missing() is not None:
                print(f"{row.name}: skipped, {row.missing()}", flush=True)
            elif not self._is_done(row):
                self._measure(row)

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        return any(row.name == run["name"] and row.missing() is None for row in self.selected)

    def render(self) -> str:
        """Return the tables of workloads, of messages and of predictions."""
        found = {row.name: run for row in self.rows if (run := self._found(row)) is not None}
        links = {
            label: (row, Link.of(run["seconds_by_bytes"]))
            for row, label in (("messages", "this machine"), ("messages-delayed", f"{DELAY_MS:g} ms of delay"))
            if (run := found.get(row)) is not None
        }
        tables = [_training_table(found), _message_table(found, links), _prediction_table(found, links)]
        machines = machines_text(found.values(), lambda run: "one thread in each process")
        return "\n\n".join([*filter(None, tables), machines])

    def _is_done(self, row: ScalingRow) -> bool:
        """Return whether a row was measured here with the packages that are installed now."""
        found = self._found(row)
        return found is not None and same_machine(found, self._machine)

    def _found(self, row: ScalingRow) -> dict[str, Any] | None:
        return self.results.find({"name": row.name, "spec": row.spec(self.args.iterations)})

    def _measure(self, row: ScalingRow) -> None:
        spec, log = row.spec(self.args.iterations), self.args.log_folder / f"{row.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Network(DELAY_MS / 1e3) if row.kind == "delayed" else nullcontext() as network:
                numbers = launched(1 if row.kind == "one" else 2, spec, log, network)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.failed[row.name] = f"{error}, see {log}"
            print(f"{row.name}: FAILED, {self.failed[row.name]}", flush=True)
            return
        self.results.add({"name": row.name, "spec": spec} | numbers | self._machine)
        print(f"{row.name}: done", flush=True)


def launched(
    n_processes: int, spec: Mapping[str, Any], log: Path, network: Network | None = None, seconds: float = 120.0
) -> dict[str, Any]:
    """Run ``scaling_child`` on processes for at most ``seconds``, and return what the first one prints."""
    child = ["-m", "tests.bench.scaling_child", json.dumps(spec)]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    variables = clone_environment() | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    if network is not None:
        commands = network.commands(launcher, child)
        variables["GLOO_SOCKET_IFNAME"] = network.interface
    elif n_processes == 1:
        commands = [[sys.executable, *child]]
    else:
        commands = [[*launcher, "--standalone", f"--nproc-per-node={n_processes}", *child]]
    with log.open("wb") as errors:
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=variables) for command in commands
        ]
        try:
            output = [process.communicate(timeout=seconds)[0] for process in processes][0]
        finally:
            for process in processes:
                process.terminate()
    lines = output.decode().strip().splitlines()
    if not lines or any(process.returncode for process in processes):
        raise ValueError(f"the processes ended with codes {[process.returncode for process in processes]}")
    return dict(json.loads(lines[-1]))


def _training_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["workload", "processes", "rollout, s", "update, s", "messages, s", "messages", "MB", "steps/s"]
    rows = []
    for row in ROWS:
        run = found.get(row.name)
        if row.workload is not None and run is not None:
            seconds = (f"{run[f'{name}_seconds']:.3f}" for name in ("rollout", "update", "message"))
            sizes = (f"{run['messages']:.0f}", f"{run['message_bytes'] / 1e6:.2f}", f"{run['steps_per_second']:,.0f}")
            rows.append([row.name.partition("-")[0], _KINDS[row.kind], *seconds, *sizes])
    workloads = "; ".join(
        f"*{name}*: {each.env_id}, {each.n_envs} environments, {each.n_steps} steps, minibatches of "
        f"{each.batch_size}, networks {'-'.join(map(str, each.net_arch))}"
        for name, each in WORKLOADS.items()
    )
    notes = (
        f"Means of one iteration of the first process. {workloads}. Engine native, 10 epochs, one thread in each "
        "process. The seconds of messages include waiting for the other process. *MB* is the amount of data that one "
        "process contributes to the messages."
    )
    return f"{markdown_table(header, 'llrrrrrr', rows)}\n\n{notes}" if rows else ""


def _message_table(found: Mapping[str, Mapping[str, Any]], links: Mapping[str, tuple[str, Link]]) -> str:
    if not links:
        return ""
    header = ["all-reduce of 2 processes, ms", *(f"{n_bytes / 1024:,.0f} KiB" for n_bytes in SIZES)]
    rows = []
    for label, (row, link) in links.items():
        measured = found[row]["seconds_by_bytes"]
        rows.append([f"{label}, measured", *(f"{1e3 * measured[str(n_bytes)]:.2f}" for n_bytes in SIZES)])
        rows.append([f"{label}, model", *(f"{1e3 * link.all_reduce(2, n_bytes):.2f}" for n_bytes in SIZES)])
    texts = (
        f"{label}: {1e3 * link.latency:.2f} ms, {link.bandwidth / 1e6:,.0f} MB/s" for label, (_, link) in links.items()
    )
    return f"{markdown_table(header, 'l' + 'r' * len(SIZES), rows)}\n\nLatency and bandwidth: {'; '.join(texts)}."


def _prediction_table(found: Mapping[str, Mapping[str, Any]], links: Mapping[str, tuple[str, Link]]) -> str:
    rows = []
    for name, workload in WORKLOADS.items():
        one, pair, base = found.get(f"{name}-one"), found.get(f"{name}-weak"), links.get("this machine")
        if one is None or pair is None or base is None or not same_machine(one, pair, found[base[0]]):
            continue
        model = Model(workload, one, pair, base[1])
        for (label, (row, link)), kind in zip(links.items(), ("weak", "delayed"), strict=False):
            if not same_machine(one, found[row]):
                continue
            two = found.get(f"{name}-{kind}")
            measured = (
                ""
                if two is None or not same_machine(one, two)
                else f"{two['steps_per_second'] / (2 * one['steps_per_second']):.0%}"
            )
            predicted = (f"{model.efficiency(n, link):.1%}" for n in PREDICTED)
            rows.append([name, label, measured, *predicted])
    header = ["workload", "network", "2, measured", *(f"{n:,}" for n in PREDICTED)]
    note = (
        "Predicted steps per second of K processes with as many environments each, as a share of K times those of one "
        "process. The model includes the measurements of two processes on this machine."
    )
    return f"{markdown_table(header, 'll' + 'r' * (1 + len(PREDICTED)), rows)}\n\n{note}" if rows else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return ScalingBenchmark(ROWS, argv).main()
