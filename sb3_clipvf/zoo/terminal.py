"""Output of a training run on the terminal: a table every few seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.logger import HumanOutputFormat

from sb3_clipvf.zoo.patching import patched

TABLE_SECONDS = 5.0
"""Minimum time between two tables, seconds."""


@contextmanager
def timed_tables() -> Iterator[None]:
    """
    Print SB3's tables of numbers at most every ``TABLE_SECONDS``, each with the newest numbers, and one at the end.

    Numbers of an evaluation are shown once. Files and TensorBoard get every row.
    """
    write = HumanOutputFormat.write
    values: dict[str, Any] = {}
    excluded: dict[str, tuple[str, ...]] = {}
    held: list[tuple[HumanOutputFormat, int]] = []
    due = time.monotonic()

    def print_held() -> None:
        nonlocal due
        for output, step in held:
            write(output, values, excluded, step)
            due = time.monotonic() + TABLE_SECONDS
            for key in [key for key in values if key.startswith("eval/")]:
                del values[key], excluded[key]
        held.clear()

    def write_if_due(
        output: HumanOutputFormat, row: dict[str, Any], row_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        if output.own_file:
            write(output, row, row_excluded, step)
            return
        # An evaluation writes a row of its own, without most numbers of training.
        values.update(row)
        excluded.update(row_excluded)
        held[:] = [(output, step)]
        if time.monotonic() >= due:
            print_held()

    try:
        with patched(write_table=write_if_due):
            yield
    finally:
        print_held()
