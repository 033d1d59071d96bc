"""Numbers of runs and of groups as tables: CSV of all runs, Markdown and LaTeX of the groups."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sb3_clipvf.zoo.comparison.curves import smoothed_returns
from sb3_clipvf.zoo.comparison.groups import Group, value_text
from sb3_clipvf.zoo.comparison.records import RunRecord


@dataclass(frozen=True)
class Column:
    """A number of each run: its key in the CSV, its heading, and what it is."""

    key: str
    title: str
    meaning: str


COLUMNS = (
    Column("last_return", "Last 100 episodes", "mean return of the last 100 training episodes"),
    Column("mean_return", "Whole training", "that mean, averaged over the steps of the training"),
    Column("last_evaluation", "Last evaluation", "mean return of the last evaluation during the training"),
    Column("best_evaluation", "Best evaluation", "largest mean return of an evaluation during the training"),
    Column("trained_agent", "Trained agent", "mean return in sb3-clipvf report --env, with the most probable actions"),
    Column("sampling_agent", "Trained agent, sampled", "mean return in sb3-clipvf report --env, with sampled actions"),
    Column("best_model", "Best model", "mean return in sb3-clipvf report --load-best, with the most probable actions"),
    Column(
        "sampling_best", "Best model, sampled", "mean return in sb3-clipvf report --load-best, with sampled actions"
    ),
    Column("steps", "Steps", "environment steps of the training"),
    Column("seconds", "Seconds", "seconds from the start of the training to the end of its last episode"),
    Column("steps_per_second", "Steps/s", "steps up to the end of the last episode, divided by these seconds"),
)


@dataclass(frozen=True)
class Statistic:
    """A number over the runs of a group, of which there are ``n_runs``: the values of those that have it."""

    values: tuple[float, ...]
    n_runs: int

    @property
    def mean(self) -> float:
        """Mean of the runs."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """Standard deviation of the runs as a sample (divided by n - 1); None for one run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def numbers_of(record: RunRecord) -> dict[str, float | None]:
    """Return the numbers of a run by the keys of ``COLUMNS``; None where unknown."""
    curve = smoothed_returns(record)
    means = None if record.evaluations is None else record.evaluations.values
    seconds, agent = record.seconds, record.report.get("mean_return")
    kind = (record.report.get("is_best"), record.report.get("deterministic"))
    return {
        "last_return": float(curve.values[-1]) if len(curve.values) > 0 else None,
        "mean_return": _mean_over_steps(curve.steps, curve.values, record.steps),
        "last_evaluation": None if means is None else float(means[-1]),
        "best_evaluation": None if means is None else float(np.fmax.reduce(means)),
        "trained_agent": agent if kind == (False, True) else None,
        "sampling_agent": agent if kind == (False, False) else None,
        "best_model": agent if kind == (True, True) else None,
        "sampling_best": agent if kind == (True, False) else None,
        "steps": record.steps,
        "seconds": seconds,
        "steps_per_second": float(record.episodes.steps[-1] / seconds) if seconds else None,
    }


def statistics_of(group: Group) -> dict[str, Statistic]:
    """Return the numbers of a group by the keys of ``COLUMNS``, without those that no run has."""
    known: dict[str, list[float]] = {}
    for record in group.records:
        for key, value in numbers_of(record).items():
            if value is not None:
                known.setdefault(key, []).append(value)
    return {key: Statistic(tuple(values), len(group.records)) for key, values in known.items()}


def shown_columns(groups: Sequence[Group]) -> list[Column]:
    """Return the columns that a run has a number for."""
    keys = {key for group in groups for key in statistics_of(group)}
    return [column for column in COLUMNS if column.key in keys]


def number_text(value: float, spread: float | None = None) -> str:
    """Return a number, rounded according to its spread if there is one, else according to its size."""
    digits = 0
    if spread:
        digits = _digits(spread, 2)
    elif not float(value).is_integer():
        digits = next((digits for digits, size in enumerate((1000, 10, 1)) if abs(value) >= size), _digits(value, 3))
    return f"{value:,.{digits}f}".replace("-", "−")


