"""Pack a compressed linear into the bits that `storage` counts, and read it back exactly."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64, Integer, UInt8
from torch import Tensor

from mi_experiments.method.bit_count import WIDTH_BITS, Layout, first_of, label_groups, scale_widths
from mi_experiments.method.grid import Grid, scale_groups
from mi_experiments.method.number_formats import SCALE_DTYPES, UNQUANTIZED

CHUNK = 2**18
"""Values turned into bits at a time."""

INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}

STREAMS = ("codes", "scales", "zero_points", "pattern", "group_index")
"""Everything that a linear is stored as."""

Field = tuple[Integer[Tensor, "..."], int]
"""Unsigned values and the number of bits that each is stored in."""


class Unpacked(NamedTuple):
    """A linear as read back; codes are 0 where a weight is pruned or has none."""

    weight: Float[Tensor, "rows columns"]
    codes: Int64[Tensor, "rows columns"]
    pruned: Bool[Tensor, "rows columns"]
    grid: Grid | None


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
        weight: Weights; read for unquantized channels only, and stored in the layout's dtype.
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
        labels = label_groups(channel_group, grid)
        group_bits = first_of(bits, labels, layout.groups)
        fields["group_index"] = [(labels, layout.index_bits), (group_bits - 1, WIDTH_BITS)]
        width, stored = scale_widths(grid)
        scales = grid.scale[:, stored].to(SCALE_DTYPES[layout.scale_bits])
        fields["scales"] = [(scales.view(INTEGERS[layout.scale_bits]), layout.scale_bits)]
        fields["zero_points"] = [
            (grid.zero_point[:, at], wide) for wide, at in _stored_zeros(width, layout)
        ]
    whole = weight.to(layout.dtype).view(INTEGERS[layout.unquantized_bits])
    fields["codes"] = [
        (whole[:, at][~pruned[:, at]], layout.unquantized_bits)
        if codes is None or b == UNQUANTIZED
        else (codes[:, at][~pruned[:, at]], b)
        for b, at in _by_width(bits)
    ]
    if not layout.sparsity.is_dense:
        _, width_of_number = layout.sparsity.count(layout.rows, layout.columns)
        numbers = layout.sparsity.kind.pack(pruned, layout.sparsity)
        fields["pattern"] = [(numbers, width_of_number)]
    return {name: _write(field) for name, field in fields.items()}


def unpack(streams: Mapping[str, UInt8[Tensor, "_"]], layout: Layout) -> Unpacked:
    """Read back what `pack` wrote, exactly."""
    rows, columns = layout.rows, layout.columns
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    if not layout.sparsity.is_dense:
        (numbers,) = _read(streams["pattern"], [layout.sparsity.count(rows, columns)])
        pruned = layout.sparsity.kind.unpack(numbers, rows, columns, layout.sparsity)
    bits = torch.full((columns,), UNQUANTIZED, dtype=torch.uint8)
    grid = _read_grid(streams, layout) if layout.groups else None
    if grid is not None:
        bits = grid.bits
    parts = list(_by_width(bits))
    counts = [
        (
            int((~pruned[:, at]).count_nonzero()),
            layout.unquantized_bits if b == UNQUANTIZED else b,
        )
        for b, at in parts
    ]
    codes = torch.zeros(rows, columns, dtype=torch.int64)
    weight = torch.zeros(rows, columns, dtype=torch.promote_types(layout.dtype, torch.float32))
    for (width, at), values in zip(parts, _read(streams["codes"], counts), strict=True):
        read = torch.zeros(rows, len(at), dtype=torch.int64)
        read[~pruned[:, at]] = values
        if width == UNQUANTIZED or grid is None:
            whole = read.to(INTEGERS[layout.unquantized_bits]).view(layout.dtype)
            weight[:, at] = whole.to(weight.dtype)
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
    width = first_of(bits, shared.long(), int(shared.max()) + 1)
    stored = width != UNQUANTIZED
    scale = torch.ones(layout.rows, len(width))
    wide = layout.scale_bits
    (scales,) = _read(streams["scales"], [(layout.rows * int(stored.sum()), wide)])
    scales = scales.to(INTEGERS[wide]).view(SCALE_DTYPES[wide])
    scale[:, stored] = scales.view(layout.rows, -1).float()
    implied = torch.where(stored, layout.number_format.implied_zero(width), 0)
    zero_point = implied.repeat(layout.rows, 1).int()
    parts = list(_stored_zeros(width, layout))
    zeros = _read(streams["zero_points"], [(layout.rows * len(at), b) for b, at in parts])
    for (_, at), values in zip(parts, zeros, strict=True):
        zero_point[:, at] = values.view(layout.rows, -1).int()
    return Grid(bits, shared, scale, zero_point, wide, layout.number_format)


def _stored_zeros(
    width: UInt8[Tensor, "scale_groups"], layout: Layout
) -> Iterator[tuple[int, Int64[Tensor, "chosen"]]]:
    """Yield, by width, the scale groups whose zero points are stored, with the bits of each."""
    zero_bits = layout.zero_bits(width)
    for _, at in _by_width(width):
        if bits := int(zero_bits[at[0]]):
            yield bits, at


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


def _by_width(bits: UInt8[Tensor, "places"]) -> Iterator[tuple[int, Int64[Tensor, "chosen"]]]:
    """Each width, ascending, and where it occurs."""
    for width in torch.unique(bits).tolist():
        yield width, (bits == width).nonzero()[:, 0]
