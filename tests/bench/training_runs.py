"""
What benchmarks that train share: their options, the processes of the train command, resuming and stopping.

Each run is one process of the train command. Its result goes into a JSON file when it is there, so that a benchmark
can be stopped at any time; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TextIO, TypeVar

from sb3_clipvf.common.validation import check_int
from tests.bench.results import Results, check_row_names, clone_environment, machine, sigterm_interrupts

if TYPE_CHECKING:
    from sb3_clipvf.zoo.runs import Run

# Replaced in tests, which need a train command of a second.
TRAIN_COMMAND: tuple[str, ...] = (sys.executable, "-m", "sb3_clipvf", "train")


class TrainingRow(Protocol):
    """What is trained: an environment and settings, of which each seed is a run."""

    @property
    def name(self) -> str:
        """Name for ``--only``, the file names and the results."""

    @property
    def env_id(self) -> str:
        """The environment's id."""

    @property
    def n_timesteps(self) -> int:
        """Environment steps of training."""

    @property
    def params(self) -> tuple[str, ...]:
        """Changes to the shipped settings, as ``-params`` takes them."""

    @property
    def vec_env(self) -> str:
        """Kind of the training environments, as ``--vec-env`` takes it."""


RowT = TypeVar("RowT", bound=TrainingRow)


def run_of(row: TrainingRow, seed: int) -> dict[str, Any]:
    """
    List the key of a run's result, and what decides on its training apart from the shipped settings: a result made
    with other values is stale.

    :param row: the row
    :param seed: the seed
    :return: name, seed, and those of the row's fields, as JSON gives them back
    """
    settings = {"env_id": row.env_id, "n_timesteps": row.n_timesteps, "params": [*row.params]}
    if row.vec_env != "dummy":
        settings["vec_env"] = row.vec_env
    return {"name": row.name, "seed": seed, **settings}


def train_arguments(row: TrainingRow, seed: int, log_folder: Path) -> list[str]:
    """
    Make the options of one run's train command.

    :param row: the row
    :param seed: the run's seed
    :param log_folder: where this run alone writes
    :return: the options; one thread and the CPU, so that runs side by side do not slow each other
    """
    options = ["--algo", "clipppo", "--env", row.env_id, "--seed", str(seed), "-n", str(row.n_timesteps)]
    options += ["-f", str(log_folder), "--eval-freq", "-1", "--num-threads", "1", "--device", "cpu", "--verbose", "0"]
    options += ["--checkpoint-freq", "-1"]  # runs are timed, too
    if row.vec_env != "dummy":
        options += ["--vec-env", row.vec_env]
    return [*options, "-params", *row.params] if row.params else options


