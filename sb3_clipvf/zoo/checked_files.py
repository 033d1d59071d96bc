"""
Files of a run, read by the RL Zoo without running code: models, statistics, settings.

The Zoo unpickles statistics and replay buffers and loads ``config.yml`` and ``args.yml`` with YAML's unsafe loader. It
evaluates the text of ``normalize`` and calls whatever ``env_wrapper`` names. In :func:`checked_files`, all of these are
checked first.
"""

import ast
import os
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3 import ALGOS, utils
from stable_baselines3.common import save_util
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_clipvf.files.allowlist import CheckedFunction, NotAllowedError, create, find, restore
from sb3_clipvf.files.model import CheckedStream, check_variables, read_model
from sb3_clipvf.files.statistics import load_vec_normalize, read_pickle
from sb3_clipvf.files.trust import TRUST_VARIABLE, UnsafeFileError, trust_of
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.entries import WRAPPER_FUNCTIONS, items, with_arguments
from sb3_clipvf.zoo.patching import patched

_PYTHON = "tag:yaml.org,2002:python/"
_TRUST = f"If you trust where it comes from, pass `--trust-pickle` or set {TRUST_VARIABLE}=1."
_VARIABLES = ("ent_coef_tensor", "log_ent_coef")  # further tensors of SB3's and SB3-Contrib's algorithms
_MAX_ALIASES = 20  # each may double the parts of a value, which messages show in full
_BASES: dict[str, tuple[type, ...]] = {
    "callback": (BaseCallback,),
    "env_wrapper": (gym.Wrapper, VecEnvWrapper),
    "vec_env_wrapper": (gym.Wrapper, VecEnvWrapper),
}


@contextmanager
def checked_files(plots: bool = False) -> Iterator[None]:
    """
    Make the RL Zoo and SB3 read files without running code in the context, unless the user trusts all files.

    With ``plots``, this includes the data of plots, whose packages are slow to import.
    """
    if trust_of(None).everything:
        yield
        return
    get_wrapper_class = utils.get_wrapper_class

    def checked_wrapper_class(hyperparams: dict[str, Any], key: str = "env_wrapper") -> Any:
        for named, _ in with_arguments(hyperparams.get(key)):
            _check_class(key, named)
        return get_wrapper_class(hyperparams, key)

    replacements: dict[str, Any] = {
        "yaml_loader": RunLoader,
        "load_statistics": staticmethod(load_vec_normalize),
        "load_model": _load_from_zip_file,
        "load_replay_buffer": lambda path, verbose=0: read_pickle(path),
        "wrapper_class": checked_wrapper_class,
    }
    if plots:
        replacements["plot_pickle"] = SimpleNamespace(load=lambda file: read_pickle(file.name))
    with patched(**replacements):
        yield


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``args.yml`` or ``config.yml`` of a run; refuse it if it is damaged or could run untrusted code."""
    with checked_files(), open(path, encoding="utf-8") as file:
        settings = yaml.load(file, Loader=yaml.UnsafeLoader)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must hold the settings of a run, got {type(settings).__name__}. Restore the run's own file."
        )
    return dict(settings)


def undamaged_settings(path: Path) -> dict[str, Any]:
    """Return what :func:`read_settings` does, or {} for a missing or damaged file, beside the error of another one."""
    try:
        return read_settings(path) if path.is_file() else {}
    except ValueError:
        return {}


def check_no_code(path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Refuse settings of a run that would run code when it is resumed, unless the user trusts all files."""
    if trust_of(None).everything:
        return
    _check_plain(str(path), "monitor_kwargs", settings.get("monitor_kwargs"))
    for key in _BASES:
        for named, _ in with_arguments(settings.get(key)):
            if key == "callback" and isinstance(named, str):  # the loader has checked the wrappers
                _check_origin(str(path), key, named)
            _check_class(key, named)


def saved_timesteps(path: Path) -> int:
    """Return the environment steps that a saved model was trained for; -1 if there is no undamaged file."""
    return saved_progress(path)[0]


