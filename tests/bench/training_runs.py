"""
Benchmarks that train: options, processes of the train command, resuming and stopping.

Each run is one process of the train command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tests.bench.command import Benchmark, at_least
from tests.bench.results import clone_environment, machine

if TYPE_CHECKING:
    from sb3_clipvf.zoo.runs import Run

# Tests replace this by a quick command.
TRAIN_COMMAND: tuple[str, ...] = (sys.executable, "-m", "sb3_clipvf", "train")


@dataclass(frozen=True)
class TrainingRow:
    """
    An environment and settings, trained with each seed.

    :param name: name for ``--only``, the file names and the table
    :param env_id: id of the environment
    :param n_timesteps: environment steps of training
    :param params: changes to the shipped settings, as ``-params`` takes them
    :param vec_env: kind of the training environments, as ``--vec-env`` takes it; evaluation has Gymnasium's
    """

    name: str
    env_id: str
    n_timesteps: int
    params: tuple[str, ...] = ()
    vec_env: str = "dummy"

    def run(self, seed: int) -> dict[str, Any]:
        """
        Return the entries that a seed's result is found by: its key, and what decides on the training apart from the
        shipped settings. A result with other values is stale.
        """
        settings = {"env_id": self.env_id, "n_timesteps": self.n_timesteps, "params": [*self.params]}
        if self.vec_env != "dummy":
            settings["vec_env"] = self.vec_env
        return {"name": self.name, "seed": seed, **settings}


def train_arguments(row: TrainingRow, seed: int, log_folder: Path) -> list[str]:
    """Return the options of one run's train command; one thread and the CPU, since others may run beside it."""
    options = ["--algo", "clipppo", "--env", row.env_id, "--seed", str(seed), "-n", str(row.n_timesteps)]
    options += ["-f", str(log_folder), "--eval-freq", "-1", "--num-threads", "1", "--device", "cpu", "--verbose", "0"]
    options += ["--checkpoint-freq", "-1"]  # runs are timed, too
    if row.vec_env != "dummy":
        options += ["--vec-env", row.vec_env]
    return [*options, "-params", *row.params] if row.params else options


def how_made(run: Mapping[str, Any]) -> str:
    """Return how a run was made on its machine."""
    return f"{run['jobs']} runs side by side, one thread each"


RowT = TypeVar("RowT", bound=TrainingRow)


class TrainingBenchmark(Benchmark[RowT]):
    """Makes the runs that are missing; a subclass defines what is measured in a run, and the table."""

    default_seeds: ClassVar[tuple[int, ...]]
    deciding = ("seeds",)

    def __init__(self, rows: Sequence[RowT], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        self.seeds: list[int] = list(dict.fromkeys(self.args.seeds))
        self._stop = threading.Event()
        self._lock = threading.Lock()  # one evaluation at a time: it sets the process's random states
        self._processes: set[subprocess.Popen[bytes]] = set()

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of trainings."""
        about = "runs side by side, at most the number of cores (default: %(default)s)"
        parser.add_argument("--jobs", type=at_least(1), default=1, help=about)
        seeds, about = list(self.default_seeds), f"(default: {' '.join(map(str, self.default_seeds))})"
        parser.add_argument("--seeds", type=at_least(0), nargs="+", default=seeds, help=about)

    @abstractmethod
    def measure(self, row: RowT, run: Run) -> dict[str, Any]:
        """Return what is kept of a run, and as ``num_timesteps`` the environment steps that it was trained for."""

    @abstractmethod
    def summary(self, row: RowT, result: Mapping[str, Any]) -> str:
        """Return a result in a few words, for the progress."""

    def listed(self, row: RowT) -> str:
        """Return the steps, the seeds that are done, and the parameters."""
        done = " ".join(str(seed) for seed in self.seeds if self.results.find(row.run(seed)))
        return f"{row.n_timesteps:>9,} steps  done: {done or 'none'}  {' '.join(row.params)}"

    def run(self) -> None:
        """Make the missing runs, several at a time."""
        # Seeds outermost: a benchmark stopped early has each row once before any row has two.
        pairs = [(row, seed) for seed in self.seeds for row in self.selected]
        todo = [(row, seed) for row, seed in pairs if self.args.rerun or self.results.find(row.run(seed)) is None]
        n_done = len(pairs) - len(todo)
        print(f"{len(todo)} runs to make, {n_done} are done already (--rerun makes them again).", flush=True)
        with ThreadPoolExecutor(self.args.jobs) as pool:
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
        label, folder = f"{row.name}, seed {seed}", self.args.log_folder / row.name / f"seed_{seed}"
        log_path = folder / "train.log"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{label}: training {row.n_timesteps:,} steps, log in {log_path}", flush=True)
        started = time.perf_counter()
        code = self._train(train_arguments(row, seed, folder), log_path)
        seconds = time.perf_counter() - started
        if self._stop.is_set():
            return
        try:
            if code != 0:
                raise ValueError(f"the train command ended with code {code}, see {log_path}")
            with self._lock:
                result = {**row.run(seed), **self._measure(row, folder)}
                self.results.add({**result, "jobs": self.args.jobs, **machine()})
        except ValueError as error:  # this run has no complete model; the others can continue
            self.failed[label] = str(error)
            print(f"{label}: FAILED, {error}", flush=True)
            return
        print(f"{label}: {self.summary(row, result)}, {seconds:,.0f} s", flush=True)

    def _train(self, options: list[str], log_path: Path) -> int:
        # One thread for numerical libraries: two runs of several threads each would compete for the cores.
        environment = clone_environment() | {"OMP_NUM_THREADS": "1"}
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*TRAIN_COMMAND, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            self._processes.add(process)
            try:
                if self._stop.is_set():  # set between the earlier check and the process's start
                    process.terminate()
                return process.wait()
            finally:
                self._processes.discard(process)

    def _measure(self, row: RowT, folder: Path) -> dict[str, Any]:
        import torch as th

        from sb3_clipvf.zoo.runs import find_run

        threads = th.get_num_threads()
        th.set_num_threads(1)  # other runs are training beside it
        try:
            numbers = self.measure(row, find_run(folder, row.env_id, "clipppo"))
        finally:
            th.set_num_threads(threads)
        num_timesteps = numbers.pop("num_timesteps")
        if num_timesteps < row.n_timesteps:
            # The Zoo saves the model and ends with code 0 when it is interrupted.
            raise ValueError(f"the training was interrupted at step {num_timesteps:,}")
        return numbers
