"""The columns of a table of runs: settings, results and measurements, and which settings vary."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from mi_experiments.comparison.identity import (
    FOLLOWS,
    MACHINE,
    PROVENANCE,
    follows,
)
from mi_experiments.config.renames import KEYS
from mi_experiments.errors import InputError
from mi_experiments.evaluation.measurements import PERPLEXITY

SHORT = {
    "model.name": "model",
    "dataset.corpus": "dataset",
    "seed": "seed",
    "dataset.nsamples": "nsamples",
    "sparsity.ratio": "sparsity",
    "wbits.average": "wbits",
    "wbits.allocation": "allocation",
    "wbits.scope": "scope",
    "n_groups.grouping": "grouping",
    "n_groups.count": "n_groups",
    "recipe.name": "recipe",
}
"""Columns of the settings that are named most, by config key; every other key is its own column."""

DOTTED = {short: key for key, short in SHORT.items()}

RESULTS = ("realised_sparsity", "average_bits", "effective_bits", "dense", "compressed", "excess",
           "difference", "seconds", "peak_memory")  # fmt: skip

AVERAGED = ("average_bits", "effective_bits", "compressed", "excess", "difference", "seconds")

INTERVAL, COUNT = "_ci95", "_n"

MEASURED = re.compile(r"(dense|compressed|difference)_(\w+)")
"""Columns of measurements beside the perplexity: `dense_NAME`, `compressed_NAME`, …"""

NO_SETTING = {"run", "status", "error", "runs", *RESULTS, *MACHINE} | {
    f"{name}{suffix}" for name in AVERAGED for suffix in (INTERVAL, COUNT)
}

BOOKKEEPING = re.compile(
    r"tracking\..*|expected(\..*)?|export|cache|dry_run|evaluation\.measurements"
)
"""Keys that cannot move a number: runs that differ in nothing else are alike."""


def column_of(phase: str, measurement: str) -> str:
    """Return the column of a measurement: `dense_NAME`, and `dense` for the perplexity."""
    return phase if measurement == PERPLEXITY else f"{phase}_{measurement}"


def is_result(name: str) -> bool:
    """Tell whether a column is a number that a run gave."""
    return name in RESULTS or MEASURED.fullmatch(name) is not None


def measured_columns(frame: pd.DataFrame, *phases: str) -> list[str]:
    """Return the columns of measurements beside the perplexity, of some phases or all."""
    found = [(name, MEASURED.fullmatch(name)) for name in frame]
    return [
        name
        for name, match in found
        if match and not name.endswith((INTERVAL, COUNT)) and (not phases or match[1] in phases)
    ]


def result_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns of results, those of measurements after the perplexity's."""
    return [*RESULTS[:-2], *measured_columns(frame), *RESULTS[-2:]]


def averaged_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns that are averaged over runs."""
    measured = measured_columns(frame, "compressed", "difference")
    return [*AVERAGED[:-1], *measured, *AVERAGED[-1:]]


def missing(value: Any) -> Any:
    """Return NaN for None: the one mark of a missing value."""
    return math.nan if value is None else value


def belongs(key: str, text: object) -> bool:
    """Tell whether a key is one of an evaluation text's own settings."""
    return key.startswith(f"evaluation.datasets.{text}.")


def find_column(frame: pd.DataFrame, name: str) -> str:
    """Return the column of a name: its own, a config key, or a measurement (`perplexity`).

    Raises:
        InputError: there is none.
    """
    known = synonyms(frame)
    column = known.get(name, name)
    if column in frame:
        return column
    if column in KEYS:
        raise InputError(f"column {column} is called {KEYS[column]} now")
    near = difflib.get_close_matches(name, [*frame.columns, *known], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    some = ", ".join(frame.columns[:20])
    raise InputError(f"unknown column {name}{hint} (text needs quotes; columns: {some}, …)")


def synonyms(frame: pd.DataFrame) -> dict[str, str]:
    """Return other names of columns; a measurement is that of the compressed model."""
    measured = measured_columns(frame, "compressed")
    others = {name.removeprefix("compressed_"): name for name in measured}
    return SHORT | {PERPLEXITY: "compressed"} | others


def find_settings(frame: pd.DataFrame, names: Iterable[str], option: str) -> list[str]:
    """Return the columns of settings by name; results are refused."""
    columns = [find_column(frame, name) for name in names]
    for column in columns:
        if not is_setting(column):
            raise InputError(f"{option} {column} is not allowed: it is no setting of the runs")
    return columns


def settings(frame: pd.DataFrame) -> list[str]:
    """Return the columns of settings."""
    return [name for name in frame if is_setting(name)]


def is_setting(name: str) -> bool:
    """Tell whether a column is a setting, or what tells runs apart as one does."""
    return name not in NO_SETTING and not is_result(name)


def varying(frame: pd.DataFrame) -> list[str]:
    """Return the settings in which runs differ, without `tracking`, `export` and mere copies.

    A copy is a key that has the value of a shorter or earlier key of the same last name in every
    row, as `dataset.seed` has that of `seed` unless it is set.
    """
    names = [
        name for name in settings(frame) if not BOOKKEEPING.fullmatch(name) and differs(frame, name)
    ]
    names = [
        name
        for name in names
        if name not in FOLLOWS or not follows(frame, name, [n for n in names if n != name])
    ]
    order = {name: (DOTTED.get(name, name).count("."), names.index(name)) for name in names}
    return [
        name
        for name in names
        if not any(order[other] < order[name] and is_copy(frame, name, other) for other in names)
    ]


def differs(frame: pd.DataFrame, name: str) -> bool:
    """Tell whether a setting has two values; one of a text is compared within that text."""
    if name == "tokens_sha256" and "text" in frame:
        return bool((frame.groupby("text")[name].nunique() > 1).any())
    values = frame.loc[own_rows(frame, name), name]
    return int(values.nunique(dropna=name in PROVENANCE)) > 1


def own_rows(frame: pd.DataFrame, name: str) -> pd.Series:
    """Mark the rows that can have a setting: all, or those of the text that it belongs to."""
    if not name.startswith("evaluation.datasets.") or "text" not in frame:
        return pd.Series(True, frame.index)
    return frame["text"].map(lambda text: belongs(name, text)).astype(bool)


def is_copy(frame: pd.DataFrame, name: str, other: str) -> bool:
    """Tell whether a setting has the value of another of the same last name in all of its rows."""
    if DOTTED.get(name, name).split(".")[-1] != DOTTED.get(other, other).split(".")[-1]:
        return False
    rows = frame.loc[own_rows(frame, name)]
    return cells(rows[[name]]) == cells(rows[[other]])


def stands_for(frame: pd.DataFrame, columns: Iterable[str]) -> set[str]:
    """Return settings with all that follow them: their copies, and what a config's name names."""
    found = set(columns)
    for column in list(found):
        key = DOTTED.get(column, column)
        group = key.removesuffix("name") if key.endswith(".name") else None
        found |= {
            other
            for other in settings(frame)
            if is_copy(frame, other, column)
            or (group and DOTTED.get(other, other).startswith(group))
        }
    return found


def cells(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Return the rows as tuples that compare equal where values are missing in both."""
    rows = frame.itertuples(name=None)
    return [tuple(None if pd.isna(cell) else cell for cell in row[1:]) for row in rows]


def show_value(cell: object) -> str:
    """Write a setting as on the command line: `3`, `true`, `null`, `random`."""
    if pd.isna(cell):
        return "null"
    if isinstance(cell, float):
        return f"{cell:g}"
    return str(cell).lower() if pd.api.types.is_bool(cell) else str(cell)
