"""The speed benchmark's results: which runs belong together, their ratios, and the Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tests.bench.command import MIN_ROUNDS
from tests.bench.results import Results, machines_text, markdown_table, same_machine
from tests.bench.speed_rows import BOUNDS, PEERS, SpeedRow

KEY = ("name", "peer", "part")
"""What identifies a run of the results file; ``part`` is a trial's name or the number of a round."""

STORED = (
    *("steps_per_second", "steps", "environment_seconds", "policy_seconds", "update_seconds", "other_seconds"),
    *("startup_seconds", "products_seconds", "peak_megabytes", "engine", "device", "torch_threads"),
)
"""Measured values that the results file keeps and the tables read; of a bound, only the first."""

COLD_TRIAL = "trial, default threads"
"""The only trial of peers whose threads are not chosen by trials; it measures the time of compiling."""

TRIALS: dict[str, int | None] = {
    "trial, 1 thread": 1,
    COLD_TRIAL: None,
    "second trial, 1 thread": 1,
    "second trial, default threads": None,
}
"""Trials that choose a peer's number of threads: part -> threads, None for the default."""

_FIRST_TRIALS = tuple(TRIALS)[:2]
_CLEAR = 1.25  # a trial that is this many times faster needs no second ones

CACHES = {"clipppo": "NUMBA_CACHE_DIR", "sb3_compiled": "TORCHINDUCTOR_CACHE_DIR"}
"""Peers that keep compiled code -> the environment variable that names the folder."""

_DETAILS = "<!-- details -->"
"""Mark at which docs/speed.md splits the text: the ratios come first, what follows the mark is at the page's end."""

_SPLIT = ("environment", "policy", "update", "other")


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value, and the number of values."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """Summarise values, or return None without any."""
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def entries_of(row: SpeedRow, peer: str, part: str) -> dict[str, Any]:
    """Return the entries that a run is found by: its key, and the row, since runs with other settings do not count."""
    # Without defaults, so that a new field of rows does not make earlier results invalid.
    values = {field.name: value for field in fields(row) if (value := getattr(row, field.name)) != field.default}
    for name in ("title", "goal", "peers"):  # no part of what one peer does
        values.pop(name, None)
    return {"name": row.name, "peer": peer, "part": part, "row": values}


def runs_of(results: Results, row: SpeedRow, peer: str, rounds: int) -> dict[int, dict[str, Any]]:
    """Return a peer's runs by number of round, without those that are missing."""
    found = {number: results.find(entries_of(row, peer, str(number))) for number in range(1, rounds + 1)}
    return {number: run for number, run in found.items() if run is not None}


def ratio(
    results: Results, row: SpeedRow, peer: str, rounds: int, phase: str = "all", base: str = "clipppo"
) -> Spread | None:
    """
    Return how many times faster ``base`` is than ``peer``, round by round; None without a common machine.

    ``phase`` "all" compares steps per second of the row's own phase, "update" the update's seconds.
    """
    ours, theirs = runs_of(results, row, base, rounds), runs_of(results, row, peer, rounds)
    pairs = [(ours[n], theirs[n]) for n in ours if n in theirs and same_machine(ours[n], theirs[n])]
    if phase == "update":
        return Spread.of([other["update_seconds"] / run["update_seconds"] for run, other in pairs])
    return Spread.of([run["steps_per_second"] / other["steps_per_second"] for run, other in pairs])


