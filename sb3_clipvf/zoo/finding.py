"""Which run a command takes: the newest one that holds the model asked for, or the one that ``--exp-id`` names."""

import importlib
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class RunId(int):
    """
    Number of a run; its text ends in what ``-uuid`` added to the run's folder, so that the RL Zoo finds that folder.

    :param number: Number of the run.
    :param unique: What ``-uuid`` added, or "".
    """

    unique: str

    def __new__(cls, number: int, unique: str = "") -> "RunId":
        """Make an int with one more attribute."""
        run_id = super().__new__(cls, number)
        run_id.unique = unique
        return run_id

    def __str__(self) -> str:
        return f"{int(self)}_{self.unique}" if self.unique else str(int(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @classmethod
    def parse(cls, text: str) -> "RunId":
        """
        Read ``--exp-id``.

        :param text: A number, or a number and what ``-uuid`` added, as in the name of the run's folder.
        :return: The run's number.
        :raises ArgumentTypeError: If it is neither.
        """
        match = re.fullmatch(rf"(-?\d+)(?:_({_UUID}))?", text)
        if match is None:
            raise ArgumentTypeError(f"must be the number of a run, or <number>_<uuid>, got {text!r}")
        return cls(int(match[1]), match[2] or "")


def choose_run(parent: Path, env_name: str, exp_id: int, has_model: Callable[[Path], bool]) -> int:
    """
    Choose a run, and write which one where it is not the newest.

    :param parent: Folder of the algorithm's runs.
    :param env_name: Name of the environment as in the runs' folders.
    :param exp_id: What the user gave: 0 for the newest, a number, or a number with what ``-uuid`` added.
    :param has_model: Whether the folder of a run holds the model asked for.
    :return: ``exp_id``, or where it is 0 or the number of runs of ``-uuid``, the newest of these with a model, or
        without one if none has it; ``exp_id`` if there is none.
    """
    if exp_id < 0 or (exp_id > 0 and (parent / f"{env_name}_{exp_id}").is_dir()):
        return exp_id
    if isinstance(exp_id, RunId) and exp_id.unique:
        return exp_id
    # RunIds are equal where their numbers are.
    found = [(run_id, parent / f"{env_name}_{run_id}") for run_id in _run_ids(parent, env_name)]
    found = [(run_id, folder) for run_id, folder in found if exp_id in (0, run_id)]
    if not found:
        return exp_id
    newest = found[0][1]
    chosen, folder = next((pair for pair in found if has_model(pair[1])), found[0])
    if folder != newest:
        sys.stdout.write(f"{newest} does not hold the model: taking that of {folder}\n")
    elif exp_id > 0 and len(found) > 1:
        sys.stdout.write(f"{len(found)} runs have the number {exp_id}: taking {folder}\n")
    return chosen


def _run_ids(parent: Path, env_name: str) -> list[RunId]:
    """Return the numbers of an environment's runs, newest first."""
    pattern = re.compile(rf"{re.escape(env_name)}_(\d+)(?:_({_UUID}))?")
    folders = [(folder, pattern.fullmatch(folder.name)) for folder in parent.glob(f"{env_name}_*") if folder.is_dir()]
    run_ids = [
        (RunId(int(match[1]), match[2] or ""), _started(folder / env_name)) for folder, match in folders if match
    ]
    return [run_id for run_id, _ in sorted(run_ids, key=lambda pair: (int(pair[0]), pair[1]), reverse=True)]


def _started(settings_folder: Path) -> float:
    # Later commands write into the run's folder, but not into its settings.
    path = settings_folder / "args.yml"
    return (path if path.exists() else settings_folder.parent).stat().st_mtime


def model_test(env_name: str, options: Namespace) -> Callable[[Path], bool]:
    """
    Make the test for the model that a command asks for.

    :param env_name: Name of the environment as in the runs' folders.
    :param options: Its parsed options.
    :return: Function that returns whether the folder of a run holds that model.
    """
    if getattr(options, "load_best", False):
        names = ["best_model.zip"]
    elif getattr(options, "load_checkpoint", None) is not None:
        steps = options.load_checkpoint
        names = [f"rl_model_{steps}_steps.zip", f"checkpoints/checkpoint_{steps}.zip"]
    elif getattr(options, "load_last_checkpoint", False):
        names = ["rl_model_*_steps.zip", "checkpoints/checkpoint_*.zip"]
    elif hasattr(options, "load_checkpoint"):
        names = [f"{env_name}.zip"]
    else:  # a video of each model
        names = [f"{env_name}.zip", "best_model.zip", "rl_model_*_steps.zip"]
    return lambda folder: any(any(folder.glob(name)) for name in names)


def choose_run_of_options(options: Namespace) -> None:
    """
    Replace ``exp_id`` by that of the run to take, and import the packages that register its environment.

    :param options: Parsed options of a script of the RL Zoo that loads a model.
    :raises ImportError: If a package cannot be imported.
    :raises ValueError: If nothing registers its environment.
    :raises UnsafeFileError: If the run names packages that may have come with it.
    """
    from sb3_clipvf.zoo.run_files import read_settings  # imports torch

    parent = Path(options.folder, options.algo)
    options.exp_id = choose_run(parent, options.env, options.exp_id, model_test(options.env, options))
    settings = parent / f"{options.env}_{options.exp_id}" / options.env / "args.yml"
    if settings.is_file():
        import_packages(read_settings(settings).get("gym_packages"), str(settings))
        _check_registered(options.env.gym_id, settings, hasattr(options, "gym_packages"))


def _check_registered(env_id: str, settings: Path, has_option: bool) -> None:
    """Raise an error that names the environment; the Zoo's would be a KeyError."""
    if env_id not in gym.registry:
        way_out = "Name it by `--gym-packages`, or add it there." if has_option else "Add the module there."
        raise ValueError(
            f"{env_id} not found in gym registry, and `gym_packages` in {settings} names no module that registers it. "
            f"{way_out}"
        )


def import_packages(names: Iterable[Any] | None, where: str) -> None:
    """
    Import packages that register environments.

    :param names: Names of modules, or None.
    :param where: Where they stand, for messages.
    :raises ImportError: If one cannot be imported.
    """
    for name in names or ():
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever the module's own code raises
            text = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ImportError(
                f"`{where}` must name modules that can be imported, got {name!r}: {text}. Correct the name or the "
                "module, install its package, or run the command where its file is."
            ) from error
