"""Benchmarks that train: rows of trainings, their missing runs, and what is kept of each."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sb3_clipvf.zoo import ALGORITHM
from tests.bench.command import SeedsBenchmark, at_least
from tests.bench.experiments.executors import Finished, LocalExecutor
from tests.bench.experiments.runs import Record, RunSpec
from tests.bench.experiments.suite import zoo_settings
from tests.bench.time_left import time_left


@dataclass(frozen=True)
class TrainingRow:
    """
    An environment and settings, trained with each seed.

    :param name: name for ``--only``, the file names and the table
    :param env_id: id of the environment
    :param n_timesteps: environment steps of training
    :param params: changes to the packaged settings, as ``-params`` takes them
    :param vec_env: kind of the training environments, as ``--vec-env`` takes it; evaluation has Gymnasium's
    :param n_episodes: episodes of the evaluation of the final model; 0: none
    :param algo: name of the algorithm in the Zoo; those other than ``clipppo`` have the Zoo's settings
    """

    name: str
    env_id: str
    n_timesteps: int
    params: tuple[str, ...] = ()
    vec_env: str = "dummy"
    n_episodes: int = 0
    algo: str = ALGORITHM

    def spec(self, seed: int, log_folder: Path = Path()) -> RunSpec:
        """Return the run of a seed, with its folder in that of all rows."""
        spec = RunSpec(
            label=f"{self.name}, seed {seed}",
            folder=log_folder,
            env_id=self.env_id,
            seed=seed,
            n_timesteps=self.n_timesteps,
            vec_env=self.vec_env,
            hyperparams=zoo_settings(self.env_id, self.algo),
            params=self.params,
            algo=self.algo,
            n_eval_episodes=self.n_episodes,
        )
        # Runs of an earlier version of the row stay beside those of this one.
        return replace(spec, folder=log_folder / self.name / f"seed_{seed}-{spec.digest()}")

    def run(self, seed: int) -> dict[str, Any]:
        """
        Return the entries that a seed's result is found by: its key, what decides on the training, and a digest of it
        with all settings. A result with other values is stale.
        """
        settings: dict[str, Any] = {"env_id": self.env_id, "n_timesteps": self.n_timesteps, "params": [*self.params]}
        if self.vec_env != "dummy":
            settings["vec_env"] = self.vec_env
        if self.algo != ALGORITHM:
            settings["algo"] = self.algo
        return {"name": self.name, "seed": seed, **settings, "digest": self.spec(seed).digest()}


def how_made(run: Mapping[str, Any]) -> str:
    """Return how a run was made on its machine."""
    jobs = run["jobs"]
    return f"{'one run at a time' if jobs == 1 else f'{jobs} parallel runs'}, one thread each"


RowT = TypeVar("RowT", bound=TrainingRow)


class TrainingBenchmark(SeedsBenchmark[RowT]):
    """Makes the runs that are missing; a subclass defines what is kept of a run, and the table."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of trainings."""
        about = "parallel runs, at most the number of cores (default: %(default)s)"
        parser.add_argument("--jobs", type=at_least(1), default=1, help=about)
        super().add_options(parser)

    @abstractmethod
    def measure(self, record: Record) -> dict[str, Any]:
        """Return what is kept of a run."""

    @abstractmethod
    def summary(self, row: RowT, result: Mapping[str, Any]) -> str:
        """Return a result in a few words, for the progress."""

    def listed(self, row: RowT) -> str:
        """Return the steps, the seeds that are done, and the parameters."""
        return f"{row.n_timesteps:>9,} steps  {self.done(row)}  {' '.join(row.params)}"

    def remove_old(self) -> None:
        """Remove the results that ``--rerun`` makes again, and the folders of their runs."""
        super().remove_old()
        for row in self.selected:
            for seed in self.seeds:
                shutil.rmtree(row.spec(seed, self.args.log_folder.absolute()).folder, ignore_errors=True)

    def run(self) -> None:
        """Make the missing runs, several at a time."""
        todo = self.to_train()
        n_done = len(self.seeds) * len(self.selected) - len(todo)
        specs = [row.spec(seed, self.args.log_folder.absolute()) for row, seed in todo]
        left = {spec.folder: made for spec, made in zip(specs, todo, strict=True)}
        print(
            f"{len(todo)} runs to make, {n_done} are done already (--rerun makes them again); "
            f"{self._time_left([row for row, _ in todo])}",
            flush=True,
        )
        with contextlib.closing(LocalExecutor(self.args.jobs).run(specs)) as ended:
            for finished in ended:
                row, seed = left.pop(finished.spec.folder)
                text = self._add(row, seed, finished)
                place = f"[{len(specs) - len(left):>{len(str(len(specs)))}}/{len(specs)}]"
                print(f"{place} {text} | {self._time_left([row for row, _ in left.values()])}", flush=True)
        if left:
            print(f"{len(left)} runs are left out, since another command makes them.", flush=True)

    def _time_left(self, todo: Sequence[RowT]) -> str:
        runs = [run for run in self.results.runs if run.get("run_seconds")]  # of a resumed run, it is not known
        done = [(run["name"], run["n_timesteps"], run["run_seconds"]) for run in runs]
        return time_left([(row.name, row.n_timesteps) for row in todo], done, self.args.jobs)

    def _add(self, row: RowT, seed: int, finished: Finished) -> str:
        """Keep a result, and return a line about it."""
        label, record = finished.spec.label, finished.record
        if record is None:  # the others continue
            self.failed[label] = finished.error
            return f"{label}: FAILED, {finished.error}"
        result = {**row.run(seed), **self.measure(record), "run_seconds": record.scores.get("run_seconds")}
        # The record may be of an earlier command, with other versions.
        self.results.add({**result, "jobs": record.jobs or self.args.jobs, **record.machine})
        return f"{label}: {self.summary(row, result)}, {finished.time_text()}"
