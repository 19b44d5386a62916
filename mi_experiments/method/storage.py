"""Count every bit that a compressed linear needs, and pack it into exactly that many.

A linear is stored as five bit streams: the codes of the weights that are left, a 16-bit scale and
a zero point per (row, scale group), the sparsity pattern, and which channels share a width. Any
grouping is stored as an index, contiguous groups too, so that groupings compare at equal storage.
A reader needs nothing else but a `Layout`: a few numbers per linear, none per channel or row.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64, Integer, UInt8
from torch import Tensor

from mi_experiments.method.grid import UNQUANTIZED, Grid, scale_groups
from mi_experiments.method.pruning import Sparsity

SCALE_BITS = 16
"""Width of a stored scale, which is a float16."""

WIDTH_BITS = 4
"""Width of a channel group's stored bit width, minus one: 1 to 16."""

CHUNK = 2**18
"""Values turned into bits at a time."""

STREAMS = ("codes", "scales", "zero_points", "pattern", "group_index")
"""Everything that a linear is stored as."""

Field = tuple[Integer[Tensor, "..."], int]
"""Unsigned values and the number of bits that each is stored in."""


@dataclass(frozen=True)
class Storage:
    """The bits that one linear, or several together, are stored in.

    Attributes:
        weights: Number of weights, pruned ones included.
        codes: Bits of the codes of kept weights; 16 per kept weight of an unquantized channel.
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
        symmetric: Whether zero points are 2^(bits − 1), and so are not stored.
        dtype: The 16-bit dtype of the weights of unquantized channels.
    """

    rows: int
    columns: int
    sparsity: Sparsity
    groups: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype

    @property
    def index_bits(self) -> int:
        """Bits per channel that tell its group: ⌈log₂ groups⌉."""
        return max(self.groups - 1, 0).bit_length()

    @property
    def patterns(self) -> int:
        """Number of stored patterns: one per window, per weight, or none."""
        if self.sparsity.is_dense:
            return 0
        return self.rows * self.columns // max(self.sparsity.m, 1)

    @property
    def pattern_bits(self) -> int:
        """Bits per pattern: ⌈log₂ C(m, n)⌉ for a window, 1 for a weight."""
        if not self.sparsity.is_structured:
            return 1
        return (comb(self.sparsity.m, self.sparsity.n) - 1).bit_length()


class Unpacked(NamedTuple):
    """A linear as read back; codes are 0 where a weight is pruned or has none."""

    weight: Float[Tensor, "rows columns"]
    codes: Int64[Tensor, "rows columns"]
    pruned: Bool[Tensor, "rows columns"]
    grid: Grid | None


def average_bits(bits: UInt8[Tensor, "columns"]) -> float:
    """Average the width of the codes over all weights, pruned ones included."""
    return int(bits.sum()) / bits.numel()


