"""Sections of the report's page that need no JavaScript: tables, videos and commands as HTML."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from sb3_clipvf.zoo.comparison.groups import MISSING, Group, differing_keys, value_text
from sb3_clipvf.zoo.comparison.summary import (
    Column,
    Statistic,
    cell_text,
    number_text,
    numbers_of,
    shown_columns,
    statistics_of,
)
from sb3_clipvf.zoo.comparison.train_commands import train_commands

N_COLORS, N_DASHES = 7, 4
"""Colours and dashes of the page's style sheet. Further settings repeat the colours with the next dash."""

_NO_RETURNS = ("steps", "seconds", "steps_per_second")

MOST_VIDEO_BYTES = 20 * 2**20
"""Videos in a page, in all. Others are listed by their paths."""


def swatch(place: int) -> str:
    """Return a sample of the line of the setting at a place in the legend."""
    kind = f"swatch c{place % N_COLORS} d{place // N_COLORS % N_DASHES}"
    return f'<svg class="{kind}" viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21"/></svg>'


def problem_list(problems: Sequence[str]) -> str:
    """Return the messages about runs that were left out or lack data; "" without any."""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<aside class="problems" aria-label="Notes about the runs"><ul>{items}</ul></aside>' if items else ""


def summary_table(by_env: Mapping[str, Sequence[Group]], places: Mapping[str, int]) -> str:
    """Return mean and standard deviation of each group, with a drawing of the runs on a scale of the environment."""
    found = [group for groups in by_env.values() for group in groups]
    columns, drawn = shown_columns(found), _drawn_column(found)
    heads = [_head("Setting"), _head("Runs"), _head(f"{drawn.title}, each run" if drawn else "", kind="strip")]
    heads += [_head(one.title, one.meaning) for one in columns]
    rows = []
    for env_id, groups in by_env.items():
        known = [statistics_of(group) for group in groups]
        strips = [numbers.get(drawn.key) if drawn else None for numbers in known]
        values = [value for one in strips if one is not None for value in one.values if np.isfinite(value)]
        low, high = min(values, default=0.0), max(values, default=0.0)
        # Files with single precision differ from others in the last digits.
        is_drawn = high - low > 1e-5 * max(abs(low), abs(high))
        scale = f"{number_text(low, (high - low) / 10)} to {number_text(high, (high - low) / 10)}" if is_drawn else ""
        cells = [_row_head(escape(env_id or "unknown environment"), "rowgroup"), "<td></td>"]
        cells += [f'<td class="scale">{scale}</td>', f'<td colspan="{len(columns)}"></td>']
        rows.append(_row(cells, "env"))
        for group, numbers, one in zip(groups, known, strips, strict=True):
            place = places[group.name]
            strip = "" if one is None or not is_drawn else _strip(one, low, high, place)
            cells = [_row_head(swatch(place) + escape(group.name)), *_cells([len(group.records)])]
            cells += [f'<td class="strip">{strip}</td>', *_cells(cell_text(numbers, column.key) for column in columns)]
            rows.append(_row(cells))
    return _table("summary", heads, rows)


def settings_tables(by_env: Mapping[str, Sequence[Group]], places: Mapping[str, int]) -> str:
    """Return the settings of the groups of each environment; rows that differ come first."""
    tables = []
    for env_id, found in by_env.items():
        groups = [group for group in found if group.settings]
        keys = {key for group in groups for key in group.settings}
        differing = set(differing_keys([group.settings for group in groups]))
        heads = [
            _head(env_id or "Setting"),
            *(_head(group.name, sample=swatch(places[group.name])) for group in groups),
        ]
        rows = []
        for key in sorted(keys, key=lambda key: (key not in differing, key)):
            mark = '<span title="differs">≠ </span>' if key in differing else ""
            cells = _cells(value_text(group.settings.get(key, MISSING)) for group in groups)
            rows.append(_row([_row_head(mark + escape(key)), *cells], "differs" if key in differing else "same"))
        if rows:
            tables.append(_table("settings" if differing else "settings all", heads, rows))
    return "".join(tables) or '<p class="hint">The files of the runs name no settings.</p>'


