"""``python -m tests.bench growth``: how the time per transition grows with each size, beside SB3's and a bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.bench.growth_report import render_axes, write_figure
from tests.bench.growth_rows import AXES, Axis
from tests.bench.speed import SpeedBenchmark
from tests.bench.speed_rows import SpeedRow


class GrowthBenchmark(SpeedBenchmark):
    """Measures the points of all axes as the speed benchmark measures its rows, by default once."""

    name = "growth"
    description = "Measure how the speed and memory of ClipPPO and SB3's PPO scale with each size."
    log_folder = "logs/bench/growth"
    n_rounds = 1
    gpu_rows = ()

    def render(self) -> str:
        """Return a table for each axis."""
        return render_axes(self.results, self._points(), self.args.rounds, self.row_notes())

    def draw(self, path: Path) -> bool:
        """Draw cost and memory along each axis."""
        write_figure(self.results, self._points(), self.args.rounds, path)
        return True

    def _points(self) -> dict[Axis, dict[int, SpeedRow]]:
        rows = {row.name: row for row in self.rows}  # short ones with --quick
        return {axis: {value: rows[row.name] for value, row in axis.rows().items()} for axis in AXES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return GrowthBenchmark([row for axis in AXES for row in axis.rows().values()], argv).main()
