"""What a run is of, beyond what was asked: its model, texts, numerics and machine, as columns.

Two runs with the same settings may be of two models: the files at a path were replaced, or the path
was masked as a secret. So a record's content hashes keep runs apart as its settings do, and where
they do not follow from the settings a table shows them.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mi_experiments.records.record_types import short_hash
from mi_experiments.records.result import Provenance

PROVENANCE = ("numerics_version", "device", "tokens_sha256", "model_files", "calibration_text",
              "calibration_sha256")  # fmt: skip
"""Known once a run has begun, and as good a reason as a setting to keep two runs apart."""

MACHINE = ("versions", "threads", "platform")
"""Known likewise; they move last bits, so that a mean may join them, and says so."""

FOLLOWS = {
    "model_files": r"model|model\.(path|revision)",
    "calibration_text": r"dataset|dataset\.(path|split|text_field)|corpora\..*",
    "calibration_sha256": (
        r"seed|nsamples|dataset(\..*)?|corpora\..*|model|model\.(path|revision)|model_files"
        r"|calibration_text|evaluation\.datasets\..*\.(corpus|path)"
    ),
}
"""Hashes, and the columns of what they follow from: two runs that differ in these may differ in the
hash, and two that agree in all of them and differ in the hash are told apart by it."""


def identity_columns(provenance: Provenance | None) -> dict[str, Any]:
    """Return the columns of a run's origin; missing where it is not known."""
    if provenance is None:
        names = [name for name in (*PROVENANCE, *MACHINE) if name != "tokens_sha256"]
        return dict.fromkeys(names, math.nan)
    versions = ", ".join(f"{name} {value}" for name, value in sorted(provenance.versions.items()))
    return {
        "numerics_version": provenance.numerics_version,
        "device": provenance.device,
        "model_files": short_hash(provenance.model_files) or math.nan,
        "calibration_text": provenance.calibration_text_sha256 or math.nan,
        "calibration_sha256": provenance.calibration_sha256 or math.nan,
        "versions": versions or math.nan,
        "threads": provenance.threads,
        "platform": provenance.platform,
    }


def follows(frame: pd.DataFrame, name: str, varying: Sequence[str]) -> bool:
    """Tell whether a hash is the same wherever all that it follows from is the same.

    Args:
        frame: rows of runs.
        name: the name of the hash.
        varying: columns in which the runs differ.
    """
    deciding = [other for other in varying if re.fullmatch(FOLLOWS[name], other)]
    seen: dict[tuple[Any, ...], Any] = {}
    for row in frame[[name, *deciding]].itertuples(index=False, name=None):
        value, key = row[0], tuple(None if pd.isna(cell) else cell for cell in row[1:])
        if not pd.isna(value) and seen.setdefault(key, value) != value:
            return False
    return True


def tell_models_apart(frame: pd.DataFrame, varying: Sequence[str]) -> list[str]:
    """Return the columns in which rows are of different models or texts."""
    pattern = r"model|model\..*|model_files|calibration_text|tokens_sha256|numerics_version"
    return [name for name in varying if re.fullmatch(pattern, name) and name in frame]


def kept_apart(frame: pd.DataFrame, varying: Sequence[str]) -> list[str]:
    """Say in which origin runs differ whose settings do not say so."""
    done = frame[frame["status"] == "completed"]
    return [
        f"kept apart, because they differ in {name}: {found}"
        for name in varying
        if name in PROVENANCE and (found := runs_by_value(done, name))
    ]


def mixtures(frame: pd.DataFrame, groups: Sequence[Sequence[int]], what: str) -> list[str]:
    """Say of which machines, versions and models the completed runs are that are put together.

    Args:
        frame: rows of runs.
        groups: places of the rows that become one number.
        what: they become.

    Returns:
        A line for each kind of difference, with the runs of the first group that has it.
    """
    lines = []
    for name in (*MACHINE, *PROVENANCE):
        if name == "calibration_sha256" or name not in frame:
            continue
        for members in groups:
            rows = frame.iloc[list(members)]
            if found := runs_by_value(rows[rows["status"] == "completed"], name):
                lines.append(f"{what} of runs that differ in {name}: {found}")
                break
    return lines


def runs_by_value(frame: pd.DataFrame, name: str) -> str:
    """Return the values of a column with their runs, in a line; empty if there is one value.

    Of the versions of libraries only those are shown that differ.
    """
    runs: dict[str, list[str]] = {}
    for run, value in zip(frame["run"], frame[name], strict=True):
        runs.setdefault("unknown" if pd.isna(value) else str(value), []).append(str(run))
    if len(runs) < 2 or (name == "tokens_sha256" and not several_in_a_text(frame)):
        return ""
    common = set.intersection(*(set(value.split(", ")) for value in runs))
    shown = []
    for value, names in runs.items():
        own = [part for part in value.split(", ") if part not in common or name != "versions"]
        some = ", ".join(list(dict.fromkeys(names))[:3]) + (", …" if len(names) > 3 else "")
        text = ", ".join(own)
        shown.append(f"{text if len(text) <= 60 or name in MACHINE else text[:12]} ({some})")
    return "; ".join(shown)


def several_in_a_text(frame: pd.DataFrame) -> bool:
    """Tell whether two runs have other tokens of a text of one name."""
    return bool((frame.groupby("text")["tokens_sha256"].nunique() > 1).any())
