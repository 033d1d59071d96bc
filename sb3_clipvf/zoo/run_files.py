"""
Files of runs, read by the RL Zoo without running code: models, statistics, settings.

The Zoo unpickles statistics and replay buffers, reads ``config.yml`` and ``args.yml`` by a YAML loader that calls what
they name, evaluates the text of ``normalize``, and calls whatever ``env_wrapper`` names. While :func:`checked_files` is
on, the names by which its modules reach these lead here.
"""

import ast
import importlib
import io
import os
import pathlib
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import PathFinder
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common import base_class, off_policy_algorithm, save_util
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_clipvf.files.allowlist import Maker, NotAllowedError, create, find, restore
from sb3_clipvf.files.archive import reason_of
from sb3_clipvf.files.model import CheckedStream, read_model
from sb3_clipvf.files.statistics import load_vec_normalize, read_pickle
from sb3_clipvf.files.trust import TRUST_VARIABLE, UnsafeFileError, trust_of
from sb3_clipvf.zoo.entries import WRAPPER_FUNCTIONS, items, with_arguments

_PYTHON = "tag:yaml.org,2002:python/"
_TRUST = f"If you trust where it comes from, pass `--trust-pickle` or set {TRUST_VARIABLE}=1."


@contextmanager
def checked_files(plots: bool = False) -> Iterator[None]:
    """
    Make the RL Zoo and SB3 read files without running code in the context, unless the user trusts all of them.

    :param plots: Whether to do so for the data of plots, too, whose packages are slow to import.
    """
    if trust_of(None).everything:
        yield
        return
    from rl_zoo3 import utils

    get_wrapper_class = utils.get_wrapper_class

    def checked_wrapper_class(hyperparams: dict[str, Any], key: str = "env_wrapper") -> Any:
        _check_wrappers(hyperparams.get(key), key)
        return get_wrapper_class(hyperparams, key)

    with ExitStack() as stack:
        for owner, name, value in (
            (yaml, "UnsafeLoader", RunLoader),
            (VecNormalize, "load", staticmethod(load_vec_normalize)),
            (base_class, "load_from_zip_file", _load_from_zip_file),
            (off_policy_algorithm, "load_from_pkl", _load_from_pkl),
            (utils, "get_wrapper_class", checked_wrapper_class),
        ):
            stack.enter_context(replaced(owner, name, value))
        if plots:
            # Not `from rl_zoo3.plots import`: that name is a function there.
            plot_from_file = importlib.import_module("rl_zoo3.plots.plot_from_file")
            stack.enter_context(replaced(plot_from_file, "pickle", SimpleNamespace(load=_load_open_pickle)))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """
    Replace an attribute in the context.

    :param owner: A module or class that has it.
    :param name: The name.
    :param value: Its value in the context.
    """
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _load_from_zip_file(
    load_path: Any, load_data: bool = True, custom_objects: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    """SB3's function of this name; what ``ClipPPO.load`` hands it is checked already."""
    replaced = dict(custom_objects or {})
    if not isinstance(load_path, CheckedStream):
        file = read_model(load_path, needs_data=load_data)
        load_path = file.stream()
        if load_data:
            replaced = {**file.unpickled(trust_of(None), replaced), **replaced}
    return save_util.load_from_zip_file(load_path, load_data=load_data, custom_objects=replaced, **kwargs)


def _load_from_pkl(path: Any, verbose: int = 0) -> Any:
    return read_pickle(path)


def _load_open_pickle(file: io.BufferedReader) -> Any:
    return read_pickle(file.name)


# ---------------------------------------------------------------------- YAML


class RunLoader(yaml.SafeLoader):
    """Reads the settings of a run, which the Zoo wrote with Python's types in them, and refuses what could run code."""

    def get_single_data(self) -> Any:
        """
        Read the only document.

        :return: It.
        :raises UnsafeFileError: If reading it, or what the Zoo does with it, could run code.
        :raises ValueError: If it is damaged.
        """
        try:
            data = super().get_single_data()
        except UnsafeFileError:
            raise
        except (yaml.YAMLError, TypeError, ValueError, RecursionError, ImportError, AttributeError) as error:
            raise ValueError(f"{self.name} could not be read: {error}. Bring back the run's own file.") from error
        if isinstance(data, dict):
            _check_settings(str(self.name), data)
        return data

    def _refused(self, what: str, node: yaml.Node) -> UnsafeFileError:
        mark = node.start_mark
        return UnsafeFileError(
            f"{self.name}, line {mark.line + 1}, must hold plain data, got {what}, which could run any code. {_TRUST}"
        )

    def _python_object(self, kind: str, node: yaml.Node) -> Any:
        """Build what ``!!python/<kind>`` asks for, of the same list as in pickles."""
        what, _, name = kind.partition(":")
        try:
            return self._of_list(what, name, node)
        except NotAllowedError as refused:
            raise self._refused(refused.what, node) from None

    def _of_list(self, what: str, name: str, node: yaml.Node) -> Any:
        if what == "tuple" and isinstance(node, yaml.SequenceNode):
            return tuple(self.construct_sequence(node, deep=True))
        module, _, attribute = name.rpartition(".")
        if what == "name":
            found = find(module or "builtins", attribute)
            if not isinstance(found, Maker):
                return found
        if what == "object/apply":
            args, state = self._arguments(node)
            if name == "collections.OrderedDict":
                return OrderedDict(*args)
            found = find(module, attribute)
            if isinstance(found, Maker):
                made = found.make(*args)
                if state is not None:
                    restore(made, state)
                return made
        if what == "object" and isinstance(node, yaml.MappingNode):
            instance = create(find(module, attribute), ())
            restore(instance, self.construct_mapping(node, deep=True))
            return instance
        raise NotAllowedError(f"!!python/{what}:{name}".rstrip(":"))

    def _arguments(self, node: yaml.Node) -> tuple[list[Any], Any]:
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True), None
        if not isinstance(node, yaml.MappingNode):
            raise NotAllowedError("a call without a list of arguments")
        parts = self.construct_mapping(node, deep=True)
        if not parts.keys() <= {"args", "state"} or not isinstance(parts.get("args", []), list):
            raise NotAllowedError("a call with unusual arguments")
        return parts.get("args", []), parts.get("state")


