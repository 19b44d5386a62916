"""Draw the pictures of docs/method.md: python benchmarks/draw_pictures.py RUN_DIR [FOLDER].

RUN_DIR is a run of `mi-run sparsity=dense wbits.average=3`; the other pictures come from results/.
Each SVG says from what it was drawn, with the SHA-256 of the file.
"""

import hashlib
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
COLOURS = ("#0072b2", "#d55e00", "#008f6b", "#b5558c", "#b97a00", "#4b5a67", "#6a51a3", "#8b939b")
MARKS = ("o", "s", "^", "D", "v", "P")
MODELS = ("embedded", "stories260K", "babyllama")
STYLE = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e7e2", "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 7,
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "mi_experiments",
}  # fmt: skip
RIVALS = {
    "the default: energy groups": ("energy", 5, False, "mixed"),
    "contiguous groups": ("contiguous", 5, False, "mixed"),
    "a width a linear, a scale a row": ("contiguous", 1, False, "mixed"),
    "a width a linear, a scale for 64 channels": ("contiguous", 1, True, "mixed"),
    "one width for all": ("contiguous", 1, False, "uniform"),
}


def save(figure: Figure, source: Path, file: Path) -> None:
    """Write an SVG that names its source, the same bytes each time."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    metadata = {"Date": None, "Description": f"drawn from {source.name}, sha256 {digest}"}
    figure.savefig(file, metadata=metadata)
    print(f"{file}: {file.stat().st_size / 1024:.0f} KiB")


def panels(count: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side."""
    figure = Figure(figsize=(7.2, height))
    return figure, list(figure.subplots(1, count))


def draw_groupings(source: Path, file: Path) -> None:
    """Draw what each grouping gains over random groups, with its 95 % interval."""
    table = pd.read_csv(source)
    table = table[(table["sparsity"] == 0) & (table["grouping"] != "random")]
    names = ("energy", "sensitivity", "redundancy", "mutual_information", "contiguous")
    figure, axes = panels(len(MODELS))
    for model, axis in zip(MODELS, axes, strict=True):
        rows = table[table["model"] == model]
        for place, name in enumerate(names):
            row = rows[rows["grouping"] == name].sort_values("wbits")
            axis.errorbar(
                row["wbits"] + 0.06 * (place - 2), row["difference"], row["difference_ci95"],
                color=COLOURS[place], marker=MARKS[place], markersize=3.5, linestyle="none",
                linewidth=0.9, label=name.replace("_", " "),
            )  # fmt: skip
        axis.axhline(0, color="#59626c", linewidth=0.8)
        axis.set_title(model, loc="left")
        axis.set_xlabel("average bits")
        axis.set_xticks(sorted(rows["wbits"].unique()))
    axes[0].set_ylabel("difference to random groups,\nnats per token (below 0: better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    save(figure, source, file)


def draw_storage(source: Path, file: Path) -> None:
    """Draw what is lost against everything that is stored."""
    table = pd.read_csv(source)
    figure, axes = panels(len(MODELS))
    for model, axis in zip(MODELS, axes, strict=True):
        for place, (label, (grouping, count, chunked, allocation)) in enumerate(RIVALS.items()):
            rows = table[
                (table["model"] == model)
                & (table["grouping"] == grouping)
                & (table["n_groups"] == count)
                & (table["wbits.group_size"].notna() == chunked)
                & (table["allocation"] == allocation)
            ].sort_values("effective_bits")
            axis.errorbar(
                rows["effective_bits"], rows["excess"], rows["excess_ci95"], color=COLOURS[place],
                marker=MARKS[place], markersize=3.5, linewidth=0.9, label=label,
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(model, loc="left")
        axis.set_xlabel("effective bits a weight")
    axes[0].set_ylabel("excess, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, source, file)


def draw_widths(run: Path, file: Path) -> None:
    """Draw which share of each linear's channels has which width."""
    source = run / "linears.parquet"
    table = pd.read_parquet(source)
    figure = Figure(figsize=(7.2, 2.8))
    axis = figure.subplots()
    widths = sorted({width for bits in table["bits"] for width, _ in bits})
    below = pd.Series(0.0, table.index)
    for place, width in enumerate(widths):
        share = table["bits"].map(lambda bits, width=width: dict(bits).get(width, 0))
        share = share / table["columns"]
        axis.bar(table.index, share, bottom=below, color=COLOURS[place], label=f"{width} bits")
        below += share
    names = table["name"].str.split(".").str[-1].str.removesuffix("_proj")
    axis.set_xticks(table.index, names, rotation=90)
    for first in table.index[table["block"].diff() > 0]:
        axis.axvline(first - 0.5, color="#59626c", linewidth=0.8)
    axis.set_ylabel("share of the channels")
    axis.grid(False)
    figure.legend(loc="outside upper center", ncols=len(widths))
    save(figure, source, file)


if __name__ == "__main__":
    run = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "pictures"
    with mpl.rc_context(STYLE):
        draw_groupings(ROOT / "results" / "ablation_grouping.csv", folder / "groupings.svg")
        draw_storage(ROOT / "results" / "mixed_against_whole_linears.csv", folder / "storage.svg")
        draw_widths(run, folder / "widths.svg")
