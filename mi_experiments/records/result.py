"""What a run leaves behind: frozen values, written as JSON and parquet, and read back.

A run directory holds `result.json` (one `Result`), `linears.parquet` and `timings.parquet` (a
`LinearReport` a row), `manifest.json` (what is finished, by content), `run.log`, `.hydra/`, and
with `export=dense` the compressed model and its grids.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mi_experiments.config.renames import record_with_new_names
from mi_experiments.persistence.atomic import file_hash, write_atomically
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.persistence.seals import SEAL, seal
from mi_experiments.records.candidates import SafetyNet
from mi_experiments.records.record_types import check_rows, read_as, read_rows

RESULT = "result.json"
LINEARS = "linears.parquet"
TIMINGS = "timings.parquet"

CHANGED = ("compressed", "escalated", "dead", "vanished")
"""Status of a linear to which what was asked was done."""


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
            an expert; `untouched`, where neither bits nor sparsity were asked. These three are
            rounded to 16 bits a weight, if they have more, and counted so. `dead`: compressed,
            although all that it reads is zero on every calibration token; `vanished`: compressed,
            but weights of a group are too small for the scales that are stored.
        plan_damping: share that was added to the dense model's Hessian, which groups and costs
            come from; None if that was not measured.
        stability: adjusted Rand index between the groups that two halves of the calibration tokens
            give; None where groups do not come from tokens.
        retries: how often memory was short while its site was measured or it was compressed, and
            the work was done again in smaller pieces; of sites measured together, the first counts.
        unquantized_dtype: 16-bit type of the weights that have no codes, `float16` or `bfloat16`;
            None where all have.
        planned_bits: mean width that the plan gave it, which counts against the budget; None in
            records without it.
    """

    block: int
    name: str
    site: str
    rows: int
    columns: int
    bits: dict[int, int]
    average_bits: float
    effective_bits: float
    sparsity: float
    output_error: float
    levels: int
    groups: int
    pairwise_information: float | None
    information_noise: float | None
    redundancy: float | None
    total_correlation: float | None
    damping: float | None
    damping_attempts: tuple[float, ...]
    dead_channels: int
    tokens: int
    seconds: float
    status: str
    plan_damping: float | None = None
    retries: int = 0
    all_tokens: bool = False
    stability: float | None = None
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


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of one model on one text.

    Attributes:
        protocol: name of the evaluation protocol.
        windows: how the text was cut: `joined`, `documents` or `sampled`.
        seqlen: tokens in a window, at most.
        nll: mean negative log-likelihood per predicted token, nats.
        perplexity: exp(nll).
        standard_error: of `nll`, over windows, nats; None for one window.
        tokens: predicted tokens.
        count: windows.
        dropped_tokens: tokens at the end that filled no window.
        tokens_sha256: content hash of the windows.
        floor: perplexity of the true distribution on the same tokens, where it is known.
        bos: whether a beginning token was put before each text; None in records without it.
    """

    protocol: str
    windows: str
    seqlen: int
    nll: float
    perplexity: float
    standard_error: float | None
    tokens: int
    count: int
    dropped_tokens: int
    tokens_sha256: str
    floor: float | None
    bos: bool | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
        numerics_version: raised whenever a change may move a number.
        versions: of Python and the libraries that compute.
        commit: of the checkout, with `+` where it had local changes; None without a checkout.
        command: the command line.
        started: UTC time, ISO 8601.
        platform: operating system, processor, and the vector instructions that are used of it.
        device: what the model ran on.
        threads: of the CPU mathematics.
        seeds: by purpose.
        model_files: SHA-256 of each file of the model.
        model_revision: commit that a hub id resolved to; None for a directory.
        calibration_sha256: content hash of the calibration tokens.
        calibration_samples: sequences that there were, fewer than asked if that was allowed; None
            in records without it.
        calibration_bos: whether a beginning token was put before each calibration document; None
            in records without it.
        untied: weights that the config ties to others, and that are stored with other values: they
            were kept apart.
        calibration_documents: documents that calibration may draw from and `calibration_left_out`;
            None where it reads no file, and in records without it, as are the next three.
        calibration_duplicates: of these, how many repeat an earlier one.
        calibration_shared: how many, passages of running text too, evaluation has as well.
        calibration_left_out: how many of those are not drawn from: all, or none if published.
        calibration_text_sha256: content hash of the files that calibration draws from, whatever it
            draws; None for the embedded language, and in records without it.
    """

    numerics_version: int
    versions: dict[str, str]
    commit: str | None
    command: str
    started: str
    platform: str
    device: str
    threads: int
    seeds: dict[str, int]
    model_files: dict[str, str]
    model_revision: str | None
    calibration_sha256: str | None
    calibration_samples: int | None = None
    calibration_bos: bool | None = None
    untied: list[str] = field(default_factory=list)
    calibration_documents: int | None = None
    calibration_duplicates: int | None = None
    calibration_shared: int | None = None
    calibration_left_out: int | None = None
    calibration_text_sha256: str | None = None


