"""Checks of the settings that the RL Zoo itself reads: their file, their values, and what they import."""

import difflib
import importlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3 import ALGOS, exp_manager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.arguments import constructor_arguments
from sb3_clipvf.clip_ppo import ClipPPO
from sb3_clipvf.common.validation import check_int, check_keywords, wrong_type
from sb3_clipvf.files.archive import reason_of
from sb3_clipvf.zoo.entries import SCHEDULE, WRAPPER_FUNCTIONS, ZOO_KEYS, items, with_arguments
from sb3_clipvf.zoo.parsing import option_name

COMMAND_LINE_KEYS = ("device", "env", "seed", "tensorboard_log", "verbose")
"""Arguments of ClipPPO that the RL Zoo sets from its command line, so that the settings must not."""

_BASES: dict[str, type] = {
    "callback": BaseCallback,
    "env_wrapper": gym.Env,
    "policy": object,  # ClipPPO itself checks these two
    "rollout_buffer_class": object,
    "vec_env_wrapper": VecEnv,
}
"""Keys that name classes, and the base of these classes."""

_PASSED_BY_ZOO = ("env", "filename", "venv")
"""Arguments of wrappers that the RL Zoo passes itself."""

_LINEAR_IN_ZOO = ("clip_range", "clip_range_vf", "delta_std", "learning_rate")
"""Keys of which the RL Zoo turns all text into linear schedules."""

_WRITE_CLASS = "Write it as `package.module.Class`, with its arguments, if any, indented below it."


@contextmanager
def readable_config(config: str, env_id: str) -> Iterator[None]:
    """Raise a ValueError with the reason if the RL Zoo cannot read an environment's settings from ``--conf-file``."""
    rule = "`--conf-file` must hold a dict of settings for each environment"
    if config.endswith((".yml", ".yaml")):
        _check_config_file(config, rule)
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and error.args == ("atari",):
            raise ValueError(
                f"{config} must have an entry for {env_id} or one named `atari`, got neither. Add one of them."
            ) from error
        text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{rule}, got {config!r}: {text}. Pass a .yml file, or a .py file or module that defines the dict "
            "`hyperparams`."
        ) from error


def _check_config_file(config: str, rule: str) -> None:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{rule}, got {config!r}: {text}. Correct it, or its name.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{rule}, got {content!r} in {config}. Write `CartPole-v1:`, and its settings indented below.")
    for key, value in content.items():
        if not isinstance(value, dict):
            raise ValueError(f"{rule}, got {value!r} for {key} in {config}. Write its settings indented below it.")


def constructor_keys() -> frozenset[str]:
    """Return the arguments of ClipPPO that settings may set."""
    return frozenset(constructor_arguments(ClipPPO)) - {*COMMAND_LINE_KEYS}


def check_hyperparams(hyperparams: dict[str, Any], overrides: Iterable[str], source: str) -> None:
    """
    Refuse settings that neither the RL Zoo nor ClipPPO reads, or that the YAML files of a run cannot hold.

    ``overrides`` are the keys given on the command line; ``source`` is the origin of the others, for messages.
    ClipPPO's constructor checks its own arguments.
    """
    overridden = set(overrides)
    for key, value in hyperparams.items():
        where = "`-params`" if key in overridden else source
        _check_key(key, value, where)
        _check_no_text(key, value, where, is_pair=key in overridden)
        if key in _CHECKS:
            _CHECKS[key](key, value, where)
    for key in ("policy", "n_timesteps"):
        if key not in hyperparams:
            raise ValueError(
                f"`{key}` must be set for each environment, got none in {source}. Add a line `{key}: ...`."
            )
    for key, value in hyperparams.items():
        where = "`-params`" if key in overridden else source
        _check_imports(key, value, where)
        check_saved(key, value, where)


def check_schedules(hyperparams: dict[str, Any], overrides: Iterable[str], source: str, algo: str) -> None:
    """
    Refuse ClipPPO's schedules in settings of another algorithm, for which the RL Zoo would train another schedule.

    ``overrides`` and ``source`` are those of :func:`check_hyperparams`.
    """
    for key, value in hyperparams.items():
        schedule = SCHEDULE.fullmatch(value) if isinstance(value, str) else None
        if schedule is None:
            continue
        where = "`-params`" if key in overrides else source
        if key in _LINEAR_IN_ZOO and schedule[1] != "lin":
            raise ValueError(
                f"`{key}` must be a number or `lin_{schedule[2]}` with --algo {algo}, got {value!r} in {where}: the RL "
                f"Zoo would read it as `lin_{schedule[2]}`. Write {schedule[2]} for a constant."
            )
        if key not in _LINEAR_IN_ZOO and not issubclass(ALGOS[algo], ClipPPO):
            raise ValueError(
                f"`{key}` must not be a schedule with --algo {algo}, got {value!r} in {where}. "
                f"Write {schedule[2]} for a constant."
            )