def _digits(value: float, n_significant: int) -> int:
    """Return the decimal places that show so many significant digits of a number, at most 6."""
    if value == 0 or not np.isfinite(value):
        return 0
    return int(np.clip(n_significant - 1 - np.floor(np.log10(abs(value))), 0, 6))


def cell_text(numbers: Mapping[str, Statistic], key: str) -> str:
    """
    Return mean and standard deviation of a group, such as ``493.2 ± 10.1``; an en dash if no run has the number.

    If some runs lack it, their number follows, such as ``493.2 ± 10.1 (2 of 3)``.
    """
    if key not in numbers:
        return "–"
    mean, std, n_values = numbers[key].mean, numbers[key].std, len(numbers[key].values)
    few = f" ({n_values} of {numbers[key].n_runs})" if n_values < numbers[key].n_runs else ""
    # That runs are equally long needs no mention.
    if std is None or (key == "steps" and std == 0):
        return number_text(mean) + few
    return f"{number_text(mean, std)} ± {number_text(std, std)}{few}"


def csv_table(groups: Sequence[Group]) -> str:
    """Return all runs as CSV: one row each, with the numbers in full precision and the settings."""
    keys = sorted({key for group in groups for key in group.settings})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.key for column in COLUMNS]
    writer.writerow(["env", "setting", "algo", "seed", *names, "folder", *(f"setting.{key}" for key in keys)])
    for group in groups:
        for record in group.records:
            numbers = numbers_of(record)
            cells = [record.env_id, group.name, record.algo, record.seed, *(numbers[name] for name in names)]
            settings = (value_text(record.settings.get(key, "")) for key in keys)
            writer.writerow([*cells, record.folder, *settings])  # a number that is None is an empty cell
    return text.getvalue()


def markdown_table(groups: Sequence[Group]) -> str:
    """Return the groups as a Markdown table: mean and standard deviation over seeds."""
    header, rows = _cells(groups)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{_legend(groups)}\n"


def latex_table(groups: Sequence[Group]) -> str:
    """Return the groups as a LaTeX table for the package ``booktabs``."""
    header, rows = _cells(groups)
    lines = [r"\begin{tabular}{ll" + "r" * (len(header) - 2) + "}", r"\toprule", _latex_row(header), r"\midrule"]
    lines += [*map(_latex_row, rows), r"\bottomrule", r"\end{tabular}", f"% {_legend(groups)}"]
    return "\n".join(lines) + "\n"


def _cells(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    columns = shown_columns(groups)
    rows = []
    for group in groups:
        known = statistics_of(group)
        cells = [group.env_id, group.name, str(len(group.records)), *(cell_text(known, one.key) for one in columns)]
        rows.append([" ".join(cell.split()) for cell in cells])
    return ["Environment", "Setting", "Runs", *(column.title for column in columns)], rows


def _legend(groups: Sequence[Group]) -> str:
    meanings = "; ".join(f"{column.title}: {column.meaning}" for column in shown_columns(groups))
    return f"Mean ± standard deviation over runs. (2 of 3) means that one of three runs lacks the number. {meanings}."


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl needs another encoding of fonts than LaTeX's default
    "…": r"\ldots{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "β": r"$\beta$",
    "ε": r"$\varepsilon$",
}


def _latex_row(cells: Sequence[str]) -> str:
    escaped = ["".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells]
    return " & ".join(escaped) + r" \\"


def _mean_over_steps(steps: np.ndarray, values: np.ndarray, end: float) -> float | None:
    """Return the mean of a curve over the steps from its first value to the run's end, to which its last holds."""
    if len(steps) == 0:
        return None
    widths = np.diff(np.append(steps, max(end, steps[-1])))
    return float(values[-1]) if widths.sum() == 0 else float(np.sum(widths * values) / widths.sum())