class TrainingBenchmark(ABC, Generic[RowT]):
    """
    Runs that are still to be made, and how they are made. A subclass says what is measured in a run and written at the
    end.

    :param rows: all rows
    :param args: what :meth:`parser` gave
    :param out: where progress is told
    :raises ValueError: for unknown rows, numbers out of range, or a results file that is none
    """

    command: ClassVar[str]
    description: ClassVar[str]
    default_seeds: ClassVar[tuple[int, ...]]
    default_out: ClassVar[Path]
    default_log_folder: ClassVar[Path]

    def __init__(self, rows: Sequence[RowT], args: argparse.Namespace, out: TextIO) -> None:
        way_out = "Pass the number of runs side by side, at most the number of cores."
        self.jobs = check_int("--jobs", args.jobs, 1, way_out)
        self.seeds = [check_int("--seeds", seed, 0, "Pass numbers from 0.") for seed in dict.fromkeys(args.seeds)]
        self.rows, self.args, self._out = rows, args, out
        check_row_names("--only", args.only or (), (row.name for row in rows), self.command)
        self._selected = [row for row in rows if args.only is None or row.name in args.only]
        self.results = Results(args.out)
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()  # one evaluation at a time: it sets the process's random states
        self._processes: set[subprocess.Popen[bytes]] = set()

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """:return: parser of the options that all of these benchmarks have; a subclass adds the files it writes"""
        parser = argparse.ArgumentParser(
            prog=cls.command, description=f"{cls.description} Stop it with Ctrl-C; it goes on later."
        )
        seeds = " ".join(map(str, cls.default_seeds))
        parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
        parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows only, see --list (default: all)")
        parser.add_argument("--seeds", type=int, nargs="+", default=list(cls.default_seeds), help=f"(default: {seeds})")
        parser.add_argument("--out", type=Path, default=cls.default_out, help="(default: %(default)s)")
        parser.add_argument("--log-folder", type=Path, default=cls.default_log_folder, help="(default: %(default)s)")
        parser.add_argument("--list", action="store_true", help="list the rows and what is done, and run nothing")
        parser.add_argument("--rerun", action="store_true", help="make runs again whose results are there")
        return parser

    @abstractmethod
    def run_of(self, row: RowT, seed: int) -> dict[str, Any]:
        """:return: the key and the settings by which the result of a row and a seed is found"""

    @abstractmethod
    def measure(self, row: RowT, run: Run) -> dict[str, Any]:
        """
        Measure a run that the train command has ended.

        :param row: its row
        :param run: the run
        :return: its numbers; ``num_timesteps``, the environment steps it was trained for, must be among them
        :raises ValueError: where the run is not whole
        """

    @abstractmethod
    def summary(self, row: RowT, result: Mapping[str, Any]) -> str:
        """:return: a result in a few words, for the progress"""

    @abstractmethod
    def write(self, command: str) -> dict[str, Path]:
        """
        Write what shows the results of all rows, so that ``--only`` leaves those of before in it.

        :param command: the command that makes it again
        :return: the files by what they are
        """

    def listed(self, row: RowT) -> str:
        """:return: what ``--list`` tells of a row beside its name, steps, seeds and parameters"""
        return ""

    def say(self, text: str) -> None:
        """
        Tell of progress, at once.

        :param text: one line
        """
        self._out.write(text + "\n")
        self._out.flush()

    def main(self) -> int:
        """
        Make the missing runs, or list them, as the options say.

        :return: exit code: 0, 1 where a run failed, 130 where it was interrupted
        """
        if self.args.list:
            self._list()
            return 0
        # Seeds outermost: a benchmark stopped early has each row once before any row has two.
        pairs = [(row, seed) for seed in self.seeds for row in self._selected]
        todo = [pair for pair in pairs if self.args.rerun or not self._is_done(*pair)]
        n_done = len(pairs) - len(todo)
        self.say(f"{len(todo)} runs to make, {n_done} are done already (--rerun makes them again).")
        try:
            with sigterm_interrupts():  # else the training processes would go on alone
                self._run(todo)
        except KeyboardInterrupt:
            self.say("\nInterrupted. The same command goes on with what is missing.")
            return 130
        finally:
            self._write()
        if self.failed:
            self.say(f"Failed: {'; '.join(self.failed)}. The same command tries them again.")
            return 1
        return 0

    def _is_done(self, row: RowT, seed: int) -> bool:
        return self.results.find(self.run_of(row, seed)) is not None

    def _list(self) -> None:
        width = max(len(row.name) for row in self._selected)
        for row in self._selected:
            done = " ".join(str(seed) for seed in self.seeds if self._is_done(row, seed))
            about = f"{row.name:<{width}}  {row.n_timesteps:>9,} steps  {self.listed(row)}done: {done or 'none'}"
            self.say(f"{about}  {' '.join(row.params)}".rstrip())

    def _write(self) -> None:
        is_usual = self.seeds == list(self.default_seeds)
        command = self.command if is_usual else f"{self.command} --seeds {' '.join(map(str, self.seeds))}"
        files = {"Results": self.results.path, **self.write(command)}
        for what, path in files.items():
            self.say(f"{what + ':':<9}{path}")

    def _run(self, todo: Sequence[tuple[RowT, int]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run_one, row, seed) for row, seed in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                for process in list(self._processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise

    def _run_one(self, row: RowT, seed: int) -> None:
        if self._stop.is_set():
            return
        folder = self.args.log_folder / row.name / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"{row.name}, seed {seed}: training {row.n_timesteps:,} steps, log in {folder / 'train.log'}")
        options = train_arguments(row, seed, folder)
        start = time.perf_counter()
        code = self._train(options, folder / "train.log")
        wall_seconds = time.perf_counter() - start
        if self._stop.is_set():
            return
        if code != 0:
            self._fail(row, seed, f"the train command ended with code {code}, see {folder / 'train.log'}")
            return
        with self._lock:
            try:
                result = self._measure(row, seed, folder)
            except ValueError as error:  # no model, or one that is not whole: no reason to stop the other rows
                self._fail(row, seed, str(error))
                return
            self.results.add({**result, "jobs": self.jobs, **machine()})
        self.say(f"{row.name}, seed {seed}: {self.summary(row, result)}, {wall_seconds:,.0f} s")

    def _train(self, options: list[str], log_path: Path) -> int:
        # One thread for numerical libraries: two runs of several threads each would fight for the cores.
        environment = clone_environment() | {"OMP_NUM_THREADS": "1"}
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*TRAIN_COMMAND, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            self._processes.add(process)
            try:
                if self._stop.is_set():  # it was set between the check before and the process's start
                    process.terminate()
                return process.wait()
            finally:
                self._processes.discard(process)

    def _measure(self, row: RowT, seed: int, folder: Path) -> dict[str, Any]:
        import torch as th

        from sb3_clipvf.zoo.runs import find_run

        threads = th.get_num_threads()
        th.set_num_threads(1)  # other runs are training beside it
        try:
            run = find_run(folder, row.env_id, "clipppo")
            numbers = self.measure(row, run)
        finally:
            th.set_num_threads(threads)
        num_timesteps = numbers.pop("num_timesteps")
        if num_timesteps < row.n_timesteps:
            # The Zoo saves the model and ends with code 0 when it is interrupted.
            raise ValueError(f"the training was interrupted at step {num_timesteps:,}")
        return {**self.run_of(row, seed), **numbers}

    def _fail(self, row: RowT, seed: int, reason: str) -> None:
        self.failed.append(f"{row.name}, seed {seed}")
        self.say(f"{row.name}, seed {seed}: FAILED, {reason}")
