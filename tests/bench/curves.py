"""``python -m tests.bench curves``: train on the native engine and the reference, and compare the training curves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.curves_report import render_table, write_figure
from tests.bench.curves_statistics import (
    ENGINES,
    LAST_EPISODES,
    CurveRow,
    comparisons,
    curve_on_grid,
    grid,
    rounded_mean,
    run_of,
)
from tests.bench.results import write_text
from tests.bench.training_runs import TrainingBenchmark

if TYPE_CHECKING:
    from sb3_clipvf.zoo.runs import Run

_TRAININGS = (
    ("CartPole-v1", 100_000),
    ("Pendulum-v1", 100_000),
    ("LunarLander-v3", 300_000),
    ("HalfCheetah-v5", 200_000),
)
ROWS = tuple(CurveRow(env_id, n_timesteps, engine) for env_id, n_timesteps in _TRAININGS for engine in ENGINES)


class Benchmark(TrainingBenchmark[CurveRow]):
    """Reads the training's own episodes, and draws and tables the engines' curves beside each other."""

    command = "python -m tests.bench curves"
    description = "Train on the native engine and on the reference, and compare the training curves."
    default_seeds = (1, 2, 3, 4, 5)
    default_out = Path("docs/results/curves.json")
    default_log_folder = Path("logs/bench/curves")

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """:return: parser of the benchmark's options"""
        parser = super().parser()
        for option, suffix in (("--table", ".md"), ("--figure", ".png")):
            default = cls.default_out.with_suffix(suffix)
            parser.add_argument(option, type=Path, default=default, help="(default: %(default)s)")
        return parser

    def run_of(self, row: CurveRow, seed: int) -> dict[str, Any]:
        """:return: by what a result is found"""
        return run_of(row, seed)

    def measure(self, row: CurveRow, run: Run) -> dict[str, Any]:
        """:return: the training's curve, its mean, and the mean of the last episodes, in reward units"""
        from sb3_clipvf.zoo.runs import load_model, read_training_curve, register_all

        register_all()
        num_timesteps = load_model(run, 0, "cpu").num_timesteps
        curve = read_training_curve(run.folder, num_timesteps)
        on_grid = curve_on_grid(curve, grid(row.n_timesteps))
        return {
            "mean_return": rounded_mean([value for value in on_grid if value is not None]),
            "last_return": rounded_mean(curve.returns[-LAST_EPISODES:]),
            "num_timesteps": num_timesteps,
            "curve": on_grid,
        }

    def summary(self, row: CurveRow, result: Mapping[str, Any]) -> str:
        """:return: both means"""
        if result["mean_return"] is None:
            return "no episode ended"
        means = (result["mean_return"], result["last_return"])
        return "mean return {:.1f} over the training, {:.1f} of the last episodes".format(*means)

    def write(self, command: str) -> dict[str, Path]:
        """:return: the table and the figure, written"""
        compared = comparisons(self.results, self.rows, self.seeds)
        write_text(self.args.table, render_table(compared, command))
        write_figure(compared, self.args.figure)
        return {"Table": self.args.table, "Figure": self.args.figure}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``python -m tests.bench curves``.

    :param argv: its options; None takes the process's own
    :return: exit code: 0, 1 where a run failed, 130 where it was interrupted
    :raises ValueError: for unknown rows, numbers out of range, or a results file that is none
    """
    return Benchmark(ROWS, Benchmark.parser().parse_args(argv), sys.stdout).main()
