"""Whether the files of a run agree with each other: what one says, another lets recompute.

No seal stops who edits all of them. But a perplexity is the exponential of its mean, the bits of a
run are the mean over its linears, and `manifest.json` knows by content what was computed; a number
that was edited, damaged or copied from elsewhere in one file stands against the others.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mi_experiments.config.renames import PHASES, text_without_measurements
from mi_experiments.evaluation.measurements import MEASUREMENTS, Measurement
from mi_experiments.persistence.plain_json import BrokenRecord, read_json
from mi_experiments.records.linears import LINEARS, LinearReport, read_linears, weighted_mean
from mi_experiments.records.result import RESULT, Result, read_result, total_bits

MANIFEST = "manifest.json"
NUMBERS = "numbers"
"""Entry of the manifest's run identity: the hash of what was measured."""

ROUNDING = 1e-9
"""Share by which a number may differ that is computed again."""

MEASURED = ("dense", "compressed", "bits", "sparsity", "weights", "coverage", "statuses",
            "stability", "safety_net", "compressed_sha256")  # fmt: skip
"""Fields of a result that are the same in every run of the same inputs on the same machine."""

COMPUTED = ("numerics_version", "device", "threads", "model_files")
"""Of the provenance, what the manifest has under the same name."""

BLOCK_FILE = re.compile(r"model/model-(\d{5})-of-(\d{5})\.safetensors")


def check_record(directory: Path, *, whole: bool = False) -> list[str]:
    """Say in what the files of a run contradict each other, or what they are.

    Args:
        directory: the directory of the run.
        whole: ask also for the files of a completed run by which the others are checked, and for
            the hash of its compressed blocks.

    Returns:
        A sentence for each contradiction, which begins with the file that is not to be believed;
        nothing if there is none.
    """
    try:
        result = read_result(directory)
        return check_result(result, directory, whole=whole)
    except FileNotFoundError as error:
        return [f"{error.filename} is missing"]
    except BrokenRecord as error:
        return [str(error)]


def check_result(result: Result, directory: Path, *, whole: bool = False) -> list[str]:
    """Say in what a result, already read, is contradicted by itself and by the files beside it.

    Raises:
        BrokenRecord: a file beside it cannot be read.
    """
    lines = list(contradicted_texts(result))
    if (
        not math.isfinite(sum(result.seconds.values()))
        or min(result.seconds.values(), default=0) < 0
    ):
        lines.append("seconds are no times")
    # Of a run that goes on, one file may be newer than another.
    if result.status == "completed":
        if result.bits is not None and (directory / LINEARS).exists():
            lines += contradicted_bits(result, read_linears(directory))
        elif whole:
            lines.append(f"is completed without bits and {LINEARS}")
        if whole and result.compressed_sha256 is None:
            lines.append("compressed_sha256 is missing: the compressed blocks are not known")
        if (directory / MANIFEST).exists():
            manifest = read_manifest_of(directory)
            lines += contradicted_origin(result, manifest["run_identity"])
            lines += contradicted_blocks(result, manifest["files"])
            lines = [f"{directory / RESULT}: {line}" for line in lines]
            return lines + changed_files(directory, manifest["files"])
        if whole:
            lines.append(f"is completed without {MANIFEST}")
    return [f"{directory / RESULT}: {line}" for line in lines]


def contradicted_texts(result: Result) -> Iterator[str]:
    """Yield what cannot be of the evaluations of one model before and after."""
    for phase in PHASES:
        for name, text in getattr(result, phase).items():
            place = f"{phase}.{name}"
            if text.tokens < 1 or text.count < 1:
                yield f"{place} has {text.tokens} tokens in {text.count} windows"
            for measured, number in text.measurements.items():
                yield from contradicted_number(f"{place}.{measured}", measured, number)
    for name in result.dense.keys() & result.compressed.keys():
        dense, compressed = result.dense[name], result.compressed[name]
        for field in ("tokens_sha256", "tokens", "count", "windows", "seqlen", "protocol", "floor"):
            if getattr(dense, field) != getattr(compressed, field):
                yield f"dense.{name} and compressed.{name} differ in {field}: two texts"
        if list(dense.measurements) != list(compressed.measurements):
            yield f"dense.{name} and compressed.{name} do not have the same measurements"
    if result.status == "completed" and result.compressed.keys() != result.dense.keys():
        yield "dense and compressed are not of the same texts"


def contradicted_number(place: str, name: str, number: Measurement) -> Iterator[str]:
    """Yield that a measurement cannot be; one of another version says only how to read it."""
    kind = MEASUREMENTS.get(name)
    if kind is None:
        return
    if not kind.smallest - ROUNDING <= number.mean <= kind.largest + ROUNDING:
        yield f"{place} has a mean of {number.mean:g} {kind.unit}"
    elif not same(number.value, kind.of_mean(number.mean)):
        yield f"{place} is {number.value:.10g}, and {kind.of_mean(number.mean):.10g} by its mean"


