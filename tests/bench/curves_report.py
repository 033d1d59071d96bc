"""The table and the figure of the curves benchmark: the mean returns of both engines, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.experiments.episodes import N_POINTS, WINDOW
from tests.bench.experiments.estimates import difference, estimate, mean, over_seeds
from tests.bench.plots import (
    BLUE,
    VERMILION,
    add_legend,
    add_panels,
    draw_band,
    interval_handle,
    line_handle,
    mean_band,
    new_figure,
    save_figure,
)
from tests.bench.results import Results, machines_text, markdown_table
from tests.bench.training_runs import TrainingRow, how_made

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The first one is compared with the second, which is the reference.
ENGINES = ("native", "autograd")
# Through the dashes of the second curve, the first is visible.
_STYLES = {"native": (BLUE, "-"), "autograd": (VERMILION, "--")}
_LABELS = {"native": "native", "autograd": "autograd"}
_MEASURES = (("whole training", "mean_return"), ("last 100 episodes", "last_return"))


@dataclass(frozen=True, kw_only=True)
class CurveRow(TrainingRow):
    """An environment on an engine, trained with each seed."""

    engine: str

    @classmethod
    def of(cls, env_id: str, n_timesteps: int, engine: str) -> CurveRow:
        """Return the row whose one change to the packaged settings is the engine."""
        name, params = f"{env_id}-{engine}", (f"engine:'{engine}'",)
        return cls(name=name, env_id=env_id, n_timesteps=n_timesteps, params=params, engine=engine)

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by."""
        return {**super().run(seed), "n_points": N_POINTS, "window": WINDOW}


@dataclass(frozen=True)
class Comparison:
    """The runs of one environment by engine, of which there should be ``n_seeds`` each."""

    env_id: str
    n_timesteps: int
    n_seeds: int
    runs: Mapping[str, Sequence[Mapping[str, Any]]]

    def so_far(self) -> str:
        """Return which part of the runs is done, empty if all are."""
        counts = [len(self.runs[engine]) for engine in ENGINES]
        if not any(counts):
            return "not run"
        if min(counts) == self.n_seeds:
            return ""
        return f"so far {counts[0]} and {counts[1]} of {self.n_seeds} seeds"


def comparisons(results: Results, rows: Sequence[CurveRow], seeds: Sequence[int]) -> list[Comparison]:
    """Return the runs of these seeds, gathered by environment in the order of the rows."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        runs = [run for seed in seeds if (run := results.find(row.run(seed))) is not None]
        found.setdefault(row.env_id, {})[row.engine] = runs
    n_timesteps = {row.env_id: row.n_timesteps for row in rows}
    return [Comparison(env_id, n_timesteps[env_id], len(seeds), runs) for env_id, runs in found.items()]


def render_table(compared: Sequence[Comparison]) -> str:
    """Return the Markdown table of the comparisons, one an environment, and its notes."""
    header = ["environment", "mean return", *ENGINES, f"{ENGINES[0]} − {ENGINES[1]}"]
    rows = []
    for comparison in compared:
        so_far = comparison.so_far()
        for index, (name, key) in enumerate(_MEASURES):
            values = [over_seeds(run[key] for run in comparison.runs[engine]) for engine in ENGINES]
            found = [*(estimate(mean, group) for group in values), estimate(difference(mean), *values)]
            cells = ["" if one is None else one.text("z,.1f") for one in found]
            first = f"{comparison.env_id}, {comparison.n_timesteps:,} steps" + (f", {so_far}" if so_far else "")
            rows.append([first if index == 0 else "", name, *cells])
    notes = (
        "A cell is the mean over the seeds with its 95 % interval (`docs/experiments.md` defines it). *Whole training* "
        "is the mean of the curve's points, *last 100 episodes* that of the last 100 returns."
    )
    runs = [run for comparison in compared for engine in ENGINES for run in comparison.runs[engine]]
    return f"{markdown_table(header, 'llrrr', rows)}\n\n{notes}\n\n{machines_text(runs, how_made)}"


def write_figure(compared: Sequence[Comparison], path: Path) -> None:
    """Draw the mean curves of the engines with their confidence bands, one panel an environment, into a PNG."""
    n_columns = min(2, len(compared))
    n_rows = -(-len(compared) // n_columns)
    figure = new_figure(3.7 * n_columns, 0.6 + 2.4 * n_rows)
    for axes, comparison in zip(add_panels(figure, len(compared), n_columns), compared, strict=True):
        _draw(axes, comparison)
    figure.supxlabel("training (environment steps)", fontsize="small")
    figure.supylabel(f"mean return of the last {WINDOW} episodes", fontsize="small")
    handles = [line_handle(_LABELS[engine], *style) for engine, style in _STYLES.items()]
    add_legend(figure, [*handles, interval_handle("95 % interval of the mean over the seeds")])
    save_figure(figure, path)


def _draw(axes: Axes, comparison: Comparison) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    so_far = comparison.so_far()
    axes.set_title(f"{comparison.env_id} ({so_far})" if so_far else comparison.env_id, fontsize="small")
    axes.set_xlim(0, comparison.n_timesteps)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if not any(comparison.runs.values()):
        axes.set_yticks([])
    for engine, style in _STYLES.items():
        band = mean_band(comparison.runs[engine], comparison.n_timesteps)
        if band is not None:
            draw_band(axes, band, *style)
