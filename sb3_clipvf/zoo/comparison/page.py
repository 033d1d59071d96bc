"""The report as one HTML file: static tables, and figures that Plotly draws in the browser without a network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from sb3_clipvf.zoo.comparison import sections
from sb3_clipvf.zoo.comparison.curves import Panel, panels
from sb3_clipvf.zoo.comparison.groups import Group
from sb3_clipvf.zoo.comparison.summary import csv_table, latex_table, markdown_table
from sb3_clipvf.zoo.comparison.titles import NEGATED, order_of, plural, title_of

_DIGITS = 5
"""Significant digits of a figure's points, more than a screen shows."""


def page(groups: Sequence[Group], problems: Sequence[str], command: str) -> str:
    """
    Return the report as HTML.

    :param groups: Groups of all environments.
    :param problems: Messages about runs that were left out or lack data.
    :param command: The command that writes the page.
    :raises ImportError: If Plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    names = list(dict.fromkeys(group.name for group in groups))
    places = {name: place for place, name in enumerate(names)}
    by_env: dict[str, list[Group]] = {}
    for group in groups:
        by_env.setdefault(group.env_id, []).append(group)
    envs = [{"id": env_id, "panels": _panels_data(found)} for env_id, found in by_env.items()]
    tables = {"csv": csv_table(groups), "md": markdown_table(groups), "tex": latex_table(groups)}
    here = files(__package__)
    return Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(_title(by_env)),
        about=escape(_about(groups, len(by_env))),
        problems=sections.problem_list(problems),
        summary=sections.summary_table(by_env, places),
        settings=sections.settings_tables(by_env, places),
        videos=sections.videos(groups, places),
        commands=sections.command_blocks(groups, places, command),
        runs=sections.run_table(groups),
        meanings=sections.meanings(groups),
        css=here.joinpath("page.css").read_text(encoding="utf-8"),
        js=here.joinpath("page.js").read_text(encoding="utf-8"),
        data=packed(json.dumps({"groups": names, "envs": envs, "tables": tables}, separators=(",", ":"))),
        plotly=packed(get_plotlyjs()),
    )


def packed(text: str) -> str:
    """Return a text compressed with gzip, in base64; the same text gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _panels_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [_panel_data(panel) for panel in sorted(panels(groups), key=lambda panel: order_of(panel.key))]


def _panel_data(panel: Panel) -> dict[str, Any]:
    title, unit = title_of(panel.key)
    sign = -1 if panel.key in NEGATED else 1
    axes = {
        axis: {
            "x": _numbers(panel.grids[axis]),
            "runs": {name: [_numbers(sign * run) for run in runs] for name, runs in lines.items()},
        }
        for axis, lines in panel.lines.items()
    }
    return {"key": panel.key, "title": title, "unit": unit, "axes": axes}


def _numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers in short form; None where they are not finite, which JSON cannot hold."""
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]


def _title(env_ids: Mapping[str, Any]) -> str:
    names = [env_id or "unknown environment" for env_id in env_ids]
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} environments"


def _about(groups: Sequence[Group], n_env_ids: int) -> str:
    counts = [len(group.records) for group in groups]
    parts = [plural(sum(counts), "run"), plural(len({group.name for group in groups}), "setting")]
    parts += [plural(n_env_ids, "environment")] if n_env_ids > 1 else []
    if len(groups) > 1:
        few, most = min(counts), max(counts)
        parts.append(f"{plural(most, 'run') if few == most else f'{few} to {most} runs'} each")
    return ", ".join(parts)
