"""The report of a suite: Markdown tables of differences to the baselines, and the figures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tests.bench.experiments.best_result import best_result_scores, mean_score, unbeaten
from tests.bench.experiments.episodes import LAST_EPISODES
from tests.bench.experiments.estimates import (
    Estimate,
    difference,
    estimate,
    iqm,
    mean,
    number_text,
    probability_of_improvement,
)
from tests.bench.experiments.figures import CAPTIONS, Drawn, remove_figures, write_figures
from tests.bench.experiments.finished import MEASURES, SuiteRuns
from tests.bench.experiments.scores import ALL, SuiteScores, families
from tests.bench.results import machines_text, markdown_table, write_text
from tests.bench.training_runs import how_made

_LOST = (
    "*Lost* runs failed or have no score. Means without them may be too high, so no difference to or from a setting "
    "with lost runs is bold."
)


def write_report(runs: SuiteRuns, command: str, name: str) -> list[Path]:
    """Write the report and its figures beside the suite's table, with the command that makes it again."""
    remove_figures(runs, name)
    found = families(runs)
    drawn = {scores.suite.baseline: write_figures(scores, name) for scores in found}
    path = runs.path.with_name(f"{name}.md")
    title = f"# Results of the suite `{runs.suite.name}`"
    write_text(path, f"{title}\n\nMade by `{command}`.\n\n{render(runs, found, drawn)}")
    return [path, *(one.path for figures in drawn.values() for one in figures)]


def render(
    runs: SuiteRuns, found: Sequence[SuiteScores], drawn: Mapping[str, Sequence[Drawn]] = MappingProxyType({})
) -> str:
    """Return the text of the report, with these scores of its families, and their figures by baseline."""
    parts = [*_state(runs), *_best_results(runs)]
    for scores in found:
        parts += [f"## Compared with `{scores.suite.baseline}`"]
        parts += [_image(one) for one in drawn.get(scores.suite.baseline, ())]
        parts += [*_unlearned(scores), *_summary(scores), *_comparisons(scores), *_equivalence(scores)]
        parts += _returns(scores)
    parts += ["## How the runs were made", machines_text(runs.machines(), how_made)]
    return "\n\n".join(parts)


def _image(drawn: Drawn) -> str:
    caption = CAPTIONS[drawn.kind]
    return f"![{caption}]({drawn.path.name})\n\n{caption}."


def _state(runs: SuiteRuns) -> Iterator[str]:
    """Yield what is missing, and what limits the results."""
    if runs.suite.kind == "tune":
        yield "**Seeds of this suite chose settings, so its results are no evidence.** No difference has a verdict."
    if runs.n_finished < runs.n_runs:
        yield (
            f"**So far {runs.n_finished} of {runs.n_runs} runs are finished.** The columns *seeds* and *runs* show "
            "where others are missing."
        )
    if missing := [f"`{name}`" for name in runs.suite.settings if not runs.has(name)]:
        yield f"Settings without a finished run: {', '.join(missing)}."
    if runs.errors:
        yield "Failed runs:\n\n" + "\n".join(f"- {label}: `{error}`" for label, error in runs.errors.items())
    if runs.without_score:
        labels = "; ".join(runs.without_score)
        yield f"Runs without a score, since no episode ended or a return is not finite: {labels}."
    if runs.errors or runs.without_score:
        yield _LOST
    if short := [f"{env_id}: {n_short} of {n_all} runs" for env_id, (n_short, n_all) in runs.short().items()]:
        yield (
            f"Runs with fewer than {LAST_EPISODES} episodes, of which *{MEASURES['last_return']}* has all: "
            f"{'; '.join(short)}."
        )


