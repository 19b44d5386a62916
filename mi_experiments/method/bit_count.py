"""Count every bit that a compressed linear needs; `packing` writes it into exactly that many.

A linear is stored as five bit streams: the codes of the weights that are left, a scale of 16 or 32
bits and a zero point per (row, scale group), the sparsity pattern, and which channels share a
width. Any grouping is stored as an index, contiguous groups too, so that groupings compare at equal
storage. A reader needs nothing else but a `Layout`: a few numbers per linear, none per channel or
row.
"""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Int, Int64, UInt8
from torch import Tensor

from mi_experiments.method.grid import Grid, scale_groups
from mi_experiments.method.number_formats import UNIFORM, UNQUANTIZED, NumberFormat
from mi_experiments.method.pruning import Sparsity

WIDTH_BITS = 4
"""Width of a channel group's stored bit width, minus one: 1 to 16."""


@dataclass(frozen=True)
class Storage:
    """The bits that one linear, or several together, are stored in.

    Attributes:
        weights: Number of weights, pruned ones included.
        codes: Bits of the codes of kept weights; 16 per kept weight of an unquantized channel, or
            what its dtype has where nothing was done.
        scales: Bits of the scales.
        zero_points: Bits of the zero points.
        pattern: Bits that say which weights are pruned.
        group_index: Bits that say which channels share a width, and which width.
    """

    weights: int
    codes: int
    scales: int
    zero_points: int
    pattern: int
    group_index: int

    @property
    def total(self) -> int:
        """All bits."""
        return self.codes + self.scales + self.zero_points + self.pattern + self.group_index

    @property
    def effective_bits(self) -> float:
        """All bits per weight."""
        return self.total / self.weights


@dataclass(frozen=True)
class Layout:
    """What a reader of the bit streams must know beforehand.

    Attributes:
        rows: Rows of the weight.
        columns: Columns of the weight.
        sparsity: Which pattern is stored.
        groups: Number of channel groups; 0 if nothing is quantized.
        group_size: Most channels that share a scale inside a channel group.
        number_format: Which level each code stands for.
        dtype: The 16-bit dtype of the weights of unquantized channels; of a linear that nothing was
            done to, it may have more.
        scale_bits: Width of a stored scale: 16 for float16, 32 for float32.
    """

    rows: int
    columns: int
    sparsity: Sparsity
    groups: int
    group_size: int
    dtype: torch.dtype
    scale_bits: int = 16
    number_format: NumberFormat = UNIFORM

    @property
    def index_bits(self) -> int:
        """Bits per channel that tell its group: ⌈log₂ groups⌉."""
        return max(self.groups - 1, 0).bit_length()

    def zero_bits(self, bits: UInt8[Tensor, "groups"]) -> Int64[Tensor, "groups"]:
        """Return the bits that a stored zero point takes at each width; 0 where none is stored."""
        count = self.number_format.zero_bits
        return torch.tensor(
            [0 if b == UNQUANTIZED else count(b) for b in bits.tolist()], device=bits.device
        )

    @property
    def unquantized_bits(self) -> int:
        """Bits of a weight of an unquantized channel."""
        return 8 * self.dtype.itemsize


def average_bits(bits: UInt8[Tensor, "columns"]) -> float:
    """Average the width of the codes over all weights, pruned ones included."""
    return int(bits.sum()) / bits.numel()


