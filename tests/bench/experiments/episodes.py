"""What is kept of a training's episodes: a curve on a grid of steps, and a short table of the episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sb3_clipvf.zoo.training_curve import TrainingCurve

N_POINTS = 40
WINDOW = 20
LAST_EPISODES = 100
MAX_ROWS = 200
EPISODES = ("step", "return", "episodes", "seconds")
"""Columns of a run's file of episodes."""


def grid(n_timesteps: float) -> np.ndarray:
    """Return ``(N_POINTS,)`` environment steps that divide a training evenly; the last one is its end."""
    return n_timesteps * np.arange(1, N_POINTS + 1) / N_POINTS


def curve_on_grid(curve: TrainingCurve, steps: np.ndarray, window: int = WINDOW) -> list[float | None]:
    """
    Return the mean return of the last ``window`` episodes that had ended by each of the environment steps ``(n,)``.

    Means have 5 significant digits, and are None where no episode had ended.
    """
    # Episodes are in the order of the clock, which the stable sort keeps within one step.
    order = np.argsort(curve.steps, kind="stable")
    returns = curve.returns[order]
    ended = np.searchsorted(curve.steps[order], steps, side="right")
    return [rounded_mean(returns[max(0, n - window) : n]) for n in ended]


def rounded_mean(values: Sequence[float] | np.ndarray) -> float | None:
    """Return the mean to 5 significant digits, or None without values."""
    return float(f"{np.mean(values):.5g}") if len(values) > 0 else None


def binned_episodes(curve: TrainingCurve, n_timesteps: int) -> dict[str, list[float | None]]:
    """
    Return the columns ``EPISODES``, at most ``MAX_ROWS`` rows.

    Up to that number of episodes, each has a row. Otherwise, the training's steps are divided into so many equal parts,
    and a row is a part in which episodes ended: the step and the second of the last end, the mean return, and the
    number of episodes.
    """
    order = np.argsort(curve.steps, kind="stable")
    steps, returns, seconds = curve.steps[order], curve.returns[order], curve.seconds[order]
    parts = np.arange(len(steps))
    if len(steps) > MAX_ROWS:
        last = max(n_timesteps, steps[-1])
        parts = np.minimum(np.ceil(steps * MAX_ROWS / last).astype(np.int64), MAX_ROWS)
    _, first, counts = np.unique(parts, return_index=True, return_counts=True)
    ends = first + counts - 1
    means = np.add.reduceat(returns, first) / counts if len(first) > 0 else np.array([])
    return {
        "step": [round(float(step)) for step in steps[ends]],
        "return": [float(f"{mean:.6g}") for mean in means],
        "episodes": counts.tolist(),
        "seconds": [round(float(second), 1) for second in seconds[ends]],
    }


def unbinned_curve(columns: Mapping[str, np.ndarray]) -> TrainingCurve:
    """Return the curve of a file of episodes, in which all episodes of a row ended together with the row's mean."""
    from sb3_clipvf.zoo.training_curve import TrainingCurve

    counts = columns["episodes"].astype(np.int64)
    steps, returns, seconds = (np.repeat(columns[name], counts) for name in ("step", "return", "seconds"))
    return TrainingCurve(steps, returns, seconds)
