"""Returns of random actions, the zero of normalised scores, kept in a CSV beside the results of suites."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sb3_clipvf.common.versions import installed_versions
from tests.bench.experiments.finished import SuiteRuns
from tests.bench.results import csv_text, locked_folder, write_text

N_EPISODES = 100
FILE = "random_policy.csv"
_COLUMNS = ("env", "episodes", "mean_return", "return_std", "gymnasium_version")


@dataclass(frozen=True)
class RandomReturns:
    """Mean and standard deviation of the returns of episodes with random actions, and their number."""

    mean: float
    std: float
    n_episodes: int

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return float(self.std / self.n_episodes**0.5)


def random_returns(runs: SuiteRuns, env_ids: Iterable[str]) -> dict[str, RandomReturns]:
    """
    Return the random returns of environments as Gymnasium registers them. Measure and store missing ones.

    Those of a version of Gymnasium that is neither that of the runs nor the installed one are measured again.

    :raises ValueError: if the file holds something else
    """
    path = runs.path.parent / FILE
    installed = installed_versions(["gymnasium"])["gymnasium"]
    rows = _read(path)
    for env_id in env_ids:
        if env_id in rows and rows[env_id]["gymnasium_version"] in (runs.gymnasium_version, installed):
            continue
        print(f"{N_EPISODES} episodes of random actions in {env_id}", flush=True)
        found = _measured(env_id)
        values = (env_id, str(N_EPISODES), f"{found.mean:.6g}", f"{found.std:.6g}", installed)
        with locked_folder(path.parent):
            # Read again: another command may have added to the file since.
            rows = {**_read(path), env_id: dict(zip(_COLUMNS, values, strict=True))}
            write_text(path, csv_text(_COLUMNS, (rows[name].values() for name in sorted(rows))))
    return {env_id: _returns(rows[env_id]) for env_id in env_ids}


def _returns(row: Mapping[str, str]) -> RandomReturns:
    return RandomReturns(float(row["mean_return"]), float(row["return_std"]), int(row["episodes"]))


def _read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    try:
        for row in rows:
            _returns(row), row["gymnasium_version"]
        return {row["env"]: row for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold returns of random actions, but is damaged ({error!r}). Remove it."
        ) from error


def _measured(env_id: str) -> RandomReturns:
    import gymnasium as gym

    env = gym.make(env_id)
    env.action_space.seed(0)
    returns = np.zeros(N_EPISODES)
    for episode in range(N_EPISODES):
        env.reset(seed=episode)
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += float(reward)
            ended = terminated or truncated
    env.close()
    return RandomReturns(float(returns.mean()), float(returns.std()), N_EPISODES)
