"""What happened to each linear: one frozen value, written to parquet a row a linear, and read back.

A field that is a number to look at says so once, beside itself, by a `Metric`. The columns on disk,
the curves in Weights & Biases and the maps and figures of a comparison follow from the fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.records.record_types import check_rows, read_rows

LINEARS = "linears.parquet"
TIMINGS = "timings.parquet"

CHANGED = ("compressed", "escalated", "dead", "vanished")
"""Status of a linear to which what was asked was done."""


@dataclass(frozen=True)
class Metric:
    """What is said beside a number of a linear.

    Attributes:
        label: words for an axis, with the unit.
        of_site: whether all linears of a site have the same value.
    """

    label: str
    of_site: bool = False


@dataclass(frozen=True)
class LinearReport:
    """What happened to one weight matrix.

    Attributes:
        block: index of the decoder block.
        name: name of the module in the model.
        site: the linears that read the same input, as one name.
        rows: output dimension.
        columns: input dimension.
        bits: number of channels at each width.
        average_bits: mean width of the codes over all weights, recomputed from what is stored.
        effective_bits: everything stored, per weight.
        sparsity: share of weights that are exactly zero by the pattern.
        output_error: ‖(Ŵ − W*)X‖² / ‖W*X‖² on the calibration inputs of the compressed model; W* is
            what the sweep aimed at, W itself unless the recipe corrects targets.
        levels: most distinct values of one (row, scale group).
        groups: number of channel groups.
        pairwise_information: mean mutual information of two channels, nats; None if not measured.
        information_noise: the same estimate on shuffled tokens, nats.
        redundancy: mean of what the other channels know about a channel, nats.
        total_correlation: of the site's channels, nats; None where there was no factor.
        damping: share of the mean diagonal that was added to the Hessian in the end; None where
            there was no factor: skipped, or all weights pruned.
        damping_attempts: all shares that were tried.
        dead_channels: channels that are zero on every calibration token.
        tokens: calibration tokens that the linear saw.
        all_tokens: whether it was calibrated on all tokens, because those are too few.
        seconds: time of its grid fits and sweeps.
        status: `compressed`; `escalated`, with more damping than asked; `skipped`, left as it was
            because its Hessian is singular; `kept`, likewise because too few tokens are routed to
            an expert. These two are rounded to 16 bits a weight, if they have more, and counted
            so. `untouched`, where neither bits nor sparsity were asked: it stays to the bit, and
            counts 16, or 32 if no 16-bit type holds it exactly. `dead`: compressed, although all
            that it reads is zero on every calibration token; `vanished`: compressed, but weights
            of a group are too small for the scales that are stored.
        plan_damping: share that was added to the dense model's Hessian, which groups and costs
            come from; None if that was not measured.
        stability: adjusted Rand index between the groups that two halves of the calibration tokens
            give; None where groups do not come from tokens.
        retries: how often memory was short while its site was measured or it was compressed, and
            the work was done again in smaller pieces; of sites measured together, the first counts.
        unquantized_dtype: type in which the weights that have no codes are stored, `float16` or
            `bfloat16`, or `float32` if `untouched`; None where all have.
        planned_bits: mean width that the plan gave it, which counts against the budget; None in
            records without it.
    """

    block: int
    name: str
    site: str
    rows: int
    columns: int
    bits: dict[int, int]
    average_bits: Annotated[float, Metric("average bits")]
    effective_bits: Annotated[float, Metric("effective bits per weight")]
    sparsity: Annotated[float, Metric("sparsity")]
    output_error: Annotated[float, Metric("relative output error")]
    levels: int
    groups: int
    pairwise_information: Annotated[
        float | None, Metric("pairwise information, nats", of_site=True)
    ]
    information_noise: float | None
    redundancy: Annotated[float | None, Metric("redundancy, nats", of_site=True)]
    total_correlation: Annotated[float | None, Metric("total correlation, nats", of_site=True)]
    damping: float | None
    damping_attempts: tuple[float, ...]
    dead_channels: int
    tokens: int
    seconds: Annotated[float, Metric("seconds")]
    status: str
    plan_damping: float | None = None
    retries: int = 0
    all_tokens: bool = False
    stability: Annotated[float | None, Metric("stability of the groups")] = None
    unquantized_dtype: str | None = None
    planned_bits: float | None = None

    @property
    def changed(self) -> bool:
        """Whether anything was done to it."""
        return self.status in CHANGED

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "LinearReport":
        """Return the report that `dataclasses.asdict` and JSON turned into a row."""
        bits = {int(width): channels for width, channels in row["bits"].items()}
        attempts = tuple(row["damping_attempts"])
        return cls(**{**row, "bits": bits, "damping_attempts": attempts})


def metrics_of(report: type) -> dict[str, Metric]:
    """Return the numbers to look at of a report, by field, in order."""
    hints = get_type_hints(report, include_extras=True)
    return {
        name: said
        for name, hint in hints.items()
        for said in getattr(hint, "__metadata__", ())
        if isinstance(said, Metric)
    }


COLUMNS: dict[Any, pa.DataType] = {
    int: pa.int64(),
    str: pa.string(),
    bool: pa.bool_(),
    float: pa.float64(),
    float | None: pa.float64(),
    str | None: pa.string(),
    dict[int, int]: pa.map_(pa.int64(), pa.int64()),
    tuple[float, ...]: pa.list_(pa.float64()),
}
"""How the type of a field is stored."""


def schema_of(report: type) -> pa.Schema:
    """Return the columns of a report on disk: its fields, but for the time that it took."""
    hints = get_type_hints(report)
    return pa.schema([(name, COLUMNS[hint]) for name, hint in hints.items() if name != "seconds"])


METRICS = metrics_of(LinearReport)
LINEAR_SCHEMA = schema_of(LinearReport)
TIMING_SCHEMA = pa.schema([("name", pa.string()), ("seconds", pa.float64())])


def write_linears(linears: Sequence[LinearReport], run_dir: Path) -> None:
    """Write `linears.parquet` and `timings.parquet` atomically, a row a linear.

    Times differ between equal runs; all else is in the first file, which does not.
    """
    rows = [dataclasses.asdict(linear) | {"bits": list(linear.bits.items())} for linear in linears]
    for name, schema in ((LINEARS, LINEAR_SCHEMA), (TIMINGS, TIMING_SCHEMA)):
        sink = pa.BufferOutputStream()
        chosen = [{field: row[field] for field in schema.names} for row in rows]
        pq.write_table(pa.Table.from_pylist(chosen, schema=schema), sink)
        write_atomically(run_dir / name, sink.getvalue().to_pybytes())


def read_linears(run_dir: Path) -> list[LinearReport]:
    """Read what `write_linears` wrote back as the values that it was written from.

    Raises:
        FileNotFoundError: there are none.
        BrokenRecord: they are not what `write_linears` writes.
    """
    rows = read_rows(run_dir / LINEARS, LINEAR_SCHEMA)
    unknown = [row | {"seconds": 0.0} for row in rows]
    linears: list[LinearReport] = check_rows(LinearReport, unknown, run_dir / LINEARS)
    timings = {row["name"]: row["seconds"] for row in read_rows(run_dir / TIMINGS, TIMING_SCHEMA)}
    if [linear.name for linear in linears] != list(timings) or None in timings.values():
        raise BrokenRecord(f"{run_dir / TIMINGS} is not of the linears of {LINEARS}")
    return [dataclasses.replace(linear, seconds=timings[linear.name]) for linear in linears]


def weighted_mean(linears: Sequence[LinearReport], values: Mapping[str, float]) -> float:
    """Mean of a value per linear, weighted by the number of its weights."""
    weights = sum(linear.weights for linear in linears)
    return sum(values[linear.name] * linear.weights for linear in linears) / weights