def import_packages(names: Iterable[Any] | None, where: str) -> None:
    """Import the modules that register environments; ``where`` is their option or file, for messages."""
    for name in names or ():
        _imported(f"`{where}` must name modules that can be imported, got {name!r}", str(name))


def check_saved(key: str, value: Any, where: str) -> None:
    """Check that the YAML files of a run can store the value of a setting or option, and that it loads again."""
    try:
        # Not `yaml.UnsafeLoader`, which may be replaced. These are the user's own settings.
        yaml.load(yaml.dump(value), Loader=yaml.loader.UnsafeLoader)
    except Exception as error:  # whatever the value's own class raises
        reason = getattr(error, "problem", None) or reason_of(error)  # the first line of YAML's errors is their context
        raise ValueError(
            f"`{key}` must be a value that YAML files can hold, got {value!r} in {where}: {reason}. Define "
            "functions and classes in a module that can be imported, and leave out lambdas."
        ) from error


def _check_key(key: str, value: Any, where: str) -> None:
    if key in COMMAND_LINE_KEYS:
        raise ValueError(
            f"`{key}` must be set by the option `{option_name(key)}`, got `{key}: {value}` in {where}. Remove it there."
        )
    legal = constructor_keys() | ZOO_KEYS
    if key not in legal:
        near = difflib.get_close_matches(str(key), sorted(legal), n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"The keys are: {', '.join(sorted(legal))}."
        raise ValueError(
            f"`{key}` must be an argument of ClipPPO or a key of the RL Zoo, got `{key}: {value}` in {where}. {hint}"
        )


def _check_no_text(key: str, value: Any, where: str, *, is_pair: bool) -> None:
    """Refuse text that stands for a number or null, at any depth if YAML reads it as text without quotes."""
    if isinstance(value, str) and value == "None":
        hint = f"Write `{key}:None`." if is_pair else "In YAML, write `null`."
        raise ValueError(f"`{key}` must not be the text 'None', got it in {where}. {hint}")
    for path, text in _texts(key, value):
        if _is_number(text) and (path == key or isinstance(yaml.safe_load(text), str)):
            hint = f"YAML needs a point and a sign in it, as in 1.0e-3, or a tag: !!float {text}."
            if is_pair:
                hint = f"Write `{key}:{text}`." if path == key else "Write it without quotes."
            raise ValueError(f"`{path}` must be a number, got the text {text!r} in {where}. {hint}")


def _texts(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield each text in a value, in dicts and lists, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(f"{path}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _texts(f"{path}[{index}]", item)


def _check_imports(key: str, value: Any, where: str) -> None:
    """Check that the classes that a value names exist, have the key's base, and take the arguments given for them."""
    if key not in _BASES:
        return
    for named, kwargs in with_arguments(value):
        if not isinstance(named, str) or (key == "policy" and "." not in named):
            continue
        module, _, name = named.rpartition(".")
        found = _imported(f"`{key}` must name something that can be imported, got {named!r} in {where}", module, name)
        if found is None:
            raise ValueError(
                f"`{key}` must name something that its module holds, got {named!r} in {where}: {module} has no "
                f"{name!r}. Correct the name."
            )
        _check_class(key, named, found, where)
        check_keywords(key, kwargs, found, _PASSED_BY_ZOO, f"It is in {where}. Correct it, or leave it out.")


def _imported(rule: str, module: str, name: str | None = None) -> Any:
    """Import a module; return it, or its attribute of this name (None if there is none)."""
    try:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name, None)
    except Exception as error:  # whatever the module's own code raises
        text = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ImportError(
            f"{rule}: {text}. Correct the name or the module, install its package, or run the command where its file "
            "is."
        ) from error


def _check_class(key: str, named: str, found: Any, where: str) -> None:
    if isinstance(found, type):
        base = _BASES[key]
        if not issubclass(found, base):
            raise ValueError(
                f"`{key}` must name a class derived from {base.__name__}, got {named!r} in {where}. Correct the name."
            )
    elif not (key == "env_wrapper" and named in WRAPPER_FUNCTIONS):
        raise ValueError(f"`{key}` must name a class, got {named!r} in {where}, which is not a class. {_WRITE_CLASS}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_whole(key: str, value: Any, where: str) -> None:
    hint = f"It is in {where}. Write it without a point."
    if not isinstance(value, numbers.Integral):  # the Zoo does not convert whole floats
        raise wrong_type(key, "a whole number", value, hint)
    check_int(key, value, 1, hint)


def _check_steps(key: str, value: Any, where: str) -> None:
    check_int(key, value, 1, f"It is in {where}. Write for example `{key}: !!float 1e6`.")


def _check_dict(key: str, value: Any, where: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise wrong_type(key, "a dict", value, f"It is in {where}. Write its entries indented below it.")
    _check_text_keys(key, value or {}, where)


def _check_evaluated(key: str, value: Any, where: str) -> None:
    if key == "normalize" and isinstance(value, bool):
        return
    if isinstance(value, str):
        rule = f"`{key}` must be a dict, or Python text that evaluates to one"
        hint = 'Write for example "dict(...)".'
        try:
            value = eval(value, dict(vars(exp_manager)))  # as the Zoo will
        except Exception as error:
            raise ValueError(f"{rule}, got {value!r} in {where}: {type(error).__name__}: {error}. {hint}") from error
        if not isinstance(value, dict):
            raise TypeError(f"{rule}, got text that evaluates to {value!r} in {where}. {hint}")
    _check_dict(key, value, where)
    called = {"monitor_kwargs": Monitor, "normalize": VecNormalize}.get(key)
    if called is not None:
        check_keywords(key, value or {}, called, _PASSED_BY_ZOO, f"It is in {where}. Correct it, or leave it out.")


def _check_policy(key: str, value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise wrong_type(key, "text", value, f"It is in {where}. Write MlpPolicy, or `package.module.Class`.")
    if "." in value:  # ClipPPO itself checks names of its own policies
        _check_named(key, value, where)


def _check_classes(key: str, value: Any, where: str) -> None:
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        raise TypeError(f"`{key}` must be a list of classes, got {value!r} in {where}. {_WRITE_CLASS}")
    ready = BaseCallback if key == "callback" else type
    for item in items(value):
        if isinstance(item, dict) and len(item) != 1:
            raise ValueError(
                f"`{key}` must hold dicts of one class and its arguments, got {item!r} in {where}. Indent "
                "the arguments below the class."
            )
    for named, kwargs in with_arguments(value):
        _check_named(key, named, where, ready)
        if not isinstance(kwargs, Mapping):
            raise TypeError(
                f"`{key}` must hold dicts of arguments, got {kwargs!r} for {named!r} in {where}. Write `name: value` "
                "below it, or leave out the colon behind the class."
            )
        _check_text_keys(key, kwargs, where)


def _check_named(key: str, value: Any, where: str, ready: type | tuple[type, ...] = ()) -> None:
    """Refuse a value that is neither the full name of a class nor an instance of ``ready``."""
    parts = value.split(".") if isinstance(value, str) else []
    is_path = len(parts) > 1 and all(part.isidentifier() for part in parts)
    if not (is_path or isinstance(value, ready)):
        raise ValueError(f"`{key}` must name a class with its module, got {value!r} in {where}. {_WRITE_CLASS}")


def _check_text_keys(key: str, value: Mapping[Any, Any], where: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise TypeError(f"`{key}` must have text as keys, got {name!r} in {where}. Put it in quotes.")


_CHECKS: dict[str, Callable[[str, Any, str], None]] = {
    "callback": _check_classes,
    "env_kwargs": _check_dict,
    "env_wrapper": _check_classes,
    "frame_stack": _check_whole,
    "monitor_kwargs": _check_evaluated,
    "n_envs": _check_whole,
    "n_timesteps": _check_steps,
    "normalize": _check_evaluated,
    "policy": _check_policy,
    "policy_kwargs": _check_evaluated,
    "rollout_buffer_class": partial(_check_named, ready=(type, NoneType)),
    "vec_env_wrapper": _check_classes,
}
