"""Sums of inputsᵀ·inputs over batches, at half the work of a full product."""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mi_experiments.out_of_memory import in_pieces

_PANELS = 8
_NARROWEST_PANEL = 256


def add_gram_(
    total: Float[Tensor, "columns columns"], inputs: Float[Tensor, "tokens columns"]
) -> None:
    """Add inputsᵀ·inputs to `total`, only on and right of its diagonal blocks: half the work.

    Where memory is short, fewer tokens are multiplied at a time; the last bits may then differ.

    Raises:
        MemoryShortage: there is no room for the product of a single token.
    """
    for start, stop in _panels(len(total)):
        add = partial(_add_panel_, total[start:stop, start:], inputs[:, start:])
        in_pieces(add, len(inputs), "tokens")


def _add_panel_(
    panel: Float[Tensor, "some columns"],
    inputs: Float[Tensor, "tokens columns"],
    first: int,
    last: int,
) -> None:
    """Add the product of the tokens first…last."""
    right = inputs[first:last]
    left = right[:, : len(panel)].T
    if right.dtype == panel.dtype:
        panel.addmm_(left, right)
    else:
        panel += torch.mm(left, right, out_dtype=panel.dtype)


def mirror_(total: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """Copy what `add_gram_` wrote to the other side of the diagonal; return the same tensor."""
    for start, stop in _panels(len(total)):
        block = total[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _panels(columns: int) -> list[tuple[int, int]]:
    """Cut the columns into wide panels."""
    width = max(_NARROWEST_PANEL, math.ceil(columns / _PANELS))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]
