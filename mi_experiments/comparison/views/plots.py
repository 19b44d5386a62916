"""The plots of the page as matplotlib figures, for papers: PNG and PDF.

The data of a figure are the numbers of the comparison, as they are; only seconds and bytes of a
column are stacked or written in GB.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from mi_experiments.comparison.columns import (
    INTERVAL,
    cells,
    show_value,
    varying,
)
from mi_experiments.comparison.views.data import (
    INFORMATION,
    LAYER_METRICS,
    Comparison,
    drawn_losses,
    family,
    label_of,
    linears_with_kinds,
)
from mi_experiments.comparison.views.paper import (
    COLOURS,
    COLUMN,
    MARKS,
    PAGE,
    STYLE,
    Look,
    add_legend,
    literally,
    name_runs,
    paper,
    scatter,
    spread,
)


def write_plots(comparison: Comparison, directory: Path) -> tuple[list[str], list[str]]:
    """Write every plot that there is something to show of, as PNG and PDF.

    Returns:
        The names of the plots, and a line for each that was left out, and why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawn, left_out = [], []
    with mpl.rc_context(STYLE):
        for name, figure in draw_all(comparison):
            if isinstance(figure, str):
                left_out.append(f"no plot {name}: {figure}")
                continue
            drawn.append(name)
            # Without the time, the same records make the same file.
            figure.savefig(directory / f"{name}.pdf", metadata={"CreationDate": None})
            figure.savefig(directory / f"{name}.png")
    return drawn, left_out


def draw_all(comparison: Comparison) -> Iterator[tuple[str, Figure | str]]:
    """Yield file names with their figures, or why there is none."""
    done = comparison.runs["status"] == "completed"
    texts = list(dict.fromkeys(comparison.runs.loc[done, "text"].dropna())) or [None]
    for text in texts:
        suffix = "" if len(texts) == 1 else "_" + re.sub(r"[^\w.-]+", "_", str(text))
        for loss in drawn_losses(comparison.runs):
            yield f"frontier_{loss}{suffix}", draw_frontier(comparison, text, loss)
            yield f"calibration_{loss}{suffix}", draw_calibration(comparison, text, loss)
    run = comparison.chosen
    reports = comparison.details[run].linears if run is not None else None
    if run is None or reports is None:
        yield "layers", "no completed run has linears"
    else:
        linears = linears_with_kinds(reports)
        for metric in LAYER_METRICS[:2]:
            yield f"map_{metric}", draw_map(linears, metric, run)
        yield "error", draw_curves(linears, "output_error", "kind", run)
        for metric in INFORMATION:
            yield metric, draw_curves(linears, metric, "site_kind", run)
    yield "time", draw_time(comparison)
    yield "memory", draw_memory(comparison)


def draw_frontier(comparison: Comparison, text: object, loss: str) -> Figure | str:
    """Draw a loss against effective bits, with the best at that many bits or fewer."""
    rows = completed(shown(comparison), text, loss, "effective_bits")
    if rows.empty:
        return "no completed run has it"
    figure, axes = paper(COLUMN, "effective_bits", loss)
    looks = looks_of(comparison)
    names = [comparison.colour] if comparison.colour else []
    for _, series in group_rows(rows, names):
        scatter(axes, series, "effective_bits", loss, look_of(comparison, looks, series))
    if len(rows) > 1 and not loss.startswith("difference"):
        # What another model reaches is nothing that this one could.
        for _, members in group_rows(rows, comparison.models):
            draw_stairs(axes, members, loss, rising=loss in comparison.rising)
    save_plot(figure, axes, comparison, looks, rows, loss)
    return figure


def draw_stairs(axes: Axes, rows: pd.DataFrame, loss: str, *, rising: bool = False) -> None:
    """Draw the lowest loss, or the highest if it is `rising`, at that many bits or fewer."""
    stairs = rows.sort_values(["effective_bits", loss], ascending=[True, not rising])
    least = (-stairs[loss] if rising else stairs[loss]).cummin()
    stairs = stairs[least.diff().fillna(-1) < 0]
    axes.step(
        [*stairs["effective_bits"], rows["effective_bits"].max()],
        [*stairs[loss], stairs[loss].iloc[-1]],
        where="post", color="#9aa5b0", linewidth=0.8, zorder=1, label="frontier",
    )  # fmt: skip


