"""Files of a report: each format by the suffix of its name, written when all of it is complete."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.zoo.comparison.groups import Group, printable
from sb3_clipvf.zoo.comparison.page import page
from sb3_clipvf.zoo.comparison.summary import csv_table, latex_table, markdown_table

FIGURES = (".png", ".svg", ".pdf")
TABLES: dict[str, Callable[[Sequence[Group]], str]] = {".csv": csv_table, ".md": markdown_table, ".tex": latex_table}
SUFFIXES = (".html", *FIGURES, *TABLES)


def check_outputs(paths: Sequence[Path]) -> None:
    """
    Check the names of a report's files, before anything is read.

    :raises ValueError: If a suffix is unknown, or a folder does not exist.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"`-o` must end in one of {', '.join(SUFFIXES)}, got {path}. Change its ending.")
        if path.is_dir() or not path.parent.is_dir():
            reason = "which is a folder" if path.is_dir() else f"but there is no folder {path.parent}"
            raise ValueError(f"`-o` must be a file in a folder that exists, got {path}, {reason}. Change the path.")


def write_outputs(groups: Sequence[Group], problems: Sequence[str], command: str, paths: Sequence[Path]) -> None:
    """Write a report in the formats of the paths, each atomically."""
    for path in paths:
        if path.suffix == ".html":
            content = printable(page(groups, problems, command)).encode()
        elif path.suffix in TABLES:
            content = printable(TABLES[path.suffix](groups)).encode()
        else:
            content = _figure(groups, path.suffix)
        with atomic_write(path) as file:
            file.write(content)


def _figure(groups: Sequence[Group], suffix: str) -> bytes:
    from sb3_clipvf.zoo.comparison.figure import learning_curves  # imports matplotlib

    content = io.BytesIO()
    learning_curves(groups).savefig(content, format=suffix.removeprefix("."), dpi=150)
    return content.getvalue()
