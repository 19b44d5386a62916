"""How a figure for a paper looks: colours, marks, sizes, scales and legends, with matplotlib."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mi_experiments.comparison.columns import INTERVAL
from mi_experiments.comparison.views.data import label_of

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e7e2",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#8b939b",
    "axes.linewidth": 0.7,
    "xtick.color": "#59626c",
    "ytick.color": "#59626c",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}
COLOURS = ("#0072b2", "#d55e00", "#008f6b", "#b5558c", "#b97a00", "#4b5a67", "#6a51a3")
MARKS = ("o", "s", "^", "D", "v", "P")
COLUMN, PAGE = (3.5, 3.0), (7.1, 2.9)
"""Inches: a column and a page of a paper."""


@dataclass(frozen=True)
class Look:
    """How a series is told apart: colour and mark, so that colour is never alone."""

    colour: str
    mark: str


def paper(size: tuple[float, float], x: str, y: str) -> tuple[Figure, Axes]:
    """Return an empty figure with named axes."""
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_xlabel(literally(label_of(x)))
    axes.set_ylabel(literally(label_of(y)))
    return figure, axes


def scatter(axes: Axes, rows: pd.DataFrame, x: str, y: str, look: Look) -> None:
    """Draw rows as points, with the intervals that they have."""
    widths = {
        f"{axis}err": rows[name + INTERVAL].fillna(0.0)
        for axis, name in (("x", x), ("y", y))
        if name + INTERVAL in rows
    }
    axes.errorbar(
        rows[x], rows[y], **widths, color=look.colour, marker=look.mark, markersize=4,
        markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.6, linestyle="none",
        label="points",
    )  # fmt: skip


def spread(axes: Axes, values: pd.Series, ends: pd.Series) -> None:
    """Choose the scale and limits of the upward axis, as on the page.

    Widely spread positive values get a logarithmic one. An interval of few samples is wide: it
    counts for no more than a third of the spread of the values themselves.
    """
    low, high = values.min(), values.max()
    if log := low > 0 and high / low > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if low == high:
        return
    span = [math.log(low), math.log(high)] if log else [low, high]
    room = 0.35 * (span[1] - span[0])
    inner = ends[ends > 0] if log else ends
    outer = [math.log(inner.min()), math.log(inner.max())] if log else [inner.min(), inner.max()]
    bottom = max(min(span[0], outer[0]), span[0] - room) - 0.07 * (span[1] - span[0])
    top = min(max(span[1], outer[1]), span[1] + room) + 0.07 * (span[1] - span[0])
    axes.set_ylim(*(math.exp(bottom), math.exp(top)) if log else (bottom, top))


def add_legend(figure: Figure, looks: dict[str, Look], title: str) -> None:
    """Name the looks above the plot."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.mark, markersize=4, linestyle="none")
        for look in looks.values()
    ]
    side_by_side = 58 // (max(map(len, looks)) + 5)
    figure.legend(handles, list(looks), title=literally(title), loc="outside upper left",
                  ncols=max(1, min(side_by_side, 3)), handletextpad=0.1, columnspacing=0.8,
                  title_fontsize=7, alignment="left")  # fmt: skip


def name_runs(axes: Axes, runs: list[str]) -> None:
    """Write the runs' names below their columns while there is room."""
    if len(runs) <= 24:
        axes.set_xticks(range(len(runs)), [literally(run[-12:]) for run in runs], rotation=60)
    else:
        axes.set_xlabel(f"{len(runs)} runs, in the order of the table")


def literally(text: str) -> str:
    """Return text that matplotlib writes as it is, dollars too."""
    return text.replace("$", r"\$")
