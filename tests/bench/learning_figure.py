"""The figure of the learning benchmark: returns of ClipPPO and of SB3's PPO against processor time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.experiments.episodes import WINDOW, grid
from tests.bench.experiments.estimates import mean
from tests.bench.plots import (
    BLUE,
    VERMILION,
    Band,
    add_legend,
    add_panels,
    band_of,
    draw_band,
    interval_handle,
    line_handle,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    f"Mean return of the last {WINDOW} training episodes against processor time summed over all threads, of runs that "
    "were not resumed: ClipPPO with its shipped settings and SB3's PPO with those of the RL Zoo, for the same steps"
)

_STYLES = {"ClipPPO": (BLUE, "-"), "SB3's PPO": (VERMILION, "--")}
_N_POINTS = 200


@dataclass(frozen=True)
class TimeComparison:
    """Results of both algorithms in an environment, of which there should be ``n_seeds`` each."""

    env_id: str
    n_timesteps: int
    ours: Sequence[Mapping[str, Any]]
    peers: Sequence[Mapping[str, Any]]
    n_seeds: int

    def bands(self) -> dict[str, Band]:
        """Return mean and interval of the curves by algorithm, of runs whose time is known."""
        found = {}
        for name, runs in zip(_STYLES, (self.ours, self.peers), strict=True):
            band = time_band([run for run in runs if run.get("cpu_seconds") and run.get("curve")], self.n_timesteps)
            if band is not None:
                found[name] = band
        return found

    def is_drawn(self) -> bool:
        """Return whether both algorithms have the runs of all seeds, and a curve against time."""
        return len(self.ours) == len(self.peers) == self.n_seeds and len(self.bands()) == len(_STYLES)

    def n_timed(self) -> int:
        """Return the smaller number of runs whose time is known."""
        return min(sum(bool(run.get("cpu_seconds")) for run in runs) for runs in (self.ours, self.peers))


def time_band(runs: Sequence[Mapping[str, Any]], n_timesteps: int) -> Band | None:
    """
    Return the mean over runs of their curves against processor time, up to the end of the shortest training.

    Each step of a run takes the same share of its ``cpu_seconds``, which include the start of its process.
    """
    x = np.linspace(0, min((run["cpu_seconds"] for run in runs), default=0.0), _N_POINTS + 1)[1:]
    found = []
    for run in runs:
        seconds = grid(n_timesteps) * run["cpu_seconds"] / n_timesteps
        curve = np.array(run["curve"], dtype=np.float64)
        known = np.isfinite(curve)
        if known.any():
            found.append(np.interp(x, seconds[known], curve[known], left=np.nan))
    return band_of(x, np.array(found).reshape(-1, _N_POINTS), mean)


def write_time_figure(comparisons: Sequence[TimeComparison], path: Path) -> None:
    """Draw a panel for each environment."""
    n_columns = min(3, len(comparisons))
    n_rows = -(-len(comparisons) // n_columns)
    figure = new_figure(2.9 * max(n_columns, 2), 0.8 + 2.2 * n_rows)
    for axes, comparison in zip(add_panels(figure, len(comparisons), n_columns), comparisons, strict=True):
        _draw(axes, comparison)
    figure.supxlabel("processor time of the training", fontsize="small")
    figure.supylabel(f"mean return of the last {WINDOW} episodes", fontsize="small")
    handles = [line_handle(name, *style, marker="o", ms=4) for name, style in _STYLES.items()]
    add_legend(figure, [*handles, interval_handle("95 % interval over the seeds")])
    save_figure(figure, path)


def _draw(axes: Axes, comparison: TimeComparison) -> None:
    from matplotlib.ticker import MaxNLocator

    bands = comparison.bands()
    n_timed = comparison.n_timed()
    n_seeds = comparison.n_seeds
    seeds = f"{n_seeds} {'seed' if n_seeds == 1 else 'seeds'}"
    seeds = seeds if n_timed == n_seeds else f"{n_timed} of {seeds} with known time"
    axes.set_title(f"{comparison.env_id}\n{comparison.n_timesteps:,} steps, {seeds}", fontsize="small")
    is_short = max(band.x[-1] for band in bands.values()) < 120
    for name, band in bands.items():
        color, style = _STYLES[name]
        x = band.x if is_short else band.x / 60
        draw_band(axes, Band(x, band.values, band.ends), color, style)
        # All trainings have the same steps: the end shows what they cost.
        axes.plot(x[-1:], band.values[-1:], marker="o", ms=4, color=color, clip_on=False, zorder=5)
    axes.set_xlabel("seconds" if is_short else "minutes", fontsize="small")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
