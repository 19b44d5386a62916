"""Find the samples on which a model breaks down, in one pass over its blocks."""

import json
import logging
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.errors import NumericalError
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.blocks import held
from mi_experiments.llm.inventory import block_list
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.replay import open_stream
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.persistence.commits import Commits

log = logging.getLogger(__name__)


DROPPED = "evaluations/dropped.json"


def find_nonfinite(
    model: PreTrainedModel,
    tokens: Int[Tensor, "nsamples seqlen"],
    *,
    batch_size: int,
    path: str | None = None,
    weights: BlockWeights | None = None,
    allocate: Allocate | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Return the samples with a hidden state that is not finite, and where each was found first.

    Hidden states are looked at before the first block and after every block.

    Args:
        model: A causal language model in eval mode.
        tokens: Token ids; samples are not padded.
        batch_size: Samples per forward pass.
        path: Path of the block list, see ``block_list``.
        weights: Loads each block when its turn comes; None for a model that holds all its weights.
        allocate: Makes room for hidden states; by default where blocks run.
        on_block: Called after each block.
    """
    path, modules = block_list(model, path)
    dropped: dict[int, str] = {}
    with torch.no_grad():
        with held(weights, 0):
            stream = open_stream(
                model, path, modules, tokens, batch_size, allocate, dropped=dropped
            )
        for index, module in enumerate(modules):
            with held(weights, index):
                stream.advance(f"{path}.{index}", module)
            on_block()
    return dict(sorted(dropped.items()))


def drop_nonfinite(
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
    committed = commits.read_json(DROPPED) if commits is not None else None
    if committed is None:
        dropped = find_nonfinite(
            opened.model,
            calibration,
            batch_size=batch_size,
            path=opened.weights.path,
            weights=opened.weights,
            allocate=allocate,
            on_block=on_block,
        )
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
