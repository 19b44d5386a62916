"""Which weights to set to zero: how many, in which pattern, and the exact choice by score.

A pattern chooses, checks, counts and numbers what is pruned. A new one is a class and a row of
`PATTERNS`; what sweeps, audits, counts and packs asks the pattern.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import comb
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mi_experiments.errors import InputError


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


@dataclass(frozen=True, repr=False)
class Sparsity:
    """How many weights are pruned, and in which pattern.

    Attributes:
        ratio: Fraction of the weights that is pruned, 0 to 1.
        n: Weights kept in every window of ``m`` consecutive channels in storage order.
        m: Length of a window; 0 means unstructured.
        pattern: Name in `PATTERNS`; empty for n:m where there is an m, else unstructured.

    Raises:
        ValueError: The ratio is outside [0, 1], ``n`` is outside [0, m], or they disagree.
    """

    ratio: float
    n: int = 0
    m: int = 0
    pattern: str = ""

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
    def kind(self) -> "Pattern":
        """The pattern."""
        return PATTERNS[self.pattern or ("windows" if self.m else "unstructured")]

    @property
    def window(self) -> int:
        """Consecutive channels that are chosen together, and that the sweep keeps together."""
        return self.kind.window(self)

    def __repr__(self) -> str:
        """Name the pattern only if it is named, as in hashes of earlier versions."""
        named = f", pattern={self.pattern!r}" if self.pattern else ""
        return f"Sparsity(ratio={self.ratio!r}, n={self.n!r}, m={self.m!r}{named})"

    def stored(self) -> dict[str, Any]:
        """Return the fields as JSON; the pattern only if it is named."""
        named = {"pattern": self.pattern} if self.pattern else {}
        return {"ratio": self.ratio, "n": self.n, "m": self.m} | named

    def count(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many numbers store the pattern of a linear, and the bits of each."""
        return (0, 0) if self.is_dense else self.kind.count(rows, columns, self)