def draw_calibration(comparison: Comparison, text: object, loss: str) -> Figure | str:
    """Draw a loss against the number of calibration sequences; lines join the rest's equals."""
    frame = shown(comparison)
    rows = completed(frame, text, loss, "nsamples")
    if rows.empty:
        return "no completed run has it"
    if rows["nsamples"].nunique() < 2:
        return f"every run has nsamples={show_value(rows['nsamples'].iloc[0])}"
    figure, axes = paper(COLUMN, "nsamples", loss)
    looks = looks_of(comparison)
    others = [name for name in varying(frame) if name not in {"nsamples", "runs"}]
    for _, members in group_rows(rows, others):
        line = members.sort_values("nsamples")
        look = look_of(comparison, looks, line)
        axes.plot(line["nsamples"], line[loss], color=look.colour, linewidth=1, label="line")
        scatter(axes, line, "nsamples", loss, look)
    values = sorted(rows["nsamples"].unique())
    if values[0] > 0 and values[-1] / values[0] > 5:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [show_value(value) for value in values])
    save_plot(figure, axes, comparison, looks, rows, loss)
    return figure


def draw_map(linears: pd.DataFrame, metric: str, run: str) -> Figure:
    """Draw a number of every linear: blocks across, the linears of a block downwards."""
    table = linears.pivot(index="kind", columns="block", values=metric)
    table = table.reindex(list(dict.fromkeys(linears["kind"])))
    size = (PAGE[0], 0.9 + 0.19 * len(table))
    figure = Figure(figsize=size)
    axes = figure.subplots()
    image = axes.imshow(table.to_numpy(dtype=float), cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(table)), [literally(kind) for kind in table.index])
    every = max(1, math.ceil(len(table.columns) / 20))
    ticks = range(0, len(table.columns), every)
    axes.set_xticks(ticks, [str(table.columns[tick]) for tick in ticks])
    axes.set_xlabel("block")
    axes.grid(visible=False)
    axes.set_title(literally(f"{label_of(metric)} · {run}"), loc="left", fontsize=8)
    figure.colorbar(image, ax=axes, pad=0.015)
    return figure


def draw_curves(linears: pd.DataFrame, metric: str, kind: str, run: str) -> Figure | str:
    """Draw a number over the blocks: a line for each kind of linear or site."""
    known = linears[linears[metric].notna()].drop_duplicates(["block", kind])
    if known.empty:
        return "it was not measured"
    figure, axes = paper((PAGE[0] / 2, COLUMN[1]), "block", metric)
    families = sorted({family(name) for name in known[kind]})
    for name, line in known.groupby(kind, sort=False):
        place = families.index(family(str(name)))
        look = Look(COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)])
        ordered = line.sort_values("block")
        axes.plot(ordered["block"], ordered[metric], color=look.colour, marker=look.mark,
                  markersize=3, linewidth=1, label=f"{run} {name}")  # fmt: skip
        if metric == "pairwise_information":
            axes.plot(ordered["block"], ordered["information_noise"], color=look.colour,
                      linestyle=":", linewidth=0.8, label=f"noise {run} {name}")  # fmt: skip
    spread(axes, known[metric], known[metric])
    marks = {literally(name): Look(COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)])
             for i, name in enumerate(families)}  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, marks, f"run {run}")
    return figure


def draw_time(comparison: Comparison) -> Figure | str:
    """Draw the seconds of each run by phase, in the order of the table."""
    runs = list(comparison.details)
    phases = dict.fromkeys(p for run in runs for p in comparison.details[run].result.seconds)
    if not phases:
        return "no run has recorded it"
    figure, axes = paper(PAGE, "run", "seconds")
    below = np.zeros(len(runs))
    for i, phase in enumerate(phases):
        seconds = [comparison.details[run].result.seconds.get(phase, 0.0) for run in runs]
        axes.bar(range(len(runs)), seconds, bottom=below, color=COLOURS[i % len(COLOURS)],
                 width=0.76, label=literally(phase))  # fmt: skip
        below += seconds
    name_runs(axes, runs)
    figure.legend(loc="outside upper left", ncols=6)
    return figure


