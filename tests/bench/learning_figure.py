"""The figure of the learning benchmark: returns of ClipPPO and of SB3's PPO against processor time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.experiments.episodes import WINDOW
from tests.bench.plots import (
    BLUE,
    VERMILION,
    Band,
    add_legend,
    add_panels,
    draw_band,
    interval_handle,
    line_handle,
    mean_band,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    f"Mean return of the last {WINDOW} training episodes against processor time summed over all threads: ClipPPO with "
    "its packaged settings and SB3's PPO with those of the RL Zoo, for the same steps. Time is that of the fastest run"
)

_STYLES = {"ClipPPO": (BLUE, "-"), "SB3's PPO": (VERMILION, "--")}


@dataclass(frozen=True)
class TimeComparison:
    """Results of both algorithms in an environment, of which there should be ``n_seeds`` each."""

    env_id: str
    n_timesteps: int
    ours: Sequence[Mapping[str, Any]]
    peers: Sequence[Mapping[str, Any]]
    n_seeds: int

    def bands(self) -> dict[str, Band]:
        """Return mean and interval of the curves by algorithm, where the time of a run is known."""
        found = {}
        for name, runs in zip(_STYLES, (self.ours, self.peers), strict=True):
            band = time_band(runs, self.n_timesteps)
            if band is not None:
                found[name] = band
        return found

    def is_drawn(self) -> bool:
        """Return whether both algorithms have the runs of all seeds, and a curve against time."""
        return len(self.ours) == len(self.peers) == self.n_seeds and len(self.bands()) == len(_STYLES)


def fastest_seconds(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """
    Return the smallest known ``cpu_seconds``: what a training costs on the least disturbed machine.

    Other work on a machine makes the same training take up to three times as much processor time.
    """
    return min((run["cpu_seconds"] for run in runs if run.get("cpu_seconds")), default=None)


def time_band(runs: Sequence[Mapping[str, Any]], n_timesteps: int) -> Band | None:
    """
    Return the mean over runs of their curves against the processor time of the fastest one.

    Each step takes the same share of its ``cpu_seconds``, which include the start of its process.
    """
    seconds = fastest_seconds(runs)
    band = mean_band(runs, n_timesteps) if all(run.get("curve") for run in runs) else None
    if seconds is None or band is None:
        return None
    return Band(band.x * seconds / n_timesteps, band.values, band.ends)


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
    n_seeds = comparison.n_seeds
    seeds = f"{n_seeds} {'seed' if n_seeds == 1 else 'seeds'}"
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