def find_layout(
    grid: Grid | None,
    pruned: Bool[Tensor, "rows columns"],
    sparsity: Sparsity,
    channel_group: Int[Tensor, "columns"] | None,
    *,
    dtype: torch.dtype = torch.float16,
) -> Layout:
    """Describe how a linear is stored, after checking that the streams would say it all.

    Args:
        grid: Levels of the weights; None if nothing is quantized.
        pruned: Weights that are zero.
        sparsity: The pattern that ``pruned`` follows.
        channel_group: Group of each channel, any labels; None for a single group.
        dtype: Of the weights of unquantized channels: 16 bits, but where nothing is pruned either.

    Raises:
        ValueError: The pattern, the widths, the scale groups, the zero points or the dtype are
            not as said.
    """
    rows, columns = pruned.shape
    _check_pattern(pruned, sparsity)
    if dtype.itemsize != 2 and (grid is not None or not sparsity.is_dense):
        raise ValueError(f"unquantized weights are stored in 16 bits, not as {dtype}")
    if grid is None:
        return Layout(rows, columns, sparsity, 0, columns, dtype)
    labels = label_groups(channel_group, grid)
    groups = int(labels.max()) + 1
    if not torch.equal(first_of(grid.bits, labels, groups)[labels], grid.bits):
        raise ValueError("channels of one group have different bits")
    group_size = int(grid.scale_group.bincount().max())
    if not torch.equal(scale_groups(labels, group_size), grid.scale_group):
        raise ValueError(f"scale groups are not chunks of {group_size} channels of a group")
    layout = Layout(
        rows, columns, sparsity, groups, group_size, dtype, grid.scale_bits, grid.number_format
    )
    width, stored = scale_widths(grid)
    implied = stored & (layout.zero_bits(width) == 0)
    zero = grid.number_format.implied_zero(width)
    if (grid.zero_point != zero)[:, implied].any():
        raise ValueError("a zero point that is not stored is other than its width implies")
    return layout


def count_storage(
    grid: Grid | None,
    pruned: Bool[Tensor, "rows columns"],
    sparsity: Sparsity,
    channel_group: Int[Tensor, "columns"] | None,
    *,
    dtype: torch.dtype = torch.float16,
) -> Storage:
    """Count the bits of a linear, which are those that `pack` writes.

    Args:
        grid: Levels of the weights; None if nothing is quantized.
        pruned: Weights that are zero.
        sparsity: The pattern that ``pruned`` follows.
        channel_group: Group of each channel, any labels; None for a single group.
        dtype: Of the weights of unquantized channels.
    """
    layout = find_layout(grid, pruned, sparsity, channel_group, dtype=dtype)
    kept = (~pruned).count_nonzero(0)
    pattern = prod(sparsity.count(layout.rows, layout.columns))
    if grid is None:
        return Storage(pruned.numel(), int(kept.sum()) * layout.unquantized_bits, 0, 0, pattern, 0)
    width, stored = scale_widths(grid)
    return Storage(
        weights=pruned.numel(),
        codes=int((kept * grid.bits).sum()),
        scales=layout.rows * int(stored.sum()) * layout.scale_bits,
        zero_points=layout.rows * int(layout.zero_bits(width)[stored].sum()),
        pattern=pattern,
        group_index=layout.columns * layout.index_bits + layout.groups * WIDTH_BITS,
    )


def _check_pattern(pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> None:
    """Refuse a pattern that the stream for this sparsity could not say."""
    if sparsity.is_dense and pruned.any():
        raise ValueError("weights are pruned although the sparsity is 0")
    if fault := sparsity.kind.fault(pruned, sparsity):
        raise ValueError(fault)


def label_groups(
    channel_group: Int[Tensor, "columns"] | None, grid: Grid
) -> Int64[Tensor, "columns"]:
    """Label the groups densely from 0."""
    if channel_group is None:
        return torch.zeros_like(grid.bits, dtype=torch.int64)
    labels: Tensor = torch.unique(channel_group, return_inverse=True)[1]
    return labels


def first_of(
    values: UInt8[Tensor, "columns"], labels: Int64[Tensor, "columns"], groups: int
) -> UInt8[Tensor, "groups"]:
    """Take one value from each group."""
    return values.new_zeros(groups).index_copy_(0, labels, values)


def scale_widths(
    grid: Grid,
) -> tuple[UInt8[Tensor, "scale_groups"], Bool[Tensor, "scale_groups"]]:
    """Return the width of each scale group, and whether it has a scale to store."""
    width = grid.group_bits
    return width, width != UNQUANTIZED
