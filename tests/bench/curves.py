"""``python -m tests.bench curves``: train on the native engine and the reference, and compare the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.curves_report import render_table, write_figure
from tests.bench.curves_statistics import (
    ENGINES,
    LAST_EPISODES,
    Comparison,
    CurveRow,
    comparisons,
    curve_on_grid,
    grid,
    rounded_mean,
)
from tests.bench.training_runs import TrainingBenchmark

if TYPE_CHECKING:
    from sb3_clipvf.zoo.runs import Run

_TRAININGS = (
    ("CartPole-v1", 100_000),
    ("Pendulum-v1", 100_000),
    ("LunarLander-v3", 300_000),
    ("HalfCheetah-v5", 200_000),
)
ROWS = tuple(CurveRow.of(env_id, n_timesteps, engine) for env_id, n_timesteps in _TRAININGS for engine in ENGINES)


class CurvesBenchmark(TrainingBenchmark[CurveRow]):
    """Reads the training's own episodes, and compares the engines' curves in a table and a figure."""

    name = "curves"
    description = "Train on the native engine and on the reference, and compare the training curves."
    default_seeds = (1, 2, 3, 4, 5)
    log_folder = "logs/bench/curves"

    def measure(self, row: CurveRow, run: Run) -> dict[str, Any]:
        """Read the training's curve, its mean, and the mean of the last episodes, in reward units."""
        from sb3_clipvf.zoo.runs import load_model, read_training_curve, register_all

        register_all()
        num_timesteps = load_model(run, 0, "cpu").num_timesteps
        curve = read_training_curve(run.folder, num_timesteps)
        on_grid = curve_on_grid(curve, grid(row.n_timesteps))
        return {
            "num_timesteps": num_timesteps,
            "mean_return": rounded_mean([value for value in on_grid if value is not None]),
            "last_return": rounded_mean(curve.returns[-LAST_EPISODES:]),
            "curve": on_grid,
        }

    def summary(self, row: CurveRow, result: Mapping[str, Any]) -> str:
        """Return both means."""
        if result["mean_return"] is None:
            return "no episode ended"
        means = (result["mean_return"], result["last_return"])
        return "mean return {:.1f} over the training, {:.1f} of the last episodes".format(*means)

    def render(self) -> str:
        """Return the table of means, and how far the bands overlap."""
        return render_table(self._compared())

    def draw(self, path: Path) -> bool:
        """Draw the curves."""
        write_figure(self._compared(), path)
        return True

    def _compared(self) -> list[Comparison]:
        return comparisons(self.results, self.rows, self.seeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return CurvesBenchmark(ROWS, argv).main()
