"""Suites of experiments: YAML files of settings, environments and seeds, and the runs that they stand for."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.bench.experiments.runs import RunSpec

ALGORITHM = "clipppo"
FOLDER = Path(__file__).with_name("suites")
SEEDS: dict[str, tuple[int, int | None]] = {"tune": (0, 999), "report": (1000, None)}
"""First and last seed of each kind of suite. Seeds of ``tune`` choose settings, so they are no evidence for them."""

QUICK_ENVIRONMENTS, QUICK_SETTINGS, QUICK_STEPS, QUICK_EPISODES = 2, 4, 4096, 2
"""The part of a suite that ``--quick`` runs: its first environments, the first settings of each, and one seed."""

_OF_SETTINGS = {"algo": ALGORITHM, "expected": "", "baseline": ""}
"""Keys of a setting that do not reach the training, with their defaults."""

ZOO = "zoo"
"""Value of an environment's ``settings`` that stands for the RL Zoo's, for the algorithm of each setting."""


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

    :param settings: what all settings of the suite change; ``ZOO``: the Zoo's
    :param only: settings of the suite that are made in this environment; empty: all
    """

    env_id: str
    n_timesteps: int
    seeds: tuple[int, ...]
    vec_env: str
    settings: Mapping[str, Any] | str
    only: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """
    Settings x environments x seeds.

    :param name: name for files
    :param kind: a key of ``SEEDS``
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
        _check_known("--envs", env_ids or (), known)
        _check_known("--settings", settings or (), self.settings)
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
            _check_known(f"settings.{setting}.algo", [self.settings[setting].algo], ALGOS)
        for environment in self.environments:
            env_id = environment.env_id
            _check_known(f"environments of {self.name}", [env_id], gym.registry)
            for setting in self.settings_of(environment):
                source = f"the suite {self.name} ({env_id}, {setting})"
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
        found = environment.settings
        if isinstance(found, str):
            found = zoo_settings(environment.env_id, self.settings[setting].algo)
        steps = {"n_timesteps": environment.n_timesteps}
        return {"policy": "MlpPolicy", **found, **steps, **self.settings[setting].changes}


def suite_names() -> list[str]:
    """Return the names of the suites in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yml"))


