"""
``python -m tests.bench speed``: ClipPPO, SB3's PPO and, where it is installed, SBX's PPO on the same machine in turn.

Each measurement is a process of its own (``speed_child``). Its result goes into a JSON file when it is there, so that
the benchmark can be stopped at any time; the same command goes on with the alternations that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import psutil

from sb3_clipvf.common.validation import check_int
from tests.bench.results import Results, check_row_names, clone_environment, machine, sigterm_interrupts, write_text
from tests.bench.speed_figure import write_figure
from tests.bench.speed_rows import PEERS, ROWS, SpeedRow
from tests.bench.speed_table import KEY, MIN_ALTERNATIONS, STORED, TRIALS, best_threads, render, trials_of, wanted

# Replaced in tests.
CHILD_COMMAND: tuple[str, ...] = (sys.executable, "-m", "tests.bench.speed_child")
_COMMAND = "python -m tests.bench speed"
_PACKAGES = ("numba", "scipy", "mujoco", "box2d", "envpool", "ale_py", "sbx_rl", "jax")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_BOUND_SECONDS = 2.0
_QUICK_BOUND_SECONDS = 0.05


class ChildError(RuntimeError):
    """A measured process that failed; the message says why and where its output is."""


class SpeedBenchmark:
    """
    Measures what is missing, one process after the other.

    :param results: where results are kept
    :param log_folder: folder of what the processes print
    :param out: where progress is told
    :param quick: whether bounds take a moment
    """

    def __init__(self, results: Results, log_folder: Path, out: TextIO, *, quick: bool) -> None:
        self.results, self.log_folder, self._out, self._quick = results, log_folder, out, quick
        self.failed: dict[str, str] = {}  # row -> the last reason
        self._machine = machine(_PACKAGES)

    def say(self, text: str) -> None:
        """
        Tell of progress, at once.

        :param text: one line
        """
        self._out.write(text + "\n")
        self._out.flush()

    def is_done(self, row: SpeedRow, peer: str, part: str) -> bool:
        """
        Look for a result that was made here, with the packages that are installed now.

        :param row: the row
        :param peer: key of PEERS or BOUNDS
        :param part: a trial's name or the number of an alternation
        :return: whether there is one
        """
        run = self.results.find(wanted(row, peer, part))
        if run is None or any(run[name] != self._machine[name] for name in ("cpu", "cores")):
            return False
        versions = self._machine["versions"]
        return all(versions.get(name) == number for name, number in run["versions"].items())

    def missing(self, rows: Sequence[SpeedRow], alternations: int, *, rerun: bool) -> list[tuple[SpeedRow, int]]:
        """
        List the alternations to measure: one that lacks a peer is measured as a whole, since only what is measured
        together can be compared.

        :param rows: the rows
        :param alternations: how many there should be
        :param rerun: whether those that are there are measured again
        :return: rows and numbers of alternations; each row once before any row comes twice
        """
        return [
            (row, number)
            for number in range(1, alternations + 1)
            for row in rows
            if rerun or not all(self.is_done(row, peer, str(number)) for peer in row.measured())
        ]

    def run(self, todo: Sequence[tuple[SpeedRow, int]], *, rerun: bool) -> None:
        """
        Measure alternations.

        :param todo: rows and numbers of alternations
        :param rerun: whether threads are chosen again
        :raises KeyboardInterrupt: when it was interrupted, after ending the process it started
        """
        chosen: dict[tuple[str, str], int | None] = {}
        unable: set[tuple[str, str]] = set()
        for row, number in todo:
            for peer in row.measured():
                if peer in PEERS and (row.name, peer) not in chosen.keys() | unable:
                    try:
                        chosen[row.name, peer] = self._choose_threads(row, peer, rerun=rerun)
                    except LookupError:
                        unable.add((row.name, peer))
            if unable & {(row.name, "clipppo"), (row.name, "sb3")}:
                self.say(f"{row.name}, {number}: left out, since the trials failed")
                continue
            peers = [peer for peer in row.measured() if (row.name, peer) not in unable]
            for peer in peers if number % 2 else reversed(peers):
                self._measure(row, peer, str(number), chosen.get((row.name, peer)))

    def _choose_threads(self, row: SpeedRow, peer: str, *, rerun: bool) -> int | None:
        for part, threads in trials_of(row, peer).items():
            if rerun or not self.is_done(row, peer, part):
                self._measure(row, peer, part, threads)
        return best_threads(self.results, row, peer)

    def _measure(self, row: SpeedRow, peer: str, part: str, threads: int | None) -> None:
        iterations = max(1, row.iterations // 4) if part in TRIALS else row.iterations
        task = self.task(replace(row, iterations=iterations), peer, 0 if part in TRIALS else int(part), threads)
        label = f"{row.name}, {PEERS.get(peer, peer)}, {part}"
        log_path = self.log_folder / row.name / f"{peer}, {part}.log".replace(", ", "-").replace(" ", "-")
        # The share of the processor that others take: a measurement beside them is worth less.
        load = psutil.cpu_percent(0.1 if self._quick else 0.5)
        try:
            if row.compile_anew and peer == "clipppo" and part == next(iter(trials_of(row, peer)), None):
                with tempfile.TemporaryDirectory() as cache:  # as after an installation
                    result = run_child(task, threads, log_path, {"NUMBA_CACHE_DIR": cache})
            else:
                result = run_child(task, threads, log_path)
        except ChildError as error:
            self.failed[row.name] = str(error)
            self.say(f"{label}: FAILED, {error}")
            return
        kept = {name: result[name] for name in (STORED if peer in PEERS else STORED[:1]) if name in result}
        self.results.add(wanted(row, peer, part) | kept | {"other_load": load} | self._machine)
        self.say(f"{label}: {result['steps_per_second']:,.0f} steps/s")

    def task(self, row: SpeedRow, peer: str, seed: int, threads: int | None) -> dict[str, Any]:
        """
        Describe a measurement to the process that makes it.

        :param row: the row
        :param peer: key of PEERS or BOUNDS
        :param seed: seed of the model and its environments
        :param threads: None: the default
        :return: what ``speed_child`` takes
        """
        return {
            "row": asdict(row),
            "peer": peer,
            "seed": seed,
            # JAX takes no number of threads: it starts one for each core that it may use.
            "one_core": peer == "sbx" and threads == 1,
            "profile": False,
            "bound_seconds": _QUICK_BOUND_SECONDS if self._quick else _BOUND_SECONDS,
        }


def run_child(
    task: Mapping[str, Any], threads: int | None, log_path: Path, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    Run a measured process.

    :param task: what ``speed_child`` takes
    :param threads: of numerical libraries; None: their default, even where the environment says otherwise
    :param log_path: where its errors go; its folder is made
    :param variables: further environment variables
    :return: its result
    :raises ChildError: where it failed
    :raises KeyboardInterrupt: when it was interrupted, after ending the process
    """
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
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # their texts may go on below
    return f" ({(errors or lines)[-1]})" if lines else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Measure ClipPPO, SB3's PPO and SBX's PPO (where installed) in turn on this machine, and table "
        "their steps a second. Stop it with Ctrl-C; the same command goes on.",
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, see --list (default: all)")
    parser.add_argument(
        "--alternations",
        type=int,
        default=MIN_ALTERNATIONS,
        help="of all peers; below 3 is no result (default: 3)",
    )
    parser.add_argument("--rerun", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--quick", action="store_true", help="moments instead of minutes: whether all runs, not how fast"
    )
    parser.add_argument("--out", type=Path, help="(default: docs/results/speed.json, logs/bench/quick.json if --quick)")
    parser.add_argument("--table", type=Path, help="(default: the same with .md)")
    parser.add_argument("--log-folder", type=Path, default=Path("logs/bench/speed"), help="(default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the rows and what is done, and run nothing")
    parser.add_argument("--profile", metavar="NAME", help="tell where the time of this row goes; keeps no result")
    parser.add_argument("--peer", choices=tuple(PEERS), default="clipppo", help="for --profile (default: clipppo)")
    return parser