def render_tables(results: Results, rows: Sequence[SpeedRow], rounds: int, notes: Mapping[str, str]) -> str:
    """Render results as Markdown; ``notes`` has the reason why a row has no result."""
    runs = [run for row in rows for peer in (*PEERS, *BOUNDS) for run in runs_of(results, row, peer, rounds).values()]
    busy = max((run["other_load"] for run in runs), default=0.0)
    text = f"{_ratio_table(results, rows, rounds, notes)}\n\n"
    text += (
        "Steps per second of training, without the warm-up; in configurations *update alone*, transitions per second "
        "of the update. Each measurement is a separate process. A round runs all libraries one after the other, "
        "every second one in reverse order. A ratio is computed within a round: median (smallest to largest). "
        "*goal* is the ratio that a configuration should reach, and whether the median reaches it. All libraries "
        "have the same arguments and networks, and none logs. ClipPPO has SB3's objective (SB3_EQUIVALENT) and the "
        'engine that "auto" selects. Each library has one thread or its default number, whichever is faster in short '
        "trials. The native engine selects the number itself. *SB3 compiled* is SB3 with `torch.compile`, on SB3's "
        "number of threads. *update* is the ratio of the updates' seconds alone. *environment-only steps/s* is the "
        "speed of the environments alone under random actions: ClipPPO's, and SB3's if they differ.\n\n"
    )
    text += f"{_DETAILS}\n\n{_split_table(results, rows, rounds)}\n\n"
    text += (
        "Seconds in this table are medians for 100,000 steps: the environments with their VecEnv wrappers, the "
        "policy with the rest of the rollout, the update, and everything else. *matrix products* is the time of the "
        "update's matrix products and convolutions alone, as a share of its seconds. torch's BLAS and oneDNN compute "
        "them one after the other, on one thread or all, whichever is faster, or on the configuration's number. On "
        "many cores, the native engine, which divides them among threads, can be faster than that. Memory is the "
        "peak of the process; in brackets, the difference from SB3's. *start* is the seconds to full speed after "
        "torch is imported (other imports, building, compilation); in brackets, measured once, without compiled code "
        "of an earlier run.\n"
    )
    text += f"\nOther programs used at most {busy:.0f} % of the processor just before a measurement.\n"
    return f"{text}\n{machines_text(runs, lambda run: 'one run at a time')}"


def _ratio_table(results: Results, rows: Sequence[SpeedRow], rounds: int, notes: Mapping[str, str]) -> str:
    shown = [peer for peer in PEERS if any(peer in row.peers for row in rows)]
    others = [peer for peer in shown if peer not in ("clipppo", "sb3")]
    header = ["configuration", "ClipPPO / SB3", "update", *(f"ClipPPO / {PEERS[peer]}" for peer in others)]
    header += [*(f"{PEERS[peer]} steps/s" for peer in shown), "environment-only steps/s", "goal"]
    lines = []
    for row in rows:
        to_sb3 = ratio(results, row, "sb3", rounds)
        update = ratio(results, row, "sb3", rounds, "update")
        speeds = [_speed(results, row, peer, rounds) for peer in shown]
        bounds = " / ".join(text for peer in BOUNDS if (text := _speed(results, row, peer, rounds)))
        lines.append(
            [f"{row.title} (`{row.name}`)", _ratio_text(to_sb3), _ratio_text(update)]
            + [_ratio_text(ratio(results, row, peer, rounds)) for peer in others]
            + [*speeds, bounds]
            + [f"{row.goal:g}: {_verdict(row, to_sb3, notes.get(row.name))}"]
        )
    return markdown_table(header, "l" + "r" * (len(header) - 2) + "l", lines)


def _ratio_text(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2f}" + (f"<br>({spread.low:.2f} to {spread.high:.2f})" if spread.count > 1 else "")


def _verdict(row: SpeedRow, spread: Spread | None, note: str | None) -> str:
    if spread is None:
        return note or "not run"
    verdict = "yes" if spread.median >= row.goal else "no"
    if spread.count < MIN_ROUNDS:
        return f"{verdict} so far ({spread.count} of {MIN_ROUNDS} rounds)"
    return verdict


def _speed(results: Results, row: SpeedRow, peer: str, rounds: int) -> str:
    spread = Spread.of([run["steps_per_second"] for run in runs_of(results, row, peer, rounds).values()])
    return "" if spread is None else f"{spread.median:,.0f}"


