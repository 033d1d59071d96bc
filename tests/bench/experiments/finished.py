"""The finished and the missing runs of a suite, as its table has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.experiments.episodes import LAST_EPISODES, unbinned_curve
from tests.bench.experiments.runs import RunSpec
from tests.bench.experiments.suite import Suite
from tests.bench.experiments.tables import SuiteTable, made_on

if TYPE_CHECKING:
    from sb3_clipvf.zoo.training_curve import TrainingCurve

MEASURES = {"mean_return": "whole training", "last_return": "last 100 episodes"}
"""Columns of the table that are scores, and their names."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, its row of the table, and its training curve."""

    spec: RunSpec
    row: Mapping[str, str]
    curve: TrainingCurve

    def scores(self) -> list[float] | None:
        """Return the ``MEASURES``, or None if one is not finite or no episode ended."""
        found = [float(self.row[measure] or "nan") for measure in MEASURES]
        return found if np.isfinite(found).all() else None

    def seconds_per_step(self) -> float | None:
        """Return the processor time for each environment step, or None if the run was resumed."""
        seconds = self.row["cpu_seconds"]
        return float(seconds) / float(self.row["num_timesteps"]) if seconds else None


class SuiteRuns:
    """
    The runs of a suite, or of a part of it.

    :param suite: the suite, or the part
    :param table: table of the suite
    :param whole: suite whose runs the attribute ``whole`` has; None: ``suite``
    :raises ValueError: if the runs do not belong together, a file is damaged, or no run is finished
    """

    def __init__(self, suite: Suite, table: SuiteTable, whole: Suite | None = None) -> None:
        self.suite, self.path = suite, table.path
        self.whole = self if whole is None or whole == suite else SuiteRuns(whole, table)
        runs = suite.runs(Path())
        table.check_alike(runs)
        self.n_runs = len(runs)
        self.errors: dict[str, str] = {}  # label of a failed run -> reason
        self.without_score: list[str] = []
        self._finished: dict[tuple[str, str], list[FinishedRun]] = {}
        self._n_lost: dict[tuple[str, str], int] = {}
        for setting, spec in runs:
            place = (spec.env_id, setting)
            row, error = table.find(setting, spec), table.error(setting, spec)
            if row is not None and table.is_done(setting, spec):
                run = FinishedRun(spec, row, unbinned_curve(table.episodes(setting, spec)))
                self._finished.setdefault(place, []).append(run)
                if run.scores() is not None:
                    continue
                self.without_score.append(spec.label)
            elif error is not None:
                self.errors[spec.label] = error
            else:
                continue
            self._n_lost[place] = self._n_lost.get(place, 0) + 1
        if not self._finished:
            raise ValueError(
                f"{table.path} must have finished runs of the suite, but has none in the environments and settings of "
                "this report. Make them first."
            )

    @property
    def n_finished(self) -> int:
        """Number of finished runs."""
        return sum(map(len, self._finished.values()))

    @property
    def gymnasium_version(self) -> str:
        """Gymnasium's version, which all runs have in common."""
        return next(iter(self._finished.values()))[0].row["gymnasium_version"]

    def of(self, env_id: str, setting: str) -> list[FinishedRun]:
        """Return the finished runs of a setting in an environment, by seed."""
        return self._finished.get((env_id, setting), [])

    def n_lost(self, env_id: str, setting: str) -> int:
        """Return the number of runs of a setting in an environment that failed or have no score."""
        return self._n_lost.get((env_id, setting), 0)

    def has(self, setting: str) -> bool:
        """Return whether a run of the setting is finished."""
        return any(name == setting for _, name in self._finished)

    def short(self) -> dict[str, tuple[int, int]]:
        """Return the number of runs with fewer than ``LAST_EPISODES`` episodes, and of all, by environment."""
        found: dict[str, tuple[int, int]] = {}
        for (env_id, _), runs in self._finished.items():
            n_short = sum(int(run.row["n_episodes"] or LAST_EPISODES) < LAST_EPISODES for run in runs)
            before = found.get(env_id, (0, 0))
            found[env_id] = (before[0] + n_short, before[1] + len(runs))
        return {env_id: counts for env_id, counts in found.items() if counts[0]}

    def machines(self) -> list[dict[str, Any]]:
        """Return how and where each finished run was made, see :func:`tests.bench.results.machines_text`."""
        return [made_on(run.row) for runs in self._finished.values() for run in runs]
