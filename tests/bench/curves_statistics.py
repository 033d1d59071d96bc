"""The curves benchmark's numbers: a training's curve on a grid of steps, intervals of means, overlap of two bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_clipvf.zoo.runs import TrainingCurve
from tests.bench import training_runs
from tests.bench.results import Results

# The first one is compared with the second, which is the reference.
ENGINES = ("native", "autograd")
N_POINTS = 40
WINDOW = 20
LAST_EPISODES = 100
CONFIDENCE = 0.95


@dataclass(frozen=True)
class CurveRow:
    """
    An environment on an engine, trained with each seed.

    :param env_id: the environment's id
    :param n_timesteps: environment steps of training
    :param engine: value of ``engine=``
    :param vec_env: kind of the training environments, as ``--vec-env`` takes it
    """

    env_id: str
    n_timesteps: int
    engine: str
    vec_env: str = "dummy"

    @property
    def name(self) -> str:
        """Name for ``--only``, the file names and the results."""
        return f"{self.env_id}-{self.engine}"

    @property
    def params(self) -> tuple[str, ...]:
        """The change to the shipped settings: the engine."""
        return (f"engine:'{self.engine}'",)


def run_of(row: CurveRow, seed: int) -> dict[str, Any]:
    """
    List by what a row's result is found.

    :param row: the row
    :param seed: the seed
    :return: the key, and what decides on the result
    """
    return {**training_runs.run_of(row, seed), "n_points": N_POINTS, "window": WINDOW}


def grid(n_timesteps: int) -> np.ndarray:
    """
    Divide a training evenly.

    :param n_timesteps: its environment steps
    :return: ``(N_POINTS,)`` environment steps; the last one is the training's end
    """
    return n_timesteps * np.arange(1, N_POINTS + 1) / N_POINTS


def curve_on_grid(curve: TrainingCurve, steps: np.ndarray, window: int = WINDOW) -> list[float | None]:
    """
    Read a training's curve at given steps: the mean return of the last episodes that had ended by then.

    :param curve: the training's episodes
    :param steps: ``(n,)`` environment steps
    :param window: at most this many episodes in a mean; the first means are of fewer
    :return: n means in reward units, to 5 significant digits; None where no episode had ended
    """
    # Episodes come by the clock; of those that end at one step, the order by the clock stays.
    order = np.argsort(curve.steps, kind="stable")
    returns = curve.returns[order]
    ended = np.searchsorted(curve.steps[order], steps, side="right")
    return [rounded_mean(returns[max(0, n - window) : n]) for n in ended]


def rounded_mean(values: Sequence[float] | np.ndarray) -> float | None:
    """
    Average.

    :param values: numbers
    :return: their mean to 5 significant digits, None where there are none
    """
    return float(f"{np.mean(values):.5g}") if len(values) > 0 else None


@dataclass(frozen=True)
class Estimate:
    """
    A mean and its confidence interval.

    :param mean: the mean
    :param margin: half of the interval's width; None where too few values tell none
    """

    mean: float
    margin: float | None

    def overlaps(self, other: Estimate) -> bool | None:
        """:return: whether the intervals have a point in common; None where one of them is not known"""
        if self.margin is None or other.margin is None:
            return None
        return abs(self.mean - other.mean) <= self.margin + other.margin

    def __str__(self) -> str:
        # The spaces do not break, so that a cell of a table stays on one line.
        return f"{self.mean:.1f}" if self.margin is None else f"{self.mean:.1f}\u00a0±\u00a0{self.margin:.1f}"


def mean_estimate(values: Sequence[float | None]) -> Estimate | None:
    r"""
    Estimate a mean: :math:`t_{n-1} s / \sqrt n` on both sides of the values' mean, with Student's t.

    :param values: one a seed; None does not count
    :return: the 95 % interval; None without values
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) == 0:
        return None
    if len(known) == 1:
        return Estimate(float(known[0]), None)
    return Estimate(float(np.mean(known)), _margin(float(np.var(known, ddof=1)) / len(known), len(known) - 1))


def difference_estimate(first: Sequence[float | None], second: Sequence[float | None]) -> Estimate | None:
    """
    Estimate the difference of two means whose variances may differ.

    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
    involved", with the degrees of freedom of Welch and Satterthwaite.

    :param first: one value a seed; None does not count
    :param second: those to subtract
    :return: the 95 % interval of the first mean minus the second; None where one of them has no values
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
    """
    The runs of one environment.

    :param env_id: the environment's id
    :param n_timesteps: environment steps of a training
    :param n_seeds: number of runs that there should be on each engine
    :param runs: engine -> results that there are
    """

    env_id: str
    n_timesteps: int
    n_seeds: int
    runs: Mapping[str, Sequence[Mapping[str, Any]]]

    def bands(self, engine: str) -> list[Estimate | None]:
        """:return: at each step of :func:`grid`, the mean over the seeds; None where no episode had ended"""
        curves = [run["curve"] for run in self.runs[engine]]
        return [mean_estimate([curve[point] for curve in curves]) for point in range(N_POINTS)]

    def overlap(self) -> tuple[int, int]:
        """:return: number of points at which both bands overlap, and of those at which there are two bands"""
        pairs = zip(*(self.bands(engine) for engine in ENGINES), strict=True)
        known = [first.overlaps(second) for first, second in pairs if first is not None and second is not None]
        return known.count(True), known.count(True) + known.count(False)

    def so_far(self) -> str:
        """:return: which part of the runs there is; empty where all are there"""
        counts = [len(self.runs[engine]) for engine in ENGINES]
        if not any(counts):
            return "not run"
        if min(counts) == self.n_seeds:
            return ""
        return f"so far {counts[0]} and {counts[1]} of {self.n_seeds} seeds"


def comparisons(results: Results, rows: Sequence[CurveRow], seeds: Sequence[int]) -> list[Comparison]:
    """
    Gather the runs of each environment.

    :param results: the results
    :param rows: all rows
    :param seeds: the seeds that count
    :return: one an environment, in the order of the rows
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        runs = [run for seed in seeds if (run := results.find(run_of(row, seed))) is not None]
        found.setdefault(row.env_id, {})[row.engine] = runs
    n_timesteps = {row.env_id: row.n_timesteps for row in rows}
    return [Comparison(env_id, n_timesteps[env_id], len(seeds), runs) for env_id, runs in found.items()]
