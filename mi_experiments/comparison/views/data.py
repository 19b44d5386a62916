"""What a comparison shows, as plain data: the table of runs, its means, and the linears of runs.

Every number is one of a record, or of the table that `read_runs`, `add_difference` and
`average_over` make of them; nothing is rounded, scaled or computed again on the way to the eye.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mi_experiments.comparison.columns import (
    COUNT,
    DOTTED,
    INTERVAL,
    MEASURED,
    column_of,
    find_settings,
    measured_columns,
    result_columns,
    settings,
    show_value,
    varying,
)
from mi_experiments.comparison.identity import tell_models_apart
from mi_experiments.comparison.run_table import find_runs
from mi_experiments.errors import InputError
from mi_experiments.evaluation.measurements import MEASUREMENTS
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.records.linears import LINEARS, METRICS, LinearReport, read_linears
from mi_experiments.records.result import Result, read_result

LABELS = {
    "compressed": "perplexity",
    "excess": "excess, nats per token",
    "difference": "paired difference, nats per token",
    "dense": "dense perplexity",
    "realised_sparsity": "realised sparsity",
    "nsamples": "calibration sequences",
    "wbits": "requested bits",
    "n_groups": "groups a site",
    "peak_memory": "peak memory",
} | {name: metric.label for name, metric in METRICS.items()}
"""What an axis or a choice is called, with its unit; any other column has its own name."""

LOSSES = ("compressed", "excess", "difference")
"""What may be drawn upwards over bits and calibration, before what else was measured."""

LAYER_METRICS = tuple(METRICS)
"""Numbers of a linear that a map of the layers can show; the first is the default."""

INFORMATION = tuple(name for name, metric in METRICS.items() if metric.of_site)
"""Numbers of a site, the same for each of its linears; the first is the default."""

COLOURED_FIRST = (
    "model",
    "grouping",
    "recipe",
    "allocation",
    "scope",
    "sparsity",
    "wbits",
    "nsamples",
)
"""Settings that tell points apart by colour, if they vary, in order of preference."""


@dataclass(frozen=True)
class RunDetail:
    """One run beyond its row.

    Attributes:
        directory: where its records are.
        result: its record.
        linears: what happened to each weight matrix; None if the run has none yet.
    """

    directory: Path
    result: Result
    linears: list[LinearReport] | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: rows of `read_runs`, in the order in which they are shown.
        means: rows of `average_over`; None if nothing was averaged.
        over: what was averaged over.
        columns: what a table of `runs` shows.
        mean_columns: what a table of `means` shows.
        colour: the setting that tells points apart; None if the runs differ in nothing.
        details: the details by run.
        command: the command line that shows the same again.
    """

    runs: pd.DataFrame
    means: pd.DataFrame | None
    over: tuple[str, ...]
    columns: tuple[str, ...]
    mean_columns: tuple[str, ...]
    colour: str | None
    details: dict[str, RunDetail]
    command: str

    @property
    def models(self) -> list[str]:
        """The columns in which the shown rows are of different models, texts or numerics."""
        frame = self.runs if self.means is None else self.means
        return tell_models_apart(frame, varying(frame))

    @property
    def rising(self) -> list[str]:
        """The columns of which more is better."""
        return list(
            dict.fromkeys(
                column_of(phase, name)
                for detail in self.details.values()
                for evaluation in detail.result.dense.values()
                for name, number in evaluation.measurements.items()
                for phase in ("dense", "compressed", "difference")
                if not number.lower_is_better
            )
        )

    @property
    def chosen(self) -> str | None:
        """The run whose layers are shown first: the first completed one that has them."""
        rows = zip(self.runs["run"], self.runs["status"], strict=True)
        for run, status in rows:
            if status == "completed" and self.details[run].linears is not None:
                return str(run)
        return None


def gather_details(
    paths: Sequence[Path], runs: Iterable[str], left_out: list[str] | None = None
) -> dict[str, RunDetail]:
    """Read the records of some runs below the paths, with the linears of those that have them.

    Args:
        paths: the paths that the runs were read from.
        runs: their names.
        left_out: receives a line for each run whose linears cannot be read, which then has none;
            None if that is an error.

    Raises:
        InputError: the linears of a run cannot be read.
    """
    directories = {name: directory for directory, name in find_runs(paths).items()}
    details = {}
    for run in dict.fromkeys(runs):
        directory = directories[run]
        linears = None
        if (directory / LINEARS).exists():
            try:
                linears = read_linears(directory)
            except (OSError, BrokenRecord) as error:
                if left_out is None:
                    raise InputError(str(error)) from error
                left_out.append(f"left out: {error}")
        details[run] = RunDetail(directory, read_result(directory), linears)
    return details


def linears_with_kinds(linears: Sequence[LinearReport]) -> pd.DataFrame:
    """Return a row a linear with its `kind` and `site_kind`: the names inside the block."""
    return pd.DataFrame([asdict(linear) for linear in linears]).assign(
        kind=[below_block(linear.name, linear.block) for linear in linears],
        site_kind=[below_block(linear.site, linear.block) for linear in linears],
    )


def below_block(name: str, block: int) -> str:
    """Return a linear's name inside its block: `self_attn.q_proj` of `model.layers.3.self_…`."""
    _, found, rest = f".{name}".partition(f".{block}.")
    return rest if found else name


