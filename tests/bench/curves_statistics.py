"""The curves benchmark's numbers: intervals of means, and the overlap of two bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench.experiments.episodes import N_POINTS, WINDOW
from tests.bench.results import Results
from tests.bench.training_runs import TrainingRow

# The first one is compared with the second, which is the reference.
ENGINES = ("native", "autograd")
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class CurveRow(TrainingRow):
    """An environment on an engine, trained with each seed."""

    engine: str

    @classmethod
    def of(cls, env_id: str, n_timesteps: int, engine: str) -> CurveRow:
        """Return the row whose one change to the shipped settings is the engine."""
        name, params = f"{env_id}-{engine}", (f"engine:'{engine}'",)
        return cls(name=name, env_id=env_id, n_timesteps=n_timesteps, params=params, engine=engine)

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by."""
        return {**super().run(seed), "n_points": N_POINTS, "window": WINDOW}


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of the width of its confidence interval, which is None for a single value."""

    mean: float
    margin: float | None

    def overlaps(self, other: Estimate) -> bool | None:
        """Return whether the intervals have a point in common, or None if one of them is not known."""
        if self.margin is None or other.margin is None:
            return None
        return abs(self.mean - other.mean) <= self.margin + other.margin

    def __str__(self) -> str:
        # The spaces do not break, so that a cell of a table stays on one line.
        return f"{self.mean:.1f}" if self.margin is None else f"{self.mean:.1f}\u00a0±\u00a0{self.margin:.1f}"


def mean_estimate(values: Sequence[float | None]) -> Estimate | None:
    r"""
    Return a mean over seeds with its 95 % interval, or None without values; None among the values does not count.

    The interval is :math:`t_{n-1} s / \sqrt n` on both sides, with Student's t.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) == 0:
        return None
    if len(known) == 1:
        return Estimate(float(known[0]), None)
    return Estimate(float(np.mean(known)), _margin(float(np.var(known, ddof=1)) / len(known), len(known) - 1))


def difference_estimate(first: Sequence[float | None], second: Sequence[float | None]) -> Estimate | None:
    """
    Return the first mean minus the second with its 95 % interval, or None if one has no values; variances may differ.

    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
    involved", with the degrees of freedom of Welch and Satterthwaite.
    """
    groups = [np.array([value for value in values if value is not None]) for values in (first, second)]
    if any(len(group) == 0 for group in groups):
        return None
    difference = float(np.mean(groups[0]) - np.mean(groups[1]))
    if any(len(group) == 1 for group in groups):
        return Estimate(difference, None)
    variances = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    spread = sum(variance**2 / (len(group) - 1) for variance, group in zip(variances, groups, strict=True))
    freedom = sum(variances) ** 2 / spread if spread > 0 else 1.0
    return Estimate(difference, _margin(sum(variances), freedom))


def _margin(squared_error: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(squared_error)


@dataclass(frozen=True)
class Comparison:
    """The runs of one environment by engine, of which there should be ``n_seeds`` each."""

    env_id: str
    n_timesteps: int
    n_seeds: int
    runs: Mapping[str, Sequence[Mapping[str, Any]]]

    def bands(self, engine: str) -> list[Estimate | None]:
        """Return the mean over the seeds at each step of a curve, or None where no episode had ended."""
        curves = [run["curve"] for run in self.runs[engine]]
        return [mean_estimate([curve[point] for curve in curves]) for point in range(N_POINTS)]

    def overlap(self) -> tuple[int, int]:
        """Return the number of points at which both bands overlap, and of those at which there are two bands."""
        pairs = zip(*(self.bands(engine) for engine in ENGINES), strict=True)
        known = [first.overlaps(second) for first, second in pairs if first is not None and second is not None]
        return known.count(True), known.count(True) + known.count(False)

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
