"""Values of the settings that the RL Zoo itself reads: each is checked before the Zoo takes it apart."""

import importlib
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3 import exp_manager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.common.validation import check_float, check_int, check_keywords
from sb3_clipvf.zoo.entries import WRAPPER_FUNCTIONS, items, with_arguments

# Of `policy` and `rollout_buffer_class`, ClipPPO checks what they are derived from.
_IMPORTED: dict[str, type] = {
    "callback": BaseCallback,
    "env_wrapper": gym.Env,
    "policy": object,
    "rollout_buffer_class": object,
    "vec_env_wrapper": VecEnv,
}
"""Keys that name classes, and what these must be derived from."""
_TAKEN = ("env", "filename", "venv")
"""Arguments of wrappers that the RL Zoo fills."""

_CLASS_TEXT = "Write it as `package.module.Class`, with its arguments, if any, indented below it."


@contextmanager
def readable_config(config: str, env_id: str) -> Iterator[None]:
    """
    Explain why the RL Zoo cannot read the settings.

    :param config: File or module, as given to ``--conf-file``.
    :param env_id: Environment whose settings it reads.
    :raises ValueError: If it cannot be read, or does not hold settings for each environment.
    """
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
            f"{rule}, got {config!r}: {text}. Give a .yml file, or a .py file or module that defines the dict "
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


def check_setting(key: str, value: Any, where: str) -> None:
    """
    Check one value, without importing what it names.

    :param key: A key of the settings. Those that ClipPPO's constructor takes as they are it checks itself.
    :param value: Its value.
    :param where: Where it stands, for messages.
    :raises TypeError: If it is of another type than the RL Zoo can use.
    :raises ValueError: If it is out of range, or no Python where it must be.
    """
    check = _CHECKS.get(key)
    if check is not None:
        check(key, value, where)


def check_imports(key: str, value: Any, where: str) -> None:
    """
    Check that what a value names is there, and takes the arguments that it gets.

    :param key: A key of the settings.
    :param value: Its value, which :func:`check_setting` has checked.
    :param where: Where it stands, for messages.
    :raises ImportError: If a module cannot be imported.
    :raises ValueError: If it holds nothing of this name, or no class that the key can use.
    :raises TypeError: If an argument is none.
    """
    if key not in _IMPORTED:
        return
    for named, kwargs in with_arguments(value):
        if not isinstance(named, str) or (key == "policy" and "." not in named):
            continue
        module, _, name = named.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except AttributeError as error:
            raise ValueError(
                f"`{key}` must name something that its module holds, got {named!r} in {where}: {error}. Correct the "
                "name."
            ) from error
        except Exception as error:  # whatever the module's own code raises
            text = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ImportError(
                f"`{key}` must name something that can be imported, got {named!r} in {where}: {text}. Correct the "
                "name or the module, or install its package."
            ) from error
        _check_class(key, named, found, where)
        check_keywords(key, kwargs, found, _TAKEN, f"It stands in {where}. Correct it, or leave it out.")


def _check_class(key: str, named: str, found: Any, where: str) -> None:
    if isinstance(found, type):
        base = _IMPORTED[key]
        if not issubclass(found, base):
            raise ValueError(
                f"`{key}` must name a class derived from {base.__name__}, got {named!r} in {where}. Correct the name."
            )
    elif not (key == "env_wrapper" and named in WRAPPER_FUNCTIONS):
        raise ValueError(f"`{key}` must name a class, got {named!r} in {where}, which is none. {_CLASS_TEXT}")


def _whole(key: str, value: Any, where: str) -> None:
    way_out = f"It stands in {where}. Write it without a point."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{key}` must be a whole number, got {value!r} of type {type(value).__name__}. {way_out}")
    check_int(key, value, 1, way_out)


def _steps(key: str, value: Any, where: str) -> None:
    check_float(key, value, f"It stands in {where}. Write for example `{key}: !!float 1e6`.")


def _frames(key: str, value: Any, where: str) -> None:
    if value is not None:
        _whole(key, value, where)


def _mapping(key: str, value: Any, where: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"`{key}` must be a dict, got {value!r} of type {type(value).__name__} in {where}. Write its entries "
            "indented below it."
        )
    _text_keys(key, value or {}, where)


def _evaluated(key: str, value: Any, where: str) -> None:
    """Of what the Zoo runs as Python where it is text."""
    if isinstance(value, str):
        try:
            value = eval(value, dict(vars(exp_manager)))  # as the Zoo will
        except Exception as error:
            raise ValueError(
                f"`{key}` must be a dict, or Python text that makes one, got {value!r} in {where}: "
                f'{type(error).__name__}: {error}. Write for example "dict(...)".'
            ) from error
        if not isinstance(value, dict):
            raise TypeError(
                f"`{key}` must be a dict, or Python text that makes one, got text that makes {value!r} in {where}. "
                'Write for example "dict(...)".'
            )
    _mapping(key, value, where)
    called = {"monitor_kwargs": Monitor, "normalize": VecNormalize}.get(key)
    if called is not None:
        check_keywords(key, value or {}, called, _TAKEN, f"It stands in {where}. Correct it, or leave it out.")


def _normalize(key: str, value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _evaluated(key, value, where)


def _policy(key: str, value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"`{key}` must be text, got {value!r} of type {type(value).__name__} in {where}. Write MlpPolicy, or "
            "`package.module.Class`."
        )
    if "." in value:  # others are ClipPPO's aliases, or refused there
        _named(key, value, where)


def _classes(key: str, value: Any, where: str) -> None:
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        raise TypeError(f"`{key}` must be a list of classes, got {value!r} in {where}. {_CLASS_TEXT}")
    ready = BaseCallback if key == "callback" else type
    for item in items(value):
        if isinstance(item, dict) and len(item) != 1:
            raise ValueError(
                f"`{key}` must hold dicts of one class and its arguments, got {item!r} in {where}. Check the "
                "indentation: arguments stand deeper than the class."
            )
    for named, kwargs in with_arguments(value):
        _named(key, named, where, ready)
        if not isinstance(kwargs, Mapping):
            raise TypeError(
                f"`{key}` must give arguments as a dict, got {kwargs!r} for {named!r} in {where}. Write `name: value` "
                "below it, or leave out the colon behind the class."
            )
        _text_keys(key, kwargs, where)


def _buffer_class(key: str, value: Any, where: str) -> None:
    if not (value is None or isinstance(value, type)):
        _named(key, value, where)


def _named(key: str, value: Any, where: str, ready: type | tuple[()] = ()) -> None:
    parts = value.split(".") if isinstance(value, str) else []
    is_path = len(parts) > 1 and all(part.isidentifier() for part in parts)
    if not (is_path or isinstance(value, ready)):
        raise ValueError(f"`{key}` must name a class with its module, got {value!r} in {where}. {_CLASS_TEXT}")


def _text_keys(key: str, value: Mapping[Any, Any], where: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise TypeError(f"`{key}` must have text as keys, got {name!r} in {where}. Put it in quotes.")


_CHECKS: dict[str, Callable[[str, Any, str], None]] = {
    "callback": _classes,
    "env_kwargs": _mapping,
    "env_wrapper": _classes,
    "frame_stack": _frames,
    "monitor_kwargs": _evaluated,
    "n_envs": _whole,
    "n_timesteps": _steps,
    "normalize": _normalize,
    "policy": _policy,
    "policy_kwargs": _evaluated,
    "rollout_buffer_class": _buffer_class,
    "vec_env_wrapper": _classes,
}