def draw_memory(comparison: Comparison) -> Figure | str:
    """Draw the peak memory of host and accelerator of each run, in the order of the table."""
    runs = list(comparison.details)
    parts = dict.fromkeys(p for run in runs for p in comparison.details[run].result.memory)
    if not parts:
        return "no run has recorded it"
    figure, axes = paper(PAGE, "run", "peak GB")
    for i, part in enumerate(parts):
        memory = [comparison.details[run].result.memory.get(part, math.nan) / 1e9 for run in runs]
        axes.plot(range(len(runs)), memory, color=COLOURS[i % len(COLOURS)], linestyle="none",
                  marker=MARKS[i % len(MARKS)], markersize=3.5, label=literally(part))  # fmt: skip
    axes.set_ylim(bottom=0, top=1.08 * axes.get_ylim()[1])
    name_runs(axes, runs)
    figure.legend(loc="outside upper left", ncols=6)
    return figure


def shown(comparison: Comparison) -> pd.DataFrame:
    """Return the means where there are some, else the runs."""
    return comparison.runs if comparison.means is None else comparison.means


def completed(frame: pd.DataFrame, text: object, *needed: str) -> pd.DataFrame:
    """Return the completed rows of a text that have all the numbers that are needed."""
    kept = frame["status"] == "completed"
    if text is not None:
        kept &= frame["text"] == text
    return frame[kept & frame[list(needed)].notna().all(axis=1)]


def group_rows(frame: pd.DataFrame, names: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield the rows that agree in some settings, missing values included."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, key in enumerate(cells(frame[names])):
        groups.setdefault(key, []).append(place)
    for key, places in groups.items():
        yield key, frame.iloc[places]


def looks_of(comparison: Comparison) -> dict[Any, Look]:
    """Return a look for each value of the setting that is told apart by colour, as on the page."""
    if comparison.colour is None:
        return {None: Look(COLOURS[0], MARKS[0])}
    values = list(dict.fromkeys(row[0] for row in cells(comparison.runs[[comparison.colour]])))
    numeric = all(value is None or isinstance(value, int | float) for value in values)
    values.sort(key=lambda value: (value is None, value if numeric else str(value)))
    return {
        value: Look(COLOURS[i % len(COLOURS)], MARKS[(i + i // len(COLOURS)) % len(MARKS)])
        for i, value in enumerate(values)
    }


def look_of(comparison: Comparison, looks: dict[Any, Look], rows: pd.DataFrame) -> Look:
    """Return the look of rows that agree in the setting told apart by colour."""
    ((value,),) = cells(rows[[comparison.colour]].iloc[:1]) if comparison.colour else ((None,),)
    return looks[value]


def save_plot(
    figure: Figure,
    axes: Axes,
    comparison: Comparison,
    looks: dict[Any, Look],
    rows: pd.DataFrame,
    loss: str,
) -> None:
    """Add the dense model, a scale that fits and the legend."""
    levels: list[float] = []
    if loss.startswith("compressed"):
        same_text = comparison.runs["text"].isin(rows["text"])
        dense = loss.replace("compressed", "dense", 1)
        levels = comparison.runs.loc[same_text, dense].dropna().unique().tolist()
    if loss.startswith("difference"):
        levels = [0.0]
    for level in levels:
        axes.axhline(level, color="#59626c", linewidth=0.7, linestyle=":", label="level")
    widths = rows[loss + INTERVAL].fillna(0.0) if loss + INTERVAL in rows else 0.0
    ends = pd.concat([rows[loss] - widths, rows[loss] + widths])
    spread(axes, pd.concat([rows[loss], pd.Series(levels)]), ends)
    if len(looks) > 1 and comparison.colour:
        named = {literally(show_value(value)): look for value, look in looks.items()}
        add_legend(figure, named, comparison.colour)