RunLoader.add_multi_constructor(_PYTHON, RunLoader._python_object)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read ``args.yml`` or ``config.yml`` of a run.

    :param path: The file.
    :return: Its content, in Python's types.
    :raises UnsafeFileError: If reading it, or what the Zoo does with it, could run code that the user does not trust.
    :raises ValueError: If it is damaged.
    """
    with checked_files(), open(path, encoding="utf-8") as file:
        settings = yaml.load(file, Loader=yaml.UnsafeLoader)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold the settings of a run, got {type(settings).__name__}. Bring its file back.")
    return dict(settings)


def check_saved(key: str, value: Any, where: str) -> None:
    """
    Check that the files of a run can hold a value, so that other commands can read them.

    :param key: A key of the settings, or an option.
    :param value: Its value.
    :param where: Where it stands, for messages.
    :raises ValueError: If it cannot be written as YAML, or not be read again.
    """
    try:
        # Not as `yaml.UnsafeLoader`, which may be replaced; these are the user's own settings.
        yaml.load(yaml.dump(value), Loader=yaml.loader.UnsafeLoader)
    except Exception as error:  # whatever the value's own class raises
        raise ValueError(
            f"`{key}` must be what the files of the run can hold, got {value!r} in {where}: {reason_of(error)}. Define "
            "functions and classes in a module that can be imported, and leave out lambdas."
        ) from error


def check_built(path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """
    Refuse settings by which training a run again would run code, unless the user trusts all files.

    :param path: Where they were read from.
    :param settings: From :func:`read_settings`.
    :raises UnsafeFileError: If a wrapper or callback is none, or text would be evaluated that is no plain value.
    """
    if trust_of(None).everything:
        return
    from rl_zoo3.utils import get_class_by_name

    for key in ("env_wrapper", "vec_env_wrapper"):
        _check_wrappers(settings.get(key), key)
    monitor = settings.get("monitor_kwargs")
    if isinstance(monitor, str) and not _is_plain(monitor):
        raise UnsafeFileError(
            f"`monitor_kwargs` in {path} must be plain values, got {monitor!r}, which the RL Zoo would run. {_TRUST}"
        )
    for named, _ in with_arguments(settings.get("callback")):
        found = named
        if isinstance(named, str):
            _check_origin(str(path), "callback", named)
            found = get_class_by_name(named)
        if not (isinstance(found, BaseCallback) or (isinstance(found, type) and issubclass(found, BaseCallback))):
            raise UnsafeFileError(
                f"`callback` in {path} must name callbacks, classes derived from BaseCallback, got {named!r}, which "
                f"the RL Zoo would call. {_TRUST}"
            )


def _check_settings(source: str, data: dict[str, Any]) -> None:
    normalize = data.get("normalize")
    if isinstance(normalize, str) and not _is_plain(normalize):
        raise UnsafeFileError(
            f"`normalize` in {source} must be plain values, got {normalize!r}, which the RL Zoo would run. {_TRUST}"
        )
    for key in ("env_wrapper", "vec_env_wrapper", "gym_packages"):
        for name in _names(source, key, data.get(key)):
            _check_origin(source, key, name)


def _names(source: str, key: str, entries: Any) -> list[str]:
    """Return the names that a key has imported, and refuse forms that the Zoo does not read as names."""
    is_wrapper = key != "gym_packages"
    names: list[Any] = [name for name, _ in with_arguments(entries)] if is_wrapper else items(entries)
    is_legal = is_wrapper or entries is None or isinstance(entries, list)
    if not is_legal or not all(isinstance(name, str) for name in names):
        what = "names, or names with their arguments" if is_wrapper else "a list of names of modules"
        raise UnsafeFileError(f"`{key}` in {source} must be {what}, got {entries!r}. {_TRUST}")
    return names


def _is_plain(expression: str) -> bool:
    """Return whether an expression is a literal, or ``dict(...)`` of literals."""
    try:
        node = ast.parse(expression, mode="eval").body
        values: list[ast.expr] = [node]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            values = [keyword.value for keyword in node.keywords]
        for value in values:
            ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _check_origin(source: str, key: str, name: str) -> None:
    """Refuse modules that lie beside the settings: whoever wrote these may have written those."""
    if not os.path.isfile(source):
        return
    folder = _folder_of_runs(pathlib.Path(source).resolve())
    if any(_is_of_runs(place, folder) for place in _places(name)):
        raise UnsafeFileError(
            f"`{key}` in {source} must name a module that is installed, got {name!r}, which lies in {folder}. {_TRUST}"
        )


def lies_beside(source: str | os.PathLike[str], config: str) -> bool:
    """
    Return whether the settings that a run was trained with lie among the runs, so that they may have come with it.

    :param source: ``args.yml`` of the run.
    :param config: File or module, as given to ``--conf-file``.
    :return: Whether they do.
    """
    folder = _folder_of_runs(pathlib.Path(source).resolve())
    is_file = config.endswith((".py", ".yml", ".yaml"))
    places = [pathlib.Path(config).resolve()] if is_file else _places(config)
    return any(_is_of_runs(place, folder) for place in places)


def _is_of_runs(place: pathlib.Path, folder: pathlib.Path) -> bool:
    """Return whether a file is in the folder of runs, and not in one that Python's packages are installed in there."""
    installed = [pathlib.Path(path).resolve() for path in {*sysconfig.get_paths().values()}]
    installed = [path for path in installed if path != folder and path.is_relative_to(folder)]
    return place.is_relative_to(folder) and not any(map(place.is_relative_to, installed))


