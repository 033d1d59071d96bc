"""
``python -m tests.bench critic``: what clipping the value loss does to the critic, update by update.

docs/value_clipping.md explains the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateStatistics
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize
from tests.bench.command import InProcessBenchmark
from tests.bench.experiments.candidates import InnerUpdate, UpdateCallback, predicted_values
from tests.bench.experiments.episodes import WINDOW
from tests.bench.experiments.suite_file import read_suite
from tests.bench.plots import (
    BLACK,
    BLUE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    add_legend,
    add_panels,
    line_handle,
    new_figure,
    save_figure,
)
from tests.bench.results import digest, machines_text, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_TIMESTEPS = 100_000
ENV_IDS = ("Acrobot-v1", "InvertedDoublePendulum-v5", "Hopper-v5", "Swimmer-v5")
EARLY = 0.2
"""Share of the updates that the table calls early."""
LAG = 0.5
"""Mean error, as a share of σ, above which an update counts as one of a lagging critic."""
SMOOTHED = 3
"""Updates of a moving mean in the figure."""

_COMMON: dict[str, Any] = {"clip_range": 0.2, "clip_range_vf": None, "vf_clip": "max", "vf_clip_units": "return_std"}
"""Arguments that all settings have unless they change them."""

# Title, changes of the arguments, color and line style
SETTINGS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "none": ("none", {}, BLACK, "-"),
    "max-3": ("max, 3", {"clip_range_vf": 3.0}, SKY_BLUE, "-."),
    "max-1": ("max, 1", {"clip_range_vf": 1.0}, BLUE, "--"),
    "max-0.2": ("max, 0.2", {"clip_range_vf": 0.2}, VERMILION, "-"),
    "prediction-0.2": ("prediction, 0.2", {"clip_range_vf": 0.2, "vf_clip": "prediction"}, PURPLE, "--"),
}
PANELS = {"error": "error / σ", "no_gradient": "without gradient", "return": "return"}
"""Rows of the figure, and their labels."""

NUMBERS = ("error", "bias", "beyond", "no_gradient", "change", "return")
"""What is kept of each update."""


@dataclass(frozen=True)
class Row:
    """An environment and a setting, trained with each seed."""

    env_id: str
    setting: str

    @property
    def name(self) -> str:
        """Name for ``--only`` and the results file."""
        return f"{self.env_id}-{self.setting}"

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by, with a digest of all settings."""
        settings = {"env_id": self.env_id, "window": WINDOW, **self.settings()}
        return {"name": self.name, "seed": seed, "n_timesteps": N_TIMESTEPS, "digest": digest(settings)}

    def settings(self) -> dict[str, Any]:
        """Return the settings of the training: those of the suite ``defaults`` and the row's own."""
        return {**_settings_of(self.env_id), **_COMMON, **SETTINGS[self.setting][1]}


@functools.cache
def _settings_of(env_id: str) -> Mapping[str, Any]:
    (environment,) = read_suite("defaults").only([env_id], None).environments
    return environment.settings


ROWS = tuple(Row(env_id, setting) for env_id in ENV_IDS for setting in SETTINGS)

_NOTES = (
    "σ is the standard deviation of a rollout's returns, *error* the root mean square of R − V_old, *change* that "
    f"of V − V_old at the end of an update. *Lagging*: updates that begin with a mean of R − V_old beyond {LAG:g} "
    "σ. *Target beyond the range*: share of the transitions with |R − V_old| > ε. *No gradient*: share of the "
    "transitions without a gradient of the value loss at the end of an update. Two numbers are means over the "
    f"first {EARLY:.0%} of the updates and over the others. *Return*: of the last {WINDOW} episodes, mean over all "
    "updates, with the smallest and the largest value of the seeds. All cells are means over the seeds."
)


class CriticRecorder(UpdateCallback):
    """Measures the critic before and after each update; ``numbers`` has a list for each of ``NUMBERS``."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, list[float | None]] = {name: [] for name in NUMBERS}

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update, and measure."""
        epsilon, vf_clip = coefficients.clip_range_vf, self.engine.settings.vf_clip
        returns, old_values = buffer.returns.copy(), buffer.values.copy()
        statistics = inner(buffer, coefficients)
        values = predicted_values(self.engine, buffer)
        errors, sigma = returns - old_values, float(np.std(returns))
        episodes = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        numbers = {
            "error": rms(errors) / sigma,
            "bias": float(np.mean(errors)) / sigma,
            "beyond": None if epsilon is None else share(np.abs(errors) > epsilon),
            "no_gradient": share(lacks_gradient(values, old_values, returns, epsilon, vf_clip)),
            "change": rms(values - old_values) / sigma,
            "return": float(np.mean(episodes)) if episodes else None,
        }
        for name, number in numbers.items():
            self.numbers[name].append(None if number is None else float(f"{number:.4g}"))
        return statistics


def lacks_gradient(
    values: np.ndarray, old_values: np.ndarray, returns: np.ndarray, epsilon: float | None, vf_clip: str
) -> np.ndarray:
    """Return whether the value loss of each transition has no gradient, by the form of the clip."""
    if epsilon is None:
        return np.zeros(values.shape, bool)
    outside = np.abs(values - old_values) > epsilon
    if vf_clip == "prediction":
        return np.asarray(outside)
    clipped = old_values + np.clip(values - old_values, -epsilon, epsilon)
    return np.asarray(outside & (np.abs(clipped - returns) > np.abs(values - returns)))


