"""The speed benchmark's results: which runs belong together, their ratios, and the Markdown tables."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.results import Results, machine_text
from tests.bench.speed_rows import BOUNDS, PEERS, SpeedRow

KEY = ("name", "peer", "part")
"""What tells runs of the results file apart; ``part`` is a trial's name or the number of an alternation."""

STORED = (
    *("steps_per_second", "steps", "environment_seconds", "policy_seconds", "update_seconds", "other_seconds"),
    *("startup_seconds", "products_seconds", "peak_megabytes", "engine", "torch_threads"),
)
"""Measured values that the tables read, of a bound the first one alone; the results file keeps no others."""

MIN_ALTERNATIONS = 3
"""Fewer are no result."""

COLD_TRIAL = "trial, default threads"
"""The one trial where the native engine chooses: how long compiling takes is measured by it."""

TRIALS: dict[str, int | None] = {
    "trial, 1 thread": 1,
    COLD_TRIAL: None,
    "second trial, 1 thread": 1,
    "second trial, default threads": None,
}
"""Trials that choose a peer's number of threads: part -> threads, None for the default."""

_DETAILS = "<!-- details -->"
"""Where docs/speed.md divides the text: the ratios begin the page."""

_SPLIT = ("environment", "policy", "update", "other")


@dataclass(frozen=True)
class Spread:
    """
    A median with the smallest and largest value.

    :param median: the median
    :param low: the smallest value
    :param high: the largest value
    :param count: number of values
    """

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """
        Summarise values.

        :param values: any number of them
        :return: None where there are none
        """
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def wanted(row: SpeedRow, peer: str, part: str) -> dict[str, Any]:
    """
    List by what a run is found: a run made with other settings of the row is none of it.

    :param row: the row
    :param peer: key of PEERS or BOUNDS
    :param part: a trial's name or the number of an alternation
    :return: the key, and the row as JSON gives it back
    """
    values = asdict(row)
    del values["title"], values["goal"]
    return {"name": row.name, "peer": peer, "part": part, "row": values}


def runs_of(results: Results, row: SpeedRow, peer: str, alternations: int) -> dict[int, dict[str, Any]]:
    """
    Collect a peer's runs.

    :param results: all results
    :param row: the row
    :param peer: key of PEERS or BOUNDS
    :param alternations: how many there should be
    :return: alternation -> run, without those that are missing
    """
    found = {number: results.find(wanted(row, peer, str(number))) for number in range(1, alternations + 1)}
    return {number: run for number, run in found.items() if run is not None}


def ratio(
    results: Results, row: SpeedRow, peer: str, alternations: int, phase: str = "all", base: str = "clipppo"
) -> Spread | None:
    """
    Compare a peer with another, alternation by alternation.

    :param results: all results
    :param row: the row
    :param peer: the peer to compare with
    :param alternations: how many there should be
    :param phase: "all" compares steps a second of the row's own phase, "update" the update's seconds
    :param base: the peer that is compared
    :return: how many times faster ``base`` is; None where no alternation has both on the same machine
    """
    ours, theirs = runs_of(results, row, base, alternations), runs_of(results, row, peer, alternations)
    pairs = [(ours[n], theirs[n]) for n in ours if n in theirs and _same_machine(ours[n], theirs[n])]
    if phase == "update":
        return Spread.of([other["update_seconds"] / run["update_seconds"] for run, other in pairs])
    return Spread.of([run["steps_per_second"] / other["steps_per_second"] for run, other in pairs])


