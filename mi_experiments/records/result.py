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

from mi_experiments.config.renames import record_with_new_names, text_with_measurements
from mi_experiments.evaluation.measurements import PERPLEXITY, Measurement
from mi_experiments.persistence.atomic import file_hash, write_atomically
from mi_experiments.persistence.seals import SEAL, seal
from mi_experiments.records.candidates import SafetyNet
from mi_experiments.records.linears import TIMINGS, LinearReport, weighted_mean
from mi_experiments.records.record_types import adapter, read_as

RESULT = "result.json"


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model on one text, and on what exactly.

    Attributes:
        protocol: name of the evaluation protocol.
        windows: how the text was cut: `joined`, `documents` or `sampled`.
        seqlen: tokens in a window, at most.
        tokens: predicted tokens.
        count: windows.
        dropped_tokens: tokens at the end that filled no window.
        tokens_sha256: content hash of the windows.
        floor: perplexity of the true distribution on the same tokens, where it is known.
        bos: whether a beginning token was put before each text; None in records without it.
        measurements: what was asked, by name, in that order.
    """

    protocol: str
    windows: str
    seqlen: int
    tokens: int
    count: int
    dropped_tokens: int
    tokens_sha256: str
    floor: float | None
    measurements: dict[str, Measurement]
    bos: bool | None = None

    @property
    def perplexity(self) -> float:
        """The perplexity, where it was measured."""
        return self.measurements[PERPLEXITY].value

    @property
    def nll(self) -> float:
        """Its mean negative log-likelihood, nats per predicted token."""
        return self.measurements[PERPLEXITY].mean


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
        numerics_version: raised whenever a change may move a number.
        versions: the versions of Python and the libraries that compute.
        commit: of the checkout, with `+` where it had local changes; None without a checkout.
        command: the command line.
        started: UTC time, ISO 8601.
        platform: operating system, processor, and the vector instructions that are used of it.
        device: what the model ran on.
        threads: the threads of the CPU mathematics.
        seeds: the seeds by purpose.
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
        calibration_duplicates: the calibration duplicates of these, how many repeat an earlier one.
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
        seconds: the seconds by phase, over all the times that the run was continued.
        resumed: how many times it was.
        statuses: number of linears by status.
        dropped: calibration samples that were left out, and in what they were not finite; messages
            of later phases count the samples that are left.
        retries: how often memory was short and work was done again in smaller pieces.
        from_cache: by phase, what was not computed but read, because another job had computed it;
            the seconds of that phase are those of reading, and of waiting for that job.
        stability: mean of that of the linears, by their weights; None where none has one.
        safety_net: what it compared and kept; None without one.
        compressed_sha256: the compressed sha256 of all compressed blocks; None until there are all.
        seal: the seal of the file, see `seals`; empty in records without one.
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


def read_evaluation(entry: Mapping[str, Any]) -> Evaluation:
    """Return the value that `dataclasses.asdict` and JSON turned into an entry, of any version.

    Raises:
        ValueError: it is none.
    """
    evaluation: Evaluation = adapter(Evaluation).validate_python(text_with_measurements(entry))
    return evaluation


def by_name(texts: Mapping[str, Evaluation]) -> dict[str, dict[str, Measurement]]:
    """Return what was measured on some texts, by the name of the measurement and then by text."""
    found: dict[str, dict[str, Measurement]] = {}
    for text, evaluation in texts.items():
        for name, measured in evaluation.measurements.items():
            found.setdefault(name, {})[text] = measured
    return found


def total_bits(linears: Sequence[LinearReport], requested: float) -> Bits:
    """Average over all weights of all linears."""
    return Bits(
        requested=requested,
        average=weighted_mean(linears, {linear.name: linear.average_bits for linear in linears}),
        effective=weighted_mean(
            linears, {linear.name: linear.effective_bits for linear in linears}
        ),
    )