def find_layout(
    grid: Grid | None,
    pruned: Bool[Tensor, "rows columns"],
    sparsity: Sparsity,
    channel_group: Int[Tensor, "columns"] | None,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Layout:
    """Describe how a linear is stored, after checking that the streams would say it all.

    Args:
        grid: Levels of the weights; None if nothing is quantized.
        pruned: Weights that are zero.
        sparsity: The pattern that ``pruned`` follows.
        channel_group: Group of each channel, any labels; None for a single group.
        symmetric: Whether zero points follow from the widths.
        dtype: The 16-bit dtype of the weights of unquantized channels.

    Raises:
        ValueError: The pattern, the widths, the scale groups, the zero points or the dtype are
            not as said.
    """
    rows, columns = pruned.shape
    _check_pattern(pruned, sparsity)
    if dtype.itemsize != 2:
        raise ValueError(f"unquantized weights are stored in 16 bits, not as {dtype}")
    if grid is None:
        return Layout(rows, columns, sparsity, 0, columns, symmetric, dtype)
    labels = _labels(channel_group, grid)
    groups = int(labels.max()) + 1
    if not torch.equal(_first_of(grid.bits, labels, groups)[labels], grid.bits):
        raise ValueError("channels of one group have different bits")
    group_size = int(grid.scale_group.bincount().max())
    if not torch.equal(scale_groups(labels, group_size), grid.scale_group):
        raise ValueError(f"scale groups are not chunks of {group_size} channels of a group")
    width, stored = _scale_widths(grid)
    if symmetric and (grid.zero_point[:, stored] != 2 ** (width[stored] - 1)).any():
        raise ValueError("a symmetric grid has a zero point other than 2^(bits − 1)")
    return Layout(rows, columns, sparsity, groups, group_size, symmetric, dtype)


def count_storage(
    grid: Grid | None,
    pruned: Bool[Tensor, "rows columns"],
    sparsity: Sparsity,
    channel_group: Int[Tensor, "columns"] | None,
    *,
    symmetric: bool = False,
) -> Storage:
    """Count the bits of a linear, which are those that `pack` writes.

    Args:
        grid: Levels of the weights; None if nothing is quantized.
        pruned: Weights that are zero.
        sparsity: The pattern that ``pruned`` follows.
        channel_group: Group of each channel, any labels; None for a single group.
        symmetric: Whether zero points follow from the widths and are not stored.
    """
    layout = find_layout(grid, pruned, sparsity, channel_group, symmetric=symmetric)
    kept = (~pruned).count_nonzero(0)
    pattern = layout.patterns * layout.pattern_bits
    if grid is None:
        return Storage(pruned.numel(), int(kept.sum()) * UNQUANTIZED, 0, 0, pattern, 0)
    width, stored = _scale_widths(grid)
    return Storage(
        weights=pruned.numel(),
        codes=int((kept * grid.bits).sum()),
        scales=layout.rows * int(stored.sum()) * SCALE_BITS,
        zero_points=0 if symmetric else layout.rows * int(width[stored].sum()),
        pattern=pattern,
        group_index=layout.columns * layout.index_bits + layout.groups * WIDTH_BITS,
    )


def pack(
    weight: Float[Tensor, "rows columns"],
    codes: Int[Tensor, "rows columns"] | None,
    pruned: Bool[Tensor, "rows columns"],
    grid: Grid | None,
    channel_group: Int[Tensor, "columns"] | None,
    layout: Layout,
) -> dict[str, UInt8[Tensor, "bytes"]]:
    """Write a linear as little-endian bit streams on the CPU, one for each count of `Storage`.

    Within a stream of several widths the smaller ones come first, and within a width the rows.

    Args:
        weight: Weights; read for unquantized channels only, and rounded to the layout's dtype.
        codes: Codes of the weights; None if nothing is quantized.
        pruned: Weights that are zero.
        grid: Levels of the weights; None if nothing is quantized.
        channel_group: Group of each channel, as given to `find_layout`.
        layout: What `find_layout` returned for these.

    Returns:
        Streams named as the fields of `Storage`, of exactly ⌈bits / 8⌉ bytes each.
    """
    fields: dict[str, list[Field]] = {name: [] for name in STREAMS}
    bits = torch.full_like(pruned[0], UNQUANTIZED, dtype=torch.uint8)
    if grid is not None:
        bits = grid.bits
        labels = _labels(channel_group, grid)
        group_bits = _first_of(bits, labels, layout.groups)
        fields["group_index"] = [(labels, layout.index_bits), (group_bits - 1, WIDTH_BITS)]
        width, stored = _scale_widths(grid)
        fields["scales"] = [(grid.scale[:, stored].half().view(torch.int16), SCALE_BITS)]
        if not layout.symmetric:
            fields["zero_points"] = [
                (grid.zero_point[:, at], b) for b, at in _by_width(width) if b != UNQUANTIZED
            ]
    halves = weight.to(layout.dtype).view(torch.int16)
    fields["codes"] = [
        ((halves if codes is None or b == UNQUANTIZED else codes)[:, at][~pruned[:, at]], b)
        for b, at in _by_width(bits)
    ]
    if not layout.sparsity.is_dense:
        fields["pattern"] = [(_rank(pruned, layout.sparsity), layout.pattern_bits)]
    return {name: _write(field) for name, field in fields.items()}


def unpack(streams: Mapping[str, UInt8[Tensor, "_"]], layout: Layout) -> Unpacked:
    """Read back what `pack` wrote, exactly."""
    rows, columns = layout.rows, layout.columns
    (ranks,) = _read(streams["pattern"], [(layout.patterns, layout.pattern_bits)])
    pruned = _unrank(ranks, layout)
    bits = torch.full((columns,), UNQUANTIZED, dtype=torch.uint8)
    grid = _read_grid(streams, layout) if layout.groups else None
    if grid is not None:
        bits = grid.bits
    parts = list(_by_width(bits))
    counts = [(int((~pruned[:, at]).count_nonzero()), b) for b, at in parts]
    codes = torch.zeros(rows, columns, dtype=torch.int64)
    weight = torch.zeros(rows, columns)
    for (width, at), values in zip(parts, _read(streams["codes"], counts), strict=True):
        read = torch.zeros(rows, len(at), dtype=torch.int64)
        read[~pruned[:, at]] = values
        if width == UNQUANTIZED or grid is None:
            weight[:, at] = read.to(torch.int16).view(layout.dtype).float()
        else:
            codes[:, at] = read
            weight[:, at] = grid.decode(read, at)
    return Unpacked(weight.masked_fill(pruned, 0), codes, pruned, grid)


def _read_grid(streams: Mapping[str, UInt8[Tensor, "_"]], layout: Layout) -> Grid:
    """Read widths, scales and zero points, and place them by the group index."""
    counts = [(layout.columns, layout.index_bits), (layout.groups, WIDTH_BITS)]
    labels, group_bits = _read(streams["group_index"], counts)
    bits = (group_bits + 1).to(torch.uint8)[labels]
    shared = scale_groups(labels, layout.group_size)
    width = _first_of(bits, shared.long(), int(shared.max()) + 1)
    stored = width != UNQUANTIZED
    scale = torch.ones(layout.rows, len(width))
    (halves,) = _read(streams["scales"], [(layout.rows * int(stored.sum()), SCALE_BITS)])
    scale[:, stored] = halves.to(torch.int16).view(torch.float16).view(layout.rows, -1).float()
    zero_point = torch.where(stored, 2 ** (width.int() - 1), 0).expand(layout.rows, -1).int()
    if not layout.symmetric:
        parts = [(b, at) for b, at in _by_width(width) if b != UNQUANTIZED]
        zeros = _read(streams["zero_points"], [(layout.rows * len(at), b) for b, at in parts])
        zero_point = zero_point.clone()
        for (_, at), values in zip(parts, zeros, strict=True):
            zero_point[:, at] = values.view(layout.rows, -1).int()
    return Grid(bits, shared, scale, zero_point)


def _check_pattern(pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> None:
    """Refuse a pattern that the stream for this sparsity could not say."""
    if sparsity.is_dense and pruned.any():
        raise ValueError("weights are pruned although the sparsity is 0")
    if sparsity.is_structured:
        if pruned.shape[1] % sparsity.m:
            raise ValueError(f"{pruned.shape[1]} columns are no windows of {sparsity.m}")
        if ((~pruned).view(len(pruned), -1, sparsity.m).count_nonzero(-1) != sparsity.n).any():
            raise ValueError(f"a window does not keep {sparsity.n} of {sparsity.m} weights")


def _labels(channel_group: Int[Tensor, "columns"] | None, grid: Grid) -> Int64[Tensor, "columns"]:
    """Label the groups densely from 0."""
    if channel_group is None:
        return torch.zeros_like(grid.bits, dtype=torch.int64)
    labels: Tensor = torch.unique(channel_group, return_inverse=True)[1]
    return labels


def _first_of(
    values: UInt8[Tensor, "columns"], labels: Int64[Tensor, "columns"], groups: int
) -> UInt8[Tensor, "groups"]:
    """Take one value from each group."""
    return values.new_zeros(groups).index_copy_(0, labels, values)


def _scale_widths(
    grid: Grid,
) -> tuple[UInt8[Tensor, "scale_groups"], Bool[Tensor, "scale_groups"]]:
    """Width of each scale group, and whether it has a scale to store."""
    width = _first_of(grid.bits, grid.scale_group.long(), grid.scale.shape[1])
    return width, width != UNQUANTIZED


def _by_width(bits: UInt8[Tensor, "places"]) -> Iterator[tuple[int, Int64[Tensor, "chosen"]]]:
    """Each width, ascending, and where it occurs."""
    for width in torch.unique(bits).tolist():
        yield width, (bits == width).nonzero()[:, 0]


def _combinations(sparsity: Sparsity) -> Int64[Tensor, "positions counts"]:
    """C(position, count) for every position of a window."""
    counts = range(sparsity.n + 1)
    return torch.tensor([[comb(at, count) for count in counts] for at in range(sparsity.m)])


def _rank(pruned: Bool[Tensor, "rows columns"], sparsity: Sparsity) -> Int64[Tensor, "patterns"]:
    """Number the patterns: a bit per weight, or each window's rank among its combinations.

    The i-th kept position p_i of a window, counted from 1, contributes C(p_i, i): the
    combinatorial number system.
    """
    if not sparsity.is_structured:
        return pruned.flatten().long().cpu()
    kept = (~pruned).view(-1, sparsity.m).cpu()
    each = _combinations(sparsity)[torch.arange(sparsity.m), kept.cumsum(1)]
    return (each * kept).sum(1)


def _unrank(ranks: Int64[Tensor, "patterns"], layout: Layout) -> Bool[Tensor, "rows columns"]:
    """Find the pattern of each number, from the last position of the windows to the first."""
    sparsity, shape = layout.sparsity, (layout.rows, layout.columns)
    if sparsity.is_dense:
        return torch.zeros(shape, dtype=torch.bool)
    if not sparsity.is_structured:
        return ranks.bool().view(shape)
    left = torch.full_like(ranks, sparsity.n)
    kept = torch.zeros(len(ranks), sparsity.m, dtype=torch.bool)
    table = _combinations(sparsity)
    for position in reversed(range(sparsity.m)):
        below = table[position, left]
        kept[:, position] = ranks >= below
        ranks = ranks - below * kept[:, position]
        left = left - kept[:, position].long()
    return ~kept.view(shape)


def _write(fields: Iterable[Field]) -> UInt8[Tensor, "bytes"]:
    """Write fields one after the other without gaps, lowest bit first, and fill the last byte."""
    octets, rest = [], torch.zeros(0, dtype=torch.uint8)
    for values, width in fields:
        places = torch.arange(width, dtype=torch.int64)
        for chunk in torch.split(values.flatten().cpu(), CHUNK):
            rest = torch.cat([rest, ((chunk[:, None].long() >> places) & 1).byte().flatten()])
            whole = rest.numel() // 8 * 8
            octets.append(_octets(rest[:whole]))
            rest = rest[whole:]
    octets.append(_octets(torch.nn.functional.pad(rest, (0, -rest.numel() % 8))))
    return torch.cat(octets)


def _octets(bits: UInt8[Tensor, "bits"]) -> UInt8[Tensor, "bytes"]:
    """Join eight bits to a byte."""
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _read(
    stream: UInt8[Tensor, "bytes"], counts: Iterable[tuple[int, int]]
) -> list[Int64[Tensor, "_"]]:
    """Read fields of given (count, width) back, unsigned."""
    fields, start = [], 0
    for count, width in counts:
        places = torch.arange(width)
        parts = [torch.zeros(0, dtype=torch.int64)]
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            end = start + size * width
            octets = stream[start // 8 : -(-end // 8)]
            bits = ((octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
            field = bits[start % 8 :][: size * width].view(size, width)
            parts.append((field.long() << places).sum(1))
            start = end
        fields.append(torch.cat(parts))
    return fields
