"""Scores of runs between random actions and the best result of each environment, as the PPO paper has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.bench.experiments.estimates import Estimate, estimate, mean
from tests.bench.experiments.finished import SuiteRuns
from tests.bench.experiments.random_policy import random_returns
from tests.bench.experiments.suite import Environment

_MEASURE = "last_return"


def best_result_scores(runs: SuiteRuns) -> dict[str, list[np.ndarray]]:
    """
    Return the scores of each setting: for each environment, those of its runs, ``(n_seeds,)``.

    A score is 0 for the mean return of random actions, and 1 for the best run of all settings of the whole suite in the
    environment. If no run is better than random actions, there are no scores. Returns are those of the last 100
    training episodes.

    Source: Schulman et al. 2017, arXiv 1707.06347, section 6.1, where "the best result was set to 1". Here, a result is
    that of a run.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in runs.suite.settings}
    for environment in runs.suite.environments:
        returns, random = _returns(runs, environment)
        best = max(map(max, filter(None, returns.values())), default=random)
        for setting in runs.suite.settings_of(environment):
            scores = [(value - random) / (best - random) for value in returns[setting] if best > random]
            found[setting].append(np.array(scores, dtype=np.float64))
    return found


def unbeaten(runs: SuiteRuns) -> list[str]:
    """Return the environments without scores, since no run of the whole suite is better than random actions."""
    found = [(environment.env_id, *_returns(runs, environment)) for environment in runs.suite.environments]
    return [
        env_id
        for env_id, returns, random in found
        if any(returns.values()) and all(value <= random for values in returns.values() for value in values)
    ]


def _returns(runs: SuiteRuns, environment: Environment) -> tuple[dict[str, list[float]], float]:
    """Return the whole suite's returns in an environment by setting, and the mean return of random actions."""
    env_id, whole = environment.env_id, runs.whole
    returns = {
        setting: [float(run.row[_MEASURE]) for run in whole.of(env_id, setting) if run.scores() is not None]
        for setting in whole.suite.settings_of(environment)
    }
    return returns, random_returns(runs, [env_id])[env_id].mean if any(returns.values()) else 0.0


def mean_score(scores: Sequence[np.ndarray], n_seeds: int) -> Estimate | None:
    """Return the mean over environments and seeds with its interval, or None if an environment has fewer seeds."""
    is_whole = all(len(values) == n_seeds for values in scores)
    return estimate(mean, np.stack(scores, axis=1)) if is_whole else None
