"""Records of many runs as one table, a row a (run, evaluation text).

A column is a setting (what was asked, by its key in the config or the short name in `SHORT`), a
result, or one of `run`, `status` and `error`. Failed and unfinished runs are rows like all others;
what they have no number for is missing, and nothing is ever averaged across two statuses.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mi_experiments.comparison.columns import (
    NO_SETTING,
    RESULTS,
    SHORT,
    belongs,
    column_of,
    is_result,
    missing,
)
from mi_experiments.comparison.identity import (
    MACHINE,
    PROVENANCE,
    identity_columns,
)
from mi_experiments.errors import InputError
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.records.record_check import check_result
from mi_experiments.records.result import RESULT, Result, read_result

INCONSISTENT = "inconsistent"
"""Status of a completed run whose files contradict each other: none of its numbers is shown."""


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


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a list becomes its JSON text, so that it can be compared."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else missing(value)