def family(kind: str) -> str:
    """Return a kind without the number of its expert, so that experts share a colour."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind)


def choose_colour(frame: pd.DataFrame, asked: str | None) -> str | None:
    """Return the setting that tells points apart: as asked, or the first that varies."""
    if asked is not None:
        return find_settings(frame, [asked], "--by")[0]
    names = [name for name in varying(frame) if name != "text"]
    return next((name for name in (*COLOURED_FIRST, *names) if name in names), None)


def numeric_settings(frame: pd.DataFrame) -> list[str]:
    """Return what may be an axis: settings that are numbers, nsamples first, then what varies."""
    names = [
        name
        for name in varying(frame)
        if pd.api.types.is_numeric_dtype(frame[name])
        and not pd.api.types.is_bool_dtype(frame[name])
    ]
    return list(dict.fromkeys([name for name in ("nsamples",) if name in frame] + names))


def drawn_losses(frame: pd.DataFrame) -> list[str]:
    """Return what can be drawn upwards: what a row has, the losses first; at least the first."""
    names = [*LOSSES, *measured_columns(frame, "compressed", "difference")]
    known = [name for name in names if name in frame and frame[name].notna().any()]
    return known or [LOSSES[0]]


def in_common(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the settings that all rows share, by config key, where they have a value."""
    shared = []
    for name in settings(frame):
        values = frame[name]
        if name != "text" and values.notna().all() and values.nunique() == 1:
            shared.append((DOTTED.get(name, name), show_value(values.iloc[0])))
    return shared


def label_of(name: str) -> str:
    """Return what a column is called on an axis."""
    if (match := MEASURED.fullmatch(name)) and match[2] in MEASUREMENTS:
        before = {"compressed": "", "dense": "dense ", "difference": "paired difference of "}
        return before[match[1]] + MEASUREMENTS[match[2]].label
    return LABELS.get(name, name)


def to_plain(comparison: Comparison) -> dict[str, Any]:
    """Return all that a page needs, for JSON: numbers unrounded, what is missing as None.

    Linears lie in columns; the names of linears, which most runs share, stand once in `shapes`.
    """
    frame, means = comparison.runs, comparison.means
    shapes: list[dict[str, list[Any]]] = []
    statuses = dict(zip(frame["run"], frame["status"], strict=True))
    errors = dict(zip(frame["run"], frame["error"], strict=True))
    runs = {
        run: {
            "status": statuses[run],
            "error": plain(errors[run]),
            "seconds": detail.result.seconds,
            "memory": detail.result.memory,
            "command": detail.result.provenance and detail.result.provenance.command,
            "linears": plain_linears(detail.linears, shapes),
        }
        for run, detail in comparison.details.items()
    }
    apart = varying(frame)
    kept = dict.fromkeys(
        ["run", "status", "error", "text", *comparison.columns, *apart, *numeric_settings(frame),
         *result_columns(frame)]
    )  # fmt: skip
    floors = [
        getattr(comparison.details[run].result.dense.get(text), "floor", None)
        for run, text in zip(frame["run"], frame["text"], strict=True)
    ]
    rows = plain_rows(frame[[name for name in kept if name in frame]].assign(floor=floors))
    return {
        "command": comparison.command,
        "over": list(comparison.over),
        "columns": list(comparison.columns),
        "mean_columns": list(comparison.mean_columns),
        "varying": apart,
        "mean_varying": [] if means is None else [n for n in varying(means) if n != "runs"],
        "models": comparison.models,
        "axes": numeric_settings(frame),
        "losses": drawn_losses(frame),
        "colour": comparison.colour,
        "chosen": comparison.chosen,
        "labels": LABELS | {name: label_of(name) for name in measured_columns(frame)},
        "results": result_columns(frame),
        "rising": comparison.rising,
        "layer_metrics": list(LAYER_METRICS),
        "information": list(INFORMATION),
        "interval": INTERVAL,
        "count": COUNT,
        "common": in_common(frame),
        "rows": rows,
        "means": [] if means is None else plain_rows(means),
        "runs": runs,
        "shapes": shapes,
    }


def plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table with plain values."""
    return [
        {str(name): plain(value) for name, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]


def plain(value: Any) -> Any:
    """Return a value that JSON knows: numbers as they are, None for what is missing."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | bool | int | float) else str(value)


def plain_linears(
    linears: Sequence[LinearReport] | None, shapes: list[dict[str, list[Any]]]
) -> dict[str, Any] | None:
    """Return the numbers of the linears in columns, and which of the shapes they belong to."""
    if not linears:
        return None
    shape: dict[str, list[Any]] = {
        name: [getattr(linear, name) for linear in linears]
        for name in ("block", "name", "rows", "columns")
    }
    shape["kind"] = [below_block(linear.name, linear.block) for linear in linears]
    shape["site_kind"] = [below_block(linear.site, linear.block) for linear in linears]
    if shape not in shapes:
        shapes.append(shape)
    return {
        "shape": shapes.index(shape),
        "bits": [{str(width): n for width, n in linear.bits.items()} for linear in linears],
    } | {
        name: [plain(getattr(linear, name)) for linear in linears]
        for name in (*LAYER_METRICS, "information_noise")
    }