def saved_progress(path: Path) -> tuple[int, int]:
    """Return the steps of a saved model, and those at which its training was to end; -1 without an undamaged file."""
    try:
        data = read_model(path).data or {}
        return int(data["num_timesteps"]), int(data.get("_total_timesteps", -1))
    except (OSError, ValueError, KeyError, TypeError):
        return -1, -1


def lies_beside(source: str | os.PathLike[str], config: str) -> bool:
    """
    Return whether ``config``, the file or module of ``--conf-file``, is among the runs and may have come with one.

    ``source`` is the run's ``args.yml``.
    """
    folder = _folder_of_runs(Path(source).resolve())
    is_file = config.endswith((".py", ".yml", ".yaml"))
    places = [Path(config).resolve()] if is_file else _module_files(config)
    return any(_is_of_runs(place, folder) for place in places)


class RunLoader(yaml.SafeLoader):
    """YAML loader for a run's settings; it builds the types that the Zoo writes, and refuses what could run code."""

    _n_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count references to earlier parts of the file."""
        self._n_aliases += self.check_event(yaml.AliasEvent)
        if self._n_aliases > _MAX_ALIASES:
            raise ValueError(f"it refers to its own parts more than {_MAX_ALIASES} times")
        return super().compose_node(parent, index)

    def get_single_data(self) -> Any:
        """Read the only document of the file."""
        try:
            data = super().get_single_data()
        except UnsafeFileError:
            raise
        except (yaml.YAMLError, TypeError, ValueError, RecursionError, ImportError, AttributeError) as error:
            raise ValueError(f"{self.name} could not be read: {error}. Restore the run's own file.") from error
        if isinstance(data, dict):
            _check_settings(str(self.name), data)
        return data

    def _python_object(self, kind: str, node: yaml.Node) -> Any:
        """Build the object of ``!!python/<kind>``, if it is on the list that pickles are checked against."""
        what, _, name = kind.partition(":")
        try:
            return self._allowed_object(what, name, node)
        except NotAllowedError as refused:
            raise UnsafeFileError(
                f"{self.name}, line {node.start_mark.line + 1}, must hold plain data, got {refused}, which could "
                f"run any code. {_TRUST}"
            ) from None

    def _allowed_object(self, what: str, name: str, node: yaml.Node) -> Any:
        if what == "tuple" and isinstance(node, yaml.SequenceNode):
            return tuple(self.construct_sequence(node, deep=True))
        module, _, attribute = name.rpartition(".")
        if what == "name":
            found = find(module or "builtins", attribute)
            if not isinstance(found, CheckedFunction):
                return found
        if what == "object/apply":
            args, state = self._arguments(node)
            if name == "collections.OrderedDict":
                return OrderedDict(*args)
            found = find(module, attribute)
            if isinstance(found, CheckedFunction):
                made = found.call(*args)
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


def _load_from_zip_file(
    load_path: Any, load_data: bool = True, custom_objects: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    """Replace SB3's function of this name; ``ClipPPO.load`` passes a stream that it has checked already."""
    objects = dict(custom_objects or {})
    if not isinstance(load_path, CheckedStream):
        file = read_model(load_path, needs_data=load_data)
        check_variables(file, _VARIABLES)
        load_path = file.stream()
        if load_data:
            objects = {**file.unpickled(trust_of(None), objects), **objects}
    return save_util.load_from_zip_file(load_path, load_data=load_data, custom_objects=objects, **kwargs)


def _check_settings(source: str, data: dict[str, Any]) -> None:
    _check_plain(source, "normalize", data.get("normalize"))
    for key in ("env_wrapper", "vec_env_wrapper", "gym_packages"):
        for name in _names(source, key, data.get(key)):
            _check_origin(source, key, name)


