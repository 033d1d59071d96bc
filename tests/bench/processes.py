"""``python -m tests.bench processes``: what one process and two with half the environments each learn per step."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.command import SeedsBenchmark
from tests.bench.experiments.episodes import N_POINTS
from tests.bench.experiments.estimates import difference, estimate, mean, over_seeds
from tests.bench.plots import (
    BLUE,
    VERMILION,
    add_legend,
    add_panels,
    draw_band,
    line_handle,
    mean_band,
    new_figure,
    save_figure,
)
from tests.bench.results import machine, machines_text, markdown_table
from tests.bench.scaling import launched

_STYLES = {1: (BLUE, "-"), 2: (VERMILION, "--")}
_SECONDS = 7200


@dataclass(frozen=True)
class ProcessesRow:
    """A training on a number of processes, which share environments and minibatches evenly."""

    env_id: str
    n_timesteps: int
    n_envs: int
    batch_size: int
    n_processes: int
    normalize: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name for ``--only`` and the results file."""
        return f"{self.env_id}-{self.n_processes}"

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by."""
        return {"name": self.name, "seed": seed, "spec": self.spec(seed)}

    def spec(self, seed: int) -> dict[str, Any]:
        """Return what each process does."""
        shares = {"n_envs": self.n_envs // self.n_processes, "batch_size": self.batch_size // self.n_processes}
        return {
            "env_id": self.env_id,
            "n_timesteps": self.n_timesteps,
            "n_points": N_POINTS,  # of the curve
            "n_envs": shares["n_envs"],
            "normalize": self.normalize,
            "arguments": {**self.arguments, "batch_size": shares["batch_size"], "seed": seed},
        }


_TRAININGS: tuple[dict[str, Any], ...] = (
    {
        "env_id": "CartPole-v1",
        "n_timesteps": 100_000,
        "n_envs": 8,
        "batch_size": 256,
        "arguments": {
            "n_steps": 32,
            "n_epochs": 20,
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "learning_rate": "lin_0.001",
            "clip_range": "lin_0.2",
        },
    },
    {
        "env_id": "LunarLander-v3",
        "n_timesteps": 500_000,
        "n_envs": 16,
        "batch_size": 256,
        "arguments": {"n_steps": 256, "n_epochs": 4, "gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01},
    },
    {
        "env_id": "HalfCheetah-v5",
        "n_timesteps": 300_000,
        "n_envs": 8,
        "batch_size": 256,
        "normalize": True,
        "arguments": {"n_steps": 256},
    },
)
ROWS = tuple(ProcessesRow(**training, n_processes=n) for training in _TRAININGS for n in _STYLES)


class ProcessesBenchmark(SeedsBenchmark[ProcessesRow]):
    """Makes the trainings that are missing, one after the other."""

    name = "processes"
    description = "Train in one process, and in two with half the environments each, and compare their curves."
    log_folder = "logs/bench/processes"
    default_seeds = (1, 2, 3, 4, 5)

    def listed(self, row: ProcessesRow) -> str:
        """Return the steps and the seeds that are done."""
        return f"{row.n_timesteps:>9,} steps  {self.done(row)}"

    def run(self) -> None:
        """Make the missing trainings."""
        for row, seed in self.to_train():
            self._train(row, seed)

    def render(self) -> str:
        """Return the table of mean returns."""
        header = ["environment", "mean return", "1 process", "2 processes", "1 − 2"]
        lines, runs = [], []
        for env_id, by_number in self._by_environment().items():
            runs += [run for found in by_number.values() for run in found]
            for index, (label, key) in enumerate((("whole training", "mean_return"), ("end", "last_return"))):
                values = [over_seeds(run[key] for run in by_number[n]) for n in _STYLES]
                found = [*(estimate(mean, group) for group in values), estimate(difference(mean), *values)]
                n_seeds = min(map(len, by_number.values()))
                first = f"{env_id}, {n_seeds} of {len(self.seeds)} seeds" if index == 0 else ""
                lines.append([first, label, *("" if one is None else one.text("z,.1f") for one in found)])
        notes = (
            "A cell is the mean over the seeds with its 95 % interval (`docs/experiments.md` defines it). *Whole "
            "training* is the mean of the curve's points, *end* is the curve's last point. Each point is the mean "
            "return of the last 100 episodes."
        )
        machines = machines_text(runs, lambda run: "one thread in each process")
        return f"{markdown_table(header, 'llrrr', lines)}\n\n{notes}\n\n{machines}"

    def draw(self, path: Path) -> bool:
        """Draw the mean curves with their intervals, one panel an environment."""
        from matplotlib.ticker import EngFormatter

        panels = self._by_environment()
        if not panels:
            return False
        n_timesteps = {row.env_id: row.n_timesteps for row in self.rows}
        figure = new_figure(3.0 * len(panels), 2.8)
        for axes, (env_id, by_number) in zip(add_panels(figure, len(panels), len(panels)), panels.items(), strict=True):
            axes.set_title(env_id, fontsize="small")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            for n, found in by_number.items():
                band = mean_band(found, n_timesteps[env_id])
                if band is not None:
                    draw_band(axes, band, *_STYLES[n])
        figure.supxlabel("environment steps of all processes", fontsize="small")
        figure.supylabel("mean return of 100 episodes", fontsize="small")
        labels = {n: "1 process" if n == 1 else f"{n} processes" for n in _STYLES}
        add_legend(figure, [line_handle(labels[n], *style) for n, style in _STYLES.items()])
        save_figure(figure, path)
        return True

    def _by_environment(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for row in self.rows:
            found.setdefault(row.env_id, {})[row.n_processes] = self.runs_of(row)
        return {env_id: by_number for env_id, by_number in found.items() if any(by_number.values())}

    def _train(self, row: ProcessesRow, seed: int) -> None:
        label, log = f"{row.name}, seed {seed}", self.args.log_folder / f"{row.name}-{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            curve = launched(row.n_processes, row.spec(seed), log, seconds=_SECONDS)["curve"]
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.failed[label] = f"{error}, see {log}"
            print(f"{label}: FAILED, {self.failed[label]}", flush=True)
            return
        known = [value for value in curve if value is not None]
        returns = {"mean_return": float(np.mean(known)), "last_return": known[-1]}
        self.results.add({**row.run(seed), "curve": curve, **returns, **machine()})
        print(f"{label}: mean return {returns['mean_return']:.1f}, at the end {known[-1]:.1f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return ProcessesBenchmark(ROWS, argv).main()
