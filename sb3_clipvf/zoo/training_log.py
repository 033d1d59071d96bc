"""The training log in the folder of a run: ``progress.json``, in the format of SB3's logger."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common import utils
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import JSONOutputFormat, Logger

from sb3_clipvf.distributed import current_group
from sb3_clipvf.zoo.patching import patched

LOG_FILE = "progress.json"
"""SB3's own name for a log in this format."""


@contextmanager
def logged_to(folder: Path, resumed: BaseAlgorithm | None = None) -> Iterator[None]:
    """
    Also write the log of runs that begin in the context to a file in a folder, one row of JSON each time.

    ``resumed`` is the model of a resumed run: rows of later steps than its own are removed.
    """
    configure_logger = utils.configure_logger
    opened: list[tuple[Logger, JSONOutputFormat]] = []

    def add_output(logger: Logger) -> None:
        output = _AppendedRows(folder / LOG_FILE)
        logger.output_formats.append(output)
        opened.append((logger, output))

    def configured(*args: Any, **kwargs: Any) -> Logger:
        logger = configure_logger(*args, **kwargs)
        add_output(logger)
        return logger

    try:
        if resumed is not None and current_group().rank == 0:
            _remove_rows_after(resumed.num_timesteps, folder / LOG_FILE)
            if resumed._custom_logger:  # that of its TensorBoard run: `learn` configures no other one
                add_output(resumed.logger)
        with patched(configure_logger=configured):
            yield
    finally:
        for logger, output in opened:
            logger.output_formats.remove(output)
            output.close()


def _remove_rows_after(num_timesteps: int, path: Path) -> None:
    """Remove the rows that a resumed run writes again, and a last one that a kill has cut."""
    if not path.exists():
        return
    length = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or _steps(line) > num_timesteps:
                break
            length += len(line)
        file.truncate(length)


def _steps(line: bytes) -> int:
    try:
        return int(json.loads(line).get("time/total_timesteps", 0))
    except (ValueError, AttributeError, TypeError):  # damaged: the report skips it
        return 0


class _AppendedRows(JSONOutputFormat):
    """SB3's output, but for a file that may exist: a resumed run adds its rows."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", encoding="utf-8")
