"""Suites of experiments: YAML files of settings, environments and seeds, and the runs that they stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.bench.experiments.runs import RunSpec

FOLDER = Path(__file__).with_name("suites")
SEEDS: dict[str, tuple[int, int | None]] = {"tune": (0, 999), "report": (1000, None)}
"""First and last seed of each kind of suite. No reported number comes from a seed that chose a setting."""

QUICK_ENVIRONMENTS, QUICK_STEPS, QUICK_EPISODES = 2, 4096, 2
"""What ``--quick`` makes of a suite: its first environments with all settings, and one seed."""


@dataclass(frozen=True)
class Environment:
    """An environment of a suite; ``settings`` are those that all settings of the suite change."""

    env_id: str
    n_timesteps: int
    seeds: tuple[int, ...]
    vec_env: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """
    Settings x environments x seeds.

    :param name: name for files
    :param settings: changes to an environment's settings, by name
    :param environments: environments in the order of their runs, the cheapest first
    :param n_eval_episodes: episodes of each final evaluation
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    environments: tuple[Environment, ...]
    n_eval_episodes: int

    def runs(self, folder: Path) -> list[tuple[str, RunSpec]]:
        """
        Return the runs, each with the name of its setting, in their order: seed by seed over all environments and
        settings, so that a campaign stopped early has compared all settings in all environments.
        """
        return [
            (setting, self._run(environment, setting, environment.seeds[index], folder))
            for index in range(max(len(environment.seeds) for environment in self.environments))
            for environment in self.environments
            if index < len(environment.seeds)
            for setting in self.settings
        ]

    def only(self, env_ids: Sequence[str] | None, settings: Sequence[str] | None) -> Suite:
        """
        Return the suite with these environments and settings alone; None keeps all.

        :raises ValueError: if the suite does not have one of them
        """
        known = {environment.env_id: environment for environment in self.environments}
        _check_known("--envs", env_ids or (), known)
        _check_known("--settings", settings or (), self.settings)
        environments = tuple(one for one in self.environments if env_ids is None or one.env_id in env_ids)
        kept = {name: value for name, value in self.settings.items() if settings is None or name in settings}
        return replace(self, environments=environments, settings=kept)

    def quick(self) -> Suite:
        """Return a suite of the same kind that takes a minute, to try the machinery."""
        environments = tuple(
            replace(one, n_timesteps=min(one.n_timesteps, QUICK_STEPS), seeds=one.seeds[:1])
            for one in self.environments[:QUICK_ENVIRONMENTS]
        )
        return replace(self, name=f"{self.name}-quick", environments=environments, n_eval_episodes=QUICK_EPISODES)

    def check_settings(self) -> None:
        """
        Check that all environments and settings exist, before the first run.

        :raises ValueError, TypeError, ImportError: if one does not
        """
        import gymnasium as gym

        from sb3_clipvf.zoo.runs import register_all
        from sb3_clipvf.zoo.settings import check_hyperparams

        register_all()
        for environment in self.environments:
            env_id = environment.env_id
            _check_known(f"environments of {self.name}", [env_id], gym.registry)
            for setting in self.settings:
                source = f"the suite {self.name} ({env_id}, {setting})"
                check_hyperparams(self._hyperparams(environment, setting), (), source)

    def _run(self, environment: Environment, setting: str, seed: int, folder: Path) -> RunSpec:
        return RunSpec(
            label=f"{environment.env_id}, {setting}, seed {seed}",
            folder=folder / self.name / environment.env_id / setting / f"seed_{seed}",
            env_id=environment.env_id,
            seed=seed,
            n_timesteps=environment.n_timesteps,
            vec_env=environment.vec_env,
            hyperparams=self._hyperparams(environment, setting),
            n_eval_episodes=self.n_eval_episodes,
        )

    def _hyperparams(self, environment: Environment, setting: str) -> dict[str, Any]:
        own = {"policy": "MlpPolicy", "n_timesteps": environment.n_timesteps}
        return {**own, **environment.settings, **self.settings[setting]}


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


def _suite(name: str, content: Any) -> Suite:
    keys: dict[str, type] = {
        "kind": str,
        "first_seed": int,
        "evaluation_episodes": int,
        "settings": dict,
        "environments": dict,
    }
    entries = _entries("suite", content, keys)
    kind = entries["kind"]
    if kind not in SEEDS:
        raise ValueError(f"`kind` must be tune or report, got {kind!r}. Only seeds of `report` are reported.")
    for key in ("settings", "environments"):
        if not entries[key]:
            raise ValueError(f"`{key}` must have at least one entry, got none. Add one.")
    settings = {
        _name(setting): _settings(f"settings.{setting}", changes) for setting, changes in entries["settings"].items()
    }
    environments = tuple(_environments(entries))
    first, last = SEEDS[kind]
    for seed in (entries["first_seed"], *(environment.seeds[-1] for environment in environments)):
        if seed < first or (last is not None and seed > last):
            rule = f"from {first}" if last is None else f"{first} to {last}"
            raise ValueError(
                f"seeds of a suite of kind {kind} must be {rule}, got {seed}. Only seeds from 1000 are reported."
            )
    return Suite(name, settings, environments, _at_least_one("evaluation_episodes", entries["evaluation_episodes"]))


def _environments(entries: Mapping[str, Any]) -> Iterator[Environment]:
    from sb3_clipvf.zoo.vec_env import VEC_ENVS

    for env_id, content in entries["environments"].items():
        where = f"environments.{env_id}"
        keys: dict[str, type] = {"steps": int, "seeds": int, "vec_env": str, "settings": dict}
        found = _entries(where, content, keys, {"vec_env": "dummy", "settings": {}})
        _check_known(f"{where}.vec_env", [found["vec_env"]], ("dummy", "subproc", *VEC_ENVS))
        n_seeds, first = _at_least_one(f"{where}.seeds", found["seeds"]), entries["first_seed"]
        yield Environment(
            _name(env_id),
            _at_least_one(f"{where}.steps", found["steps"]),
            tuple(range(first, first + n_seeds)),
            found["vec_env"],
            _settings(f"{where}.settings", found["settings"]),
        )


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
        if not isinstance(found[key], kind) or isinstance(found[key], bool):
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
            raise ValueError(f"`{where}` must name what there is, got {name!r}. {hint}")
