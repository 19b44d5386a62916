"""Which weights to set to zero: how many, in which pattern, and the exact choice by score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mi_experiments.errors import InputError

PARTS = 128
"""What linears keep where they share a total is counted in 128ths of their weights."""


class Selection(Enum):
    """How many weights of an unstructured mask block are pruned.

    `exact`: round(ratio · n), ties included. `threshold`: all that score no more than the weight at
    position ⌊ratio · n⌋ of the sorted scores, counted from 0, so one more than asked and all ties
    with it, as in the published code of SparseGPT (arXiv:2301.00774).
    """

    exact = "exact"
    threshold = "threshold"

    def may_prune(self, count: int, ratio: float, weights: int) -> bool:
        """Say whether that many pruned weights of a mask block are what the selection promises."""
        if self is Selection.exact or ratio in (0, 1):
            return count == round(ratio * weights)
        return int(ratio * weights) < count <= weights


@dataclass(frozen=True)
class Sparsity:
    """How many weights are pruned, and in which pattern.

    Attributes:
        ratio: Fraction of the weights that is pruned, 0 to 1.
        n: Weights kept in every window of ``m`` consecutive channels in storage order.
        m: Length of a window; 0 means unstructured.

    Raises:
        ValueError: The ratio is outside [0, 1], ``n`` is outside [0, m], or they disagree.
    """

    ratio: float
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"sparsity ratio {self.ratio} is outside [0, 1]")
        if not 0 <= self.n <= self.m:
            raise ValueError(f"pattern {self.n}:{self.m} keeps more weights than a window has")
        if self.m and not math.isclose(self.ratio, (self.m - self.n) / self.m):
            raise ValueError(f"ratio {self.ratio} is not that of the pattern {self.n}:{self.m}")

    @classmethod
    def structured(cls, n: int, m: int) -> "Sparsity":
        """Keep ``n`` weights in every window of ``m`` consecutive channels.

        Args:
            n: Weights kept in a window.
            m: Length of a window, at least 1.

        Raises:
            ValueError: The window is empty or keeps more than it has.
        """
        if m < 1:
            raise ValueError(f"pattern {n}:{m} has an empty window")
        return cls((m - n) / m, n, m)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.ratio == 0

    @property
    def is_structured(self) -> bool:
        """Whether the pattern is n:m."""
        return self.m > 0

    @property
    def pattern_bits_per_weight(self) -> float:
        """Bits that store the pattern: a bitmask, or the index of each window's choice."""
        if self.is_dense:
            return 0.0
        if not self.is_structured:
            return 1.0
        return (math.comb(self.m, self.n) - 1).bit_length() / self.m


def check_dimensions(
    columns: Mapping[str, int], sparsity: Sparsity, mask_block: int | None
) -> None:
    """Refuse an n:m pattern that does not fit every linear, before any weight is read.

    Unstructured patterns and quantization grids fit any number of columns.

    Args:
        columns: Of every linear to be compressed, by name.
        sparsity: The pattern that all of them get.
        mask_block: Columns whose pattern is chosen at a time; None if that follows the columns.

    Raises:
        InputError: A linear or the mask block is no whole number of windows; names it.
    """
    m = sparsity.m
    if not sparsity.is_structured:
        return
    if mask_block is not None and mask_block % m:
        raise InputError(f"sparsity.mask_block={mask_block} is not a multiple of m = {m}")
    if misfits := [name for name, count in columns.items() if count % m]:
        more = f", and so have {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise InputError(
            f"{misfits[0]} has {columns[misfits[0]]} columns, which are no whole number of windows "
            f"of m = {m} for sparsity {sparsity.n}:{m}{more}: name them in model.ignore, or choose "
            "another pattern"
        )


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


def choose_pruned(
    score: Float[Tensor, "rows columns"],
    sparsity: Sparsity,
    selection: Selection = Selection.exact,
) -> Bool[Tensor, "rows columns"]:
    """Choose the weights with the smallest scores, exactly as many as asked.

    Unstructured: round(ratio · rows · columns) over the whole tensor, or what the selection says.
    n:m: m − n in every window of m consecutive columns, the earlier channel first among equal
    scores. The same scores give the same choice on the same device.

    Args:
        score: What is lost by pruning each weight; in storage order for n:m.
        sparsity: How many and in which pattern.
        selection: How an unstructured pattern counts them.

    Returns:
        True where the weight is to be set to zero.

    Raises:
        ValueError: The columns cannot be cut into windows of m.
    """
    rows, columns = score.shape
    pruned = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if sparsity.is_structured:
        if columns % sparsity.m:
            raise ValueError(f"{columns} columns cannot be cut into windows of {sparsity.m}")
        windows = score.reshape(rows, -1, sparsity.m).argsort(dim=-1, stable=True)
        least = windows[..., : sparsity.m - sparsity.n]
        return pruned.view(windows.shape).scatter_(-1, least, value=True).view(rows, columns)
    if selection is Selection.threshold and 0 < sparsity.ratio < 1:
        position = int(sparsity.ratio * score.numel())
        return score <= score.flatten().kthvalue(position + 1).values
    count = round(sparsity.ratio * score.numel())
    least = score.flatten().topk(count, largest=False, sorted=False).indices
    return pruned.view(-1).index_fill_(0, least, value=True).view(rows, columns)
