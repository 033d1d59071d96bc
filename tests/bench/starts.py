"""
``python -m tests.bench starts``: seconds from the start of a process to the end of its first update, with defaults.

ClipPPO starts twice, without kernels on disk and then with those that the first start left, beside SB3 and SBX.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil

from tests.bench.command import RoundsBenchmark
from tests.bench.results import clone_environment, machine, machines_text, markdown_table, same_machine
from tests.bench.speed_table import Spread

PEERS = {
    "cold": ("ClipPPO, no kernels on disk", "sb3_clipvf", "ClipPPO"),
    "clipppo": ("ClipPPO", "sb3_clipvf", "ClipPPO"),
    "sb3": ("SB3", "stable_baselines3", "PPO"),
    "sbx": ("SBX", "sbx", "PPO"),
}
"""Peer -> name in the table, module and class, in the order of a round; "clipppo" reads what "cold" compiled."""

PROGRAM = """
from {module} import {algorithm}
model = {algorithm}("MlpPolicy", "{env_id}")
model.learn(1)
print("updated", flush=True)
"""
"""The measured program: one rollout and one update."""

_PACKAGES = ("numba", "scipy", "mujoco", "sbx_rl", "jax")
_NOTES = (
    "Seconds from the start of a process to the end of its first update. They include imports, building, compilation, "
    "one rollout and one update, with default arguments. Median (smallest to largest) of the rounds. In a round, all "
    "columns run one after the other, each in its own process. *No kernels on disk* is the first start after an "
    "installation. JAX compiles at every start, which is its default."
)


@dataclass(frozen=True)
class StartRow:
    """One environment, whose id is the row's name."""

    name: str

    def missing(self) -> str | None:
        """Return "needs ..." with the command that installs what is missing, or None."""
        if self.name.startswith("HalfCheetah") and find_spec("mujoco") is None:
            return "needs mujoco: pip install 'sb3_clipvf[mujoco]'"
        return None


ROWS = (StartRow("CartPole-v1"), StartRow("HalfCheetah-v5"))


class StartsBenchmark(RoundsBenchmark[StartRow]):
    """Measures the rounds that are missing, one process after the other."""

    name = "starts"
    description = "Measure the seconds from the start of a process to the end of its first update."
    log_folder = "logs/bench/starts"
    key = ("name", "peer", "part")
    deciding = ("rounds",)

    def __init__(self, rows: Sequence[StartRow], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        self._machine = machine(_PACKAGES)

    def listed(self, row: StartRow) -> str:
        """Return the rounds that are done, or what the row needs."""
        return row.missing() or self.done(row)

    def run(self) -> None:
        """Measure the missing rounds."""
        reasons = {row.name: reason for row in self.selected if (reason := row.missing()) is not None}
        for name, reason in reasons.items():
            print(f"{name}: skipped, {reason}", flush=True)
        for row, number in self.to_measure([row for row in self.selected if row.name not in reasons]):
            self._measure(row, number)

    def render(self) -> str:
        """Return the table of seconds."""
        rounds = {row.name: [self._round(row, number) for number in self.numbers()] for row in self.rows}
        found = {
            (name, peer): [runs[peer] for runs in made if peer in runs]
            for name, made in rounds.items()
            for peer in PEERS
        }
        shown = [peer for peer in PEERS if any(found[row.name, peer] for row in self.rows)]
        header = ["seconds", *(PEERS[peer][0] for peer in shown)]
        rows = [[row.name, *(_cell(found[row.name, peer]) for peer in shown)] for row in self.rows]
        table = markdown_table(header, "l" + "r" * len(shown), rows)
        runs = [run for of_cell in found.values() for run in of_cell]
        load = max((run["other_load"] for run in runs), default=0.0)
        others = f"Just before a measurement, other programs used up to {load:.0f} % of the processor."
        machines = machines_text(runs, lambda run: "default number of threads")
        return f"{table}\n\n{_NOTES} {others}\n\n{machines}"

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        is_made = any(row.name == run["name"] and row.missing() is None for row in self.selected)
        return is_made and super().remakes(run) and run["peer"] in self._peers()

    def _round(self, row: StartRow, number: int) -> dict[str, dict[str, Any]]:
        """Return the runs of a round by peer, without those of another machine than the first one's."""
        runs = {peer: run for peer in PEERS if (run := self.results.find(_entries(row, peer, number))) is not None}
        return {peer: run for peer, run in runs.items() if same_machine(run, next(iter(runs.values())))}

    def _peers(self) -> list[str]:
        return [peer for peer, (_, module, _) in PEERS.items() if find_spec(module) is not None]

    def is_done(self, row: StartRow, number: int) -> bool:
        """Return whether a round was measured here as a whole, with the packages that are installed now."""
        runs = [self.results.find(_entries(row, peer, number) | self._machine) for peer in self._peers()]
        return all(run is not None for run in runs)

    def _measure(self, row: StartRow, number: int) -> None:
        with tempfile.TemporaryDirectory() as kernels:  # empty, as after an installation
            for peer in self._peers():
                label = f"{row.name}, {PEERS[peer][0]}, {number}"
                log = self.args.log_folder / f"{row.name}-{peer}-{number}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                load = psutil.cpu_percent(0.5)  # of other programs, which makes a measurement less reliable
                with log.open("wb") as errors:
                    seconds = _seconds_to_update(row, peer, {"NUMBA_CACHE_DIR": kernels}, errors)
                if seconds is None:
                    self.failed[label] = f"the process ended before its update, see {log}"
                    print(f"{label}: FAILED, {self.failed[label]}", flush=True)
                    return
                entries = {"seconds": round(seconds, 3), "other_load": load}
                self.results.add(_entries(row, peer, number) | entries | self._machine)
                print(f"{label}: {seconds:.1f} s", flush=True)


def _entries(row: StartRow, peer: str, number: int) -> dict[str, Any]:
    """Return the entries that a run is found by."""
    return {"name": row.name, "peer": peer, "part": str(number)}


def _seconds_to_update(row: StartRow, peer: str, variables: Mapping[str, str], errors: Any) -> float | None:
    """Return the seconds until a new process has made its first update, or None if it ended before."""
    _, module, algorithm = PEERS[peer]
    program = PROGRAM.format(module=module, algorithm=algorithm, env_id=row.name)
    environment = {name: value for name, value in clone_environment().items() if not name.endswith("_NUM_THREADS")}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=errors, env=environment | dict(variables)
    ) as process:
        try:
            for line in process.stdout or ():
                if line == b"updated\n":
                    return time.perf_counter() - started
        finally:
            process.terminate()
    return None


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    spread = Spread.of([run["seconds"] for run in runs])
    if spread is None:
        return ""
    return f"{spread.median:.1f}<br>({spread.low:.1f} to {spread.high:.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return StartsBenchmark(ROWS, argv).main()
