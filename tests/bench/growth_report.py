"""The tables and the figure of the growth benchmark: cost, bound and memory along each axis."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.growth_rows import Axis
from tests.bench.plots import BLUE, VERMILION, new_figure, save_figure
from tests.bench.results import Results, machines_text, markdown_table
from tests.bench.speed_rows import BOUNDS, PEERS, SpeedRow
from tests.bench.speed_table import ratio, runs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[Axis, Mapping[int, SpeedRow]]
"""Axis -> size -> row."""

Curves = dict[str, dict[int, float]]
"""Name of the curve -> size -> value."""

_STYLES: dict[str, dict[str, Any]] = {
    "ClipPPO": {"color": BLUE, "marker": "o"},
    "SB3": {"color": VERMILION, "marker": "s"},
    "bound": {"color": "#707070", "linestyle": ":"},
}
_NOTES = (
    "Steps per second of training, or of the update alone on the axes *width* and *batch size*. Each library has one "
    "thread; EnvPool has one more for each core. *Bound* is the speed if only ClipPPO's environments, under random "
    "actions, and the update's matrix products, by torch's BLAS, took time. A share above 100 % means that the "
    "kernels multiply small matrices faster than torch. Microseconds are per transition: environments with their "
    "wrappers + policy with the rest of the rollout + update. Memory is the peak of the process."
)


@dataclass(frozen=True)
class Cost:
    """Medians of a peer's runs at one point."""

    steps_per_second: float
    microseconds: tuple[float, float, float]  # environment, policy, update, for a transition
    megabytes: float

    @staticmethod
    def of(results: Results, row: SpeedRow, peer: str, rounds: int) -> Cost | None:
        """Summarise a peer's runs of a row, or return None without any."""
        runs = list(runs_of(results, row, peer, rounds).values())
        if not runs:
            return None
        seconds = (
            [run[f"{part}_seconds"] / run["steps"] for run in runs] for part in ("environment", "policy", "update")
        )
        environment, policy, update = (1e6 * statistics.median(values) for values in seconds)
        speed, memory = (
            statistics.median(run[name] for run in runs) for name in ("steps_per_second", "peak_megabytes")
        )
        return Cost(speed, (environment, policy, update), memory)


def bound_of(results: Results, row: SpeedRow, rounds: int) -> float | None:
    """Return the steps per second that ClipPPO's environments and the update's products alone allow."""
    runs = runs_of(results, row, "clipppo", rounds).values()
    alone = runs_of(results, row, "bound_clipppo", rounds).values()
    if not runs or ("bound_clipppo" in row.measured() and not alone):
        return None
    if any("products_seconds" not in run for run in runs):  # updates on a GPU have none
        return None
    products = statistics.median(run["products_seconds"] / run["steps"] for run in runs)
    environment = statistics.median(1 / run["steps_per_second"] for run in alone) if alone else 0.0
    return float(1 / (products + environment))


def render_axes(results: Results, points: Points, rounds: int, notes: Mapping[str, str]) -> str:
    """Render a Markdown table for each axis; ``notes`` has the reason why a row has no result."""
    header = ["size", "ClipPPO steps/s", "SB3 steps/s", "ClipPPO / SB3", "bound steps/s", "share of the bound"]
    header += ["ClipPPO µs", "SB3 µs", "ClipPPO MB", "SB3 MB"]
    texts = []
    for axis, rows in points.items():
        lines = [
            [f"{size:,}", *_cells(results, row, rounds, notes.get(row.name, "not run"))] for size, row in rows.items()
        ]
        texts.append(f"**{axis.title}**\n\n{markdown_table(header, 'r' * len(header), lines)}")
    rows_of_all = [row for rows in points.values() for row in rows.values()]
    runs = [
        run for row in rows_of_all for peer in (*PEERS, *BOUNDS) for run in runs_of(results, row, peer, rounds).values()
    ]
    texts += [_NOTES, machines_text(runs, lambda run: "one run at a time")]
    return "\n\n".join(texts)


def _cells(results: Results, row: SpeedRow, rounds: int, note: str) -> list[str]:
    ours, sb3 = (Cost.of(results, row, peer, rounds) for peer in ("clipppo", "sb3"))
    times, bound = ratio(results, row, "sb3", rounds), bound_of(results, row, rounds)
    return [
        note if ours is None else f"{ours.steps_per_second:,.0f}",
        "" if sb3 is None else f"{sb3.steps_per_second:,.0f}",
        "" if times is None else f"{times.median:.1f}",
        "" if bound is None else f"{bound:,.0f}",
        "" if bound is None or ours is None else f"{ours.steps_per_second / bound:.0%}",
        *("" if cost is None else " + ".join(f"{part:.3g}" for part in cost.microseconds) for cost in (ours, sb3)),
        *("" if cost is None else f"{cost.megabytes:,.0f}" for cost in (ours, sb3)),
    ]


def write_figure(results: Results, points: Points, rounds: int, path: Path) -> None:
    """Draw the microseconds of a transition above, and the peak of memory below, one column per axis."""
    figure = new_figure(2.0 * len(points), 4.4)
    grid = figure.subplots(2, len(points), sharex="col", sharey="row", squeeze=False)
    for column, (axis, rows) in enumerate(points.items()):
        for panels, curves in zip(grid, _curves(results, rows, rounds), strict=True):
            _draw(panels[column], axis, curves, labelled=column == 0)
        grid[1][column].set_xlabel(axis.label, size="small")
    grid[0][0].set_ylabel("µs per transition", size="small")
    grid[1][0].set_ylabel("peak memory, MB", size="small")
    save_figure(figure, path)


def _curves(results: Results, rows: Mapping[int, SpeedRow], rounds: int) -> tuple[Curves, Curves]:
    """Return the microseconds of a transition and the memory, by name of the curve and size."""
    costs: Curves = {}
    memory: Curves = {}
    for peer in ("sb3", "clipppo"):
        found = {size: cost for size, row in rows.items() if (cost := Cost.of(results, row, peer, rounds))}
        costs[PEERS[peer]] = {size: 1e6 / cost.steps_per_second for size, cost in found.items()}
        memory[PEERS[peer]] = {size: cost.megabytes for size, cost in found.items()}
    bounds = {size: bound_of(results, row, rounds) for size, row in rows.items()}
    costs["bound"] = {size: 1e6 / bound for size, bound in bounds.items() if bound is not None}
    return costs, memory


def _draw(panel: Axes, axis: Axis, curves: Curves, labelled: bool) -> None:
    """Draw curves on logarithmic scales, each with its name at its last point where they are labelled."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.set(xscale="log", yscale="log")
    for name, values in curves.items():
        panel.plot(list(values), list(values.values()), markersize=3, **_STYLES[name])
        if labelled and values:
            size, value = list(values.items())[-1]
            offset, side = (-4, "top") if name == "bound" else (4, "bottom")  # the bound lies below the others
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": side, "size": "small"}
            panel.annotate(name, (size, value), (4, offset), color=_STYLES[name]["color"], **style)
    panel.set_xticks(axis.values, [_short(value) for value in axis.values])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for one in (panel.xaxis, panel.yaxis):
        one.set_minor_locator(NullLocator())
    panel.tick_params(labelsize="x-small")
    panel.grid(alpha=0.3, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _short(value: int) -> str:
    """Return a size in a few letters: thousands and millions in powers of two."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{letter}"
    return str(value)
