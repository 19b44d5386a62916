"""How much of each linear is pruned where linears share a total, and what each share costs."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mi_experiments.method.pruning import Sparsity

PARTS = 128
"""What linears keep where they share a total is counted in 128ths of their weights."""


def keep_parts(kept: int) -> Sparsity:
    """Return the unstructured sparsity that keeps so many 128ths, exactly in floating point."""
    return Sparsity(1 - kept / PARTS)


def possible_parts(ratio: float, spread: float) -> list[int]:
    """Return the 128ths that a linear may keep, within a spread around an average sparsity.

    The most that keeps no more than the average is always among them, so that the total can be met.
    """
    average = PARTS * (1 - ratio)
    low = max(1, math.ceil(average - PARTS * spread - 1e-9))
    high = min(PARTS, math.floor(average + PARTS * spread + 1e-9))
    return list(range(min(low, max(1, math.floor(average))), high + 1))


def pruning_costs(
    score: Float[Tensor, "rows columns"],
    row_cost: Float[Tensor, "rows"],
    kept: Sequence[int],
    mask_block: int,
) -> Float64[Tensor, "choices"]:
    """Sum what is lost by what is pruned, for each number of 128ths that may be kept.

    Of every mask block the smallest scores are pruned, as `choose_pruned` does.

    Args:
        score: Output error of pruning each weight; channels in the order of the sweep.
        row_cost: What a unit of output error costs in each row.
        kept: 128ths of the weights that are kept.
        mask_block: Columns whose pattern is chosen together.
    """
    total = torch.zeros(len(kept), dtype=torch.float64)
    ratios = [keep_parts(parts).ratio for parts in kept]
    for block in torch.split(score, mask_block, dim=1):
        least = block.flatten().argsort(stable=True)
        lost = (block * row_cost[:, None]).flatten()[least].cumsum(0, dtype=torch.float64)
        counts = torch.tensor([round(ratio * block.numel()) for ratio in ratios])
        at = lost[(counts - 1).clamp(min=0).to(lost.device)].cpu()
        total += torch.where(counts > 0, at, 0.0)
    return total
