"""Learning curves as a Matplotlib figure, for papers and pages that cannot hold the interactive one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sb3_clipvf.zoo.comparison.curves import mean_and_std, panels
from sb3_clipvf.zoo.comparison.groups import Group

# Those of the page's light style.
_COLORS = ("#1f6fb4", "#c8500a", "#0a7f5f", "#a8447f", "#8a6d00", "#2a8fa8", "#5b5f66")
_DASHES = ("-", "--", ":", "-.")


def learning_curves(groups: Sequence[Group]) -> Figure:
    """Return a figure with a panel for each environment: mean and one standard deviation of the runs' returns."""
    names = list(dict.fromkeys(group.name for group in groups))
    env_ids = list(dict.fromkeys(group.env_id for group in groups))
    n_columns = min(3, len(env_ids))
    n_rows = math.ceil(len(env_ids) / n_columns)
    # The figure object draws without pyplot, whose backend belongs to the caller's process.
    figure = Figure(figsize=(max(6.4, 3.6 * n_columns), max(4.2, 2.8 * n_rows) + 0.3), layout="constrained")
    for index, env_id in enumerate(env_ids):
        axes = figure.add_subplot(n_rows, n_columns, index + 1)
        found = panels([group for group in groups if group.env_id == env_id])
        for panel in [one for one in found if one.key in ("return", "return/evaluation")][:1]:
            for name, runs in panel.lines["steps"].items():
                place = names.index(name)
                color, dash = _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]
                mean, std, _ = mean_and_std(runs)
                x = panel.grids["steps"]
                axes.plot(x, mean, dash, color=color, linewidth=1.6, label=name)
                axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.16, linewidth=0)
        axes.set_title(env_id or "unknown environment", fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlim(left=0)
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return", fontsize="medium")
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(3, len(handles)), frameon=False)
    return figure
