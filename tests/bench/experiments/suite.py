"""Suites of experiments: settings, environments and seeds, and the runs that they stand for."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.bench.experiments.runs import RunSpec

ALGORITHM = "clipppo"
_ENVIRONMENT_KEYS = ("env_kwargs", "env_wrapper", "vec_env_wrapper")
"""Settings that change the environment. ``normalize`` and ``frame_stack`` do not change the returns of actions."""

QUICK_ENVIRONMENTS, QUICK_SETTINGS, QUICK_STEPS, QUICK_EPISODES = 2, 4, 4096, 2
"""The part of a suite that ``--quick`` runs: its first environments, the first settings of each, and one seed."""


@dataclass(frozen=True)
class Setting:
    """
    Changes to an environment's settings.

    :param algo: name of the algorithm in the Zoo
    :param expected: result that a published source reports for them, or ""
    :param baseline: setting that the report compares them with; "": the suite's
    """

    changes: Mapping[str, Any]
    algo: str
    expected: str
    baseline: str


@dataclass(frozen=True)
class Environment:
    """
    An environment of a suite.

    :param settings: what all settings of the suite change
    :param has_zoo_settings: whether the RL Zoo's settings for the algorithm of each setting precede them
    :param only: settings of the suite that are made in this environment; empty: all
    """

    env_id: str
    n_timesteps: int
    seeds: tuple[int, ...]
    vec_env: str
    settings: Mapping[str, Any]
    has_zoo_settings: bool
    only: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """
    Settings x environments x seeds.

    :param name: name for files
    :param kind: "tune" or "report"
    :param settings: settings by name
    :param baseline: setting that the report compares the others with, unless they name another one; the first one of
        the file
    :param environments: environments in the order of their runs, the cheapest first
    :param n_eval_episodes: episodes of each final evaluation
    :param first: settings whose runs, with all seeds, precede those of the others
    :param equivalence_margin: margin within which settings count as equivalent to the baseline, in normalised scores;
        0: the suite does not ask for equivalence
    :param best_result_score: whether the report also scores runs between random actions and the best result
    """

    name: str
    kind: str
    settings: Mapping[str, Setting]
    baseline: str
    environments: tuple[Environment, ...]
    n_eval_episodes: int
    first: tuple[str, ...]
    equivalence_margin: float
    best_result_score: bool

    def runs(self, folder: Path) -> list[tuple[str, RunSpec]]:
        """
        Return the runs, each with the name of its setting, in their order: seed by seed over all environments and
        settings, so that a campaign stopped early has compared all settings in all environments. Those of ``first``
        go before.
        """
        return [
            (setting, self._run(environment, setting, environment.seeds[index], folder))
            for is_first in (True, False)
            for index in range(max(len(environment.seeds) for environment in self.environments))
            for environment in self.environments
            if index < len(environment.seeds)
            for setting in self.settings_of(environment)
            if (setting in self.first) == is_first
        ]

    def settings_of(self, environment: Environment) -> list[str]:
        """Return the names of the settings that are made in an environment."""
        return [setting for setting in self.settings if not environment.only or setting in environment.only]

    def environment_changes(self, environment: Environment, setting: str) -> list[str]:
        """Return the keys by which a setting changes an environment, so that it is not as Gymnasium registers it."""
        hyperparams = self._hyperparams(environment, setting)
        return [key for key in _ENVIRONMENT_KEYS if hyperparams.get(key)]

    def families(self) -> list[Suite]:
        """Return a suite for each baseline, of this setting and those that are compared with it."""
        baselines = {name: setting.baseline or self.baseline for name, setting in self.settings.items()}
        return [
            replace(
                self,
                baseline=baseline,
                settings={
                    name: setting
                    for name, setting in self.settings.items()
                    if name == baseline or baselines[name] == baseline
                },
            )
            for baseline in dict.fromkeys(baselines.values())
        ]

    def only(self, env_ids: Sequence[str] | None, settings: Sequence[str] | None) -> Suite:
        """
        Return the suite with these environments and settings alone; None keeps all.

        :raises ValueError: if the suite does not have one of them
        """
        known = {environment.env_id: environment for environment in self.environments}
        check_known("--envs", env_ids or (), known)
        check_known("--settings", settings or (), self.settings)
        kept = {name: value for name, value in self.settings.items() if settings is None or name in settings}
        some = replace(self, settings=kept)
        environments = tuple(
            one for one in self.environments if (env_ids is None or one.env_id in env_ids) and some.settings_of(one)
        )
        if not environments:
            raise ValueError(f"`--settings` must be made in one of `--envs`, got {', '.join(kept)}. See `--list`.")
        return replace(some, environments=environments)

    def quick(self) -> Suite:
        """Return a suite of the same kind that takes a minute, to try the machinery."""
        environments = tuple(
            replace(
                one,
                n_timesteps=min(one.n_timesteps, QUICK_STEPS),
                seeds=one.seeds[:1],
                only=tuple(self.settings_of(one)[:QUICK_SETTINGS]),
            )
            for one in self.environments[:QUICK_ENVIRONMENTS]
        )
        made = {setting for environment in environments for setting in environment.only}
        settings = {name: setting for name, setting in self.settings.items() if name in made}
        return replace(
            self,
            name=f"{self.name}-quick",
            settings=settings,
            environments=environments,
            n_eval_episodes=QUICK_EPISODES,
        )

    def check_settings(self) -> None:
        """
        Check that all environments and settings exist, before the first run.

        :raises ValueError, TypeError, ImportError: if one does not
        """
        import gymnasium as gym
        from rl_zoo3 import ALGOS

        from sb3_clipvf.zoo.runs import register_all
        from sb3_clipvf.zoo.settings import check_hyperparams

        register_all()
        for setting in self.settings:
            check_known(f"settings.{setting}.algo", [self.settings[setting].algo], ALGOS)
        for environment in self.environments:
            env_id = environment.env_id
            check_known(f"environments of {self.name}", [env_id], gym.registry)
            for setting in self.settings_of(environment):
                source = f"the suite {self.name} ({env_id}, {setting})"
                if self.best_result_score and (changes := self.environment_changes(environment, setting)):
                    raise ValueError(
                        f"`best_result_score` must be false if settings change an environment, got {changes[0]} in "
                        f"{source}. Remove one of them, since random actions are measured without it."
                    )
                hyperparams, algo = self._hyperparams(environment, setting), self.settings[setting].algo
                if algo == ALGORITHM:
                    check_hyperparams(hyperparams, (), source)
                else:
                    _check_keys(hyperparams, ALGOS[algo], source)

    def _run(self, environment: Environment, setting: str, seed: int, folder: Path) -> RunSpec:
        return RunSpec(
            label=f"{environment.env_id}, {setting}, seed {seed}",
            folder=folder / self.name / environment.env_id / setting / f"seed_{seed}",
            env_id=environment.env_id,
            seed=seed,
            n_timesteps=environment.n_timesteps,
            vec_env=environment.vec_env,
            hyperparams=self._hyperparams(environment, setting),
            algo=self.settings[setting].algo,
            n_eval_episodes=self.n_eval_episodes,
        )

    def _hyperparams(self, environment: Environment, setting: str) -> dict[str, Any]:
        found = self.settings[setting]
        zoo = zoo_settings(environment.env_id, found.algo) if environment.has_zoo_settings else {}
        steps = {"n_timesteps": environment.n_timesteps}
        return {"policy": "MlpPolicy", **zoo, **environment.settings, **steps, **found.changes}


def _check_keys(hyperparams: Mapping[str, Any], algorithm: type, source: str) -> None:
    """Check that an algorithm or the RL Zoo has all keys of its settings. The algorithm checks the values."""
    from sb3_clipvf.zoo.entries import ZOO_KEYS

    known = {*inspect.signature(algorithm).parameters, *ZOO_KEYS}
    for key in hyperparams:
        if key not in known:
            raise ValueError(
                f"`{key}` must be an argument of {algorithm.__name__} or a key of the RL Zoo, got `{key}` in {source}. "
                "Correct or remove it."
            )


def zoo_settings(env_id: str, algo: str) -> dict[str, Any]:
    """
    Return an algorithm's settings of an environment: the RL Zoo's, those of clipppo.yml for ``clipppo``.

    :raises ValueError: if there are none for the environment or an older version of it
    """
    import rl_zoo3

    from sb3_clipvf.zoo.commands import hyperparams_path

    folder = Path(str(rl_zoo3.__file__)).parent / "hyperparams"
    path = hyperparams_path() if algo == ALGORITHM else folder / f"{algo}.yml"
    entries = _settings_of_zoo(path)
    versioned = re.fullmatch(r"(.+-v)(\d+)", env_id)
    older = [f"{versioned[1]}{number}" for number in range(int(versioned[2]), -1, -1)] if versioned else []
    for name in older:
        if name in entries:
            return dict(entries[name])
    raise ValueError(f"`settings: zoo` needs an entry for {env_id}, but {path} has none. Write the settings out.")


@functools.cache
def _settings_of_zoo(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_known(where: str, names: Sequence[Any], known: Any) -> None:
    """
    Check that all names are among the known ones.

    :raises ValueError: with the nearest known name
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(list(known)[:12])}."
            raise ValueError(f"`{where}` must be a known name, got {name!r}. {hint}")
