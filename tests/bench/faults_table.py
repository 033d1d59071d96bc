"""The fault campaign's table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.bench.results import Results, machine_text

if TYPE_CHECKING:
    from tests.bench.faults import Row

_COLUMNS = ("attempts", "survived", "lost", "wrong", "unclear")


def render_table(results: Results, rows: Sequence[Row], seed: int, command: str) -> str:
    """
    Render results as a Markdown table.

    :param results: the results
    :param rows: the table's lines, in order
    :param seed: of the results
    :param command: the command that makes the table again
    :return: Markdown text
    """
    lines = ["what | environment | " + " | ".join(_COLUMNS) + " | of them", "--- | --- |" + " ---: |" * 5 + " ---"]
    machines, failures = set(), []
    for row in rows:
        run = results.find({"name": row.name, "seed": seed})
        cells = [f"{run[name]:,}" for name in _COLUMNS] if run else ["not run", "", "", "", ""]
        lines.append(" | ".join([row.what, row.env_id or "", *cells, _counts(run)]))
        if run:
            machines.add(machine_text(run, "one process after the other, one thread"))
            failures += [f"- `{row.name}`: {_as_code(text)}\n" for text in run["failures"]]
    table = "\n".join(f"| {line} |" for line in lines)
    made = "".join(f"- {text}\n" for text in sorted(machines))
    told = f"The first that did not survive:\n\n{''.join(failures)}\n" if failures else ""
    return f"Made by `{command}`.\n\n{table}\n\n{told}Machines and versions:\n\n{made}"


def _counts(run: dict[str, Any] | None) -> str:
    return "<br>".join(f"{name}: {count:,}" for name, count in (run or {"counts": {}})["counts"].items())


def _as_code(text: str) -> str:
    """Messages hold backquotes, pipes and angle brackets."""
    return "`` " + " ".join(text.replace("``", "'").split()) + " ``"