def _best_results(runs: SuiteRuns) -> Iterator[str]:
    """Yield the table of scores between random actions and the best result, if the suite asks for it."""
    suite = runs.suite
    if not suite.best_result_score:
        return
    yield "## Scores"
    part = "" if runs.whole.n_finished == runs.whole.n_runs else " so far"
    # What the source reports is a mean over all environments.
    is_expected = len(suite.environments) == len(runs.whole.suite.environments)
    yield (
        "Mean over environments and seeds [95 % interval] of the return of the last 100 episodes, with random actions "
        f"at 0 and the environment's best run of all settings{part} at 1."
        f"{' *Expected* is what the source reports.' if is_expected else ''}"
    )
    if names := unbeaten(runs):
        yield f"Environments without scores, since no run{part} is better than random actions: {', '.join(names)}."
    lines = []
    for setting, scores in best_result_scores(runs).items():
        n_seeds = len(suite.environments[0].seeds)
        n_runs, n_planned = sum(map(len, scores)), n_seeds * len(scores)
        found = mean_score(scores, n_seeds)
        cell = "not complete" if n_runs == 0 or found is None else found.text("z.2f")
        if found is None and n_runs > 0:
            cell = f"not complete, so far {number_text(float(np.concatenate(scores).mean()), 'z.2f')}"
        n_lost = sum(runs.n_lost(environment.env_id, setting) for environment in suite.environments)
        count = f"{n_runs} of {n_planned}" + (f", {n_lost} lost" if n_lost else "")
        expected = [suite.settings[setting].expected.removeprefix("score ")] if is_expected else []
        lines.append([f"`{setting}`", count, cell, *expected])
    header = ["setting", "runs", "score", *(["expected"] if is_expected else [])]
    yield markdown_table(header, "l" + "r" * (len(header) - 1), lines)


def _unlearned(scores: SuiteScores) -> Iterator[str]:
    """Yield which environments have no normalised scores."""
    unlearned: dict[str, str] = {}  # names of the environments -> names of the measures
    for measure, name in MEASURES.items():
        normalised = {one.name for one in scores.normalised if one.by_setting[measure]}
        if missing := [one.name for one in scores.environments if one.name not in {*normalised, *scores.changed}]:
            place = ", ".join(missing)
            unlearned[place] = f"{unlearned[place]}, {name}" if place in unlearned else name
    if unlearned:
        every = ", ".join(MEASURES.values())
        parts = [place if names == every else f"{place} ({names})" for place, names in unlearned.items()]
        yield (
            f"Environments without normalised scores, since `{scores.suite.baseline}` has no run there or has not "
            f"learned: {'; '.join(parts)}."
        )
    if scores.changed:
        yield (
            f"Environments without normalised scores, since `{scores.suite.baseline}` has `env_kwargs` or wrappers "
            f"there, and random actions are measured without them: {', '.join(scores.changed)}."
        )


def _summary(scores: SuiteScores) -> Iterator[str]:
    """Yield a sentence for each setting and group of most environments in which it is compared."""
    groups, lines = scores.groups(), []
    for setting in scores.others:
        names = [row.name for row in groups if setting in row.settings()]
        for row in groups:
            if setting not in row.settings() or row.name != names[0]:
                continue
            # The sentence is about the setting, so a lost run counts whatever family its environment is of.
            row = replace(row, name=ALL)
            found = {
                name: scores.compared(row, measure, setting, difference(iqm)) for measure, name in MEASURES.items()
            }
            why = scores.undecided(row, setting)
            verdicts = [f"{name} {_verdict(one, why)}" for name, one in found.items() if one is not None]
            seeds = scores.seeds(row, setting, scores.suite.baseline)
            lines.append(f"- `{setting}` in {len(row.env_ids)} environments, seeds {seeds}: {'; '.join(verdicts)}.")
    if lines:
        yield "\n".join(lines)


def _verdict(found: Estimate, undecided: str) -> str:
    low, high = found.interval or (0.0, 0.0)
    word = "better" if low > 0 else "worse" if high < 0 else "not clearly different"
    text = _clear_text(found, "+z.2f", 0.0) if low > 0 or high < 0 else found.text("+z.2f")
    return f"{f'undecided, since {undecided}' if undecided else word} ({text})"