def share(mask: np.ndarray) -> float:
    """Return the share of True."""
    return float(np.mean(mask))


def rms(array: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(array))))


class CriticBenchmark(InProcessBenchmark[Row]):
    """Trains each row with each seed in this process, and tabulates and draws what the critic did."""

    name = "critic"
    description = "Measure what clipping the value loss does to the critic."
    log_folder = "logs/bench/critic"
    default_seeds = (0, 1)

    def listed(self, row: Row) -> str:
        """Return the seeds that are done."""
        return self.done(row)

    def train(self, row: Row, seed: int) -> dict[str, Any]:
        """Train a row with a seed, and return what the critic did."""
        return train(row, seed)

    def render(self) -> str:
        """Return the table of all rows."""
        header = ["environment", "form, range", "error / σ", "lagging", "target beyond the range", "no gradient"]
        header += ["change / σ", "return"]
        cells = [_cells(row, self.runs_of(row)) for row in self.rows]
        how = f"seeds {' '.join(map(str, self.seeds))}, one thread"
        all_runs = [run for row in self.rows for run in self.runs_of(row)]
        table = markdown_table(header, "llrrrrrr", cells)
        return f"{table}\n\n{_NOTES}\n\n{machines_text(all_runs, lambda _: how)}"

    def draw(self, path: Path) -> bool:
        """Draw the critic and the returns over the training, one column for each environment."""
        figure = new_figure(10.0, 6.0)
        panels = iter(add_panels(figure, len(PANELS) * len(ENV_IDS), len(ENV_IDS)))
        for line, (name, label) in enumerate(PANELS.items()):
            for column, env_id in enumerate(ENV_IDS):
                axes = next(panels)
                self._draw_panel(axes, env_id, name)
                axes.set_title(env_id if line == 0 else "", fontsize="small")
                axes.set_ylabel(label if column == 0 else "", fontsize="small")
        figure.supxlabel("environment steps", fontsize="small")
        add_legend(figure, [line_handle(title, color, style) for title, _, color, style in SETTINGS.values()])
        save_figure(figure, path)
        return True

    def _draw_panel(self, axes: Axes, env_id: str, name: str) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(0, N_TIMESTEPS)
        for setting, (_, _, color, style) in SETTINGS.items():
            runs = self.runs_of(Row(env_id, setting))
            if runs:
                values = np.mean([_moving_mean(run["updates"][name]) for run in runs], axis=0)
                x = N_TIMESTEPS * np.arange(1, len(values) + 1) / len(values)
                axes.plot(x, values, color=color, linestyle=style, linewidth=1.2)


def train(row: Row, seed: int) -> dict[str, Any]:
    """Train a row with a seed, and return the numbers of its updates."""
    settings = row.settings()
    n_envs, normalizes = settings.pop("n_envs", 1), settings.pop("normalize", False)
    env: Any = make_vec_env(row.env_id, n_envs=n_envs, seed=seed, vec_env_cls=FastDummyVecEnv)
    if normalizes:
        env = FastVecNormalize(env, gamma=settings.get("gamma", 0.99))
    model = ClipPPO("MlpPolicy", env, seed=seed, device="cpu", stats_window_size=WINDOW, **settings)
    recorder = CriticRecorder()
    model.learn(N_TIMESTEPS, callback=recorder)
    return {"updates": recorder.numbers}


def _cells(row: Row, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    first = [row.env_id if row.setting == next(iter(SETTINGS)) else "", SETTINGS[row.setting][0]]
    if not runs:
        return [*first, "not run", *[""] * 5]
    numbers = {name: np.array([run["updates"][name] for run in runs], float) for name in NUMBERS}
    n_updates = numbers["error"].shape[1]
    n_early = max(1, round(EARLY * n_updates))
    lagging = np.mean(np.sum(np.abs(numbers["bias"]) > LAG, axis=1))
    cells = {"lagging": f"{lagging:.0f} of {n_updates}"}
    for name, form in {"error": ".2f", "beyond": ".0%", "no_gradient": ".0%", "change": ".2f"}.items():
        parts = (numbers[name][:, :n_early], numbers[name][:, n_early:])
        cells[name] = "" if np.isnan(parts[0]).all() else "; ".join(f"{np.mean(part):{form}}" for part in parts)
    means = np.nanmean(numbers["return"], axis=1)
    returns = f"{np.mean(means):,.0f} ({min(means):,.0f} to {max(means):,.0f})".replace("-", "−")
    return [*first, *(cells[name] for name in ("error", "lagging", "beyond", "no_gradient", "change")), returns]


def _moving_mean(values: Sequence[float | None]) -> np.ndarray:
    """Return means of the last updates, NaN before the first known value."""
    numbers = np.array(values, float)
    windows = [numbers[max(0, end - SMOOTHED) : end] for end in range(1, len(numbers) + 1)]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return CriticBenchmark(ROWS, argv).main()
