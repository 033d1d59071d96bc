"""The models that ``record_training`` records, and the folder of its videos, which the RL Zoo deletes first."""

import os
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sb3_clipvf.checkpoint.file import checkpoint_paths
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.model_choice import has_model
from sb3_clipvf.zoo.patching import patched
from sb3_clipvf.zoo.run_folders import CHECKPOINTS


@contextmanager
def recorded_training(options: Namespace) -> Iterator[None]:
    """Make the RL Zoo's script record checkpoints, too, to an unused folder; raise OSError if it writes no video."""
    numbered = [f"{options.env}_{options.exp_id}"] if options.exp_id > 0 else []
    run = os.path.join(options.folder, options.algo, *numbered)  # as the script writes it
    if not has_model(options.env, options)(Path(run)):
        raise ValueError(f"`--env` must be an environment whose run has a model, got {options.env} with none in {run}.")
    options.output_folder = folder = _output_folder(options.output_folder, Path(run, "videos"))
    options.deterministic = options.deterministic or None  # the script passes the option on unless it is None
    names = {f"rl_model_{steps}_steps.zip" for steps in checkpoint_paths(Path(run, CHECKPOINTS)).values()}
    names = {name for name in names if options.algo == ALGORITHM and not Path(run, name).exists()}
    scandir = os.scandir

    def with_checkpoints(path: Any = ".") -> Any:
        if path != run:
            return scandir(path)
        return [*scandir(path), *(SimpleNamespace(name=name, is_file=lambda: True) for name in names)]

    missing = None
    try:
        with patched(models_of_run=with_checkpoints):
            yield
    except FileNotFoundError as error:  # the script removes parts that ffmpeg has not written
        missing = error.filename
    for name in ("training.mp4", "training.gif")[: 1 + options.gif]:
        if missing is None and not Path(folder, name).is_file():
            missing = Path(folder, name)
    if missing is not None:
        raise OSError(
            f"ffmpeg has not written {missing}. Its messages are above; {folder} has the videos of the models."
        )


def _output_folder(given: str | None, videos: Path) -> str:
    """Return the absolute path of the folder to record into: the one given, or a new one in ``videos``."""
    unused = (videos / f"training_{number}" for number in count(1))
    folder = os.path.abspath(next(path for path in unused if not path.exists()) if given is None else given)
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(
            f"`--output-folder` must be a new or an empty folder, since its files would be deleted, got {given!r}, "
            "which has files. Pass another one, or omit it."
        )
    # The script does not quote it. `shlex.quote` quotes more than a shell needs: ~ within a word, and all but ASCII.
    plain = folder.encode("ascii", "ignore").decode().replace("~", "")
    if shlex.quote(plain) != plain:
        raise ValueError(
            f"`--output-folder` must be a path without spaces and special characters of the shell, got {folder!r}. "
            "Pass one by `-o`."
        )
    return folder
