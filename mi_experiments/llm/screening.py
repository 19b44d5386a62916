"""Find the samples on which a model breaks down, in one pass over its blocks."""

from collections.abc import Callable
from enum import Enum

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.blocks import held
from mi_experiments.llm.inventory import block_list
from mi_experiments.llm.replay import open_stream
from mi_experiments.llm.streaming import BlockWeights


class OnNonfinite(Enum):
    """What is done about a sample with a hidden state that is NaN or infinite in the dense model.

    `error`: the run ends. `drop`: all such samples are found first, and left out by everything that
    follows.
    """

    error = "error"
    drop = "drop"


def screen_samples(
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
    rejected: dict[int, str] = {}
    with torch.no_grad():
        with held(weights, 0):
            stream = open_stream(
                model, path, modules, tokens, batch_size, allocate, rejected=rejected
            )
        for index, module in enumerate(modules):
            with held(weights, index):
                stream.advance(f"{path}.{index}", module)
            on_block()
    return dict(sorted(rejected.items()))
