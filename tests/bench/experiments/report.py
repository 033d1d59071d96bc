"""The report of a suite: Markdown tables of differences to the baseline, and the figures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.bench.experiments.estimates import (
    Estimate,
    difference,
    estimate,
    iqm,
    mean,
    number_text,
    probability_of_improvement,
)
from tests.bench.experiments.figures import CAPTIONS, write_figures
from tests.bench.experiments.scores import MEASURES, SuiteScores
from tests.bench.results import machines_text, markdown_table, write_text
from tests.bench.training_runs import how_made


def write_report(scores: SuiteScores, command: str) -> list[Path]:
    """Write the report beside the suite's table, with the command that makes it again, and return its files."""
    figures = write_figures(scores)
    images = "".join(f"![{CAPTIONS[kind]}]({path.name})\n\n{CAPTIONS[kind]}.\n\n" for kind, path in figures.items())
    path = scores.path.with_suffix(".md")
    write_text(path, f"Made by `{command}`.\n\n{images}{render(scores)}")
    return [path, *figures.values()]


def render(scores: SuiteScores) -> str:
    """Return the tables of the report."""
    parts = [*_state(scores), *_summary(scores), *_comparisons(scores), *_equivalence(scores), *_returns(scores)]
    return "".join(f"{part}\n\n" for part in parts) + machines_text(scores.machines(), how_made)


def _state(scores: SuiteScores) -> Iterator[str]:
    """Yield what is missing."""
    baseline = scores.suite.baseline
    if len(scores.machines()) < scores.n_runs:
        yield f"So far {len(scores.machines())} of {scores.n_runs} runs are finished."
    if missing := [f"`{name}`" for name in scores.suite.settings if name not in scores.settings]:
        yield f"Settings without a finished run: {', '.join(missing)}."
    if scores.without_score:
        yield f"Runs left out, since no episode ended or a return is not finite: {'; '.join(scores.without_score)}."
    normalised = {one.name for one in scores.normalised}
    if unlearned := [one.name for one in scores.environments if one.name not in normalised]:
        yield (
            f"Environments without normalised scores, since `{baseline}` has no run there or has not learned: "
            f"{', '.join(unlearned)}."
        )


def _summary(scores: SuiteScores) -> Iterator[str]:
    """Yield a sentence for each setting, about the environments together."""
    for row in scores.groups()[:1]:
        lines = []
        for setting in scores.others:
            found = {
                name: scores.compared(row, measure, setting, difference(iqm)) for measure, name in MEASURES.items()
            }
            verdicts = [f"{name} {_verdict(one)}" for name, one in found.items() if one is not None]
            lines.append(f"- `{setting}` in {len(row.env_ids)} environments: {'; '.join(verdicts)}.")
        yield "\n".join(lines)


def _verdict(found: Estimate) -> str:
    low, high = found.interval or (0.0, 0.0)
    word = "better" if low > 0 else "worse" if high < 0 else "not clearly different"
    return f"{word} ({found.text('+z.2f')}, {found.n_seeds} seeds)"


def _comparisons(scores: SuiteScores) -> Iterator[str]:
    """Yield the table of differences to the baseline; cells whose interval excludes equality are bold."""
    lines = []
    for row in (*scores.groups(), *scores.normalised):
        for setting in scores.others_in(row):
            cells = []
            for measure in MEASURES:
                for statistic, form, same in (
                    (difference(iqm), "+z.2f", 0.0),
                    (probability_of_improvement, ".2f", 0.5),
                ):
                    cells.append(_cell(scores.compared(row, measure, setting, statistic), form, same))
            lines.append([row.title(), f"`{setting}`", scores.n_seeds(row, setting), *cells])
    if lines:
        yield (
            f"**Compared with `{scores.suite.baseline}`**: difference of the IQMs in normalised scores, and "
            "probability that a run is better [95 % interval]"
        )
        header = ["environments", "setting", "seeds"]
        header += [f"{name}: {part}" for name in MEASURES.values() for part in ("difference", "probability")]
        yield markdown_table(header, "llr" + "rr" * len(MEASURES), lines)


def _cell(found: Estimate | None, form: str, same: float | None = None) -> str:
    if found is None:
        return "no seed"
    is_clear = same is not None and found.interval is not None and not found.interval[0] <= same <= found.interval[1]
    return f"**{found.text(form)}**" if is_clear else found.text(form)


def _equivalence(scores: SuiteScores) -> Iterator[str]:
    margin = scores.suite.equivalence_margin
    lines = []
    for row in scores.normalised if margin > 0 else ():  # in groups, differences of opposite signs would cancel
        for setting in scores.others_in(row):
            for measure, name in MEASURES.items():
                found = [scores.compared(row, measure, setting, difference(of)) for of in (iqm, mean)]
                cells = [_cell(one, "+z.3f") for one in found]
                lines.append(
                    [row.name, f"`{setting}`", scores.n_seeds(row, setting), name, *cells, equivalence(found, margin)]
                )
    if lines:
        baseline = scores.suite.baseline
        yield f"**Equivalence to `{baseline}`**: both intervals within \u00b1{margin:g}, in normalised scores"
        header = ["environment", "setting", "seeds", "score", "IQM difference", "mean difference", "equivalent"]
        yield markdown_table(header, "llrlrrl", lines)


def equivalence(found: Sequence[Estimate | None], margin: float) -> str:
    """
    Return whether all intervals lie within the margin on both sides of 0.

    Two one-sided tests (Schuirmann 1987) at level 2.5 % reject a difference beyond the margin if the 95 % interval lies
    within it.
    """
    intervals = [one.interval for one in found if one is not None and one.interval is not None]
    if len(intervals) < len(found):
        return "not enough data"
    if all(-margin < low and high < margin for low, high in intervals):
        return "yes"
    return "no" if any(high < -margin or low > margin for low, high in intervals) else "not shown"


def _returns(scores: SuiteScores) -> Iterator[str]:
    yield "**Returns** in reward units, IQM [95 % interval]"
    lines = []
    for row in scores.environments:
        known = [values for by_setting in row.by_setting.values() for values in by_setting.values() if len(values)]
        form = "z,.0f" if any(np.abs(values).max() >= 1000 for values in known) else "z,.1f"
        for setting in row.settings():
            values = [row.by_setting[measure][setting] for measure in MEASURES]
            cells = [_cell(estimate(iqm, one), form) for one in values]
            lines.append([row.name, f"`{setting}`", str(len(values[0])), *cells])
        if row.name in scores.random:
            mean_return = number_text(scores.random[row.name].mean, form)
            lines.append([row.name, "random actions", "", *([mean_return] * len(MEASURES))])
    yield markdown_table(["environment", "setting", "seeds", *MEASURES.values()], "llr" + "r" * len(MEASURES), lines)
