"""
Estimates over seeds with stratified bootstrap intervals.

Scores are arrays ``(n_seeds, n_environments)``, and curves ``(n_seeds, n_environments, n_points)``. A statistic takes
resampled ones with the resamples as first axis, of one or two groups, and returns ``(n,)`` or ``(n, n_points)``.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264,
whose package rliable has the same estimates. Tests compare them. The resampling is written here, since rliable 1.2.0
draws from NumPy's global generator, whatever its ``random_state``, and takes a second for each interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Seeds from which there is an interval."""

MIN_SEEDS_ALONE = 5
"""
Seeds from which the interval of a single environment decides. With three, the 95 % interval excludes no difference in
one of ten cases if the settings are the same.
"""

N_RESAMPLES = 5000
_SEED = 0

Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """
    A number with its 95 % interval, which is None with fewer than ``MIN_SEEDS`` seeds.

    :param n_seeds: number of seeds; of two groups, the smaller one
    """

    value: float
    interval: tuple[float, float] | None
    n_seeds: int

    def text(self, form: str) -> str:
        """Return the value and the interval as a cell of a table. Numbers have this form, such as ``+z.2f``."""
        ends = ["not enough data"] if self.interval is None else [number_text(end, form) for end in self.interval]
        return f"{number_text(self.value, form)} [{', '.join(ends)}]".replace(" ", "\u00a0")  # on one line


def over_seeds(values: Iterable[float | None]) -> np.ndarray:
    """Return the scores ``(n_seeds, 1)`` of one environment, without unknown ones."""
    return np.array([value for value in values if value is not None], dtype=np.float64)[:, None]


def number_text(value: float, form: str) -> str:
    """Return a number in this form with a typographic minus sign."""
    return f"{value:{form}}".replace("-", "\u2212")


def estimate(statistic: Statistic, *groups: np.ndarray) -> Estimate | None:
    """Return a statistic of one number with its interval, or None if a group has no scores."""
    n_seeds = min(len(group) for group in groups)
    if n_seeds == 0 or any(group.shape[1] == 0 for group in groups):
        return None
    ends = interval(statistic, *groups)
    value = float(statistic(*(group[None] for group in groups))[0])
    return Estimate(value, None if ends is None else (float(ends[0]), float(ends[1])), n_seeds)


def interval(statistic: Statistic, *groups: np.ndarray) -> np.ndarray | None:
    """
    Return both ends of the expanded percentile interval, ``(2,)`` or ``(2, n_points)``, or None with too few seeds.

    Seeds are drawn with replacement, in each group and in each environment separately. Groups may have different
    numbers of seeds. The same scores give the same interval.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4). The tails
    are those of :func:`expanded_tail`, since tails of 2.5 % make the interval of few seeds too narrow.
    """
    if min(len(group) for group in groups) < MIN_SEEDS:
        return None
    rng = np.random.default_rng(_SEED)
    tail = expanded_tail(*(group.shape[:2] for group in groups))
    ends: np.ndarray = np.quantile(statistic(*(_resampled(group, rng) for group in groups)), [tail, 1 - tail], axis=0)
    return ends


def expanded_tail(*shapes: tuple[int, ...]) -> float:
    r"""
    Return :math:`\Phi(-\sqrt{n / (n - 1)}\, t_{\nu})` for groups of ``(n_seeds, n_environments)`` scores.

    The root undoes the factor by which resampled variances are too small, and Student's 97.5 % quantile with
    :math:`\nu` degrees of freedom replaces the normal one. Here, n is the smaller number of seeds, and
    :math:`\nu = \sum m (n - 1)` over the groups of m environments, each of which is resampled by itself.
    """
    from scipy.stats import norm, t

    n_seeds = min(shape[0] for shape in shapes)
    freedom = sum(n_environments * (n - 1) for n, n_environments in shapes)
    return float(norm.cdf(-np.sqrt(n_seeds / (n_seeds - 1)) * t.ppf((1 + CONFIDENCE) / 2, freedom)))


def _resampled(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n_seeds, n_environments = scores.shape[:2]
    drawn = rng.integers(n_seeds, size=(N_RESAMPLES, n_seeds, n_environments))
    return np.asarray(scores[drawn, np.arange(n_environments)])


def mean(scores: np.ndarray) -> np.ndarray:
    """Return the means over seeds and environments."""
    return np.asarray(scores.mean(axis=(1, 2)))


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile means: those of the scores without the lowest and the highest quarter, rounded down."""
    pooled = scores.reshape(len(scores), -1, *scores.shape[3:])
    n_cut = pooled.shape[1] // 4
    return np.asarray(np.sort(pooled, axis=1)[:, n_cut : pooled.shape[1] - n_cut].mean(axis=1))


def difference(of: Statistic) -> Statistic:
    """Return the statistic of two groups that is the first one's value minus the second one's."""
    return lambda first, second: of(first) - of(second)


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the probabilities that a run of the first group has the higher score, ties counting one half."""
    signs = np.zeros(len(first))
    for seed in range(first.shape[1]):
        signs += np.sign(first[:, seed, None] - second).mean(axis=(1, 2))
    return np.asarray((signs / first.shape[1] + 1) / 2)


def performance_profile(thresholds: np.ndarray) -> Statistic:
    """Return the statistic that is the share of the scores above each of the thresholds ``(n_points,)``."""
    return lambda scores: np.stack([(scores > threshold).mean(axis=(1, 2)) for threshold in thresholds], axis=1)
