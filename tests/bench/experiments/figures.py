"""The figures of a report: differences to the baseline, learning curves, and performance profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.experiments.episodes import WINDOW, curve_on_grid, grid
from tests.bench.experiments.estimates import difference, interval, iqm, performance_profile
from tests.bench.experiments.finished import MEASURES, FinishedRun, SuiteRuns
from tests.bench.experiments.scores import Scores, SuiteScores
from tests.bench.plots import (
    BLACK,
    PALETTE,
    Band,
    add_legend,
    add_panels,
    band_of,
    draw_band,
    line_handle,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sb3_clipvf.zoo.training_curve import TrainingCurve

CAPTIONS = {
    "": "Difference to the baseline in normalised scores: interquartile mean and 95 % interval, from three seeds on",
    "-curves": f"Return of the last {WINDOW} training episodes: interquartile mean over the seeds and 95 % interval",
    "-time": "Curves of the runs that were not resumed, against processor time summed over all threads",
    "-profiles": "Share of the runs whose normalised score is above each value, and 95 % interval",
}
"""Captions of the kinds of figures, which are the ends of their files' names."""

_STYLES = ("-", "--", "-.", ":")
_MOST_SHEETS = 9
StepScale = Callable[[FinishedRun], float | None]
"""Length of a run's environment step on an axis, or None if it is not known."""

_THRESHOLDS = np.linspace(0, 1.5, 61)


@dataclass(frozen=True)
class Drawn:
    """A figure of one of the kinds of ``CAPTIONS``, and its file."""

    kind: str
    path: Path


def write_figures(scores: SuiteScores, name: str) -> list[Drawn]:
    """
    Draw all figures for which there are data into ``<name>[-<baseline>]<kind>[-<sheet>].png`` beside the table.

    The suite's own baseline is not in the name. With many settings, each figure is several ones, see :func:`sheets`.
    """
    drawn = []
    for number, sheet in enumerate(sheets(scores), 1):
        figures = {
            "": _differences(sheet),
            "-curves": _curves(sheet, "environment steps", lambda run: 1.0),
            "-time": _curves(sheet, "processor time (s)", FinishedRun.seconds_per_step),
            "-profiles": _profiles(sheet),
        }
        for kind, figure in figures.items():
            if figure is not None:
                path = _path(scores.runs, name, scores.suite.baseline, kind, number)
                save_figure(figure, path)
                drawn.append(Drawn(kind, path))
    return sorted(drawn, key=lambda one: list(CAPTIONS).index(one.kind))


def remove_figures(runs: SuiteRuns, name: str) -> None:
    """Remove the figures of an earlier report, which may have had more."""
    for family in runs.suite.families():
        for kind in CAPTIONS:
            for number in range(1, _MOST_SHEETS + 1):
                _path(runs, name, family.baseline, kind, number).unlink(missing_ok=True)


def _path(runs: SuiteRuns, name: str, baseline: str, kind: str, number: int) -> Path:
    family = "" if baseline == runs.suite.baseline else f"-{baseline}"
    return runs.path.with_name(f"{name}{family}{kind}{f'-{number}' if number > 1 else ''}.png")


@dataclass(frozen=True)
class Sheet:
    """The settings of one figure: the baseline if it has runs, and at most one for each other colour."""

    scores: SuiteScores
    others: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """Names of the settings, the baseline first."""
        shown = {self.scores.suite.baseline, *self.others}
        return sorted(shown.intersection(self.scores.settings), key=lambda name: self._places[name])

    @property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate((self.scores.suite.baseline, *self.others))}

    def isdisjoint(self, settings: Iterable[str]) -> bool:
        """Return whether none of the settings besides the baseline is among these."""
        return set(self.others).isdisjoint(settings)

    def style(self, setting: str) -> tuple[str, str]:
        """Return colour and style of a setting's line."""
        place = self._places[setting]
        return PALETTE[place], _STYLES[place % len(_STYLES)]

    def so_far(self, label: str) -> str:
        """Return the label of an axis, which states how many of the suite's runs are finished if some are not."""
        runs = self.scores.runs
        return label if runs.n_finished == runs.n_runs else f"{label}\nso far {runs.n_finished} of {runs.n_runs} runs"


