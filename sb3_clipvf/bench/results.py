"""Results of ``sb3-clipvf bench learning``: the rows that are measured, the JSON file of runs, the Markdown table."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """
    One line of the table: an environment and settings, trained with each seed.

    :param name: name for ``--only``, the file names and the table
    :param env_id: the environment's id
    :param n_timesteps: environment steps of training
    :param goal: mean return to reach, in reward units
    :param comparison: what others reach, with its source
    :param params: changes to the shipped settings, as ``-params`` takes them
    :param n_episodes: episodes of the evaluation; more where the returns of one policy differ much
    :param algo: the algorithm's name in the RL Zoo
    """

    name: str
    env_id: str
    n_timesteps: int
    goal: float
    comparison: str
    params: tuple[str, ...] = ()
    n_episodes: int = 20
    algo: str = "clipppo"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """
    Describe where a run was made.

    :return: CPU model, number of cores, system, and versions of Python and of the packages that decide on the numbers
    """
    versions = {"python": platform.python_version()}
    for package in ("sb3_clipvf", "stable_baselines3", "rl_zoo3", "gymnasium", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    if "sb3_clipvf" not in versions:  # run from a source tree that is not installed
        import sb3_clipvf

        versions["sb3_clipvf"] = sb3_clipvf.__version__
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


class Results:
    """
    The JSON file of results: a list of runs, each with its row, seed, settings, returns and machine.

    :param path: the file; its folder is made
    :raises ValueError: where the file holds something else
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = self._read(path)

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            return list(content["runs"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`--out` must be a results file of this benchmark (format {_FORMAT}) or a new one, but {path} holds "
                f"something else ({type(error).__name__}: {error}). Move it away, or name another file."
            ) from error

    def find(self, row: Row, seed: int) -> dict[str, Any] | None:
        """
        Find the result of a run.

        :param row: the row
        :param seed: the seed
        :return: the result, None where there is none or it was made with other settings of the row
        """
        settings = settings_of(row)
        for run in self.runs:
            if run["name"] == row.name and run["seed"] == seed:
                return run if all(run.get(key) == value for key, value in settings.items()) else None
        return None

    def add(self, run: dict[str, Any]) -> None:
        """
        Put a result in the place of an older one of the same row and seed, and write the file.

        :param run: the result
        :raises OSError: where the file cannot be written; it then holds what it held before
        :raises ValueError: where it holds something else by now
        """
        from sb3_clipvf.checkpoint import atomic_write

        # Read again: another benchmark may have added to the file since.
        others = [
            other for other in self._read(self.path) if (other["name"], other["seed"]) != (run["name"], run["seed"])
        ]
        self.runs = sorted([*others, run], key=lambda r: (r["name"], r["seed"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(json.dumps({"format": _FORMAT, "runs": self.runs}, indent=1, default=str).encode() + b"\n")


def settings_of(row: Row) -> dict[str, Any]:
    """
    List what decides on a run's result, apart from the shipped settings: a result made with other values is stale.

    :param row: the row
    :return: those of its fields, as JSON gives them back
    """
    values = asdict(row)
    return {key: values[key] for key in ("env_id", "n_timesteps", "n_episodes", "algo")} | {"params": [*row.params]}


def render_table(results: Results, rows: Sequence[Row], seeds: Sequence[int], command: str) -> str:
    """
    Render results as a Markdown table.

    :param results: the results
    :param rows: the table's lines, in order
    :param seeds: its columns
    :param command: the command that makes the table again
    :return: Markdown text
    """
    header = ["environment and settings", "steps", *(f"seed {seed}" for seed in seeds), "mean", "goal", "reached"]
    header += ["others (RL Zoo)"]
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 3) + ["---", "---"])]
    machines: set[str] = set()
    for row in rows:
        runs = [results.find(row, seed) for seed in seeds]
        done = [run for run in runs if run is not None]
        machines |= {_machine_text(run) for run in done}
        cells = [f"{run['mean_return']:.2f} ± {run['std_return']:.2f}" if run else "" for run in runs]
        mean = float(np.mean([run["mean_return"] for run in done])) if done else None
        settings = f"{row.name}<br>`{' '.join(row.params)}`" if row.params else row.name
        lines.append(
            " | ".join(
                [settings, f"{row.n_timesteps:,}", *cells, "" if mean is None else f"{mean:.2f}", f"{row.goal:g}"]
                + [_reached(row, runs, mean), row.comparison]
            )
        )
    table = "\n".join(f"| {line} |" for line in lines)
    notes = (
        "A cell is the mean return ± one standard deviation over the evaluation's episodes (20, or 100 for Pendulum, "
        "Acrobot and LunarLander) of the final model, most probable actions, environment's own rewards. *mean* is over "
        "the seeds; *reached* compares it with the goal, and counts the seeds that reach it alone."
    )
    made = "".join(f"- {text}\n" for text in sorted(machines))
    return f"Made by `{command}`.\n\n{table}\n\n{notes}\n\nMachines and versions:\n\n{made}"


def _reached(row: Row, runs: Sequence[dict[str, Any] | None], mean: float | None) -> str:
    done = [run for run in runs if run is not None]
    if mean is None:
        return "not run"
    alone = f"{sum(run['mean_return'] >= row.goal for run in done)} of {len(done)}"
    verdict = "yes" if mean >= row.goal else "no"
    missing = len(runs) - len(done)
    return f"{verdict} ({alone})" if missing == 0 else f"{verdict} so far ({alone}, {missing} to run)"


def _machine_text(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return f"{run['cpu']}, {run['cores']} cores, {run['jobs']} runs side by side, one thread each; {versions}"
