"""Folders of runs: their numbers, which run a command uses, and how to resume it. No torch at import."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, inside the run's folder."""

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class RunId(int):
    """Number of a run; its text includes the suffix of ``-uuid``, so that the RL Zoo finds the run's folder."""

    unique: str

    def __new__(cls, number: int, unique: str = "") -> RunId:
        """Create the number; ``unique`` is the suffix that ``-uuid`` added, or ""."""
        run_id = super().__new__(cls, number)
        run_id.unique = unique
        return run_id

    def __str__(self) -> str:
        return f"{int(self)}_{self.unique}" if self.unique else str(int(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @classmethod
    def parse(cls, text: str) -> RunId:
        """Read ``--exp-id``: a number, or a number with the suffix of ``-uuid``."""
        match = re.fullmatch(rf"(-?\d+)(?:_({_UUID}))?", text)
        if match is None:
            raise ArgumentTypeError(f"must be the number of a run, or <number>_<uuid>, got {text!r}")
        return cls(int(match[1]), match[2] or "")


def choose_run(parent: Path, env_name: str, exp_id: int, has_model: Callable[[Path], bool]) -> int:
    """
    Return the number of the run to use in the algorithm's folder; print a line if it is not the newest run.

    For an ``exp_id`` of 0, or one that several runs of ``-uuid`` share, this is the newest of these runs with the model
    asked for, or the newest if none has it. Otherwise it is ``exp_id``.
    """
    is_exact = isinstance(exp_id, RunId) and exp_id.unique
    if is_exact or exp_id < 0 or (exp_id > 0 and (parent / f"{env_name}_{exp_id}").is_dir()):
        return exp_id
    # RunIds are equal if their numbers are.
    found = [(run_id, parent / f"{env_name}_{run_id}") for run_id in _run_ids(parent, env_name)]
    found = [(run_id, folder) for run_id, folder in found if exp_id in (0, run_id)]
    if not found:
        return exp_id
    newest = found[0][1]
    chosen, folder = next((pair for pair in found if has_model(pair[1])), found[0])
    if folder != newest:
        sys.stdout.write(f"{newest} does not hold the model: using {folder}\n")
    elif exp_id > 0 and len(found) > 1:
        sys.stdout.write(f"{len(found)} runs have the number {exp_id}: using {folder}\n")
    return chosen


def processes_of(arguments: Mapping[str, Any]) -> int:
    """Return the number of processes of a run, from its options in ``args.yml``."""
    number = arguments.get("n_processes")
    return number if type(number) is int and number > 1 else 1


def program(arguments: Mapping[str, Any]) -> str:
    """
    Return the beginning of a command that trains on as many processes as a run, whose options are given.

    Run a command for several machines on each of them, with the name of the first one.
    """
    number, of_machine = processes_of(arguments), arguments.get("n_processes_per_machine")
    if number == 1:
        return "sb3-clipvf"
    machines = f"--standalone --nproc-per-node {number}"
    if type(of_machine) is int and 0 < of_machine < number and number % of_machine == 0:
        machines = (
            f"--nnodes {number // of_machine} --nproc-per-node {of_machine} --rdzv-backend c10d "
            "--rdzv-endpoint first-machine:29500"
        )
    return f"torchrun {machines} -m sb3_clipvf"


def resume_command(folder: Path, arguments: Mapping[str, Any]) -> str:
    """Return the command that resumes a run on as many processes as it began with."""
    return f"{program(arguments)} train --resume {shlex.quote(str(folder))}"


def _run_ids(parent: Path, env_name: str) -> list[RunId]:
    """Return the numbers of an environment's runs, newest first."""
    pattern = re.compile(rf"{re.escape(env_name)}_(\d+)(?:_({_UUID}))?")
    found = []
    for folder in parent.glob(f"{env_name}_*"):
        match = pattern.fullmatch(folder.name)
        if match is not None and folder.is_dir():
            # Later commands write into the run's folder, but not into its settings.
            settings = folder / env_name / "args.yml"
            started = (settings if settings.exists() else folder).stat().st_mtime
            found.append((int(match[1]), started, match[2] or ""))
    return [RunId(number, unique) for number, _, unique in sorted(found, reverse=True)]
