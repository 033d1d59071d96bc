"""The table and the figure of the curves benchmark: the mean returns of both engines, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.bench.curves_statistics import ENGINES, Comparison, difference_estimate, mean_estimate
from tests.bench.experiments.episodes import WINDOW, grid
from tests.bench.results import machines_text, markdown_table, save_figure
from tests.bench.training_runs import how_made

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermilion of a palette for colour-blind readers (Okabe and Ito 2008). Through the dashes of the second curve,
# the first is visible.
_STYLES = {"native": ("#0072B2", "-"), "autograd": ("#D55E00", "--")}
_LABELS = {"native": "native", "autograd": "autograd, the reference"}
_MEASURES = (("whole training", "mean_return"), ("last 100 episodes", "last_return"))


def render_table(compared: Sequence[Comparison]) -> str:
    """Return the Markdown table of the comparisons, one an environment, and its notes."""
    header = ["environment", "mean return", *ENGINES, f"{ENGINES[0]} − {ENGINES[1]}", "bands of the curves"]
    rows = []
    for comparison in compared:
        verdict = _verdict(comparison)
        for index, (name, key) in enumerate(_MEASURES):
            values = [[run[key] for run in comparison.runs[engine]] for engine in ENGINES]
            estimates = [*(mean_estimate(group) for group in values), difference_estimate(*values)]
            cells = ["" if estimate is None else str(estimate) for estimate in estimates]
            first = f"{comparison.env_id}, {comparison.n_timesteps:,} steps" if index == 0 else ""
            rows.append([first, name, *cells, verdict if index == 0 else ""])
    notes = (
        "A cell is the mean over the seeds ± half of its 95 % confidence interval: Student's t over the seeds, and "
        "Welch's for the difference. *Whole training* is the mean of the curve's points, *last 100 episodes* that "
        "of the last 100 returns. *Bands of the curves* counts the points of the figure at which the two 95 % "
        "intervals have a value in common."
    )
    runs = [run for comparison in compared for engine in ENGINES for run in comparison.runs[engine]]
    return f"{markdown_table(header, 'llrrrl', rows)}\n\n{notes}\n\n{machines_text(runs, how_made)}"


def _verdict(comparison: Comparison) -> str:
    n_overlaps, n_points = comparison.overlap()
    so_far = comparison.so_far()
    if n_points == 0:
        return so_far
    verdict = f"overlap at {n_overlaps} of {n_points} points ({n_overlaps / n_points:.0%})"
    return f"{verdict}, {so_far}" if so_far else verdict


def write_figure(compared: Sequence[Comparison], path: Path) -> None:
    """Draw the mean curves of the engines with their confidence bands, one panel an environment, into a PNG."""
    # The figure object draws without pyplot, whose backend belongs to the caller's process.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    n_columns = min(2, len(compared))
    n_rows = -(-len(compared) // n_columns)
    figure = Figure(figsize=(3.7 * n_columns, 0.6 + 2.4 * n_rows), dpi=150, layout="constrained")
    for index, comparison in enumerate(compared):
        _draw(figure.add_subplot(n_rows, n_columns, index + 1), comparison)
    figure.supxlabel("training (environment steps)", fontsize="small")
    figure.supylabel(f"mean return of the last {WINDOW} episodes", fontsize="small")
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=color, ls=style, label=_LABELS[engine]) for engine, (color, style) in _STYLES.items()
    ]
    handles.append(Patch(color="gray", alpha=0.3, linewidth=0, label="95 % confidence band of the mean over the seeds"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize="small")
    save_figure(figure, path)


def _draw(axes: Axes, comparison: Comparison) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    so_far = comparison.so_far()
    axes.set_title(f"{comparison.env_id} ({so_far})" if so_far else comparison.env_id, fontsize="small")
    axes.set_xlim(0, comparison.n_timesteps)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.tick_params(labelsize="small", width=0.6)
    axes.spines[:].set_linewidth(0.6)
    axes.grid(alpha=0.3, linewidth=0.5)
    if not any(comparison.runs.values()):
        axes.set_yticks([])
    steps = grid(comparison.n_timesteps)
    for engine, (color, style) in _STYLES.items():
        bands = comparison.bands(engine)
        means = np.array([np.nan if band is None else band.mean for band in bands])
        margins = np.array([np.nan if band is None or band.margin is None else band.margin for band in bands])
        if not np.isnan(means).all():
            axes.fill_between(steps, means - margins, means + margins, color=color, alpha=0.2, linewidth=0)
            axes.plot(steps, means, color=color, linestyle=style, linewidth=1.2)
