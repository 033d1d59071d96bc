"""Quantities of runs on common grids of steps or seconds, with the mean and the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sb3_clipvf.zoo.comparison.groups import Group
from sb3_clipvf.zoo.comparison.records import RunRecord
from sb3_clipvf.zoo.comparison.series import Series

ROLLING_WINDOW = 100
"""Episodes in a mean of the learning curve, as in ``rollout/ep_rew_mean`` of SB3's log."""

AXES = ("steps", "seconds")
_MOST_POINTS, _ALL_POINTS, _FEWEST_POINTS = 200, 8000, 50


@dataclass(frozen=True)
class Panel:
    """
    One quantity of the groups of one environment.

    :param key: Key of the quantity: ``return``, ``return/raw``, ``return/evaluation`` or that of SB3's log.
    :param grids: Points of each axis, ``(n,)``.
    :param lines: For each axis and each group by its name, the values of its runs, ``(n_runs, n)``; NaN where a run has
        none.
    """

    key: str
    grids: dict[str, np.ndarray]
    lines: dict[str, dict[str, np.ndarray]]


def rolling_mean(values: np.ndarray, window: int = ROLLING_WINDOW) -> np.ndarray:
    """Return the mean of each value and the values before it, at most ``window`` in all, ``(n,)``."""
    head = values[: window - 1]
    means = np.cumsum(head) / np.arange(1, len(head) + 1)
    if len(values) >= window:
        # A sum of its own for each window: differences of running sums are NaN after an infinite value, and inexact
        # after a large one.
        means = np.concatenate((means, sliding_window_view(values, window).mean(axis=-1)))
    return means


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Return the quantities of the groups of one environment: returns first, then those of the log by key."""
    records = [record for group in groups for record in group.records]
    n_points = int(np.clip(_ALL_POINTS / len(records), _FEWEST_POINTS, _MOST_POINTS))
    grids = {
        axis: np.linspace(0, max((_end(one, axis) for one in records), default=0.0), n_points + 1)[1:] for axis in AXES
    }
    keys = ["return", "return/raw", "return/evaluation"]
    keys += sorted({key for record in records for key in record.log if not key.startswith(("eval/", "rollout/ep_rew"))})
    found = []
    for key in keys:
        lines = {axis: {group.name: _lines(group, key, axis, grids[axis]) for group in groups} for axis in AXES}
        if any(np.isfinite(line).any() for line in lines["steps"].values()):
            found.append(Panel(key, grids, lines))
    return found


def mean_and_std(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Return mean, standard deviation and number of the runs at each point, ``(n,)``.

    The deviation is that of a sample (divided by n - 1), NaN for one run. Points that fewer than half of the runs have
    reached are NaN: the mean of the others would be one of other runs.
    """
    finite = np.isfinite(lines)
    n = finite.sum(axis=0)
    shown = 2 * n >= max(1, finite.any(axis=1).sum())
    total = np.where(finite, lines, 0).sum(axis=0)
    mean = np.where(shown & (n > 0), total / np.maximum(n, 1), np.nan)
    squares = np.where(finite, (lines - mean) ** 2, 0).sum(axis=0)
    std = np.where(np.isfinite(mean) & (n > 1), np.sqrt(squares / np.maximum(n - 1, 1)), np.nan)
    return mean, std, n


def smoothed_returns(record: RunRecord) -> Series:
    """Return the smoothed returns of a run, which its log may hold already."""
    return record.episodes if record.is_mean else smoothed(record.episodes)


def smoothed(episodes: Series) -> Series:
    """Return the mean of the last 100 episodes at the end of each episode."""
    # Several episodes may end at one step: take the mean after all of them.
    last = np.append(np.diff(episodes.steps) > 0, True)[: len(episodes.steps)]
    return Series(episodes.steps[last], episodes.seconds[last], rolling_mean(episodes.values)[last])


def _end(record: RunRecord, axis: str) -> float:
    return record.steps if axis == "steps" else record.seconds or 0.0


def _lines(group: Group, key: str, axis: str, grid: np.ndarray) -> np.ndarray:
    ends = [_end(record, axis) for record in group.records]
    if axis == "seconds" and key.startswith("return"):
        # A run that has ended keeps its last return. Otherwise the mean would jump where the fastest run ends.
        ends = [max(ends)] * len(ends)
    return np.array([_line(record, key, axis, grid, end) for record, end in zip(group.records, ends, strict=True)])


def _line(record: RunRecord, key: str, axis: str, grid: np.ndarray, end: float) -> np.ndarray:
    """Return a quantity of a run on a grid, NaN before its first value and after the end."""
    series: Series | None = record.log.get(key)
    if key in ("return", "return/raw"):
        series = smoothed_returns(record) if key == "return" else record.episodes
        if record.is_mean and key == "return/raw":
            series = None
    elif key == "return/evaluation":
        series = record.evaluations
    if series is None:
        return np.full(len(grid), np.nan)
    x = series.steps if axis == "steps" else series.seconds
    finite = np.isfinite(x) & np.isfinite(series.values)
    x, y = x[finite], series.values[finite]
    if len(x) == 0 or len(grid) == 0 or grid[-1] <= 0:
        return np.full(len(grid), np.nan)
    first = x[0]
    if not key.startswith("return") or key == "return/raw":
        x, y = _bin_means(x, y, grid)
    # The last value holds until the end of the run; the grid's point after the first value shows it.
    values: np.ndarray = np.interp(grid, x, y)
    step = grid[0]
    values[(grid + step <= first) | (grid > end + step / 2)] = np.nan
    return values


def _bin_means(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of x and y in the intervals that end at the grid's points and hold a value."""
    bins = np.minimum(np.searchsorted(grid, x), len(grid) - 1)
    counts = np.bincount(bins, minlength=len(grid))
    held = counts > 0
    means = [np.bincount(bins, weights, len(grid))[held] / counts[held] for weights in (x, y)]
    return means[0], means[1]
