"""Records of many runs as one table, a row a (run, evaluation text), and in what its rows differ.

A column is a setting (what was asked, by its key in the config or the short name in `SHORT`), a
result, or one of `run`, `status` and `error`. Failed and unfinished runs are rows like all others;
what they have no number for is missing, and nothing is ever averaged across two statuses.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mi_experiments.comparison.identity import (
    FOLLOWS,
    MACHINE,
    PROVENANCE,
    follows,
    identity_columns,
)
from mi_experiments.config.renames import KEYS
from mi_experiments.errors import InputError
from mi_experiments.evaluation.measurements import PERPLEXITY
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.records.record_check import check_result
from mi_experiments.records.result import RESULT, Result, read_result

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

INCONSISTENT = "inconsistent"
"""Status of a completed run whose files contradict each other: none of its numbers is shown."""

NO_SETTING = {"run", "status", "error", "runs", *RESULTS, *MACHINE} | {
    f"{name}{suffix}" for name in AVERAGED for suffix in (INTERVAL, COUNT)
}
BOOKKEEPING = re.compile(
    r"tracking\..*|expected(\..*)?|export|reuse|dry_run|evaluation\.measurements"
)
"""Keys that cannot move a number: runs that differ in nothing else are alike."""


def read_runs(paths: Sequence[Path], left_out: list[str] | None = None) -> pd.DataFrame:
    """Read every run at or below the paths, a row for each of its evaluation texts.

    Columns: `dense` and `compressed` are perplexities, `excess` is the compressed model's mean
    negative log-likelihood above the dense one's, nats per token; any other measurement is in
    `dense_NAME` and `compressed_NAME`; `average_bits` and
    `effective_bits` are per weight; `seconds` is the sum over all phases and `peak_memory` the
    larger of host and accelerator, bytes. What a record does not have is missing (NaN). A run whose
    files contradict each other has the status `inconsistent`, no number, and as its error what is
    wrong.

    Args:
        paths: run directories, sweeps or trees.
        left_out: receives a line for each record that cannot be read, and the others are returned;
            None if such a record is an error.

    Raises:
        InputError: a path is no directory or has no run below it, or no record can be read.
    """
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for directory, name in find_runs(paths).items():
        try:
            rows += read_rows_of(directory, name)
        except (BrokenRecord, OSError) as error:
            line = str(error)
            if not isinstance(error, BrokenRecord):
                line = f"{error.filename or directory}: {error.strerror or error}"
            broken.append(line)
            if left_out is None:
                raise InputError(f"{directory / RESULT} is no record of a run: {line}") from error
    if not rows:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise InputError(f"no record can be read: {broken[0]}{more}")
    if left_out is not None:
        left_out += [f"left out: {line}" for line in broken]
    leading = ["run", "status", *SHORT.values(), "text", *RESULTS, "error", *PROVENANCE, *MACHINE]
    leading.remove("difference")
    found = dict.fromkeys(key for row in rows for key in row)
    return pd.DataFrame(rows, columns=leading + [name for name in found if name not in leading])


def read_rows_of(directory: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a run, without numbers if its files contradict each other.

    Raises:
        BrokenRecord: one of its files cannot be read.
    """
    result = read_result(directory)
    rows = run_rows(name, result)
    if contradictions := check_result(result, directory):
        wrong = {"status": INCONSISTENT, "error": "; ".join(contradictions)}
        rows = [row | {key: math.nan for key in row if is_result(key)} | wrong for row in rows]
    return rows


def find_runs(paths: Sequence[Path]) -> dict[Path, str]:
    """Name every run directory: relative to its path where that is unique, else as given."""
    found: dict[Path, tuple[Path, Path]] = {}
    for root in paths:
        if not root.is_dir():
            raise InputError(f"{root} is no directory: give run directories, sweeps or trees")
        # A record that is a folder, or a link to nowhere, is one, too.
        walked = ((Path(folder), [*names, *files]) for folder, names, files in os.walk(root))
        runs = sorted((folder for folder, names in walked if RESULT in names), key=natural_order)
        if not runs:
            raise InputError(f"{root} holds no run: there is no {RESULT} at or below it")
        for run in runs:
            found.setdefault(run.resolve(), (root, run))
    names = {
        run: directory.name if directory == root else directory.relative_to(root).as_posix()
        for run, (root, directory) in found.items()
    }
    if len(set(names.values())) < len(names) or "" in names.values():
        names = {run: str(directory) for run, (_, directory) in found.items()}
    # A name of a file may be any bytes; what is printed and written must be text.
    return {run: os.fsencode(name).decode(errors="backslashreplace") for run, name in names.items()}


def natural_order(path: Path) -> list[str | int]:
    """Return a sort key by which job 2 of a sweep comes before job 10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def run_rows(name: str, result: Result) -> list[dict[str, Any]]:
    """Return the rows of one run; of the texts' own settings, a row has those of its text."""
    config = dict(flatten(result.config))
    evaluation = result.config.get("evaluation")
    asked = evaluation.get("datasets") if isinstance(evaluation, Mapping) else None
    asked = asked if isinstance(asked, Mapping) else {}
    run = {
        "run": name,
        "status": result.status,
        "error": missing(result.error),
        "realised_sparsity": missing(result.sparsity),
        "average_bits": result.bits.average if result.bits else math.nan,
        "effective_bits": result.bits.effective if result.bits else math.nan,
        "seconds": sum(result.seconds.values()) if result.seconds else math.nan,
        "peak_memory": max(result.memory.values(), default=math.nan),
    } | identity_columns(result.provenance)  # fmt: skip
    rows = []
    for text in dict.fromkeys([*asked, *result.dense, *result.compressed]) or [None]:
        dense, compressed = result.dense.get(text or ""), result.compressed.get(text or "")
        numbers = {
            column_of(phase, measured): number
            for phase, evaluation in (("dense", dense), ("compressed", compressed))
            for measured, number in (evaluation.measurements if evaluation else {}).items()
        }
        before, after = numbers.get("dense"), numbers.get("compressed")
        settings = {
            SHORT.get(key, key): value
            for key, value in config.items()
            if key not in NO_SETTING
            if not key.startswith("evaluation.datasets.") or belongs(key, text)
        }
        results = {
            "text": missing(text),
            "dense": math.nan,
            "compressed": math.nan,
            "excess": after.mean - before.mean if before and after else math.nan,
            "tokens_sha256": dense.tokens_sha256 if dense else math.nan,
        } | {column: number.value for column, number in numbers.items()}
        rows.append(settings | run | results)
    return rows


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


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a list becomes its JSON text, so that it can be compared."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else missing(value)


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