def _same_machine(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(run[key] == other[key] for key in ("cpu", "cores", "versions"))


def render(
    results: Results,
    rows: Sequence[SpeedRow],
    alternations: int,
    command: str,
    notes: Mapping[str, str],
) -> str:
    """
    Render results as Markdown.

    :param results: the results
    :param rows: the table's lines, in order
    :param alternations: how many there should be
    :param command: the command that makes the tables again
    :param notes: row -> why it has no result
    :return: Markdown text
    """
    runs = [
        run for row in rows for peer in (*PEERS, *BOUNDS) for run in runs_of(results, row, peer, alternations).values()
    ]
    busy = max((run["other_load"] for run in runs), default=0.0)
    text = f"Made by `{command}`.\n\n{_ratio_table(results, rows, alternations, notes)}\n\n"
    text += (
        "Steps a second of training, without the warm-up; of rows *update alone*, transitions a second of the update. "
        "Every measurement is a process of its own; each alternation runs all peers one after the other, every second "
        "one in the opposite order. Ratios are taken within an alternation: median (smallest to largest). *goal* is "
        "the ratio that a row is to reach, and whether the median does. All peers have the same arguments and "
        "networks, and none logs; ClipPPO runs SB3's objective (SB3_EQUIVALENT) on the engine it picks itself. Each "
        "peer runs with one thread or with its default number, whichever was faster in short trials before; the native "
        "engine has the default number and chooses itself. *update* is the ratio of the update's seconds alone. "
        "*bound* is the environments alone under random actions: first ClipPPO's, then SB3's where they are others."
        "\n\n"
    )
    text += f"{_DETAILS}\n\n{_split_table(results, rows, alternations)}\n\n"
    text += (
        "Seconds in this table are medians for 100,000 steps: the environment with its VecEnv wrappers, the "
        "policy with the rest of the rollout, the update, and what is around them. *products of the update* is the "
        "share of its seconds that its matrix products and convolutions take alone, by torch's BLAS and oneDNN one "
        "after the other, on one thread or all, whichever is faster. Memory is the peak of the process, "
        "its difference to SB3's in brackets. *start* is the seconds from the process's start to full speed (imports, "
        "building, compilation), in brackets, measured once, the same without compiled code from an earlier run.\n"
    )
    text += f"\nOther programs used at most {busy:.0f} % of the processor just before a measurement.\n"
    made = "".join(f"- {line}\n" for line in sorted({machine_text(run, "one run at a time") for run in runs}))
    return f"{text}\nMachines and versions:\n\n{made}"


def _ratio_table(results: Results, rows: Sequence[SpeedRow], alternations: int, notes: Mapping[str, str]) -> str:
    header = ["configuration", "ClipPPO / SB3", "update", "ClipPPO / SBX"]
    header += [*(f"{name} steps/s" for name in PEERS.values()), "bound steps/s", "goal"]
    lines = [header, ["---"] + ["---:"] * 7 + ["---"]]
    for row in rows:
        to_sb3 = ratio(results, row, "sb3", alternations)
        update = ratio(results, row, "sb3", alternations, "update")
        speeds = [_speed(results, row, peer, alternations) for peer in (*PEERS, *BOUNDS)]
        bounds = " / ".join(text for text in speeds[len(PEERS) :] if text)
        lines.append(
            [f"{row.title} (`{row.name}`)", _ratio_text(to_sb3), _ratio_text(update)]
            + [_ratio_text(ratio(results, row, "sbx", alternations)), *speeds[: len(PEERS)], bounds]
            + [f"{row.goal:g}: {_verdict(row, to_sb3, notes.get(row.name))}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio_text(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2f}" + (f"<br>({spread.low:.2f} to {spread.high:.2f})" if spread.count > 1 else "")


def _verdict(row: SpeedRow, spread: Spread | None, note: str | None) -> str:
    if spread is None:
        return note or "not run"
    verdict = "yes" if spread.median >= row.goal else "no"
    if spread.count < MIN_ALTERNATIONS:
        return f"{verdict} so far ({spread.count} of {MIN_ALTERNATIONS} alternations)"
    return verdict


def _speed(results: Results, row: SpeedRow, peer: str, alternations: int) -> str:
    spread = Spread.of([run["steps_per_second"] for run in runs_of(results, row, peer, alternations).values()])
    return "" if spread is None else f"{spread.median:,.0f}"


def _split_table(results: Results, rows: Sequence[SpeedRow], alternations: int) -> str:
    header = ["configuration", "peer", *(f"{part} s" for part in _SPLIT), "products of the update"]
    header += ["memory MB", "start s", "engine", "threads"]
    lines = [header, ["---", "---"] + ["---:"] * 7 + ["---", "---:"]]
    for row in rows:
        sb3_memory = _median(runs_of(results, row, "sb3", alternations), "peak_megabytes")
        for peer, title in PEERS.items():
            runs = runs_of(results, row, peer, alternations)
            if not runs:
                continue
            split = [_median_per_100k(runs, f"{part}_seconds") for part in _SPLIT]
            memory = _median(runs, "peak_megabytes")
            difference = "" if peer == "sb3" or not sb3_memory else f" ({memory - sb3_memory:+.0f})"
            last = runs[max(runs)]
            lines.append(
                [row.name, title, *(f"{seconds:.2f}" for seconds in split), _products_text(runs)]
                + [f"{memory:.0f}{difference}", _start_text(results, row, peer, runs)]
                + [last["engine"], str(last["torch_threads"])]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _median(runs: Mapping[int, Mapping[str, Any]], name: str) -> float:
    spread = Spread.of([run[name] for run in runs.values()])
    return 0.0 if spread is None else spread.median


def _median_per_100k(runs: Mapping[int, Mapping[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] * 100_000 / run["steps"] for run in runs.values()))


def _products_text(runs: Mapping[int, Mapping[str, Any]]) -> str:
    share = Spread.of([run["products_seconds"] / run["update_seconds"] for run in runs.values() if _has_products(run)])
    return "" if share is None else f"{share.median:.0%}"


def _has_products(run: Mapping[str, Any]) -> bool:
    return "products_seconds" in run  # neither peers' runs nor those of earlier versions


def _start_text(results: Results, row: SpeedRow, peer: str, runs: Mapping[int, Mapping[str, Any]]) -> str:
    text = f"{_median(runs, 'startup_seconds'):.1f}"
    if peer != "clipppo" or not row.compile_anew:
        return text
    cold = [run["startup_seconds"] for part in TRIALS if (run := results.find(wanted(row, peer, part)))]
    return f"{text} ({max(cold):.1f})" if cold else text


def trials_of(row: SpeedRow, peer: str) -> dict[str, int | None]:
    """
    Say which trials a peer makes.

    :param row: the row
    :param peer: key of PEERS
    :return: all, where they choose its number of threads; where the native engine does, at most :data:`COLD_TRIAL`
    """
    if not row.is_native(peer):
        # JAX takes no number of threads: for one, its process stays on one core, where the system can see to that.
        may_choose = peer != "sbx" or hasattr(os, "sched_setaffinity")
        return {part: threads for part, threads in TRIALS.items() if threads is None or may_choose}
    return {COLD_TRIAL: None} if row.compile_anew else {}


def best_threads(results: Results, row: SpeedRow, peer: str) -> int | None:
    """
    Choose the number of threads by the trials.

    :param results: all results
    :param row: the row
    :param peer: key of PEERS
    :return: that of the fastest trial; None: the default, where the native engine chooses itself as well
    :raises LookupError: where no trial succeeded
    """
    if row.is_native(peer):
        return None
    found = {part: run for part in TRIALS if (run := results.find(wanted(row, peer, part)))}
    if not found:
        raise LookupError(f"no trial of {row.name}, {peer}")
    return TRIALS[max(found, key=lambda part: float(found[part]["steps_per_second"]))]
