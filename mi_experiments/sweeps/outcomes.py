"""A sweep as a value: its jobs, what became of each, and what it is likely to take.

A sweep directory holds a run directory for each job, `sweep.json` (this record), `multirun.yaml`
(what Hydra composed) and `sweep.lock`, which the process that launched it holds.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mi_experiments.persistence.atomic import remove_temporaries, write_atomically
from mi_experiments.persistence.locks import hold
from mi_experiments.persistence.plain_json import BrokenRecord
from mi_experiments.records.record_types import short_hash
from mi_experiments.records.result import RESULT, Evaluation, Result, by_name, read_result

SWEEP = "sweep.json"
LOCK = "sweep.lock"

FINISHED = ("done", "skipped")
"""Status of a job whose result is complete."""


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
        directory: name of its run directory.
        swept: its value of each swept key, as on the command line.
        status: `done`; `skipped`, because an earlier command has done it; `failed`;
            `interrupted`, continued by the same command; or `not run`.
        error: the one line of a job that did not complete.
        log: its log below the sweep directory, where there is one.
        dense: what was measured of the model as loaded, by name and text.
        compressed: what was measured of the compressed model, by name and text.
        effective_bits: everything stored, per weight.
        seconds: over all the times that it was continued.
        exit_code: what a run of its own would have ended with.
        model_files: short hash of the files of its model, where they are known.
    """

    directory: str
    swept: dict[str, str]
    status: str = "not run"
    error: str | None = None
    log: str | None = None
    dense: dict[str, dict[str, float]] = field(default_factory=dict)
    compressed: dict[str, dict[str, float]] = field(default_factory=dict)
    effective_bits: float | None = None
    seconds: float | None = None
    exit_code: int | None = None
    model_files: str | None = None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, as its process says it.

    Attributes:
        error: its one line; None if it completed.
        exit_code: what a run of its own would have ended with.
    """

    error: str | None = None
    exit_code: int = 0


def read_outcome(before: Outcome, sweep_dir: Path, seen: int | None, end: JobEnd | None) -> Outcome:
    """Return what became of a job, from its record and from what its process said.

    Args:
        before: the before of the job when it was launched.
        sweep_dir: holds its run directory.
        seen: the version of its record then (`record_version`).
        end: what its process said; None if it could say nothing.
    """
    run_dir = sweep_dir / before.directory
    log = f"{before.directory}/run.log" if (run_dir / "run.log").is_file() else None
    result = try_result(run_dir)
    if result is None or record_version(run_dir) == seen:
        # Nothing was recorded: it did not begin, or could not.
        if end is None or end.error is None or end.exit_code == 75:
            return replace(before, log=log)
        return replace(before, status="failed", error=end.error, log=log, exit_code=end.exit_code)
    outcome = replace(describe(before, result), log=log)
    if result.status == "completed":
        return replace(outcome, status="done", exit_code=0)
    if result.status == "interrupted" and (end is None or end.exit_code == 1):
        # Its process could not tell: it was stopped in good order, and has said of what.
        return replace(outcome, status="interrupted", exit_code=75)
    outcome = replace(outcome, status="failed" if result.status == "failed" else "interrupted")
    if end is not None and end.error is not None:
        return replace(outcome, error=end.error, exit_code=end.exit_code)
    lost = outcome.error or "its process ended without a word"
    return replace(outcome, error=lost, exit_code=1)


def describe(outcome: Outcome, result: Result) -> Outcome:
    """Return an outcome with the numbers of a result."""
    return replace(
        outcome,
        error=result.error,
        dense=values_by_name(result.dense),
        compressed=values_by_name(result.compressed),
        effective_bits=result.bits.effective if result.bits else None,
        seconds=sum(result.seconds.values(), 0.0),
        model_files=short_hash(result.provenance.model_files) if result.provenance else None,
    )


def values_by_name(texts: Mapping[str, Evaluation]) -> dict[str, dict[str, float]]:
    """Return the values of what was measured, by name and text."""
    return {
        name: {text: number.value for text, number in numbers.items()}
        for name, numbers in by_name(texts).items()
    }


def tell_models(outcomes: Sequence[Outcome]) -> str:
    """Say which jobs of one model, as it was asked for, read other files; empty if none did."""
    models: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for number, outcome in enumerate(outcomes, start=1):
        asked = tuple(value for key, value in outcome.swept.items() if key.startswith("model"))
        if outcome.model_files is not None:
            files = models.setdefault(asked, {})
            files.setdefault(outcome.model_files, []).append(str(number))
    for files in models.values():
        if len(files) > 1:
            parts = [f"{name} (job {', '.join(jobs)})" for name, jobs in files.items()]
            return f"not one model: its files have changed between jobs: {'; '.join(parts)}"
    return ""


def try_result(run_dir: Path) -> Result | None:
    """Return the result of a run directory, or None if there is none that can be read."""
    with suppress(OSError, BrokenRecord):
        return read_result(run_dir)
    return None


def record_version(run_dir: Path) -> int | None:
    """Return a number that is another one after every writing of a run's record."""
    with suppress(OSError):
        status = (run_dir / RESULT).stat()
        return hash((status.st_ino, status.st_mtime_ns, status.st_size))
    return None


