"""``python -m tests.bench curves``: train on the native engine and the reference, and compare the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.curves_report import ENGINES, Comparison, CurveRow, comparisons, render_table, write_figure
from tests.bench.experiments.runs import Record
from tests.bench.training_runs import TrainingBenchmark

_TRAININGS = (
    ("CartPole-v1", 100_000),
    ("Pendulum-v1", 100_000),
    ("LunarLander-v3", 300_000),
    ("HalfCheetah-v5", 200_000),
)
ROWS = tuple(CurveRow.of(env_id, n_timesteps, engine) for env_id, n_timesteps in _TRAININGS for engine in ENGINES)


class CurvesBenchmark(TrainingBenchmark[CurveRow]):
    """Keeps the curve of each training, and compares the engines' curves in a table and a figure."""

    name = "curves"
    description = "Train on the engines native and autograd, and compare the training curves."
    default_seeds = (1, 2, 3, 4, 5)
    log_folder = "logs/bench/curves"

    def measure(self, record: Record) -> dict[str, Any]:
        """Keep the training's curve, its mean, and the mean of the last episodes, in reward units."""
        return {**{name: record.scores[name] for name in ("mean_return", "last_return")}, "curve": record.curve}

    def summary(self, row: CurveRow, result: Mapping[str, Any]) -> str:
        """Return both means."""
        if result["mean_return"] is None:
            return "no episode ended"
        means = (result["mean_return"], result["last_return"])
        return "mean return {:.1f} over the training, {:.1f} of the last episodes".format(*means)

    def render(self) -> str:
        """Return the table of means and differences."""
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
