"""A table of runs as bytes: csv, parquet, JSON, markdown, LaTeX, and what a terminal shows."""

import json
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mi_experiments.comparison.columns import (
    COUNT,
    INTERVAL,
    is_result,
    show_value,
)
from mi_experiments.comparison.inert import escape_markdown, escape_spreadsheet, visible

UNFOLDED = 10_000
"""A width, in characters, that no table reaches: files and pipes get their rows in one line."""


def write_table(
    frame: pd.DataFrame, form: str, digits: int | None, notes: Sequence[str] = ()
) -> bytes:
    """Return the table in a format.

    Args:
        frame: what to write.
        form: `table`, `csv`, `parquet`, `json`, `markdown` or `latex`.
        digits: decimals of results; None for 4 in a `table` and for all there are elsewhere, so
            that what is read back is what was written.
        notes: lines below a `table`; no other format has a place for them.
    """
    if digits is not None:
        frame = frame.round({name: digits for name in frame if is_number(name)})
    text: str
    match form:
        case "parquet":
            sink = BytesIO()
            of_one_type(frame).to_parquet(sink, index=False)
            return sink.getvalue()
        case "csv":
            text = for_spreadsheet(frame).to_csv(index=False)
        case "json":
            rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
            text = json.dumps(rows, indent=2, allow_nan=False) + "\n"
        case "markdown":
            text = to_markdown(frame, digits)
        case "latex":
            text = to_latex(frame, digits)
        case _:
            file = StringIO()
            draw(frame, digits, notes, Console(width=UNFOLDED, file=file))
            text = file.getvalue()
    return text.encode()


def of_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with text in the columns whose values are of several types."""
    mixed = [name for name in frame if len(set(map(type, frame[name].dropna()))) > 1]
    return frame.assign(**{
        name: frame[name].map(lambda cell: None if pd.isna(cell) else show_value(cell))
        for name in mixed
    })


def for_spreadsheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with text, names of columns too, that no spreadsheet runs."""
    shown = frame.astype(object).map(
        lambda cell: escape_spreadsheet(cell) if isinstance(cell, str) else cell
    )
    inert = {
        name: shown[name] if frame[name].dtype.kind in "OUT" else frame[name] for name in frame
    }
    return pd.DataFrame(inert).rename(columns=escape_spreadsheet)


def is_number(name: str) -> bool:
    """Tell whether a column holds measured numbers: also one of a pivot, `wbits=3`."""
    return is_result(name) or "=" in name or name.endswith(INTERVAL)


def draw(frame: pd.DataFrame, digits: int | None, notes: Sequence[str], console: Console) -> None:
    """Print the table and its notes."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    shown = for_people(frame, 4 if digits is None else digits, units=True)
    for name in shown:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        heading = name.replace("_", "\n") if is_result(name) else visible(name)
        table.add_column(Text(heading), justify="right" if numeric else "left", overflow="fold")
    for row in shown.itertuples(index=False, name=None):
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
    for note in notes:
        console.print(Text(visible(note)), soft_wrap=True)


def for_people(frame: pd.DataFrame, digits: int | None, *, units: bool = False) -> pd.DataFrame:
    """Return the table as text; mean, interval and count are one cell.

    A count is written where it is not the largest of the table: a mean of fewer samples.
    """
    counts = [name for name in frame if is_part(frame, name, COUNT)]
    intervals = [name for name in frame if is_part(frame, name, INTERVAL)]
    most = frame[counts].max(axis=None) if counts else 0
    shown = {}
    for name in frame:
        if name in counts or name in intervals:
            continue
        write = writer(name, frame[name], digits, units)
        lines = [write(value) for value in frame[name]]
        if name + INTERVAL in intervals:
            widths = frame[name + INTERVAL]
            lines = [
                line if pd.isna(width) else f"{line} ± {write(width)}"
                for line, width in zip(lines, widths, strict=True)
            ]
        if name + COUNT in counts:
            lines = [
                line if count in {0, most} or pd.isna(count) else f"{line} (n={count:.0f})"
                for line, count in zip(lines, frame[name + COUNT], strict=True)
            ]
        shown[name] = lines
    return pd.DataFrame(shown)


def is_part(frame: pd.DataFrame, name: str, suffix: str) -> bool:
    """Tell whether a column is the interval or count of another that is there too."""
    return name.endswith(suffix) and name.removesuffix(suffix) in frame


def writer(name: str, column: pd.Series, digits: int | None, units: bool) -> Callable[[Any], str]:
    """Return what writes the cells of a column."""
    result = is_number(name)

    def write(cell: Any) -> str:
        if pd.isna(cell):
            return "–"
        if units and name == "peak_memory":
            return f"{cell / 1e9:.2f} GB"
        if units and name == "seconds":
            return f"{cell:.1f}"
        if units and name == "tokens_sha256":
            return str(cell)[:12]
        if not isinstance(cell, float) or not result:
            return show_value(cell)
        if digits is None:
            return repr(cell)
        return f"{cell:.{digits}f}" if abs(cell) < 1e6 else f"{cell:.{digits}e}"

    return write


def to_markdown(frame: pd.DataFrame, digits: int | None) -> str:
    """Write a pipe table."""
    shown = for_people(frame, digits)
    lines = [
        [escape_markdown(name) for name in shown],
        [align(frame, name, "---:", "---") for name in shown],
    ]
    lines += shown.map(escape_markdown).to_numpy().tolist()
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(frame: pd.DataFrame, digits: int | None) -> str:
    """Write a tabular with the rules of booktabs."""
    shown = for_people(frame, digits)
    spec = "".join(align(frame, name, "r", "l") for name in shown)
    lines = [[escape_latex(name) for name in shown], *shown.map(escape_latex).to_numpy().tolist()]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    parts = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule", *body,
             r"\bottomrule", r"\end{tabular}", ""]  # fmt: skip
    return "\n".join(parts)


def align(frame: pd.DataFrame, name: str, number: str, text: str) -> str:
    """Return the mark of a column of numbers, or that of one of text."""
    return number if pd.api.types.is_numeric_dtype(frame[name]) else text


def escape_latex(text: str) -> str:
    """Write text so that LaTeX prints it as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "±": r"$\pm$", "–": "--"}  # fmt: skip
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in visible(text))