def write_sweep(
    sweep_dir: Path, command: str, status: str, seconds: float, outcomes: Sequence[Outcome]
) -> None:
    """Write `sweep.json` atomically: the table that the sweep prints at its end."""
    content = {
        "command": command,
        "status": status,
        "seconds": round(seconds, 3),
        "jobs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(sweep_dir / SWEEP, text.encode())


@contextmanager
def lock_sweep(sweep_dir: Path) -> Iterator[None]:
    """Hold a sweep directory alone, for as long as this process lives at most.

    Raises:
        InputError: another process holds it; the line says which.
    """
    with hold(
        sweep_dir / LOCK,
        lambda holder: (
            f"{sweep_dir} is being swept by {holder}: wait for it, or choose another "
            "directory (hydra.sweep.dir=DIR)"
        ),
    ):
        # Its own alone: in the folder of a job another process may be at work.
        remove_temporaries(sweep_dir, below=False)
        yield


@dataclass(frozen=True)
class Experience:
    """What a finished run took.

    Attributes:
        model: name and path of its model.
        tokens: calibration tokens that were asked for.
        seconds: the seconds of all phases.
        bytes: the bytes of its directory.
        place: where it was found.
    """

    model: tuple[str, str]
    tokens: int
    seconds: float
    bytes: int
    place: str


@dataclass(frozen=True)
class Estimate:
    """What jobs are likely to take, one after another.

    Attributes:
        seconds: the seconds of all jobs.
        bytes: the bytes that they will leave.
        basis: the runs that say so.
    """

    seconds: float
    bytes: float
    basis: str


def read_experience(run_dir: Path, place: str) -> Experience | None:
    """Return what a run took, or None if it has not finished."""
    result = try_result(run_dir)
    if result is None or result.status != "completed":
        return None
    with suppress(KeyError, TypeError, OSError):
        config = result.config
        return Experience(
            model=(config["model"]["name"], config["model"]["path"]),
            tokens=config["dataset"]["nsamples"] * config["dataset"]["seqlen"],
            seconds=sum(result.seconds.values(), 0.0),
            bytes=sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file()),
            place=place,
        )
    return None


def estimate(jobs: Iterable[Mapping[str, Any]], runs: Sequence[Experience]) -> Estimate | None:
    """Estimate from finished runs of the same model, those with the nearest number of tokens.

    Args:
        jobs: config of each job that is to be done.
        runs: what is known; those of the first place that has any of the model are used.

    Returns:
        The estimate; None if nothing is known of a model.
    """
    seconds = size = 0.0
    used: dict[Experience, None] = {}
    for config in jobs:
        model = (config["model"]["name"], config["model"]["path"])
        alike = [run for run in runs if run.model == model]
        alike = [run for run in alike if run.place == alike[0].place]
        if not alike:
            return None
        tokens = config["dataset"]["nsamples"] * config["dataset"]["seqlen"]
        distance = {run: abs(run.tokens - tokens) for run in alike}
        nearest = [run for run in alike if distance[run] == min(distance.values())]
        seconds += sum(run.seconds for run in nearest) / len(nearest)
        size += sum(run.bytes for run in nearest) / len(nearest)
        used |= dict.fromkeys(nearest)
    places = " and ".join(dict.fromkeys(run.place for run in used))
    return Estimate(seconds, size, f"{len(used)} finished runs of {places}, nearest in tokens")
