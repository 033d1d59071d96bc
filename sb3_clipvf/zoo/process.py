"""The process around the RL Zoo's scripts: environment variables, display, figures, ``ffmpeg`` and child processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.patching import patched


def has_display() -> bool:
    """Return whether windows can be shown: everywhere but on Linux without an X or Wayland display."""
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextmanager
def patched_environment(values: Mapping[str, str], *, replace: bool = False) -> Iterator[None]:
    """Set environment variables in the context. Those that are set already change only with ``replace``."""
    changed = {name: value for name, value in values.items() if replace or name not in os.environ}
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def figures_to_files(name: str) -> Iterator[None]:
    """Write figures to ``<name>_<number>.png`` in the working folder instead of showing them."""
    # The process may have imported matplotlib before its environment variable was set.
    from matplotlib import pyplot as plt

    def save(*args: Any, **kwargs: Any) -> None:
        for number in plt.get_fignums():
            path = Path(f"{name}_{number}.png").resolve()
            plt.figure(number).savefig(path, dpi=150)
            sys.stdout.write(f"No display: figure written to {path}\n")

    plt.switch_backend("Agg")
    try:
        with patched(show=save):
            yield
    finally:
        plt.close("all")


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """Put the ``ffmpeg`` of moviepy on the path if the system has none; scripts start it by name."""
    if shutil.which("ffmpeg") is not None:
        yield
        return
    from imageio_ffmpeg import get_ffmpeg_exe  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ffmpeg").symlink_to(get_ffmpeg_exe())
        path = os.pathsep.join((folder, os.environ.get("PATH", "")))
        with patched_environment({"PATH": path}, replace=True):
            yield


@contextmanager
def one_output() -> Iterator[None]:
    """Discard what processes of ``torchrun`` other than the first one print."""
    from sb3_clipvf.distributed import current_group  # imports torch

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if current_group().rank > 0 else nullcontext():
        yield


@contextmanager
def redirected_calls() -> Iterator[None]:
    """Start this package's commands where the RL Zoo's scripts start their own, which do not support ClipPPO."""
    call = subprocess.call
    with patched(call=lambda command, *args, **kwargs: call(redirected(command), *args, **kwargs)):
        yield


def redirected(command: Any) -> Any:
    """Return this package's equivalent of an RL Zoo command line, and any other command unchanged."""
    match command:
        case ["python", "enjoy.py", *rest]:
            return [sys.executable, "-m", "sb3_clipvf", "enjoy", *rest]
        case ["python", "-m", "rl_zoo3.record_video", *rest]:
            return [sys.executable, "-m", "sb3_clipvf", "record_video", *rest]
    return command