def _select(names: Sequence[str] | None, *, quick: bool) -> list[SpeedRow]:
    check_row_names("--rows", names or (), (row.name for row in ROWS), _COMMAND)
    rows = [row for row in ROWS if names is None or row.name in names]
    return [row.quick() for row in rows] if quick else rows


def _list(benchmark: SpeedBenchmark, rows: Sequence[SpeedRow], alternations: int) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        missing = {number for _, number in benchmark.missing([row], alternations, rerun=False)}
        done = [str(number) for number in range(1, alternations + 1) if number not in missing]
        state = row.missing() or f"done: {' '.join(done) or 'none'}"
        benchmark.say(f"{row.name:<{width}}  goal {row.goal:>3g}  {state}  {row.title}")


def _profile(benchmark: SpeedBenchmark, row: SpeedRow, peer: str) -> int:
    if (reason := row.missing()) is not None:
        raise ValueError(f"`--profile` must name a row whose packages are installed, got {row.name}, which {reason}")
    if peer not in row.measured():
        raise ValueError(
            f"`--peer` must be one that can run {row.name}, got {peer}. SBX must be installed "
            "(pip install 'sb3_clipvf[sbx]'), and runs no PyTorch extractors."
        )
    task = benchmark.task(row, peer, 1, 1) | {"profile": True}
    from tests.bench.speed_profile import render_profile

    try:
        result = run_child(task, 1, benchmark.log_folder / row.name / f"{peer}-profile.log")
    except ChildError as error:
        benchmark.say(f"{row.name}: FAILED, {error}")
        return 1
    benchmark.say(render_profile(f"{row.title}, {PEERS[peer]}, one thread", result))
    return 0


