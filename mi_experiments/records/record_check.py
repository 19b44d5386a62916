"""Whether the record of a run agrees with itself: its numbers with each other."""

import math
from pathlib import Path

import pyarrow as pa

from mi_experiments.records.result import LINEARS, RESULT, read_linears, read_result, total_bits

TOLERANCE = 1e-9
"""Relative; the numbers follow from each other to the last bits."""


def check_record(directory: Path) -> list[str]:
    """Return what contradicts in the record of a run, as sentences that name the file.

    Args:
        directory: of a run that is complete.
    """
    result = read_result(directory)
    problems = []
    for phase in ("dense", "compressed"):
        for name, text in getattr(result, phase).items():
            if not math.isclose(text.perplexity, math.exp(text.nll), rel_tol=TOLERANCE):
                problems.append(
                    f"{directory / RESULT}: the {phase} perplexity of {name}, {text.perplexity}, "
                    f"is not exp(nll) = {math.exp(text.nll)}"
                )
    if result.bits is None:
        return problems
    try:
        linears = read_linears(directory)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        return [f"{directory / LINEARS} cannot be read: {error}"]
    mean = total_bits(linears, result.bits.requested) if linears else result.bits
    for key in ("average", "effective"):
        said, found = getattr(result.bits, key), getattr(mean, key)
        if not math.isclose(said, found, rel_tol=TOLERANCE):
            problems.append(
                f"{directory / RESULT}: bits.{key} {said} is not the mean of {LINEARS}, {found}"
            )
    return problems
