"""Find the samples on which a model breaks down, in one pass over its blocks."""

import json
import logging
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Commits

log = logging.getLogger(__name__)


DROPPED = "evaluations/dropped.json"


def find_nonfinite(
    walker: Walker,
    tokens: Int[Tensor, "nsamples seqlen"],
    on_block: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Return the samples with a hidden state that is not finite, and where each was found first.

    Hidden states are looked at before the first block and after every block.

    Args:
        walker: The walker of the model.
        tokens: Token ids; samples are not padded.
        on_block: Called after each block.
    """
    dropped: dict[int, str] = {}
    with torch.no_grad():
        with walker.hold(0):
            stream = walker.open_stream(tokens, dropped=dropped)
        for index in range(len(walker.blocks)):
            walker.advance(index, stream)
            on_block()
    return dict(sorted(dropped.items()))


def drop_nonfinite(
    walker: Walker,
    calibration: Int[Tensor, "nsamples seqlen"],
    *,
    commits: Commits | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> tuple[Int[Tensor, "kept seqlen"], dict[str, str]]:
    """Return the samples that are finite in the dense model, and what was found in the others.

    Args:
        walker: the walker of the dense model.
        calibration: token ids.
        commits: keep and give back what was found.
        on_block: called after each block, for progress.

    Returns:
        The samples that are left, and by name of each other one, where it was first not finite.

    Raises:
        NumericalError: more than half of them are not finite.
    """
    committed = commits.read_json(DROPPED) if commits is not None else None
    if committed is None:
        dropped = find_nonfinite(walker, calibration, on_block)
        if commits is not None:
            commits.commit({DROPPED: json.dumps(dropped).encode()})
    else:
        dropped = {int(index): where for index, where in committed.items()}
    if dropped:
        index, where = next(iter(dropped.items()))
        line = (
            f"{len(dropped)} of {len(calibration)} calibration samples are not finite in the "
            f"dense model, the first sample {index} in {where}"
        )
        if 2 * len(dropped) > len(calibration):
            raise NumericalError(f"{line}: more than half; try model.dtype=float32 or other texts")
        log.warning("%s: left out", line)
    kept = [index for index in range(len(calibration)) if index not in dropped]
    return calibration[kept], {f"sample {index}": where for index, where in dropped.items()}