def _split_table(results: Results, rows: Sequence[SpeedRow], rounds: int) -> str:
    header = ["configuration", "library", *(f"{part} s" for part in _SPLIT), "matrix products"]
    header += ["memory MB", "start s", "engine", "threads"]
    lines = []
    for row in rows:
        sb3_memory = _median(runs_of(results, row, "sb3", rounds), "peak_megabytes")
        for peer, title in PEERS.items():
            runs = runs_of(results, row, peer, rounds)
            if not runs:
                continue
            split = [_median_per_100k(runs, f"{part}_seconds") for part in _SPLIT]
            memory = _median(runs, "peak_megabytes")
            difference = "" if peer == "sb3" or not sb3_memory else f" ({memory - sb3_memory:+.0f})"
            last = runs[max(runs)]
            lines.append(
                [row.name, title, *(f"{seconds:.2f}" for seconds in split), _products_text(runs)]
                + [f"{memory:.0f}{difference}", _start_text(results, row, peer, runs)]
                + [_engine_text(row, last), str(last["torch_threads"])]
            )
    return markdown_table(header, "ll" + "r" * 7 + "lr", lines)


def _engine_text(row: SpeedRow, run: Mapping[str, Any]) -> str:
    return str(run["engine"]) if row.device == "cpu" else f"{run['engine']} on {run['device']}"


def _median(runs: Mapping[int, Mapping[str, Any]], name: str) -> float:
    spread = Spread.of([run[name] for run in runs.values()])
    return 0.0 if spread is None else spread.median


def _median_per_100k(runs: Mapping[int, Mapping[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] * 100_000 / run["steps"] for run in runs.values()))


def _products_text(runs: Mapping[int, Mapping[str, Any]]) -> str:
    # Only ClipPPO's runs have them.
    found = [run for run in runs.values() if "products_seconds" in run]
    share = Spread.of([run["products_seconds"] / run["update_seconds"] for run in found])
    return "" if share is None else f"{share.median:.0%}"


def _start_text(results: Results, row: SpeedRow, peer: str, runs: Mapping[int, Mapping[str, Any]]) -> str:
    text = f"{_median(runs, 'startup_seconds'):.1f}"
    if peer not in CACHES or not row.cold_start:
        return text
    cold = [run["startup_seconds"] for part in TRIALS if (run := results.find(entries_of(row, peer, part)))]
    return f"{text} ({max(cold):.1f})" if cold else text


def trials_of(row: SpeedRow, peer: str) -> dict[str, int | None]:
    """
    Return a peer's trials: all if they choose the threads, else at most :data:`COLD_TRIAL`.

    The native engine chooses itself. SB3 compiled has SB3's number, since every trial would have to compile.
    """
    if row.threads is None and not row.has_default_threads(peer) and peer != "sb3_compiled":
        return TRIALS
    return {COLD_TRIAL: None} if row.cold_start else {}


def needs_trial(results: Results, row: SpeedRow, peer: str, part: str) -> bool:
    """Return whether a trial decides something: a second one does not, after a clear difference of the first."""
    first = [run["steps_per_second"] for name in _FIRST_TRIALS if (run := results.find(entries_of(row, peer, name)))]
    return part in _FIRST_TRIALS or len(first) < len(_FIRST_TRIALS) or max(first) < _CLEAR * min(first)


def best_threads(results: Results, row: SpeedRow, peer: str) -> int | None:
    """
    Return the row's number of threads, or that of the fastest trial that counts.

    None is the default: of the native engine, which chooses itself, and beside a GPU.

    :raises LookupError: if no trial succeeded
    """
    if row.threads is not None or row.has_default_threads(peer):
        return row.threads
    peer = "sb3" if peer == "sb3_compiled" else peer
    parts = [part for part in TRIALS if needs_trial(results, row, peer, part)]
    found = {part: run for part in parts if (run := results.find(entries_of(row, peer, part)))}
    if not found:
        raise LookupError(f"no trial of {row.name}, {peer}")
    return TRIALS[max(found, key=lambda part: float(found[part]["steps_per_second"]))]