def contradicted_bits(result: Result, linears: list[LinearReport]) -> Iterator[str]:
    """Yield the totals of a result that are not those of its linears."""
    assert result.bits is not None
    if not linears or any(linear.weights < 1 for linear in linears):
        yield f"bits are of linears, and {LINEARS} has none"
        return
    bits = total_bits(linears, result.bits.requested)
    stabilities = {x.name: x.stability for x in linears if x.stability is not None}
    known = [linear for linear in linears if linear.name in stabilities]
    sparsities = {linear.name: linear.sparsity for linear in linears}
    totals: dict[str, tuple[int | float | None, int | float | None]] = {
        "bits.average": (result.bits.average, bits.average),
        "bits.effective": (result.bits.effective, bits.effective),
        "sparsity": (result.sparsity, weighted_mean(linears, sparsities)),
        "weights": (result.weights, sum(linear.weights for linear in linears)),
        "stability": (result.stability, weighted_mean(known, stabilities) if known else None),
    }
    for name, (said, found) in totals.items():
        if not same(said, found):
            yield f"{name} is {show(said)}, and {show(found)} over {LINEARS}"
    counts = dict(Counter(linear.status for linear in linears))
    if result.statuses and result.statuses != counts:
        yield f"statuses are {result.statuses}, and {counts} in {LINEARS}"


def contradicted_origin(result: Result, begun: Mapping[str, Any]) -> Iterator[str]:
    """Yield in what a result is not of what its manifest says that the run was begun with."""
    provenance = result.provenance
    if provenance is None:
        yield f"has no provenance, and {MANIFEST} has one"
        return
    for name in COMPUTED:
        if name in begun and getattr(provenance, name) != begun[name]:
            yield f"provenance.{name} is not that of {MANIFEST}"
    for name, version in begun.get("versions", {}).items():
        if provenance.versions.get(name) != version:
            yield f"provenance.versions.{name} is not that of {MANIFEST}"
    if "calibration" in begun and provenance.calibration_sha256 != begun["calibration"]:
        yield f"provenance.calibration_sha256 is not that of {MANIFEST}"
    for phase in PHASES:
        for name, text in getattr(result, phase).items():
            if text.tokens_sha256 != begun.get("evaluation", {}).get(name):
                yield f"{phase}.{name}.tokens_sha256 is not that of {MANIFEST}"
    for key in unlike(begun.get("config", {}), result.config):
        yield f"config.{key} is not that of {MANIFEST}"
    if begun.get(NUMBERS, hash_of_numbers(result)) != hash_of_numbers(result):
        yield f"its numbers are not those that {MANIFEST} was sealed with"


def contradicted_blocks(result: Result, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield that the compressed blocks of the manifest are others, where it has them."""
    found = {
        int(match[1]): (int(match[2]), files[name]["sha256"])
        for name in files
        if (match := BLOCK_FILE.fullmatch(name))
    }
    count = max((count for count, _ in found.values()), default=0)
    hashes = [found[number][1] for number in range(2, count + 1) if number in found]
    if count < 2 or len(hashes) < count - 1:
        return
    if hashlib.sha256("".join(hashes).encode()).hexdigest() != result.compressed_sha256:
        yield f"compressed_sha256 is not that of the blocks in {MANIFEST}"


def changed_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which of the tables of a run are not what the manifest holds."""
    path = directory / LINEARS
    if LINEARS not in files:
        return []
    if not path.is_file():
        return [f"{path} is missing, and {MANIFEST} has it"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != files[LINEARS]["sha256"]:
        return [f"{path} was changed: it is not the file of {MANIFEST}"]
    return []


def read_manifest_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest of a run.

    Raises:
        BrokenRecord: it is not what a run writes.
    """
    path = directory / MANIFEST
    content = read_json(path)
    try:
        begun, files = dict(content["run_identity"]), dict(content["files"])
        parts = [begun.get(key, {}) for key in ("config", "versions", "evaluation")]
        hashes = [entry["sha256"] for entry in files.values()]
    except (TypeError, KeyError, ValueError) as error:
        raise BrokenRecord(f"{path} is no manifest of a run") from error
    if not all(isinstance(part, dict) for part in parts):
        raise BrokenRecord(f"{path} is no manifest of a run")
    if not all(isinstance(sha256, str) for sha256 in hashes):
        raise BrokenRecord(f"{path} is no manifest of a run: a file of it has no SHA-256")
    return {"run_identity": begun, "files": files}


def hash_of_numbers(result: Result) -> str:
    """Return the SHA-256 of all that a run measured of its model, but for times and memory."""
    fields = dataclasses.asdict(result)
    plain = numbers_as_floats({name: fields[name] for name in MEASURED})
    # What was sealed before there were measurements has the same hash.
    for phase in PHASES:
        plain[phase] = {
            name: text_without_measurements(text) for name, text in plain[phase].items()
        }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def numbers_as_floats(value: Any) -> Any:
    """Return plain data in which 4 and 4.0 are the same."""
    if isinstance(value, Mapping):
        return {str(key): numbers_as_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_as_floats(item) for item in value]
    return float(value) if type(value) is int else value


def unlike(asked: Mapping[str, Any], recorded: Any, path: str = "") -> Iterator[str]:
    """Yield the keys of a config that another one has otherwise, or not at all."""
    for key, value in asked.items():
        other = recorded.get(key) if isinstance(recorded, Mapping) else None
        if isinstance(value, Mapping):
            yield from unlike(value, other, f"{path}{key}.")
        elif other != value:
            yield f"{path}{key}"


def same(said: int | float | None, found: int | float | None) -> bool:
    """Tell whether a number is one that was computed again, but for rounding."""
    if said is None or found is None:
        return said is found
    return math.isclose(said, found, rel_tol=ROUNDING, abs_tol=1e-12)


def show(value: int | float | None) -> str:
    """Write a number in full length, or that there is none."""
    return "missing" if value is None else f"{value:.10g}"