def _comparisons(scores: SuiteScores) -> Iterator[str]:
    """Yield the table of differences to the baseline; decided cells whose interval excludes equality are bold."""
    baseline, lines = scores.suite.baseline, []
    for row in (*scores.groups(), *scores.normalised):
        for setting in scores.others_in(row):
            cells = []
            is_decided = not scores.undecided(row, setting)
            for measure in MEASURES:
                for statistic, form, same in (
                    (difference(iqm), "+z.2f", 0.0),
                    (probability_of_improvement, ".2f", 0.5),
                ):
                    found = scores.compared(row, measure, setting, statistic)
                    is_scored = setting in row.by_setting[measure]
                    cells.append(_cell(found, form, same if is_decided else None) if is_scored else "")
            lines.append([row.title(), f"`{setting}`", scores.seeds(row, setting, baseline), *cells])
    if lines:
        yield "Difference of the IQMs in normalised scores, and probability that a run is better [95 % interval]:"
        header = ["environments", "setting", "seeds"]
        header += [f"{name}: {part}" for name in MEASURES.values() for part in ("difference", "probability")]
        yield markdown_table(header, "llr" + "rr" * len(MEASURES), lines)


def _cell(found: Estimate | None, form: str, same: float | None = None) -> str:
    if found is None:
        return "no seed"
    if same is None or found.interval is None or found.interval[0] <= same <= found.interval[1]:
        return found.text(form)
    return f"**{_clear_text(found, form, same)}**"


def _clear_text(found: Estimate, form: str, same: float) -> str:
    """Return the text with the decimals that are needed to show that no end of the interval is ``same``."""
    for n_decimals in range(2, 5):
        longer = form.replace("2f", f"{n_decimals}f")
        if all(number_text(end, longer) != number_text(same, longer) for end in found.interval or ()):
            return found.text(longer)
    return found.text(form)


def _equivalence(scores: SuiteScores) -> Iterator[str]:
    margin, baseline = scores.suite.equivalence_margin, scores.suite.baseline
    lines = []
    for row in scores.normalised if margin > 0 else ():  # in groups, differences of opposite signs would cancel
        for setting in scores.others_in(row):
            for measure, name in MEASURES.items():
                if setting not in row.by_setting[measure]:
                    continue
                found = [scores.compared(row, measure, setting, difference(of)) for of in (iqm, mean)]
                cells = [_cell(one, "+z.3f") for one in found]
                why = scores.undecided(row, setting)
                verdict = f"not shown, since {why}" if why else equivalence(found, margin)
                seeds = scores.seeds(row, setting, baseline)
                lines.append([row.name, f"`{setting}`", seeds, name, *cells, verdict])
    if lines:
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
    settings = scores.suite.settings
    # Scores are not in reward units.
    is_expected = not scores.suite.best_result_score and any(settings[name].expected for name in scores.settings)
    lines = []
    for row in scores.environments:
        known = [values for by_setting in row.by_setting.values() for values in by_setting.values() if len(values)]
        form = "z,.0f" if any(np.abs(values).max() >= 1000 for values in known) else "z,.1f"
        for setting in row.settings():
            cells = [_cell(estimate(iqm, row.by_setting[measure][setting]), form) for measure in MEASURES]
            cells += [settings[setting].expected] if is_expected else []
            lines.append([row.name, f"`{setting}`", scores.seeds(row, setting), *cells])
        if row.name in scores.random:
            mean_return = number_text(scores.random[row.name].mean, form)
            cells = [mean_return] * len(MEASURES) + [""] * is_expected
            lines.append([row.name, "random actions", "", *cells])
    header = ["environment", "setting", "seeds", *MEASURES.values(), *(["expected"] if is_expected else [])]
    yield markdown_table(header, "llr" + "r" * len(MEASURES) + "l" * is_expected, lines)
