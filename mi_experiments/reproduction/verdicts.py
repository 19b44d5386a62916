"""Hold a finished run to what was expected of it, and say why where it fails."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mi_experiments.config.expected import Comparison, Evidence, ExpectedConfig, NumbersConfig
from mi_experiments.evaluation.measurements import PERPLEXITY, Measurement
from mi_experiments.persistence.commits import differences
from mi_experiments.records.result import Evaluation, Result, by_name

PASS, FAIL, NOT_RUN, NONE = "PASS", "FAIL", "NOT RUN", "NO VERDICT"
PLACES = ("model.path", "model.offline", "model.device", "dataset.path", "dataset.offline",
          "evaluation.measurements")  # fmt: skip
"""Where the same thing is read or run, and what else is measured on it; what it is, numbers and
hashes tell."""

EXACT = ("model_files", "calibration", "evaluation", "numerics_version")
"""Fingerprints of a pinned run that must be equal anywhere."""

MACHINE = ("versions", "device", "threads", "platform")
"""Fingerprints that may differ, and then so may the last bits of what is computed."""

FOLLOWS = {
    "model_files": ("model.revision",),
    "calibration": ("seed", "dataset.", "corpora."),
    "evaluation": ("evaluation.", "corpora.", "dataset."),
}
"""Settings by which a content hash changes, which then is no cause of its own."""

SAME_BITS = 1e-5
"""Share by which a number of the very same weights on the very same tokens may move: other kernels
sum in another order."""

SIGNATURE = 0.003
"""Share within which a value is taken for a known wrong one."""


@dataclass(frozen=True)
class Judgement:
    """One number against what was expected.

    Attributes:
        row: the row of the table.
        phase: dense or compressed.
        text: the text of the evaluation, and TEXT/NAME for what is no perplexity.
        expected: the value; None where no source has one.
        ours: the value; None where it was not measured.
        tolerance: how far ours may be from it.
        verdict: PASS, FAIL, NOT RUN, or NO VERDICT where there is nothing to hold it to.
        why: diagnosis or reason.
        source: the source of the expected value.
        mismatch: versions, hardware, numerics and bits in which the run is not the pinned one,
            whatever the verdict.
    """

    row: str
    phase: str
    text: str
    expected: float | None
    ours: float | None
    tolerance: float | None
    verdict: str
    why: str
    source: str
    mismatch: str = ""


def judge(
    row: str,
    model: str,
    expected: ExpectedConfig,
    result: Result | None,
    changes: Sequence[str],
    signatures: Sequence[Mapping[str, Any]],
    note: str = "",
    contradictions: Sequence[str] = (),
) -> list[Judgement]:
    """Judge every text that is expected or was measured, dense first.

    Args:
        row: the row of the table.
        model: name by which signatures know it.
        expected: the expected of the row.
        result: the result of its run; None if there is none.
        changes: the changes in what the run is not the row's.
        signatures: known wrong numbers.
        note: why there is no number, or what is not known of a run that is complete.
        contradictions: what its files say against each other: then no number of it passes.
    """
    prints = hash_changes(expected.content_hashes, result)
    causes = [*contradictions, *changes, *exact_changes(changes, prints)]
    unexplained = [*unknown_bits(expected, result), *unexplained_bits(causes, prints)]
    if expected.content_hashes and result is not None and not (causes or unexplained):
        same = result.compressed_sha256 == expected.content_hashes.get("compressed")
        expected = of_same_bits(expected, compressed=same)
    shown = (*MACHINE, "model_revision", "numerics_version", "compressed")
    mismatches = [line for line in prints if kind_of(line) in shown]
    if result is not None and result.status == "completed" and note:
        mismatches.append(note)
    mismatch = "; ".join(mismatches)
    judgements = []
    for phase, numbers in (("dense", expected.dense), ("compressed", expected.compressed)):
        found = by_key(getattr(result, phase)) if result else {}
        phase_causes = [*causes, *unexplained] if phase == "compressed" else causes
        for text in [*numbers.values, *(t for t in found if t not in numbers.values)] or ["-"]:
            ours = found[text].value if text in found else None
            value = numbers.values.get(text)
            falling = text not in found or found[text].lower_is_better
            verdict, why = decide(numbers, value, ours, phase_causes, lower_is_better=falling)
            if verdict == NOT_RUN:
                why = note or (result.error or "" if result else "")
            if verdict == FAIL:
                why = "; ".join([why, *recognise(signatures, model, phase, text, ours)])
            source = ", ".join(part for part in (expected.source, numbers.where) if part)
            tolerance = None if value is None else value * numbers.tolerance
            judgements.append(
                Judgement(row, phase, text, value, ours, tolerance, verdict, why, source, mismatch)
            )
    return judgements


def by_key(texts: Mapping[str, Evaluation]) -> dict[str, Measurement]:
    """Return what was measured by the keys of `expected`: TEXT a perplexity, else TEXT/NAME."""
    return {
        text if name == PERPLEXITY else f"{text}/{name}": number
        for name, numbers in by_name(texts).items()
        for text, number in numbers.items()
    }


def exact_changes(changes: Sequence[str], prints: Sequence[str]) -> list[str]:
    """Say what a pinned run must have and this one has not, but for what follows from another.

    Tokens follow from the settings of their text and from the tokenizer's files; a file may follow
    from the revision of the model.
    """
    files = [line for line in prints if kind_of(line) == "model_files"]
    followed = {
        kind
        for kind, settings in FOLLOWS.items()
        if any(line.startswith(settings) for line in changes)
    }
    if any(".safetensors:" not in line for line in files):
        followed |= {"calibration", "evaluation"}
    causes = [*EXACT, "model_revision"] if files and "model_files" not in followed else EXACT
    return [line for line in prints if kind_of(line) in causes and kind_of(line) not in followed]


def of_same_bits(expected: ExpectedConfig, *, compressed: bool) -> ExpectedConfig:
    """Return what is expected of the very same weights: no more than kernels may move.

    Args:
        expected: the expected of a pinned row, whose model and tokens are the run's.
        compressed: whether the compressed blocks are the pinned ones, too.
    """

    def exact(numbers: NumbersConfig) -> NumbersConfig:
        if numbers.comparison is not Comparison.within:
            return numbers
        return replace(numbers, tolerance=min(numbers.tolerance, SAME_BITS))

    return replace(
        expected,
        dense=exact(expected.dense),
        compressed=exact(expected.compressed) if compressed else expected.compressed,
    )


def unknown_bits(expected: ExpectedConfig, result: Result | None) -> list[str]:
    """Say that it is not known which compressed blocks a number is of, where a row pins them."""
    if not expected.content_hashes or result is None or not result.compressed:
        return []
    if "compressed" not in expected.content_hashes:
        return ["compressed: the row does not say which bits are pinned; pin it again"]
    return [] if result.compressed_sha256 else ["compressed_sha256 is missing in the record"]


def unexplained_bits(causes: Sequence[str], prints: Sequence[str]) -> list[str]:
    """Say that the compressed blocks have other bits, where nothing that decides bits differs.

    Bits are promised for the same inputs, versions, threads and hardware; elsewhere only numbers.
    """
    if causes or any(kind_of(line) in MACHINE for line in prints):
        return []
    return [
        f"{line}, of the same inputs, versions, threads and hardware"
        for line in prints
        if kind_of(line) == "compressed"
    ]


def kind_of(line: str) -> str:
    """Return the first name of what a line is about."""
    return line.split(":")[0].split(".")[0]


def decide(
    numbers: NumbersConfig,
    value: float | None,
    ours: float | None,
    changes: Sequence[str],
    *,
    lower_is_better: bool = True,
) -> tuple[str, str]:
    """Return the verdict on one number, and why."""
    if ours is None:
        return NOT_RUN, ""
    if value is None:
        return NONE, "no source has a value"
    if numbers.evidence in (Evidence.second_hand, Evidence.recalled):
        return NONE, f"the value is {numbers.evidence.name.replace('_', '-')}"
    if changes:
        return FAIL, "not the same: " + "; ".join(changes)
    if numbers.comparison is Comparison.at_most:
        reached = ours <= value if lower_is_better else ours >= value
        return (PASS, "") if reached else (FAIL, "the bar is not reached")
    if math.isfinite(ours) and abs(ours - value) <= numbers.tolerance * value:
        return PASS, ""
    return FAIL, f"off by {(ours / value - 1):+.2%}, and {numbers.tolerance:.2%} are allowed"


def recognise(
    signatures: Sequence[Mapping[str, Any]], model: str, phase: str, text: str, ours: float | None
) -> list[str]:
    """Name the known wrong numbers that a value is near."""
    return [
        f"{entry['value']} is known from: {entry['cause']} ({entry['source']})"
        for entry in signatures
        if (entry["model"], entry["phase"], entry["text"]) == (model, phase, text)
        and ours is not None
        and abs(ours / entry["value"] - 1) <= SIGNATURE
    ]


def content_hashes(result: Result) -> dict[str, str]:
    """Return the content hashes and versions of a run."""
    provenance = result.provenance
    if provenance is None:
        return {}
    return {
        **{f"model_files.{name}": value for name, value in provenance.model_files.items()},
        "model_revision": str(provenance.model_revision),
        "calibration": str(provenance.calibration_sha256),
        **{f"evaluation.{name}": text.tokens_sha256 for name, text in result.dense.items()},
        **({"compressed": result.compressed_sha256} if result.compressed_sha256 else {}),
        "numerics_version": str(provenance.numerics_version),
        **{f"versions.{name}": value for name, value in provenance.versions.items()},
        "device": provenance.device,
        "threads": str(provenance.threads),
        "platform": provenance.platform,
    }


def hash_changes(pinned: Mapping[str, str], result: Result | None) -> list[str]:
    """Say in what a run differs from the one that was pinned, as far as the run came."""
    if not pinned or result is None or result.provenance is None:
        return []
    now = content_hashes(result)
    files = {key for key in now if kind_of(key) == "model_files"}
    lines: list[str] = []
    for key in sorted(pinned.keys() | files):
        before, after = pinned.get(key), now.get(key)
        if kind_of(key) in MACHINE and before != after:
            lines.append(f"{key}: {before} → {after}")  # whole: they differ in their ends
        elif key in now or kind_of(key) == "model_files":
            lines += differences({key: before}, {key: after})
    return lines


def setting_changes(asked: Mapping[str, Any], ran: Mapping[str, Any]) -> list[str]:
    """Say in what the settings of a run differ from those of a row, but for mere places."""
    lines = list(differences(dict(asked), dict(ran)))
    moved = any(line.startswith("model.path:") for line in lines)
    return [
        line
        for line in lines
        if line.split(":")[0] not in PLACES
        and not (line.startswith(("corpora.", "evaluation.datasets.")) and ".path:" in line)
        and not (moved and line.startswith("model.revision:") and line.endswith("None"))
    ]
