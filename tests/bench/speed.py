"""
``python -m tests.bench speed``: ClipPPO, SB3's PPO (also compiled) and SBX's PPO on the same machine in turn.

Each measurement runs in its own process (``speed_child``). ``speed_rows`` defines the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tests.bench.command import RoundsBenchmark, at_least
from tests.bench.results import clone_environment, machine
from tests.bench.speed_figure import write_figure
from tests.bench.speed_rows import DEVICES, GPU_ROWS, PEERS, ROWS, SpeedRow, absent_peers
from tests.bench.speed_table import (
    CACHES,
    KEY,
    STORED,
    TRIALS,
    best_threads,
    entries_of,
    needs_trial,
    render_tables,
    trials_of,
)

# Replaced in tests.
CHILD_COMMAND: tuple[str, ...] = (sys.executable, "-m", "tests.bench.speed_child")
COMPILE_COMMAND = (sys.executable, "-c", "from sb3_clipvf.zoo.compilation import main; main([])")
_PACKAGES = ("numba", "scipy", "mujoco", "box2d", "envpool", "ale_py", "sbx_rl", "jax")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_BOUND_SECONDS = 2.0
_QUICK_BOUND_SECONDS = 0.05


class ChildError(RuntimeError):
    """A measured process failed; the message has the reason and the path of its output."""


class SpeedBenchmark(RoundsBenchmark[SpeedRow]):
    """Measures the rounds that are missing, one process after the other."""

    name = "speed"
    description = (
        "Measure ClipPPO, SB3's PPO (in some rows also with torch.compile) and SBX's PPO (if installed) in turn on "
        "this machine, and tabulate their steps per second."
    )
    log_folder = "logs/bench/speed"
    key = KEY
    deciding = ("quick", "rounds", "iterations", "device")
    gpu_rows: ClassVar[tuple[str, ...]] = GPU_ROWS
    """Rows that ``--device cuda`` measures, unless ``--only`` names others; empty: all."""

    def __init__(self, rows: Sequence[SpeedRow], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        self._machine = machine(_PACKAGES)
        if self.args.device != "cpu":
            self._machine["gpu"] = _gpu_name()
        self._notes = {row.name: reason for row in self.selected if (reason := row.missing()) is not None}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of measurements and profiles."""
        super().add_options(parser)
        about = "rollouts and updates that are measured (default: the row's)"
        parser.add_argument("--iterations", type=at_least(1), help=about)
        about = (
            "argument device of ClipPPO and SB3 (default: %(default)s); auto: also ClipPPO on the CPU and on the GPU; "
            "cuda: also the engines autograd and cuda_graph_bf16, in the rows for GPUs; results go to "
            f"docs/results/{self.name}-DEVICE.json"
        )
        parser.add_argument("--device", choices=DEVICES, default="cpu", help=about)
        about = f"only check within seconds that everything runs; results go to logs/bench/{self.name}-quick.json"
        parser.add_argument("--quick", action="store_true", help=about)
        names = [row.name for row in self.rows]
        about = "print where the time of this row goes, and keep no result"
        parser.add_argument("--profile", choices=names, metavar="NAME", help=about)
        parser.add_argument("--peer", choices=tuple(PEERS), default="clipppo", help="for --profile (default: clipppo)")

    def prepare(self, rows: Sequence[SpeedRow]) -> Sequence[SpeedRow]:
        """Return the rows for the options. Those of ``--quick`` and of other devices go into separate files."""
        device = self.args.device
        if device != "cpu" and _gpu_name() is None:
            self.parser.error(f"`--device` must be cpu on a machine without a GPU, got {device}. Leave it out.")
        if self.args.out == self.parser.get_default("out") and (self.args.quick or device != "cpu"):
            kind = "quick" if self.args.quick else device
            self.args.out = Path("logs/bench" if self.args.quick else "docs/results") / f"{self.name}-{kind}.json"
        if device == "cuda" and self.args.only is None and self.gpu_rows:
            rows = [row for row in rows if row.name in self.gpu_rows]
        rows = [row.on(device) for row in rows]
        if self.args.iterations is not None:
            rows = [replace(row, iterations=self.args.iterations) for row in rows]
        return [row.quick() for row in rows] if self.args.quick else rows

    def listed(self, row: SpeedRow) -> str:
        """Return the goal, and the rounds that are done or what the row needs."""
        return f"goal {row.goal:>3g}  {row.missing() or self.done(row)}  {row.title}"

    def run(self) -> None:
        """Measure the missing rounds, after trials that choose each peer's number of threads."""
        for name, reason in self._notes.items():
            print(f"{name}: skipped, {reason}", flush=True)
        rows = [row for row in self.selected if row.name not in self._notes]
        for peer, reason in absent_peers().items():
            if any(peer in row.peers for row in rows):
                print(f"{PEERS[peer]}: skipped, {reason}", flush=True)
        todo = self.to_measure(rows)
        done = len(rows) * self.args.rounds - len(todo)
        print(f"{len(todo)} rounds to measure, {done} are done already (--rerun measures them again).", flush=True)
        if todo:
            print(self._expected(todo), flush=True)
            if self.args.device != "cuda":  # no peer has kernels there
                # Otherwise the first measurement would have the compiler's time and memory.
                subprocess.run(COMPILE_COMMAND, env=clone_environment(), check=False)
        chosen: dict[tuple[str, str], int | None] = {}
        unable: set[tuple[str, str]] = set()
        for row, number in todo:
            for peer in row.measured():
                if peer in PEERS and (row.name, peer) not in chosen.keys() | unable:
                    try:
                        chosen[row.name, peer] = self._choose_threads(row, peer)
                    except LookupError:
                        unable.add((row.name, peer))
            if unable & {(row.name, "clipppo"), (row.name, "sb3")}:
                print(f"{row.name}, {number}: left out, since the trials failed", flush=True)
                continue
            peers = [peer for peer in row.measured() if (row.name, peer) not in unable]
            for peer in peers if number % 2 else reversed(peers):
                self._measure(row, peer, str(number), chosen.get((row.name, peer)))

    def render(self) -> str:
        """Return the table of ratios and that of parts."""
        return render_tables(self.results, self._shown(), self.args.rounds, self.row_notes())

    def row_notes(self) -> dict[str, str]:
        """Return why rows have no results, by name."""
        return self._notes | dict.fromkeys(self.failed, "failed")

    def draw(self, path: Path) -> bool:
        """Draw the ratios."""
        if self.args.device != "cpu":  # its rows differ too much for one axis
            return False
        write_figure(self.results, self._shown(), self.args.rounds, path)
        return True

    def _shown(self) -> Sequence[SpeedRow]:
        """Return all rows, or on other devices those that have results, which are few."""
        if self.args.device == "cpu":
            return self.rows
        measured = {run["name"] for run in self.results.runs} | self.failed.keys()
        return [row for row in self.rows if row.name in measured]

    def main(self) -> int:
        """Run the benchmark, or the profile that was asked for, and return the exit code."""
        return super().main() if self.args.profile is None else self.profile()

    def profile(self) -> int:
        """Print where the time of the row of ``--profile`` goes, and return the exit code."""
        (row,) = (row for row in self.rows if row.name == self.args.profile)
        peer = self.args.peer
        if (reason := row.missing()) is not None:
            self.parser.error(f"`--profile` must name a row whose packages are installed, got {row.name}: it {reason}")
        if peer not in row.measured():
            self.parser.error(
                f"`--peer` must be one of the peers of {row.name} ({', '.join(row.peers)}), got {peer}"
                + (f", which {absent_peers()[peer]}" if peer in row.peers else "")
            )
        from tests.bench.speed_profile import render_profile

        task = self._task(row, peer, 1, 1) | {"profile": True}
        try:
            result = run_child(task, 1, self.args.log_folder / row.name / f"{peer}-profile.log")
        except ChildError as error:
            print(f"{row.name}: FAILED, {error}", flush=True)
            return 1
        print(render_profile(f"{row.title}, {PEERS[peer]}, one thread", result), flush=True)
        return 0

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again: rounds and cold starts, but no other trials."""
        for row in self.selected:
            if row.name == run["name"] and row.name not in self._notes and run["peer"] in row.measured():
                return super().remakes(run) or self._is_cold(row, run["peer"], run["part"])
        return False

    def is_done(self, row: SpeedRow, number: int) -> bool:
        """Return whether a round has all peers."""
        return all(self._is_measured(row, peer, str(number)) for peer in row.measured())

    def _expected(self, todo: Sequence[tuple[SpeedRow, int]]) -> str:
        """Return how long these rounds with their trials will take, by the stored measurements."""
        stored: dict[tuple[str, str, bool], list[float]] = {}
        for run in self.results.runs:
            if "process_seconds" in run:
                stored.setdefault((run["name"], run["peer"], run["part"] in TRIALS), []).append(run["process_seconds"])
        wanted = [(row.name, peer, False) for row, _ in todo for peer in row.measured()]
        rows = {row.name: row for row, _ in todo}.values()
        peers = [(row, peer) for row in rows for peer in row.measured() if peer in PEERS]
        wanted += [(row.name, peer, True) for row, peer in peers for _ in self._missing_trials(row, peer)]
        known = [statistics.mean(stored[key]) for key in wanted if key in stored]
        minutes = f"{math.ceil(sum(known) / 60)} min"
        if len(known) == len(wanted):
            return f"They take about {minutes}."
        return f"{len(known)} of their {len(wanted)} measurements take about {minutes}; the others were never made."

    def _is_measured(self, row: SpeedRow, peer: str, part: str) -> bool:
        """Return whether there is a result that was made here with the packages that are installed now."""
        run = self.results.find(entries_of(row, peer, part))
        if run is None or any(run.get(name) != self._machine.get(name) for name in ("cpu", "cores", "gpu")):
            return False
        versions = self._machine["versions"]
        return all(versions.get(name) == number for name, number in run["versions"].items())

    def _choose_threads(self, row: SpeedRow, peer: str) -> int | None:
        for part in self._missing_trials(row, peer):
            if needs_trial(self.results, row, peer, part):
                self._measure(row, peer, part, TRIALS[part])
        return best_threads(self.results, row, peer)

    def _missing_trials(self, row: SpeedRow, peer: str) -> list[str]:
        """Return trials to measure."""
        parts = [part for part in trials_of(row, peer) if needs_trial(self.results, row, peer, part)]
        return [part for part in parts if not self._is_measured(row, peer, part)]

    def _is_cold(self, row: SpeedRow, peer: str, part: str) -> bool:
        """Return whether this measurement starts without compiled code."""
        return row.cold_start and peer in CACHES and part == next(iter(trials_of(row, peer)), None)

    def _measure(self, row: SpeedRow, peer: str, part: str, threads: int | None) -> None:
        iterations = max(1, row.iterations // 4) if part in TRIALS else row.iterations
        task = self._task(replace(row, iterations=iterations), peer, 0 if part in TRIALS else int(part), threads)
        label = f"{row.name}, {PEERS.get(peer, peer)}, {part}"
        log_path = self.args.log_folder / row.name / f"{peer}, {part}.log".replace(", ", "-").replace(" ", "-")
        # The load of other programs, which makes a measurement less reliable.
        load = psutil.cpu_percent(0.1 if self.args.quick else 0.5)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:  # an empty one, as after an installation
            variables = {CACHES[peer]: cache} if self._is_cold(row, peer, part) else {}
            try:
                result = run_child(task, threads, log_path, variables)
            except ChildError as error:
                self.failed[row.name] = str(error)
                print(f"{label}: FAILED, {error}", flush=True)
                return
        kept = {name: result[name] for name in (STORED if peer in PEERS else STORED[:1]) if name in result}
        about = {"process_seconds": time.monotonic() - started, "other_load": load}
        self.results.add(entries_of(row, peer, part) | kept | about | self._machine)
        print(f"{label}: {result['steps_per_second']:,.0f} steps/s", flush=True)

    def _task(self, row: SpeedRow, peer: str, seed: int, threads: int | None) -> dict[str, Any]:
        """Return the task for ``speed_child``."""
        return {
            "row": asdict(row),
            "peer": peer,
            "seed": seed,
            # JAX takes no number of threads: it starts one for each core that it may use.
            "cores": threads if peer == "sbx" else None,
            "profile": False,
            "bound_seconds": _QUICK_BOUND_SECONDS if self.args.quick else _BOUND_SECONDS,
        }


def _gpu_name() -> str | None:
    """Return the name of the GPU that "cuda" means, or None without one."""
    import torch as th  # takes a second, which `--list` can do without

    return th.cuda.get_device_name() if th.cuda.is_available() else None


def run_child(
    task: Mapping[str, Any], threads: int | None, log_path: Path, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``speed_child`` on a number of threads (None: the libraries' default) and return its result."""
    environment = {name: value for name, value in clone_environment().items() if name not in _THREAD_VARIABLES}
    environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads)) if threads is not None else {}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*CHILD_COMMAND, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment | dict(variables or {}),
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()
            raise
    if process.returncode != 0:
        reason = _reason(log_path.read_text(encoding="utf-8", errors="replace"))
        raise ChildError(f"the process ended with code {process.returncode}{reason}, see {log_path}")
    try:
        return dict(json.loads(output.decode().splitlines()[-1]))
    except (IndexError, TypeError, ValueError) as error:
        raise ChildError(f"the process gave no result ({error}), see {log_path}") from error


def _reason(log: str) -> str:
    lines = log.strip().splitlines()
    # A message may continue on the lines that follow.
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return f" ({(errors or lines)[-1]})" if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return SpeedBenchmark(ROWS, argv).main()
