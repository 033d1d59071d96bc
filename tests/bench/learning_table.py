"""The learning benchmark's table: the rows that are measured, and how their results are rendered in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench import training_runs
from tests.bench.results import Results, machine_text


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
    :param vec_env: kind of the training environments, as ``--vec-env`` takes it; evaluation has Gymnasium's
    """

    name: str
    env_id: str
    n_timesteps: int
    goal: float
    comparison: str
    params: tuple[str, ...] = ()
    n_episodes: int = 20
    vec_env: str = "dummy"


def run_of(row: Row, seed: int) -> dict[str, Any]:
    """
    List by what a row's result is found.

    :param row: the row
    :param seed: the seed
    :return: the key, and what decides on the result
    """
    return {**training_runs.run_of(row, seed), "n_episodes": row.n_episodes}


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
        runs = [results.find(run_of(row, seed)) for seed in seeds]
        done = [run for run in runs if run is not None]
        machines |= {machine_text(run, f"{run['jobs']} runs side by side, one thread each") for run in done}
        cells = [f"{run['mean_return']:.2f} ± {run['std_return']:.2f}" if run else "" for run in runs]
        mean = float(np.mean([run["mean_return"] for run in done])) if done else None
        options = [*row.params, *(["--vec-env", row.vec_env] if row.vec_env != "dummy" else [])]
        settings = f"{row.name}<br>`{' '.join(options)}`" if options else row.name
        lines.append(
            " | ".join(
                [settings, f"{row.n_timesteps:,}", *cells, "" if mean is None else f"{mean:.2f}", f"{row.goal:g}"]
                + [_reached(row, runs, mean), row.comparison]
            )
        )
    table = "\n".join(f"| {line} |" for line in lines)
    notes = (
        "A cell is the mean return ± one standard deviation over the evaluation's episodes (20, or 100 where returns "
        "differ much) of the final model, most probable actions, environment's own rewards. *mean* is over "
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
