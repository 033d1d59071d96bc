"""The training log in the folder of a run: ``progress.json``, in the format of SB3's logger."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common import utils
from stable_baselines3.common.logger import JSONOutputFormat, Logger

from sb3_clipvf.zoo.patching import patched

LOG_FILE = "progress.json"
"""SB3's own name for a log in this format."""


@contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Also write the log of runs that begin in the context to a file in a folder, one row of JSON each time."""
    configure_logger = utils.configure_logger
    opened: list[tuple[Logger, JSONOutputFormat]] = []

    def configured(*args: Any, **kwargs: Any) -> Logger:
        logger = configure_logger(*args, **kwargs)
        output = _AppendedRows(folder / LOG_FILE)
        logger.output_formats.append(output)
        opened.append((logger, output))
        return logger

    try:
        with patched(configure_logger=configured):
            yield
    finally:
        for logger, output in opened:
            logger.output_formats.remove(output)
            output.close()


class _AppendedRows(JSONOutputFormat):
    """SB3's output, but for a file that may exist: a resumed run adds its rows."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", encoding="utf-8")
