"""Shared by all figures: colours, panels, legends, and lines with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_clipvf.files.atomic import atomic_write
from tests.bench.experiments.episodes import N_POINTS, grid
from tests.bench.experiments.estimates import Statistic, interval, mean

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""Colours for colour-blind readers, of Okabe and Ito 2008."""

BLACK, BLUE, VERMILION, PURPLE, SKY_BLUE = (PALETTE[place] for place in (0, 1, 2, 4, 6))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    # The figure object draws without pyplot, whose backend belongs to the caller's process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def add_panels(figure: Figure, n_panels: int, n_columns: int) -> list[Axes]:
    """Add panels with a light grid, row by row."""
    n_rows = -(-n_panels // n_columns)
    panels = [figure.add_subplot(n_rows, n_columns, index + 1) for index in range(n_panels)]
    for axes in panels:
        axes.tick_params(labelsize="small", width=0.6)
        axes.spines[:].set_linewidth(0.6)
        axes.grid(alpha=0.3, linewidth=0.5)
    return panels


def add_legend(figure: Figure, handles: Sequence[Artist], n_columns: int | None = None) -> None:
    """Add a legend above the panels, in one row unless a number of columns is given."""
    n_columns = len(handles) if n_columns is None else n_columns
    figure.legend(handles=handles, loc="outside upper center", ncols=n_columns, frameon=False, fontsize="small")


def line_handle(label: str, color: str, style: str, **marker: Any) -> Line2D:
    """Return the legend's entry of a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, ls=style, label=label, **marker)


def interval_handle(label: str) -> Patch:
    """Return the legend's entry of an interval."""
    from matplotlib.patches import Patch

    return Patch(color="gray", alpha=0.3, linewidth=0, label=label)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG atomically, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


@dataclass(frozen=True)
class Band:
    """
    A line with its interval.

    :param x: ``(n,)``
    :param values: ``(n,)``
    :param ends: both ends of the interval, ``(2, n)``; None with too few seeds
    """

    x: np.ndarray
    values: np.ndarray
    ends: np.ndarray | None


def band_of(x: np.ndarray, found: np.ndarray, statistic: Statistic) -> Band | None:
    """Return a statistic over the seeds of curves ``(n_seeds, n)``, at the points that all of them have."""
    known = np.isfinite(found).all(axis=0)
    if len(found) == 0 or not known.any():
        return None
    found = found[:, None, known]  # of one environment
    return Band(x[known], statistic(found[None])[0], interval(statistic, found))


def mean_band(runs: Sequence[Mapping[str, Any]], n_timesteps: int) -> Band | None:
    """Return the mean over runs of their curves, which have a point at each step of the grid of a training."""
    curves = np.array([run["curve"] for run in runs], dtype=np.float64).reshape(-1, N_POINTS)
    return band_of(grid(n_timesteps), curves, mean)


def draw_band(axes: Axes, band: Band, color: str, style: str) -> None:
    """Draw a line, and its interval if there is one."""
    if band.ends is not None:
        axes.fill_between(band.x, *band.ends, color=color, alpha=0.15, linewidth=0)
    axes.plot(band.x, band.values, color=color, linestyle=style, linewidth=1.2)