def read_suite(name: str) -> Suite:
    """
    Read a suite of this folder, or a file of one.

    :raises ValueError: if there is none, or it breaks a rule
    """
    path = Path(name) if name.endswith((".yml", ".yaml")) else FOLDER / f"{name}.yml"
    if not path.is_file():
        raise ValueError(
            f"`suite` must be one of {', '.join(suite_names())}, or a .yml file, got {name!r}. Correct the name."
        )
    try:
        return _suite(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`suite` must be a YAML file, got {path}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_keys(hyperparams: Mapping[str, Any], algorithm: type, source: str) -> None:
    """Check that an algorithm or the RL Zoo has all keys of its settings. The algorithm checks the values."""
    from sb3_clipvf.zoo.entries import ZOO_KEYS

    known = {*inspect.signature(algorithm).parameters, *ZOO_KEYS}
    for key in hyperparams:
        if key not in known:
            raise ValueError(
                f"`{key}` must be an argument of {algorithm.__name__} or a key of the RL Zoo, got it in {source}. "
                "Correct or remove it."
            )


def zoo_settings(env_id: str, algo: str) -> dict[str, Any]:
    """
    Return an algorithm's settings of an environment: the RL Zoo's, those of clipppo.yml for ``clipppo``.

    :raises ValueError: if there are none for the environment or an older version of it
    """
    import rl_zoo3

    from sb3_clipvf.zoo.defaults import hyperparams_path

    folder = Path(str(rl_zoo3.__file__)).parent / "hyperparams"
    path = hyperparams_path() if algo == ALGORITHM else folder / f"{algo}.yml"
    entries = _settings_of_zoo(path)
    versioned = re.fullmatch(r"(.+-v)(\d+)", env_id)
    older = [f"{versioned[1]}{number}" for number in range(int(versioned[2]), -1, -1)] if versioned else []
    for name in older:
        if name in entries:
            return dict(entries[name])
    raise ValueError(f"`settings: {ZOO}` needs an entry for {env_id}, but {path} has none. Write the settings out.")


@functools.cache
def _settings_of_zoo(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _suite(name: str, content: Any) -> Suite:
    keys: dict[str, type] = {
        "kind": str,
        "first_seed": int,
        "evaluation_episodes": int,
        "equivalence_margin": float,
        "best_result_score": bool,
        "settings": dict,
        "first": list,
        "environments": dict,
    }
    entries = _entries("suite", content, keys, {"first": [], "equivalence_margin": 0.0, "best_result_score": False})
    margin = entries["equivalence_margin"]
    if not 0 <= margin < 1:
        raise ValueError(
            f"`equivalence_margin` must be from 0 to below 1, got {margin}. It is a share of what the baseline learns."
        )
    kind = entries["kind"]
    if kind not in SEEDS:
        raise ValueError(f"`kind` must be tune or report, got {kind!r}. Results of `tune` suites are not evidence.")
    for key in ("settings", "environments"):
        if not entries[key]:
            raise ValueError(f"`{key}` must have at least one entry, got none. Add one.")
    settings = {_name(key): _setting(f"settings.{key}", value) for key, value in entries["settings"].items()}
    _check_known("first", entries["first"], settings)
    _check_baselines(settings)
    environments = tuple(_environments(entries))
    first, last = SEEDS[kind]
    for seed in (entries["first_seed"], *(environment.seeds[-1] for environment in environments)):
        if seed < first or (last is not None and seed > last):
            rule = f"from {first}" if last is None else f"{first} to {last}"
            raise ValueError(
                f"seeds of a suite of kind {kind} must be {rule}, got {seed}. Change `first_seed` or `kind`."
            )
    if entries["best_result_score"] and len({len(environment.seeds) for environment in environments}) > 1:
        raise ValueError("`best_result_score` needs as many seeds in each environment, got others. Change `seeds`.")
    n_eval_episodes = _at_least_one("evaluation_episodes", entries["evaluation_episodes"])
    return Suite(
        name,
        kind,
        settings,
        next(iter(settings)),
        environments,
        n_eval_episodes,
        tuple(entries["first"]),
        margin,
        entries["best_result_score"],
    )


def _setting(where: str, content: Any) -> Setting:
    changes = dict(_settings(where, content))
    own = {key: changes.pop(key, default) for key, default in _OF_SETTINGS.items()}
    for key, value in own.items():
        if not isinstance(value, str):
            raise ValueError(f"`{key}` of `{where}` must be of type str, got {value!r}. Correct it.")
    return Setting(changes, **own)


def _check_baselines(settings: Mapping[str, Setting]) -> None:
    first = next(iter(settings))
    for name, setting in settings.items():
        if setting.baseline:
            _check_known(f"settings.{name}.baseline", [setting.baseline], settings)
        if setting.baseline and name in (first, setting.baseline):
            what = "the first setting" if name == first else "itself"
            raise ValueError(
                f"`settings.{name}.baseline` must be omitted for the first setting, and name another setting, got "
                f"{setting.baseline!r} for {what}. Remove it."
            )


def _environments(entries: Mapping[str, Any]) -> Iterator[Environment]:
    from sb3_clipvf.zoo.vec_env import VEC_ENVS

    for env_id, content in entries["environments"].items():
        where = f"environments.{env_id}"
        keys: dict[str, type] = {"steps": int, "seeds": int, "vec_env": str, "settings": object, "only": list}
        found = _entries(where, _whole(env_id, content), keys, {"vec_env": "dummy", "settings": {}, "only": []})
        _check_known(f"{where}.vec_env", [found["vec_env"]], ("dummy", "subproc", *VEC_ENVS))
        _check_known(f"{where}.only", found["only"], entries["settings"])
        n_seeds, first = _at_least_one(f"{where}.seeds", found["seeds"]), entries["first_seed"]
        settings = found["settings"]
        yield Environment(
            _name(env_id),
            _at_least_one(f"{where}.steps", found["steps"]),
            tuple(range(first, first + n_seeds)),
            found["vec_env"],
            settings if settings == ZOO else _settings(f"{where}.settings", settings),
            tuple(found["only"]),
        )


def _whole(env_id: str, content: Any) -> Any:
    """Return the entries of an environment, with those of another suite, which ``as_in`` names, for missing ones."""
    if not isinstance(content, dict) or "as_in" not in content:
        return content
    name = content["as_in"]
    _check_known(f"environments.{env_id}.as_in", [name], suite_names())
    others = yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))["environments"]
    _check_known(f"environments of {name}", [env_id], others)
    return {**others[env_id], **{key: value for key, value in content.items() if key != "as_in"}}


def _entries(
    where: str, content: Any, types: Mapping[str, type], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the entries of a dict of the file, of which those with defaults may be missing."""
    if not isinstance(content, dict):
        raise ValueError(
            f"`{where}` must be a dict of {', '.join(types)}, got {content!r}. Indent its entries below it."
        )
    _check_known(where, list(content), types)
    found = {**(defaults or {}), **content}
    for key, kind in types.items():
        if key not in found:
            raise ValueError(f"`{where}` must have the entry `{key}`, got none. Add it.")
        if not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind not in (bool, object)):
            raise ValueError(f"`{key}` of `{where}` must be of type {kind.__name__}, got {found[key]!r}. Correct it.")
    return found


def _settings(where: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"`{where}` must be a dict of settings, got {content!r}. Write {{}} for none.")
    return content


def _name(text: Any) -> str:
    """Return a name of files."""
    if not isinstance(text, str) or re.fullmatch(r"\w[\w.-]*", text) is None:
        raise ValueError(f"a name must consist of letters, digits, `.`, `_` and `-`, got {text!r}. Rename it.")
    return text


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. Correct it.")
    return value


def _check_known(where: str, names: Sequence[Any], known: Any) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(list(known)[:12])}."
            raise ValueError(f"`{where}` must be a known name, got {name!r}. {hint}")