def _folder_of_runs(source: pathlib.Path) -> pathlib.Path:
    """The log folder, where the Zoo's ``<logs>/<algo>/<run>/<env>/config.yml`` is, or what is known to belong to it."""
    from rl_zoo3 import ALGOS

    from sb3_clipvf.zoo.defaults import ALGORITHM

    run = source.parent.parent
    for algo in (run, run.parent):
        if algo.name in {*ALGOS, ALGORITHM}:
            # The user's own modules are where the command runs.
            return algo if pathlib.Path.cwd().is_relative_to(algo.parent) else algo.parent
    return run


def _places(name: str) -> list[pathlib.Path]:
    """Where the modules lie that importing a name would run; none of them is imported for this."""
    places: list[pathlib.Path] = []
    search: list[str] | None = None
    for part in name.split("."):
        # By its last name alone, or the finder would look for the packages above it among the imported ones.
        spec = PathFinder.find_spec(part, search)
        if spec is None:
            break
        if spec.origin is not None:
            places.append(pathlib.Path(spec.origin).resolve())
            if spec.submodule_search_locations is None:
                break
            search = list(spec.submodule_search_locations)
        else:
            # Folders that hold no module of this name, but perhaps others.
            search = [os.path.join(folder, part) for folder in (sys.path if search is None else search)]
    return places


def _check_wrappers(entries: Any, key: str) -> None:
    from rl_zoo3.utils import get_class_by_name

    from sb3_clipvf.zoo.vec_env import wrapper_list

    for name, _ in wrapper_list(entries):
        wrapper: Any = get_class_by_name(name)
        is_wrapper = isinstance(wrapper, type) and issubclass(wrapper, (gym.Wrapper, VecEnvWrapper))
        if not is_wrapper and name not in WRAPPER_FUNCTIONS:
            raise UnsafeFileError(
                f"`{key}` of the run must name wrappers, classes derived from gymnasium.Wrapper or VecEnvWrapper, got "
                f"{name}, which the RL Zoo would call. {_TRUST}"
            )
