"""Scores of settings and their baseline: in reward units, normalised, and gathered in groups of environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.bench.experiments.estimates import MIN_SEEDS, MIN_SEEDS_ALONE, Estimate, Statistic, estimate
from tests.bench.experiments.finished import MEASURES, SuiteRuns
from tests.bench.experiments.random_policy import RandomReturns, random_returns
from tests.bench.experiments.suite import Environment, Suite

ALL = "all"
"""Name of the group of all environments."""

_STANDARD_ERRORS = 2.0
"""Standard errors of the mean of random returns that a baseline's mean must be above it."""


@dataclass(frozen=True, eq=False)
class Scores:
    """
    Scores of an environment, or of a group.

    :param name: name of the environment or the group
    :param env_ids: environments, in the order of the scores
    :param by_setting: scores ``(n_seeds, n_environments)`` by measure and setting; a measure may have fewer settings
    """

    name: str
    env_ids: tuple[str, ...]
    by_setting: Mapping[str, Mapping[str, np.ndarray]]

    def title(self) -> str:
        """Return the name, with the number of a group's environments."""
        return f"{self.name} ({len(self.env_ids)})" if len(self.env_ids) > 1 else self.name

    def settings(self) -> list[str]:
        """Return the names of the settings that have scores here, in one measure at least."""
        return list(dict.fromkeys(name for by_setting in self.by_setting.values() for name in by_setting))

    def n_seeds(self, setting: str) -> int:
        """Return the number of seeds of a setting."""
        return min(len(found[setting]) for found in self.by_setting.values() if setting in found)


