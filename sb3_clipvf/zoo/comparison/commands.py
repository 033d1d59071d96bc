"""Commands that repeat the training of a run."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.comparison.groups import Group
from sb3_clipvf.zoo.comparison.records import OF_OPTIONS, Record
from sb3_clipvf.zoo.defaults import ALGORITHM

# Options that change a training, with the Zoo's or this package's defaults, which need not be repeated.
_OPTIONS = {
    "vec_env": ("--vec-env", "dummy"),
    "eval_freq": ("--eval-freq", 25000),
    "eval_episodes": ("--eval-episodes", 5),
    "n_eval_envs": ("--n-eval-envs", 1),
    "num_threads": ("--num-threads", -1),
    "device": ("--device", "auto"),
}


def train_commands(group: Group) -> str:
    """Return the commands that train the runs of a group again, one command or a loop over its seeds; "" if unknown."""
    records = [one for one in group.records if one.arguments and _is_word(one.algo) and _is_word(one.env_id)]
    if not records:
        return ""
    seeds = [str(record.seed) for record in records if record.seed is not None]
    left_out = [_shown_key(key) for key, value in _changes(records[0]).items() if not _is_plain(key, value)]
    note = ""
    if left_out:
        note = f"# Without {', '.join(left_out)} of the settings: read them first, since they could run code.\n"
    if len(seeds) < 2:
        return note + train_command(records[0], *seeds)
    return f"{note}for seed in {' '.join(seeds)}; do\n  {train_command(records[0], '$seed')}\ndone"


def train_command(record: Record, seed: str = "") -> str:
    """Return the command of a run's training, with another seed."""
    arguments = record.arguments
    words = ["sb3-clipvf", "train"]
    words += [] if record.algo == ALGORITHM else ["--algo", record.algo]
    words += ["--env", record.env_id]
    n_timesteps = arguments.get("n_timesteps")
    if type(n_timesteps) is int and record.settings.get("n_timesteps") == n_timesteps:
        words += ["-n", str(n_timesteps)]
    rest = environment_options(arguments, record.folder)
    for name, (option, default) in _OPTIONS.items():
        value = arguments.get(name)
        if value != default and _is_word(value):
            rest += [option, str(value)]
    pairs = _pairs({key: value for key, value in _changes(record).items() if _is_plain(key, value)})
    rest += ["-params", *pairs] if pairs else []
    # The seed may be a variable of the shell.
    return " ".join([*map(shlex.quote, words), *(["--seed", seed] if seed else []), *map(shlex.quote, rest)])


def environment_options(arguments: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the options with which a training found its environment and its settings."""
    from sb3_clipvf.zoo.entries import is_module_name, items  # imports torch
    from sb3_clipvf.zoo.run_files import lies_beside

    packages = [name for name in items(arguments.get("gym_packages")) if is_module_name(name)]
    options = ["--gym-packages", *packages] if packages else []
    pairs = _pairs(arguments.get("env_kwargs") or {})
    options += ["--env-kwargs", *pairs] if pairs else []
    config = arguments.get("conf_file")
    # A copied command must not run code that may have come with the run.
    if config and _is_word(config) and not lies_beside(folder / "env" / "args.yml", str(config)):
        options += ["--conf-file", str(config)]
    return options


def _changes(record: Record) -> dict[str, Any]:
    """Return the settings that the command needs: those of ``-params``, or all of a file that is not to be named."""
    config = record.arguments.get("conf_file")
    if config and "--conf-file" not in environment_options(record.arguments, record.folder):
        return {key: value for key, value in record.settings.items() if key not in OF_OPTIONS}
    return dict(record.arguments.get("hyperparams") or {})


def _shown_key(key: object) -> str:
    """Return a key for a comment, on one line."""
    return str(key) if _is_name(key) else repr(str(key))


def _is_name(key: object) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _is_plain(key: object, value: Any) -> bool:
    """Return whether the Zoo takes a setting as it is written: it imports some, and evaluates the text of others."""
    if not _is_name(key) or not _is_literal(value):
        return False
    if key in ("env_wrapper", "vec_env_wrapper", "callback") or (key == "policy" and "." in str(value)):
        return value is None
    return _is_without_calls(value)


def _is_without_calls(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_without_calls, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_without_calls, value))
    if not isinstance(value, str):
        return True
    try:
        nodes = list(ast.walk(ast.parse(value.lstrip(" \t"), mode="eval")))
    except (SyntaxError, ValueError):
        return True  # no expression, such as the schedule `lin_0.2`
    except (MemoryError, RecursionError):
        return False
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return all(isinstance(called, ast.Name) and called.id == "dict" for called in calls)


def _pairs(values: Mapping[Any, Any]) -> list[str]:
    """Return values as ``key:value``, of which the Zoo evaluates the text after the first colon as Python."""
    return [f"{key}:{value!r}" for key, value in values.items() if _is_name(key) and _is_literal(value)]


def _is_literal(value: Any) -> bool:
    """Return whether the ``repr`` of a value is a literal; objects may choose their own."""
    if type(value) is dict:
        return all(map(_is_literal, (*value, *value.values())))
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return value is None or type(value) in (bool, int, float, str)


def _is_word(value: Any) -> bool:
    """Return whether a value stays one argument: no option, and without characters that a terminal obeys."""
    return type(value) is int or (isinstance(value, str) and value.isprintable() and not value.startswith("-"))