class Pattern(ABC):
    """A rule for which weights may be zero together."""

    among_rows = False
    """Whether the choice in one row depends on the others."""

    def window(self, sparsity: Sparsity) -> int:
        """Return how many consecutive channels are chosen together, whatever the mask block."""
        return 1

    def words(self, sparsity: Sparsity) -> str:
        """Return what the pattern is called in a message."""
        return sparsity.pattern

    @abstractmethod
    def choose(
        self, score: Float[Tensor, "rows columns"], sparsity: Sparsity, selection: Selection
    ) -> Bool[Tensor, "rows columns"]:
        """Choose what to prune in a mask block, by what is lost; channels in storage order."""

    @abstractmethod
    def fault(self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> str | None:
        """Say in a line how weights that are pruned break the pattern; None if they do not."""

    def block_fault(
        self, count: int, weights: int, sparsity: Sparsity, selection: Selection
    ) -> str | None:
        """Say how the number of weights pruned in a mask block is wrong; None if it is not."""
        return None

    @abstractmethod
    def count(self, rows: int, columns: int, sparsity: Sparsity) -> tuple[int, int]:
        """Return how many numbers store the pattern of a linear, and the bits of each."""

    @abstractmethod
    def pack(
        self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity
    ) -> Int64[Tensor, "numbers"]:
        """Return the numbers."""

    @abstractmethod
    def unpack(
        self, numbers: Int64[Tensor, "numbers"], rows: int, columns: int, sparsity: Sparsity
    ) -> Bool[Tensor, "rows columns"]:
        """Return what is pruned."""


class Unstructured(Pattern):
    """Any weights: those with the smallest scores of a mask block; stored as a bit each."""

    among_rows = True

    def choose(
        self, score: Float[Tensor, "rows columns"], sparsity: Sparsity, selection: Selection
    ) -> Bool[Tensor, "rows columns"]:
        """Choose round(ratio · rows · columns) of them, or what the selection says."""
        if selection is Selection.threshold and 0 < sparsity.ratio < 1:
            position = int(sparsity.ratio * score.numel())
            return score <= score.flatten().kthvalue(position + 1).values
        count = round(sparsity.ratio * score.numel())
        least = score.flatten().topk(count, largest=False, sorted=False).indices
        pruned = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        return pruned.view(-1).index_fill_(0, least, value=True).view(score.shape)

    def fault(self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> str | None:
        """Find none: a bit a weight says everything."""
        return None

    def block_fault(
        self, count: int, weights: int, sparsity: Sparsity, selection: Selection
    ) -> str | None:
        """Say how many were asked for, if it was another number."""
        if selection.may_prune(count, sparsity.ratio, weights):
            return None
        expected = round(sparsity.ratio * weights)
        return f"a sparsity of {sparsity.ratio} asks for {expected}"

    def count(self, rows: int, columns: int, sparsity: Sparsity) -> tuple[int, int]:
        """Return a bit a weight."""
        return rows * columns, 1

    def pack(
        self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity
    ) -> Int64[Tensor, "numbers"]:
        """Return 1 where a weight is pruned, row after row."""
        return pruned.flatten().long().cpu()

    def unpack(
        self, numbers: Int64[Tensor, "numbers"], rows: int, columns: int, sparsity: Sparsity
    ) -> Bool[Tensor, "rows columns"]:
        """Read the bits, row after row."""
        return numbers.bool().view(rows, columns)


class Windows(Pattern):
    """n:m, n kept of every m consecutive channels; stored as the rank of each window's choice."""

    def window(self, sparsity: Sparsity) -> int:
        """Return m."""
        return sparsity.m

    def words(self, sparsity: Sparsity) -> str:
        """Return n:m."""
        return f"{sparsity.n}:{sparsity.m}"

    def choose(
        self, score: Float[Tensor, "rows columns"], sparsity: Sparsity, selection: Selection
    ) -> Bool[Tensor, "rows columns"]:
        """Choose m − n of every window, the earlier channel first among equal scores."""
        rows, columns = score.shape
        if columns % sparsity.m:
            raise ValueError(f"{columns} columns cannot be cut into windows of {sparsity.m}")
        windows = score.reshape(rows, -1, sparsity.m).argsort(dim=-1, stable=True)
        least = windows[..., : sparsity.m - sparsity.n]
        pruned = torch.zeros(windows.shape, dtype=torch.bool, device=score.device)
        return pruned.scatter_(-1, least, value=True).view(rows, columns)

    def fault(self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> str | None:
        """Count the weights kept in every window."""
        (rows, columns), n, m = pruned.shape, sparsity.n, sparsity.m
        if columns % m:
            return f"{columns} columns cannot be cut into windows of {m}"
        kept = (~pruned).reshape(rows, -1, m).count_nonzero(-1)
        wrong = (kept != n).nonzero().tolist()
        if not wrong:
            return None
        row, window = wrong[0]
        return (
            f"{len(wrong)} of {kept.numel()} windows do not keep {n} of {m} weights: row {row}, "
            f"channels from {window * m}, keeps {kept[row, window]}"
        )

    def count(self, rows: int, columns: int, sparsity: Sparsity) -> tuple[int, int]:
        """Return ⌈log₂ C(m, n)⌉ bits a window."""
        bits = (comb(sparsity.m, sparsity.n) - 1).bit_length()
        return rows * columns // sparsity.m, bits

    def pack(
        self, pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity
    ) -> Int64[Tensor, "numbers"]:
        """Return the rank of each window among its combinations.

        The i-th kept position p_i of a window, counted from 1, contributes C(p_i, i): the
        combinatorial number system.
        """
        kept = (~pruned).view(-1, sparsity.m).cpu()
        each = _combinations(sparsity)[torch.arange(sparsity.m), kept.cumsum(1)]
        return (each * kept).sum(1)

    def unpack(
        self, numbers: Int64[Tensor, "numbers"], rows: int, columns: int, sparsity: Sparsity
    ) -> Bool[Tensor, "rows columns"]:
        """Find what each rank keeps, from the last position of the windows to the first."""
        left = torch.full_like(numbers, sparsity.n)
        kept = torch.zeros(len(numbers), sparsity.m, dtype=torch.bool)
        table = _combinations(sparsity)
        for position in reversed(range(sparsity.m)):
            below = table[position, left]
            kept[:, position] = numbers >= below
            numbers = numbers - below * kept[:, position]
            left = left - kept[:, position].long()
        return ~kept.view(rows, columns)


def _combinations(sparsity: Sparsity) -> Int64[Tensor, "positions counts"]:
    """Return C(position, count) for every position of a window."""
    counts = range(sparsity.n + 1)
    return torch.tensor([[comb(at, count) for count in counts] for at in range(sparsity.m)])


PATTERNS: dict[str, Pattern] = {"unstructured": Unstructured(), "windows": Windows()}
"""The patterns by the name that `sparsity.pattern` gives them."""


def check_dimensions(
    columns: Mapping[str, int], sparsity: Sparsity, mask_block: int | None
) -> None:
    """Refuse a pattern of windows that does not fit every linear, before any weight is read.

    Unstructured patterns and quantization grids fit any number of columns.

    Args:
        columns: Of every linear to be compressed, by name.
        sparsity: The pattern that all of them get.
        mask_block: Columns whose pattern is chosen at a time; None if that follows the columns.

    Raises:
        InputError: A linear or the mask block is no whole number of windows; names it.
    """
    m = sparsity.window
    if m == 1:
        return
    if mask_block is not None and mask_block % m:
        raise InputError(f"sparsity.mask_block={mask_block} is not a multiple of m = {m}")
    if misfits := [name for name, count in columns.items() if count % m]:
        more = f", and so have {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise InputError(
            f"{misfits[0]} has {columns[misfits[0]]} columns, which are no whole number of windows "
            f"of m = {m} for sparsity {sparsity.kind.words(sparsity)}{more}: "
            "name them in model.ignore, or choose another pattern"
        )


def choose_pruned(
    score: Float[Tensor, "rows columns"],
    sparsity: Sparsity,
    selection: Selection = Selection.exact,
) -> Bool[Tensor, "rows columns"]:
    """Choose the weights with the smallest scores, exactly as many as asked, by the pattern.

    The same scores give the same choice on the same device.

    Args:
        score: What is lost by pruning each weight; in storage order for patterns of windows.
        sparsity: How many and in which pattern.
        selection: How an unstructured pattern counts them.

    Returns:
        True where the weight is to be set to zero.

    Raises:
        ValueError: The columns cannot be cut into windows.
    """
    return sparsity.kind.choose(score, sparsity, selection)
