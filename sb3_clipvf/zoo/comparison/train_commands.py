"""Commands that repeat the training of a run."""

from __future__ import annotations

import ast
import keyword
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sb3_clipvf.zoo.commands import ALGORITHM, hyperparams_path
from sb3_clipvf.zoo.comparison.groups import Group
from sb3_clipvf.zoo.comparison.records import OF_OPTIONS, RunRecord
from sb3_clipvf.zoo.parsing import option_name
from sb3_clipvf.zoo.run_folders import program

# Options that affect training, with the Zoo's or this package's defaults, which need not be repeated.
_OPTIONS = {
    "vec_env": ("--vec-env", "dummy"),
    "eval_freq": ("--eval-freq", 25000),
    "eval_episodes": ("--eval-episodes", 5),
    "n_eval_envs": ("--n-eval-envs", 1),
    "num_threads": ("--num-threads", -1),
    "device": ("--device", "auto"),
}
_LARGEST_FILE = 2**20


def train_commands(group: Group) -> str:
    """
    Return the commands that train the runs of a group again, with a loop over its seeds; "" if unknown.

    If today's settings of the environment with the runs' ``-params`` are those of the runs, one command serves.
    Otherwise the commands first write the runs' settings into a file. Comments state what they do not repeat.
    """
    records = [one for one in group.records if one.arguments and _is_word(one.algo) and _is_word(one.env_id)]
    if not records:
        return ""
    record = records[0]
    seeds = [str(one.seed) for one in records if one.seed is not None]
    lines, options = _settings(record)
    if len(seeds) < len(records):
        lines.insert(0, "# The files of a run do not name its seed.")
    agent = record.arguments.get("trained_agent")
    if agent and _is_word(agent):
        lines.append("# The training continues from an agent: it must be the same file.")
        options += ["-i", shlex.quote(str(agent))]
    elif agent:
        lines.append("# Without the agent that the training continued from.")
    if len(seeds) < 2:
        return "\n".join([*lines, _command(record, options, "".join(seeds))])
    loop = [f"for seed in {' '.join(seeds)}; do", f"  {_command(record, options, '$seed')}", "done"]
    return "\n".join([*lines, *loop])


def environment_options(arguments: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the options with which a run found its environment and its settings."""
    return [*_environment(arguments), *_settings_file(arguments, folder)]


def _command(record: RunRecord, options: Sequence[str], seed: str) -> str:
    """Return the command with these options, which are quoted, and a seed, which may be a variable of the shell."""
    algo = [] if record.algo == ALGORITHM else ["--algo", record.algo]
    words = ["train", *algo, "--env", record.env_id]
    rest = _environment(record.arguments)
    for name, (option, default) in _OPTIONS.items():
        value = record.arguments.get(name)
        if value != default and _is_word(value):
            rest += [option, str(value)]
    seeded = ["--seed", seed] if seed else []
    return " ".join([program(record.arguments), *map(shlex.quote, words), *seeded, *map(shlex.quote, rest), *options])


def _environment(arguments: Mapping[str, Any]) -> list[str]:
    from sb3_clipvf.zoo.entries import is_module_name, items  # imports torch

    packages = [name for name in items(arguments.get("gym_packages")) if is_module_name(name)]
    options = ["--gym-packages", *packages] if packages else []
    for name in ("env_kwargs", "eval_env_kwargs"):
        pairs = _pairs(_dict(arguments, name))
        options += [option_name(name), *pairs] if pairs else []
    return options


def _settings_file(arguments: Mapping[str, Any], folder: Path) -> list[str]:
    from sb3_clipvf.zoo.checked_files import lies_beside

    config = arguments.get("conf_file")
    # A copied command must not run code that may have come with the run.
    is_shown = config and _is_word(config) and not lies_beside(folder / "env" / "args.yml", str(config))
    return ["--conf-file", str(config)] if is_shown else []


def _settings(record: RunRecord) -> tuple[list[str], list[str]]:
    """Return lines before the command, and its options, that give a new run the settings of a run."""
    from sb3_clipvf.zoo.entries import drop_null  # imports torch

    own = _own_settings(record)
    steps = record.settings.get("n_timesteps")
    if not own:
        return ["# The settings of the run are not known: these are today's."], _steps(steps)
    params = _dict(record.arguments, "hyperparams")
    if all(_is_plain(key, value) for key, value in params.items()):
        for entry in _todays_entries(record):
            found = {**entry, **params}
            drop_null(found)
            todays_steps = found.pop("n_timesteps", None)
            if found == own and (todays_steps == steps or _steps(steps)):
                options = [*_settings_file(record.arguments, record.folder)]
                options += [] if todays_steps == steps else _steps(steps)
                options += ["-params", *_pairs(params)] if params else []
                return [], list(map(shlex.quote, options))
    return _written_settings(record, own, steps or record.steps)


def _written_settings(record: RunRecord, own: Mapping[str, Any], steps: Any) -> tuple[list[str], list[str]]:
    """Return lines that write the settings of a run into a new file, and the option that names it."""
    plain = {key: value for key, value in {**own, "n_timesteps": steps}.items() if _is_plain(key, value)}
    lines = []
    if left_out := [_shown_key(key) for key in own if key not in plain]:
        lines.append(f"# Without {', '.join(left_out)} of the settings: read them first, since they could run code.")
    # Nothing at the beginning of a line is the run's, but its environment with a colon.
    text = yaml.safe_dump({record.env_id: plain}, sort_keys=False, width=float("inf"))
    lines += ["settings=$(mktemp --suffix .yml)", "cat > \"$settings\" <<'END'", text + "END"]
    return lines, ["--conf-file", '"$settings"']


def _own_settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings of a run without those that options gave."""
    given = {key for key in OF_OPTIONS if record.arguments.get(key)} | {"n_timesteps"}
    return {key: value for key, value in record.settings.items() if key not in given}


def _todays_entries(record: RunRecord) -> list[dict[str, Any]]:
    """Return the entries that a run may read today from the settings file of the command; [] if unknown."""
    shown = _settings_file(record.arguments, record.folder)
    if shown:
        # Modules are not read, since that would run their code.
        path = Path(shown[-1]) if shown[-1].endswith((".yml", ".yaml")) else None
    else:
        path = hyperparams_path() if record.algo == ALGORITHM else _zoo_path(record.algo)
    entries = {} if path is None else _entries(path)
    names = [record.env_id] if record.env_id in entries else ["atari", "default"]
    return [dict(entries[name]) for name in names if isinstance(entries.get(name), dict)]


def _zoo_path(algo: str) -> Path | None:
    spec = find_spec("rl_zoo3")
    places = [] if spec is None else spec.submodule_search_locations or []
    return Path(places[0]) / "hyperparams" / f"{algo}.yml" if places and algo.isidentifier() else None


@cache
def _entries(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            return {}
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _dict(arguments: Mapping[str, Any], name: str) -> dict[Any, Any]:
    """Return the pairs of an option; {} if a damaged file has something else."""
    pairs = arguments.get(name)
    return dict(pairs) if isinstance(pairs, Mapping) else {}


def _steps(value: Any) -> list[str]:
    is_number = type(value) in (int, float) and 1 <= value < 1e15
    return ["-n", str(int(value))] if is_number else []


def _shown_key(key: object) -> str:
    """Return a key for a comment, on one line."""
    return str(key) if _is_name(key) else repr(str(key))


def _is_name(key: object) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _is_plain(key: object, value: Any) -> bool:
    """Return whether the Zoo uses a setting as it is written: it imports some, and evaluates the text of others."""
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