class SuiteScores:
    """
    Scores of the settings that a report compares with one baseline.

    :param suite: these settings, see :meth:`Suite.families`
    :param runs: runs of the whole suite
    """

    def __init__(self, suite: Suite, runs: SuiteRuns) -> None:
        self.suite, self.runs = suite, runs
        self.settings = [name for name in suite.settings if runs.has(name)]
        self.others = [name for name in self.settings if name != suite.baseline]
        self.environments = [scores for one in suite.environments if (scores := self._raw(one)) is not None]
        self._n_planned = {one.env_id: len(one.seeds) for one in suite.environments}
        baselines = [one.name for one in self.environments if suite.baseline in one.settings()]
        self.changed = [
            one.env_id
            for one in suite.environments
            if one.env_id in baselines and suite.environment_changes(one, suite.baseline)
        ]
        self.random = random_returns(runs, [name for name in baselines if name not in self.changed])
        self.normalised = [scores for one in self.environments if (scores := self._normalised(one)) is not None]

    def others_in(self, row: Scores) -> list[str]:
        """Return the settings made in an environment or a group, without the baseline."""
        return [name for name in row.settings() if name != self.suite.baseline]

    def compared(self, row: Scores, measure: str, setting: str, statistic: Statistic) -> Estimate | None:
        """Return a statistic of a setting and the baseline, or None if one of them has no scores."""
        found = row.by_setting[measure]
        return estimate(statistic, found[setting], found[self.suite.baseline]) if setting in found else None

    def undecided(self, row: Scores, setting: str) -> str:
        """Return why the comparison of a setting with the baseline has no verdict, or ""."""
        if self.suite.kind == "tune":
            return "seeds of this suite chose settings"
        compared = (setting, self.suite.baseline)
        if self.n_lost(row, *compared) > 0:
            return "runs are lost"
        if len(row.env_ids) == 1 and min(map(row.n_seeds, compared)) < MIN_SEEDS_ALONE:
            return f"{MIN_SEEDS_ALONE} seeds are needed"
        return ""

    def n_lost(self, row: Scores, *settings: str) -> int:
        """
        Return the number of runs of settings in an environment or a group that failed or have no score.

        A group counts those of all environments of its family in which the settings are planned, since lost runs may
        leave an environment too few seeds for the group.
        """
        env_ids: Sequence[str] = row.env_ids
        if len(row.env_ids) > 1:
            env_ids = [
                one.env_id
                for one in self.suite.environments
                if row.name in (ALL, family(one.env_id)) and set(settings) <= {*self.suite.settings_of(one)}
            ]
        return sum(self.runs.n_lost(env_id, setting) for env_id in env_ids for setting in settings)

    def seeds(self, row: Scores, *settings: str) -> str:
        """Return how many seeds all of these settings have, of how many, and how many of their runs are lost."""
        n_seeds, n_planned = min(map(row.n_seeds, settings)), min(self._n_planned[name] for name in row.env_ids)
        n_lost = self.n_lost(row, *settings)
        text = str(n_seeds) if n_seeds == n_planned else f"{n_seeds} of {n_planned}"
        return f"{text}, {n_lost} lost" if n_lost else text

    def groups(self) -> list[Scores]:
        """
        Return the scores of all environments together, and of those of each family.

        A setting and a measure are in the groups of the environments where the setting and the baseline have enough
        seeds and normalised scores. Settings with other environments have groups of their own. A group has at least two
        environments, and of each setting the seeds that all of them have.
        """
        found: dict[tuple[str, tuple[Scores, ...]], dict[str, list[str]]] = {}
        for measure in MEASURES:
            for setting in self.others:
                for name, members in self._members(measure, setting).items():
                    settings = found.setdefault((name, members), {}).setdefault(measure, [self.suite.baseline])
                    settings.append(setting)
        names = [ALL, *(family(one.name) for one in self.normalised)]
        groups = sorted(found.items(), key=lambda item: names.index(item[0][0]))
        return [_gathered(name, members, by_measure) for (name, members), by_measure in groups]

    def _members(self, measure: str, setting: str) -> dict[str, tuple[Scores, ...]]:
        """Return the environments of each group, by its name, in which a setting can be compared by a measure."""
        enough = []
        for one in self.normalised:
            found = one.by_setting[measure]
            n_seeds = [len(found[name]) for name in (setting, self.suite.baseline) if name in found]
            if len(n_seeds) == 2 and min(n_seeds) >= MIN_SEEDS:
                enough.append(one)
        names = dict.fromkeys(family(one.name) for one in enough)
        members = {name: tuple(one for one in enough if family(one.name) == name) for name in names}
        members = {ALL: tuple(enough), **members} if len(members) > 1 else members
        return {name: group for name, group in members.items() if len(group) > 1}

    def _raw(self, environment: Environment) -> Scores | None:
        """Return the scores of an environment in which a run is finished."""
        env_id = environment.env_id
        settings = [name for name in self.suite.settings_of(environment) if name in self.settings]
        if not any(self.runs.of(env_id, setting) for setting in settings):
            return None
        found: dict[str, dict[str, np.ndarray]] = {measure: {} for measure in MEASURES}
        for setting in settings:
            values = [scores for run in self.runs.of(env_id, setting) if (scores := run.scores()) is not None]
            columns = np.array(values).reshape(-1, len(MEASURES)).T
            for measure, column in zip(MEASURES, columns, strict=True):
                found[measure][setting] = column[:, None]
        return Scores(env_id, (env_id,), found)

    def _normalised(self, scores: Scores) -> Scores | None:
        """Return the scores with 0 for random actions and 1 for the baseline's mean, by measures where it learned."""
        if scores.name not in self.random:
            return None
        normalised: dict[str, dict[str, np.ndarray]] = {}
        for measure, by_setting in scores.by_setting.items():
            scaled = _scale(self.random[scores.name], by_setting[self.suite.baseline])
            normalised[measure] = {name: scaled(values) for name, values in by_setting.items()} if scaled else {}
        return Scores(scores.name, scores.env_ids, normalised) if any(normalised.values()) else None


def families(runs: SuiteRuns) -> list[SuiteScores]:
    """Return the scores of each family of settings that has a finished run."""
    return [SuiteScores(one, runs) for one in runs.suite.families() if any(map(runs.has, one.settings))]


def family(env_id: str) -> str:
    """Return the package that an environment comes from, such as ``mujoco`` for Gymnasium's MuJoCo environments."""
    import gymnasium as gym

    entry = gym.spec(env_id).entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else entry.__module__
    return module.removeprefix("gymnasium.envs.").partition(".")[0]


def _scale(random: RandomReturns, baseline: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    if len(baseline) == 0 or baseline.mean() <= random.mean + _STANDARD_ERRORS * random.standard_error:
        return None
    unit = baseline.mean() - random.mean
    return lambda values: (values - random.mean) / unit


def _gathered(name: str, environments: Sequence[Scores], by_measure: Mapping[str, Sequence[str]]) -> Scores:
    found: dict[str, dict[str, np.ndarray]] = {}
    for measure in MEASURES:
        found[measure] = {}
        for setting in by_measure.get(measure, ()):
            columns = [one.by_setting[measure][setting][:, 0] for one in environments]
            n_seeds = min(len(column) for column in columns)
            found[measure][setting] = np.stack([column[:n_seeds] for column in columns], axis=1)
    return Scores(name, tuple(one.name for one in environments), found)