def _names(source: str, key: str, entries: Any) -> list[str]:
    """Return the modules or classes that a key names, and refuse forms that the Zoo does not read as names."""
    is_wrapper = key != "gym_packages"
    names: list[Any] = [name for name, _ in with_arguments(entries)] if is_wrapper else items(entries)
    is_legal = is_wrapper or entries is None or isinstance(entries, list)
    if not is_legal or not all(isinstance(name, str) for name in names):
        what = "names, or names with their arguments" if is_wrapper else "a list of names of modules"
        raise UnsafeFileError(f"`{key}` in {source} must be {what}, got {entries!r}. {_TRUST}")
    return names


def _check_plain(source: str, key: str, value: Any) -> None:
    """Refuse text other than a literal or ``dict(...)`` of literals, since the Zoo evaluates it."""
    if not isinstance(value, str):
        return
    try:
        node = ast.parse(value, mode="eval").body
        literals: list[ast.expr] = [node]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            literals = [keyword.value for keyword in node.keywords]
        for literal in literals:
            ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UnsafeFileError(
            f"`{key}` in {source} must be plain values, got {value!r}, which the RL Zoo would run. {_TRUST}"
        ) from error


def _check_class(key: str, named: Any) -> None:
    """Refuse a name or class that is not a wrapper or callback, since the Zoo calls it."""
    if named in WRAPPER_FUNCTIONS and key != "callback":
        return
    found: Any = utils.get_class_by_name(named) if isinstance(named, str) else named
    bases = _BASES[key]
    is_class = isinstance(found, type) and issubclass(found, bases)
    is_callback = key == "callback" and isinstance(found, bases)
    if not (is_class or is_callback):
        names = " or ".join(base.__name__ for base in bases)
        raise UnsafeFileError(
            f"`{key}` of the run must name classes derived from {names}, got {named}, which the RL Zoo would call. "
            f"{_TRUST}"
        )


def _check_origin(source: str, key: str, name: str) -> None:
    """Refuse a module that lies beside the settings: their author may have written it."""
    if not os.path.isfile(source):
        return
    folder = _folder_of_runs(Path(source).resolve())
    if any(_is_of_runs(place, folder) for place in _module_files(name)):
        raise UnsafeFileError(
            f"`{key}` in {source} must name a module that is installed, got {name!r}, which lies in {folder}. {_TRUST}"
        )


def _is_of_runs(place: Path, folder: Path) -> bool:
    """Return whether a file is in the folder of runs, but not in a folder of installed packages inside it."""
    installed = [Path(path).resolve() for path in {*sysconfig.get_paths().values()}]
    installed = [path for path in installed if path != folder and path.is_relative_to(folder)]
    return place.is_relative_to(folder) and not any(map(place.is_relative_to, installed))


def _folder_of_runs(source: Path) -> Path:
    """
    Return the folder whose modules may have come with the run of ``<logs>/<algo>/<run>/<env>/config.yml``.

    Modules of the working folder are the user's own. Of a run below it, the folder in it that contains the run may have
    been received as a whole. Elsewhere, it is ``<logs>``, or the run's parent if no folder is named as an algorithm.
    """
    run, here = source.parent.parent, Path.cwd()
    folder = run if here.is_relative_to(run.parent) else run.parent
    for algo in (run, run.parent):
        if algo.name in {*ALGOS, ALGORITHM}:
            folder = algo if here.is_relative_to(algo.parent) else algo.parent
            break
    topmost = here.joinpath(*run.relative_to(here).parts[:1]) if run.is_relative_to(here) else folder
    return topmost if folder.is_relative_to(topmost) else folder


def _module_files(name: str) -> list[Path]:
    """Return the files of the modules that importing a name would run, without importing any of them."""
    places: list[Path] = []
    search: list[str] | None = None
    for part in name.split("."):
        # Pass only the last part: for a dotted name, the finder would look into imported packages.
        spec = PathFinder.find_spec(part, search)
        if spec is None:
            break
        if spec.origin is not None:
            places.append(Path(spec.origin).resolve())
            if spec.submodule_search_locations is None:
                break
            search = list(spec.submodule_search_locations)
        else:
            # A namespace: its folders hold no module of this name, but perhaps modules of the next part.
            search = [os.path.join(folder, part) for folder in (sys.path if search is None else search)]
    return places
