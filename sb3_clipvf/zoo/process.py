"""State of the process and errors: pieces of the console command that know neither the sub-commands nor ClipPPO."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gymnasium.error import Error as GymnasiumError

# Package, what its absence looks like in an error, and what to install.
_OPTIONAL_PACKAGES = (
    ("Box2D", r"box2d", "'sb3_clipvf[box2d]'"),
    ("mujoco", r"mujoco", "'sb3_clipvf[mujoco]'"),
    ("envpool", r"envpool", "'sb3_clipvf[envpool]'"),
    ("ale_py", r"ALE/|NoFrameskip-v|Deterministic-v|ale_py", "'sb3_clipvf[atari]'"),
    ("wandb", r"wandb", "'sb3_clipvf[tracking]'"),
    ("minigrid", r"MiniGrid-|BabyAI-|minigrid", "'sb3_clipvf[minigrid]'"),
    ("pybullet_envs_gymnasium", r"BulletEnv-v|pybullet_envs", "'sb3_clipvf[pybullet]'"),
    ("panda_gym", r"Panda\w+-v", "panda_gym"),
)

_INPUT_ERRORS = (ValueError, TypeError, ImportError, AssertionError, OSError, GymnasiumError)
_INPUT_CHECKERS = ("sb3_clipvf", "rl_zoo3", "stable_baselines3", "gymnasium", "huggingface_hub", "huggingface_sb3")


def has_display() -> bool:
    """
    Return whether windows can be shown.

    :return: False on Linux without an X or Wayland display, else True.
    """
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextmanager
def patched_environment(values: Mapping[str, str], *, replace: bool = False) -> Iterator[None]:
    """
    Set environment variables in the context, and in the processes that are started there.

    :param values: Names and values.
    :param replace: Whether to replace values that are set already; they come back.
    """
    changed = {name: value for name, value in values.items() if replace or name not in os.environ}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def patched_argv(argv: list[str]) -> Iterator[None]:
    """
    Replace ``sys.argv``, which the RL Zoo's parsers read.

    :param argv: Program name and arguments.
    """
    before = sys.argv
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def importable_working_folder() -> Iterator[None]:
    """Find modules in the working folder too, as ``python -m`` does, behind those that are installed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def figures_to_files(name: str) -> Iterator[None]:
    """
    Without a display, write figures to the working folder where they would have been shown.

    :param name: First part of the files' names.
    """
    # Choosing the backend here serves a process that imported matplotlib before the environment was set.
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    show = plt.show

    def save(*args: Any, **kwargs: Any) -> None:
        for number in plt.get_fignums():
            path = Path(f"{name}_{number}.png").resolve()
            plt.figure(number).savefig(path, dpi=150)
            sys.stdout.write(f"No display: figure written to {path}\n")

    plt.show = save
    try:
        yield
    finally:
        plt.show = show
        plt.close("all")


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """Offer the ``ffmpeg`` that comes with moviepy to scripts that start the program by its name and find none."""
    if shutil.which("ffmpeg") is not None:
        yield
        return
    from imageio_ffmpeg import get_ffmpeg_exe  # type: ignore[import-untyped]

    before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ffmpeg").symlink_to(get_ffmpeg_exe())
        os.environ["PATH"] = os.pathsep.join((folder, before))
        try:
            yield
        finally:
            os.environ["PATH"] = before


def own_command(command: Any) -> Any:
    """
    Turn a command line that the RL Zoo starts into one that knows ClipPPO.

    :param command: What ``subprocess.call`` was given.
    :return: ``python -m sb3_clipvf enjoy|record_video ...`` with this interpreter, or ``command`` if it is another.
    """
    match command:
        case ["python", "enjoy.py", *rest]:
            return [sys.executable, "-m", "sb3_clipvf", "enjoy", *rest]
        case ["python", "-m", "rl_zoo3.record_video", *rest]:
            return [sys.executable, "-m", "sb3_clipvf", "record_video", *rest]
    return command


@contextmanager
def own_subprocesses() -> Iterator[None]:
    """Make processes that the RL Zoo's scripts start know ClipPPO, by :func:`own_command`."""
    call = subprocess.call

    def own_call(command: Any, *args: Any, **kwargs: Any) -> int:
        return call(own_command(command), *args, **kwargs)

    subprocess.call = own_call  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.call = call


def explain(error: Exception) -> str | None:
    """
    Return the message of an error of input.

    :param error: As it was raised.
    :return: Text for the user, or None for a fault, whose traceback is needed.
    """
    # Notes tell of a training that had begun: where it broke is then worth more than a short message.
    if getattr(error, "__notes__", ()):
        return None
    missing = _missing_package(error)
    if missing is not None:
        return missing
    modules = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, (ImportError, OSError)):
        # Python's own library raises these for what it was asked for.
        modules = [name for name in modules if not _is_of_python(name)]
    if isinstance(error, _INPUT_ERRORS) and modules and _checks_input(Path(modules[-1])):
        return _text(error)
    return None


def _text(error: Exception) -> str:
    # Where there is no file, the text was made for the user, and the number says nothing more.
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _is_of_python(module: str) -> bool:
    folder = sysconfig.get_path("stdlib")
    return module.startswith("<frozen ") or (Path(module).is_relative_to(folder) and "site-packages" not in module)


def _checks_input(module: Path) -> bool:
    specs = (importlib.util.find_spec(package) for package in _INPUT_CHECKERS)
    folders = [folder for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()]
    return any(module.is_relative_to(folder) for folder in folders)


def _missing_package(error: Exception) -> str | None:
    text = str(error)
    # The Zoo looks an unknown environment up in a dict: KeyError. Other errors of value only mention what they name.
    if isinstance(error, ValueError):
        unknown = re.match(r"\S+ not found in gym registry", text)
        missing = unknown[0] if unknown else ""
    else:
        missing = text if isinstance(error, (ImportError, KeyError, GymnasiumError)) else ""
    for package, pattern, requirement in _OPTIONAL_PACKAGES:
        if re.search(pattern, missing, re.IGNORECASE) and importlib.util.find_spec(package) is None:
            return f"the package {package} must be installed for this. Run `pip install {requirement}`. ({text})"
    return None
