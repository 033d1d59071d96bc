"""The speed benchmark's figure: how many times faster than SB3's PPO the others train, one pair of bars per row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tests.bench.plots import BLUE, new_figure, save_figure
from tests.bench.results import Results
from tests.bench.speed_rows import PEERS, SpeedRow
from tests.bench.speed_table import ratio

_COLORS = {"clipppo": BLUE, "sbx": "#A0A0A0"}
_HEIGHT = 0.38


def write_figure(results: Results, rows: Sequence[SpeedRow], rounds: int, path: Path) -> None:
    """Draw the ratios to SB3's steps per second: bars for medians, lines from the smallest to the largest."""
    from matplotlib.patches import Patch

    rows = [row for row in rows if any(ratio(results, row, "sb3", rounds, base=peer) for peer in _COLORS)]
    figure = new_figure(7.4, 1.0 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for index, (peer, color) in enumerate(_COLORS.items()):
        for place, row in enumerate(rows):
            spread = ratio(results, row, "sb3", rounds, base=peer)
            if spread is None:
                continue
            y = place + (index - 0.5) * _HEIGHT
            margins = [[spread.median - spread.low], [spread.high - spread.median]]
            axes.barh(y, spread.median, _HEIGHT, color=color, xerr=margins, ecolor="#404040", error_kw={"lw": 0.8})
            text = f"  {spread.median:.1f}"
            axes.text(spread.high, y, text, va="center", size="x-small")
    one = axes.axvline(1, color="black", linewidth=0.8, linestyle="--", label=PEERS["sb3"])
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.title, 44) for row in rows], size="small")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"steps per second, as a multiple of {PEERS['sb3']}'s PPO", size="small")
    axes.tick_params(axis="x", labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    handles = [*(Patch(color=color, label=PEERS[peer]) for peer, color in _COLORS.items()), one]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize="small")
    save_figure(figure, path)
