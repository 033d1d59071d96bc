"""Files of suites: YAML files of settings, environments and seeds, and the rules that they keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.bench.experiments.suite import ALGORITHM, Environment, Setting, Suite, check_known

FOLDER = Path(__file__).with_name("suites")
SEEDS: dict[str, tuple[int, int | None]] = {"tune": (0, 999), "report": (1000, None)}
"""First and last seed of each kind of suite. Seeds of ``tune`` choose settings, so they are no evidence for them."""

_SETTING_KEYS = {"algo": ALGORITHM, "expected": "", "baseline": ""}
"""Keys of a setting that do not reach the training, with their defaults."""

_ZOO = "zoo"
"""Value of an environment's ``settings`` that stands for the RL Zoo's, for the algorithm of each setting."""


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
    settings = {_checked_name(key): _setting(f"settings.{key}", value) for key, value in entries["settings"].items()}
    check_known("first", entries["first"], settings)
    _check_baselines(settings)
    environments = tuple(_environments(entries))
    first, last = SEEDS[kind]
    for seed in (entries["first_seed"], *(environment.seeds[-1] for environment in environments)):
        if seed < first or (last is not None and seed > last):
            rule = f"from {first}" if last is None else f"{first} to {last}"
            raise ValueError(
                f"seeds of a suite of kind {kind} must be {rule}, got {seed}. Change `first_seed` or `kind`."
            )
    n_seeds = sorted({len(environment.seeds) for environment in environments})
    if entries["best_result_score"] and len(n_seeds) > 1:
        raise ValueError(
            "`seeds` must be equal in all environments with `best_result_score`, got "
            f"{' and '.join(map(str, n_seeds))}. Correct them."
        )
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
    own = {key: changes.pop(key, default) for key, default in _SETTING_KEYS.items()}
    for key, value in own.items():
        if not isinstance(value, str):
            raise ValueError(f"`{key}` of `{where}` must be of type str, got {value!r}. Correct it.")
    return Setting(changes, **own)


def _check_baselines(settings: Mapping[str, Setting]) -> None:
    first = next(iter(settings))
    for name, setting in settings.items():
        if setting.baseline:
            check_known(f"settings.{name}.baseline", [setting.baseline], settings)
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
        found = _entries(
            where, _with_inherited(env_id, content), keys, {"vec_env": "dummy", "settings": {}, "only": []}
        )
        check_known(f"{where}.vec_env", [found["vec_env"]], ("dummy", "subproc", *VEC_ENVS))
        check_known(f"{where}.only", found["only"], entries["settings"])
        n_seeds, first = _at_least_one(f"{where}.seeds", found["seeds"]), entries["first_seed"]
        settings = found["settings"]
        yield Environment(
            _checked_name(env_id),
            _at_least_one(f"{where}.steps", found["steps"]),
            tuple(range(first, first + n_seeds)),
            found["vec_env"],
            {} if settings == _ZOO else _settings(f"{where}.settings", settings),
            settings == _ZOO,
            tuple(found["only"]),
        )


def _with_inherited(env_id: str, content: Any) -> Any:
    """Return an environment's entries. Missing ones come from the suite named by ``as_in``."""
    if not isinstance(content, dict) or "as_in" not in content:
        return content
    name = content["as_in"]
    check_known(f"environments.{env_id}.as_in", [name], suite_names())
    others = yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))["environments"]
    check_known(f"environments of {name}", [env_id], others)
    return {**others[env_id], **{key: value for key, value in content.items() if key != "as_in"}}


def _entries(
    where: str, content: Any, types: Mapping[str, type], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the entries of a dict of the file, of which those with defaults may be missing."""
    if not isinstance(content, dict):
        raise ValueError(
            f"`{where}` must be a dict of {', '.join(types)}, got {content!r}. Indent its entries below it."
        )
    check_known(where, list(content), types)
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


def _checked_name(text: Any) -> str:
    """Return a name if it can be part of files' names."""
    if not isinstance(text, str) or re.fullmatch(r"\w[\w.-]*", text) is None:
        raise ValueError(f"a name must consist of letters, digits, `.`, `_` and `-`, got {text!r}. Rename it.")
    return text


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. Correct it.")
    return value