def sheets(scores: SuiteScores) -> list[Sheet]:
    """Return the settings of each figure, in the order of the suite, divided evenly."""
    n_sheets = min(max(1, -(-len(scores.others) // (len(PALETTE) - 1))), _MOST_SHEETS)
    return [Sheet(scores, tuple(part)) for part in np.array_split(np.array(scores.others, dtype=object), n_sheets)]


def curve_band(curves: Sequence[TrainingCurve], end: float) -> Band | None:
    """
    Return the IQM of curves at even distances up to ``end``, from where all of them have an episode.

    Their ``steps`` are the horizontal axis, whatever it is.
    """
    x = grid(end)
    found = np.array([curve_on_grid(curve, x) for curve in curves], dtype=np.float64).reshape(-1, len(x))
    return band_of(x, found, iqm)


def _new_figure(n_panels: int, n_columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of this height."""
    figure = new_figure(8.0, 0.6 + height * -(-n_panels // n_columns))
    return figure, add_panels(figure, n_panels, n_columns)


def _legend(figure: Figure, settings: Sequence[str], sheet: Sheet, *, lines: bool) -> None:
    handles = []
    for setting in settings:
        color, style = sheet.style(setting)
        more: dict[str, Any] = {} if lines else {"marker": "o", "ms": 4}
        handles.append(line_handle(setting, color, style if lines else "-", **more))
    add_legend(figure, handles, n_columns=4)


def _differences(sheet: Sheet) -> Figure | None:
    scores = sheet.scores
    rows = [row for row in (*scores.groups(), *scores.normalised) if not sheet.isdisjoint(row.settings())]
    if not rows:
        return None
    figure, panels = _new_figure(len(MEASURES), len(MEASURES), 0.4 + len(rows) * (0.14 + 0.1 * len(sheet.others)))
    margin = scores.suite.equivalence_margin
    for axes, (measure, name) in zip(panels, MEASURES.items(), strict=True):
        axes.set_title(name, fontsize="small")
        axes.sharex(panels[0])
        axes.axvline(0, color=BLACK, linewidth=1)
        if margin:
            axes.axvspan(-margin, margin, color="gray", alpha=0.15, linewidth=0)
        _draw_differences(axes, rows, measure, sheet)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.title() for row in rows] if axes is panels[0] else [])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if len(row.env_ids) > 1 else "normal")
    axis = f"difference to {scores.suite.baseline} (0: the same, −1: as random actions)"
    figure.supxlabel(sheet.so_far(axis), fontsize="small")
    _legend(figure, sheet.others, sheet, lines=False)
    return figure


def _draw_differences(axes: Axes, rows: Sequence[Scores], measure: str, sheet: Sheet) -> None:
    height = 0.8 / len(sheet.others)
    for index, row in enumerate(rows):
        if index % 2 == 0:
            axes.axhspan(index - 0.5, index + 0.5, color="gray", alpha=0.08, linewidth=0)
        for place, setting in enumerate(sheet.others):
            if setting not in row.settings():
                continue
            found = sheet.scores.compared(row, measure, setting, difference(iqm))
            if found is None:
                continue
            color, _ = sheet.style(setting)
            y = index + (place - (len(sheet.others) - 1) / 2) * height
            # Without an interval, the marker is empty.
            face = color if found.interval is not None else "none"
            axes.plot([found.value], [y], marker="o", ms=4, color=color, markerfacecolor=face)
            if found.interval is not None:
                axes.plot(found.interval, [y, y], color=color, linewidth=1.4)


def _curves(sheet: Sheet, axis: str, scale: StepScale) -> Figure | None:
    """Draw the curves, one panel an environment; a step is as long as ``scale`` returns, in the unit of the axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    bands = {one.name: _bands(sheet, one.name, scale) for one in sheet.scores.environments}
    names = [name for name, by_setting in bands.items() if by_setting]
    if not names:
        return None
    n_columns = min(3, len(names))
    figure, panels = _new_figure(len(names), n_columns, {1: 3.2, 2: 2.4}.get(n_columns, 1.75))
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name, fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for setting, band in bands[name].items():
            draw_band(axes, band, *sheet.style(setting))
        axes.set_xlim(left=0)
    figure.supxlabel(sheet.so_far(axis), fontsize="small")
    figure.supylabel(f"return of the last {WINDOW} episodes", fontsize="small")
    _legend(figure, sheet.settings, sheet, lines=True)
    return figure


def _bands(sheet: Sheet, env_id: str, scale: StepScale) -> dict[str, Band]:
    """Return the bands of an environment by setting."""
    found = {}
    for setting in sheet.settings:
        curves, ends = [], []
        for run in sheet.scores.runs.of(env_id, setting):
            step = scale(run)
            if step is not None:
                curves.append(replace(run.curve, steps=step * run.curve.steps))
                ends.append(step * run.spec.n_timesteps)
        # The line ends with the shortest training.
        band = curve_band(curves, min(ends, default=0.0))
        if band is not None:
            found[setting] = band
    return found


def _profiles(sheet: Sheet) -> Figure | None:
    pairs = [
        (group, measure)
        for group in sheet.scores.groups()
        for measure in MEASURES
        if not sheet.isdisjoint(group.by_setting[measure])
    ]
    if not pairs:
        return None
    figure, panels = _new_figure(len(pairs), len(MEASURES), 1.9)
    for axes, (group, measure) in zip(panels, pairs, strict=True):
        axes.set_title(f"{group.title()}, {MEASURES[measure]}", fontsize="small")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(_THRESHOLDS[0], _THRESHOLDS[-1])
        for setting in filter(group.by_setting[measure].__contains__, sheet.settings):
            values, profile = group.by_setting[measure][setting], performance_profile(_THRESHOLDS)
            band = Band(_THRESHOLDS, profile(values[None])[0], interval(profile, values))
            draw_band(axes, band, *sheet.style(setting))
    figure.supxlabel(sheet.so_far("normalised score"), fontsize="small")
    figure.supylabel("share of runs above it", fontsize="small")
    _legend(figure, sheet.settings, sheet, lines=True)
    return figure
