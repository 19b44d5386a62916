"""Leave out the calibration samples on which the dense model breaks down."""

import json
import logging
from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.screening import screen_samples
from mi_experiments.resume import Commits

log = logging.getLogger(__name__)

SCREENING = "evaluations/screening.json"


def screen_calibration(
    opened: OpenModel,
    calibration: Int[Tensor, "nsamples seqlen"],
    batch_size: int,
    *,
    allocate: Allocate | None = None,
    commits: Commits | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> tuple[Int[Tensor, "kept seqlen"], dict[str, str]]:
    """Return the samples that are finite in the dense model, and what was found in the others.

    Args:
        opened: the dense model.
        calibration: token ids.
        batch_size: samples per forward pass.
        allocate: makes room for hidden states; by default where blocks run.
        commits: keep and give back what was found.
        on_block: called after each block, for progress.

    Returns:
        The samples that are left, and by name of each other one, where it was first not finite.

    Raises:
        NumericalError: more than half of them are not finite.
    """
    committed = commits.read_json(SCREENING) if commits is not None else None
    if committed is None:
        rejected = screen_samples(
            opened.model,
            calibration,
            batch_size=batch_size,
            path=opened.weights.path,
            weights=opened.weights,
            allocate=allocate,
            on_block=on_block,
        )
        if commits is not None:
            commits.commit({SCREENING: json.dumps(rejected).encode()})
    else:
        rejected = {int(index): where for index, where in committed.items()}
    if rejected:
        index, where = next(iter(rejected.items()))
        line = (
            f"{len(rejected)} of {len(calibration)} calibration samples are not finite in the "
            f"dense model, the first sample {index} in {where}"
        )
        if 2 * len(rejected) > len(calibration):
            raise NumericalError(f"{line}: more than half; try model.dtype=float32 or other texts")
        log.warning("%s: left out", line)
    kept = [index for index in range(len(calibration)) if index not in rejected]
    return calibration[kept], {f"sample {index}": where for index, where in rejected.items()}
