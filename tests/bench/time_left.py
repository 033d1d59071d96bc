"""Estimates of the time that the missing runs of a campaign will take."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def seconds_left(
    todo: Iterable[tuple[str, int]], done: Iterable[tuple[str, float, float]], jobs: int
) -> tuple[float | None, bool]:
    """
    Estimate the time for the runs to make.

    :param todo: kind and steps of each run to make
    :param done: kind, steps and seconds of each finished run
    :param jobs: number of parallel runs
    :return: seconds, or None without a finished run; and whether each kind of run has a finished one. A run is as fast
        as the finished ones of its kind, or as all if there are none.
    """
    totals: dict[str | None, tuple[float, float]] = {}
    for kind, steps, seconds in done:
        for name in (kind, None):
            known_seconds, known_steps = totals.get(name, (0.0, 0.0))
            totals[name] = (known_seconds + seconds, known_steps + steps)
    left, is_known = 0.0, True
    for kind, steps in todo:
        if not totals:
            return None, False
        seconds, known_steps = totals.get(kind, totals[None])
        left += steps * seconds / known_steps
        is_known = is_known and kind in totals
    return left / jobs, is_known


def time_left(todo: Collection[tuple[str, int]], done: Iterable[tuple[str, float, float]], jobs: int) -> str:
    """Return the estimate in words, see :func:`seconds_left`."""
    seconds, is_known = seconds_left(todo, done, jobs)
    if seconds is None:
        return "time left is not known yet"
    hours, minutes = divmod(round(seconds / 60), 60)
    guess = "" if is_known else ", a guess until each kind of run has finished once"
    return f"about {hours} h {minutes:02} min left{guess}"