def _benchmark(benchmark: SpeedBenchmark, rows: Sequence[SpeedRow], args: argparse.Namespace, table: Path) -> int:
    notes = {row.name: reason for row in rows if (reason := row.missing()) is not None}
    for name, reason in notes.items():
        benchmark.say(f"{name}: skipped, {reason}")
    here = [row for row in rows if row.name not in notes]
    todo = benchmark.missing(here, args.alternations, rerun=args.rerun)
    done = len(here) * args.alternations - len(todo)
    benchmark.say(f"{len(todo)} alternations to measure, {done} are done already (--rerun measures them again).")
    try:
        with sigterm_interrupts():  # else the measured process would go on alone
            benchmark.run(todo, rerun=args.rerun)
    except KeyboardInterrupt:
        benchmark.say("\nInterrupted. The same command goes on with what is missing.")
        return 130
    finally:
        options = f" --alternations {args.alternations}" if args.alternations != MIN_ALTERNATIONS else ""
        command = _COMMAND + (" --quick" if args.quick else "") + options
        # Of all rows, so that --rows leaves those of before in the table.
        notes |= dict.fromkeys(benchmark.failed, "failed")
        text = render(benchmark.results, _select(None, quick=args.quick), args.alternations, command, notes)
        write_text(table, text)
        figure = table.with_suffix(".png")
        write_figure(benchmark.results, _select(None, quick=args.quick), args.alternations, figure)
        benchmark.say(f"\n{text}\nResults: {benchmark.results.path}\nTable:   {table}\nFigure:  {figure}")
    if benchmark.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in benchmark.failed.items())
        benchmark.say(f"Failed: {reasons}. The same command tries again.")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``python -m tests.bench speed``.

    :param argv: its options; None takes the process's own
    :return: exit code: 0, 1 where a measurement failed, 130 where it was interrupted
    :raises ValueError: for unknown rows, numbers out of range, or a results file that is none
    """
    args = _parser().parse_args(argv)
    check_int("--alternations", args.alternations, 1, "Pass how often all peers are measured in turn.")
    rows = _select(args.rows, quick=args.quick)
    out = args.out or Path("logs/bench/quick.json" if args.quick else "docs/results/speed.json")
    table = args.table or out.with_suffix(".md")
    if table == out:
        raise ValueError(f"`--table` must be another file than `--out`, got {table} for both. Leave it out.")
    benchmark = SpeedBenchmark(Results(out, KEY), args.log_folder, sys.stdout, quick=args.quick)
    if args.profile is not None:
        check_row_names("--profile", [args.profile], (row.name for row in ROWS), _COMMAND)
        (row,) = (row for row in _select(None, quick=args.quick) if row.name == args.profile)
        return _profile(benchmark, row, args.peer)
    if args.list:
        _list(benchmark, rows, args.alternations)
        return 0
    return _benchmark(benchmark, rows, args, table)