@dataclass(frozen=True)
class Bits:
    """The budget: asked for, met in codes, and with everything that is stored; bits per weight."""

    requested: float
    average: float
    effective: float


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes:
        status: `running`, `completed`, `interrupted` (can be continued) or `failed`.
        error: the one line of a run that did not complete.
        config: what was asked.
        provenance: where the numbers come from; None if the run failed before it was known.
        dense: evaluation of the model as loaded, by text.
        compressed: evaluation of the compressed model, by text.
        bits: the budget over all compressed linears; None until they are compressed.
        sparsity: share of their weights that are zero by the pattern.
        weights: number of weights of the compressed linears.
        coverage: compressed share of all block weights of two or more dimensions.
        memory: peak bytes of host and accelerator.
        seconds: by phase, over all the times that the run was continued.
        resumed: how many times it was.
        statuses: number of linears by status.
        dropped: calibration samples that were left out, and in what they were not finite; messages
            of later phases count the samples that are left.
        retries: how often memory was short and work was done again in smaller pieces.
        from_cache: by phase, what was not computed but read, because another job had computed it;
            the seconds of that phase are those of reading, and of waiting for that job.
        stability: mean of that of the linears, by their weights; None where none has one.
        safety_net: what it compared and kept; None without one.
        compressed_sha256: of all compressed blocks; None until there are all.
        seal: of the file, see `seals`; empty in records without one.
    """

    status: str
    error: str | None
    config: dict[str, Any]
    provenance: Provenance | None
    dense: dict[str, Evaluation]
    compressed: dict[str, Evaluation]
    bits: Bits | None
    sparsity: float | None
    weights: int | None
    coverage: float | None
    memory: dict[str, int]
    seconds: dict[str, float]
    resumed: int
    statuses: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    from_cache: dict[str, list[str]] = field(default_factory=dict)
    stability: float | None = None
    safety_net: SafetyNet | None = None
    compressed_sha256: str | None = None
    seal: dict[str, str] = field(default_factory=dict, compare=False)


def write_result(result: Result, run_dir: Path) -> None:
    """Write `result.json` atomically, with a seal on it and on `timings.parquet`.

    These two differ between equal runs; so they are not in the manifest, which does not.
    """
    timings = run_dir / TIMINGS
    beside = {TIMINGS: file_hash(timings)} if timings.is_file() else {}
    content = {key: part for key, part in dataclasses.asdict(result).items() if key != SEAL}
    text = json.dumps(seal(content, beside), indent=2, allow_nan=False)
    write_atomically(run_dir / RESULT, (text + "\n").encode())


def read_result(run_dir: Path) -> Result:
    """Read `result.json` back as the value it was written from, old names as those of today.

    Raises:
        FileNotFoundError: there is none.
        BrokenRecord: it is not what `write_result` writes; the line names the first thing.
    """
    result: Result = read_as(Result, run_dir / RESULT, record_with_new_names)
    return result


LINEAR_SCHEMA = pa.schema([
    ("block", pa.int64()),
    ("name", pa.string()),
    ("site", pa.string()),
    ("rows", pa.int64()),
    ("columns", pa.int64()),
    ("bits", pa.map_(pa.int64(), pa.int64())),
    ("average_bits", pa.float64()),
    ("effective_bits", pa.float64()),
    ("sparsity", pa.float64()),
    ("output_error", pa.float64()),
    ("levels", pa.int64()),
    ("groups", pa.int64()),
    ("pairwise_information", pa.float64()),
    ("information_noise", pa.float64()),
    ("redundancy", pa.float64()),
    ("total_correlation", pa.float64()),
    ("damping", pa.float64()),
    ("damping_attempts", pa.list_(pa.float64())),
    ("dead_channels", pa.int64()),
    ("tokens", pa.int64()),
    ("status", pa.string()),
    ("plan_damping", pa.float64()),
    ("retries", pa.int64()),
    ("all_tokens", pa.bool_()),
    ("stability", pa.float64()),
    ("unquantized_dtype", pa.string()),
    ("planned_bits", pa.float64()),
])
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


def total_bits(linears: Sequence[LinearReport], requested: float) -> Bits:
    """Average over all weights of all linears."""
    return Bits(
        requested=requested,
        average=weighted_mean(linears, {linear.name: linear.average_bits for linear in linears}),
        effective=weighted_mean(
            linears, {linear.name: linear.effective_bits for linear in linears}
        ),
    )


def weighted_mean(linears: Sequence[LinearReport], values: Mapping[str, float]) -> float:
    """Mean of a value per linear, weighted by the number of its weights."""
    weights = sum(linear.weights for linear in linears)
    return sum(values[linear.name] * linear.weights for linear in linears) / weights