def videos(groups: Sequence[Group], places: Mapping[str, int]) -> str:
    """Return a video of each group that has one, embedded as long as they are not too large; "" without any."""
    figures, left = [], MOST_VIDEO_BYTES
    for group in groups:
        path = next((record.video for record in group.records if record.video is not None), None)
        if path is None:
            continue
        size = path.stat().st_size
        shown = f"<p>Too large for the page: {escape(str(path))}</p>"
        if size <= left:
            left -= size
            content = base64.b64encode(Path(path).read_bytes()).decode()
            shown = f'<video controls loop muted playsinline src="data:video/mp4;base64,{content}"></video>'
        caption = f"{_title(group, places)} <small>{escape(path.name)}</small>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{shown}</figure>")
    if not figures:
        return ""
    return f'<section id="videos"><h2>Videos</h2><div class="grid">{"".join(figures)}</div></section>'


def command_blocks(groups: Sequence[Group], places: Mapping[str, int], command: str) -> str:
    """Return the commands that train each group again, and the one that writes the page."""
    blocks = [(_title(group, places), train_commands(group)) for group in groups]
    blocks = [(title, text) for title, text in blocks if text] + [("This page", command)]
    return "".join(f'<div class="command"><h3>{title}</h3><pre>{escape(text)}</pre></div>' for title, text in blocks)


def run_table(groups: Sequence[Group]) -> str:
    """Return the numbers of every run."""
    columns = shown_columns(groups)
    titles = ["Folder", "Environment", "Setting", "Seed", *(one.title for one in columns)]
    rows = []
    for group in groups:
        for record in group.records:
            numbers = [numbers_of(record)[one.key] for one in columns]
            texts = ["–" if value is None else number_text(value) for value in numbers]
            cells = [record.env_id, group.name, "–" if record.seed is None else record.seed, *texts]
            rows.append(_row([_row_head(escape(str(record.folder))), *_cells(cells)]))
    return _table("runs", map(_head, titles), rows)


def meanings(groups: Sequence[Group]) -> str:
    """Return what the columns of the tables are."""
    return "".join(f"<dt>{escape(one.title)}</dt><dd>{escape(one.meaning)}</dd>" for one in shown_columns(groups))


def _drawn_column(groups: Sequence[Group]) -> Column | None:
    """Return the leftmost column of returns that the largest number of groups has; None if no group has any."""
    counts = Counter(key for group in groups for key in statistics_of(group))
    returns = [column for column in shown_columns(groups) if column.key not in _NO_RETURNS]
    return max(returns, key=lambda column: counts[column.key], default=None)


def _strip(statistic: Statistic, low: float, high: float, place: int) -> str:
    """Return a drawing of the runs as dots and their mean as a bar, on a scale from ``low`` to ``high``."""
    *runs, mean = (6 + 108 * (value - low) / (high - low) for value in (*statistic.values, statistic.mean))
    dots = "".join(f'<circle cx="{x:.1f}" cy="8" r="3.2"/>' for x in runs if np.isfinite(x))
    bar = f'<path d="M{mean:.1f} 1V15"/>' if np.isfinite(mean) else ""
    lines = f'<path class="axis" d="M3 8H117"/>{dots}{bar}'
    return f'<svg class="dots c{place % N_COLORS}" viewBox="0 0 120 16" aria-hidden="true">{lines}</svg>'


def _title(group: Group, places: Mapping[str, int]) -> str:
    return f"{swatch(places[group.name])}{escape(group.name)} <small>{escape(group.env_id)}</small>"


def _table(kind: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    head, body = f"<thead>{_row(heads)}</thead>", f"<tbody>{''.join(rows)}</tbody>"
    # A wide table scrolls by itself, also with the keyboard.
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{kind}">'
    return f'{region}<table class="{kind}">{head}{body}</table></div>'


def _row(cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _head(title: str, meaning: str = "", kind: str = "", sample: str = "") -> str:
    return f'<th scope="col" class="{kind}" title="{escape(meaning)}">{sample}{escape(title)}</th>'


def _row_head(html: str, scope: str = "row") -> str:
    return f'<th scope="{scope}">{html}</th>'


def _cells(values: Iterable[object]) -> list[str]:
    return [f"<td>{escape(str(value))}</td>" for value in values]
