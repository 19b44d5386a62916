"""The quantization grid: one scale and one integer zero point per (row, scale group).

A weight on the grid is scale · level, and its number format says which level a code in
[0, 2^bits − 1] stands for. The zero point is the code of zero, so zero is always exactly
representable and pruned weights stay zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Int16, Int32, Int64, UInt8
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.method.number_formats import (
    MAX_BITS,
    UNIFORM,
    UNQUANTIZED,
    NumberFormat,
    store_scale,
    top_code,
)

SHRINK_FACTORS = tuple(1.0 - 0.02 * step for step in range(30))
"""Fractions of the full range that the clip search tries: 1.00, 0.98, …, 0.42."""

COARSE = {4: slice(0, 24, 2), 5: slice(12), 6: slice(6), 7: slice(3), 8: slice(2)}
"""Which of them are tried, by width, where grids are only compared; below 4 bits every second. The
finer the levels, the less is won by clipping. On trained weights (16 linears of SmolLM2-135M, whole
and half pruned, one and five scales a row) the squared error is at most 3 % above that of all."""

CHUNK_ELEMENTS = 2**19
"""Candidate weights (factors · rows · channels) held at a time by the clip search."""


def scale_groups(
    channel_group: Int[Tensor, "columns"], group_size: int | None
) -> Int32[Tensor, "columns"]:
    """Cut every channel group into consecutive chunks that share a scale.

    Args:
        channel_group: Group label of each channel, in storage order; any integers.
        group_size: Channels per scale; the last chunk of a group may be shorter. None gives each
            channel group a single scale.

    Returns:
        The scale group of each channel, labelled densely from 0 by channel group, then by chunk.

    Raises:
        ValueError: The group size is not positive.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size {group_size} must be at least 1")
    by_group = channel_group.argsort(stable=True)
    label = channel_group[by_group]
    position = torch.arange(len(label), device=label.device)
    opens = position == 0
    opens[1:] |= label[1:] != label[:-1]
    if group_size is not None:
        rank = position - torch.where(opens, position, 0).cummax(0).values
        opens |= rank % group_size == 0
    shared = torch.empty_like(channel_group, dtype=torch.int32)
    shared[by_group] = opens.cumsum(0, dtype=torch.int32) - 1
    return shared


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels that each weight of a linear may take.

    Attributes:
        bits: Width of each channel's codes, 1 to 8; 16 leaves the channel unquantized.
        scale_group: Which column of ``scale`` and ``zero_point`` each channel uses.
        scale: What a level is multiplied by; positive, and exactly a number of ``scale_bits``, so
            that counting these for it is honest. 1 where unquantized.
        zero_point: The code of zero, in [0, 2^bits − 1]. 0 where unquantized.
        scale_bits: 16 for float16 scales, 32 for float32.
        number_format: Which level each code stands for.

    Raises:
        ValueError: A width is out of range, a scale group mixes widths or is missing, or a scale or
            zero point breaks the promises above.
    """

    bits: UInt8[Tensor, "columns"]
    scale_group: Int32[Tensor, "columns"]
    scale: Float[Tensor, "rows scale_groups"]
    zero_point: Int32[Tensor, "rows scale_groups"]
    scale_bits: int = 16
    number_format: NumberFormat = UNIFORM

    def __post_init__(self) -> None:
        width = _bits_per_group(self.bits, self.scale_group, self.scale.shape[1])
        if not ((self.scale > 0) & (self.scale == store_scale(self.scale, self.scale_bits))).all():
            raise ValueError(f"every scale must be positive and exactly a float{self.scale_bits}")
        if not ((self.zero_point >= 0) & (self.zero_point <= top_code(width))).all():
            raise ValueError("every zero point must be a code, in [0, 2^bits − 1]")
        whole = width == UNQUANTIZED
        if (self.scale[:, whole] != 1).any() or self.zero_point[:, whole].any():
            raise ValueError("unquantized channels must have scale 1 and zero point 0")

    @property
    def quantized(self) -> Bool[Tensor, "columns"]:
        """Which channels have codes."""
        return self.bits != UNQUANTIZED

    @property
    def group_bits(self) -> UInt8[Tensor, "scale_groups"]:
        """Width of each scale group."""
        width = self.bits.new_zeros(self.scale.shape[1])
        return width.index_copy_(0, self.scale_group.long(), self.bits)

    def of_rows(self, start: int, stop: int) -> "Grid":
        """Return the grid of some rows, itself for all of them."""
        if stop - start == len(self.scale):
            return self
        return replace(self, scale=self.scale[start:stop], zero_point=self.zero_point[start:stop])

    @classmethod
    def join(cls, parts: Sequence["Grid"]) -> "Grid":
        """Return the grid of consecutive rows."""
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat([part.zero_point for part in parts]),
        )

    def encode(
        self, weight: Float[Tensor, "rows chosen"], columns: Int64[Tensor, "chosen"]
    ) -> Int16[Tensor, "rows chosen"]:
        """Return the code of the level nearest to each weight.

        Args:
            weight: Weights of the chosen channels; finite.
            columns: Channel index of each column of ``weight``; quantized channels only.
        """
        group = self.scale_group[columns]
        value, zero = weight / self.scale[:, group], self.zero_point[:, group]
        return self.number_format.encode(value, self.bits[columns], zero)

    def decode(
        self, codes: Int[Tensor, "rows chosen"], columns: Int64[Tensor, "chosen"]
    ) -> Float[Tensor, "rows chosen"]:
        """Turn codes into weights, in the dtype of the scales.

        Args:
            codes: Codes of the chosen channels.
            columns: Channel index of each column of ``codes``; quantized channels only.
        """
        group = self.scale_group[columns]
        bits, zero = self.bits[columns], self.zero_point[:, group]
        return self.number_format.decode(codes, bits, zero) * self.scale[:, group]

    def quantize(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Round every weight to its nearest level; unquantized channels are returned unchanged."""
        rounded = weight.clone()
        for width in torch.unique(self.bits[self.quantized]).tolist():
            columns = (self.bits == width).nonzero()[:, 0]
            group = self.scale_group[columns]
            scale, zero = self.scale[:, group], self.zero_point[:, group].to(self.scale.dtype)
            level = self.number_format.to_level_(weight[:, columns] / scale, width, zero)
            rounded[:, columns] = level.mul_(scale).to(weight.dtype)
        return rounded


@torch.no_grad()
def fit_grid(
    weight: Float[Tensor, "rows columns"],
    bits: UInt8[Tensor, "columns"],
    scale_group: Int32[Tensor, "columns"],
    *,
    clip_search: bool,
    coarse: bool = False,
    number_format: NumberFormat = UNIFORM,
    scale_bits: int = 16,
    pruned: Bool[Tensor, "rows columns"] | None = None,
) -> Grid:
    """Fit one scale and zero point to the weights of every (row, scale group).

    The number format says which scale and zero point span a range. The clip search shrinks both
    ends of the range together and keeps the factor with the smallest squared error (GPTQ's ``mse``,
    arXiv:2210.17323, with exponent 2), so it never does worse than the full range. Where all
    weights are zero the scale is 1.

    Args:
        weight: Weights in storage order.
        bits: Width of each channel; 16 leaves it unquantized, with scale 1 and zero point 0.
        scale_group: Scale group of each channel, dense from 0.
        clip_search: Whether to try shrunk ranges.
        coarse: Whether to try only some of them, see `shrink_factors`: for grids that are compared
            and not used.
        number_format: Which levels each width has.
        scale_bits: What a scale is rounded to: 16 for float16, 32 for float32.
        pruned: Weights that will be zero and so have no part in the fit.

    Raises:
        NumericalError: A weight is not finite, or a scale exceeds the largest that is stored.
        ValueError: A width is out of range, or a scale group mixes widths or is missing.
    """
    if bad := int((~weight.isfinite()).sum()):
        raise NumericalError(f"{bad} of {weight.numel()} weights are not finite: no grid fits them")
    if pruned is not None:
        # A pruned weight becomes a zero: every range includes zero and every grid represents it.
        weight = weight.masked_fill(pruned, 0)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    groups = int(scale_group.max()) + 1
    scale = weight.new_ones(len(weight), groups)
    zero_point = scale.new_zeros(scale.shape, dtype=torch.int32)
    for width, chosen, columns in _batches(bits, scale_group, groups):
        if width not in number_format.widths:
            raise ValueError(f"{number_format.name} levels of {width} bits do not exist")
        factors = weight.new_tensor(shrink_factors(width, coarse) if clip_search else [1.0])
        chunks = 1 + len(factors) * len(weight) * columns.numel() // CHUNK_ELEMENTS
        parts = [
            _fit(part[:, columns], width, number_format, factors, scale_bits)
            for part in weight.chunk(chunks)
        ]
        scale[:, chosen] = torch.cat([part[0] for part in parts])
        zero_point[:, chosen] = torch.cat([part[1] for part in parts])
    if not scale.isfinite().all():
        most = f"{weight.abs().max():.3g}"
        remedy = "; recipe.scale_bits=32 stores wider ones" if scale_bits == 16 else ""
        raise NumericalError(f"weights up to {most} need scales beyond float{scale_bits}{remedy}")
    return Grid(bits, scale_group, scale, zero_point, scale_bits, number_format)


def shrink_factors(bits: int, coarse: bool = False) -> Sequence[float]:
    """Return the fractions of the full range that the clip search tries, or some of them."""
    return SHRINK_FACTORS[COARSE.get(bits, slice(0, None, 2))] if coarse else SHRINK_FACTORS


def _bits_per_group(
    bits: UInt8[Tensor, "columns"], scale_group: Int32[Tensor, "columns"], groups: int
) -> UInt8[Tensor, "scale_groups"]:
    """Width of each scale group, after checking that it has exactly one."""
    if not (((bits >= 1) & (bits <= MAX_BITS)) | (bits == UNQUANTIZED)).all():
        raise ValueError(
            f"bits must be 1 to {MAX_BITS} or {UNQUANTIZED}, not {sorted(set(bits.tolist()))}"
        )
    index = scale_group.long()
    width = bits.new_zeros(groups)
    width[index] = bits
    if (width[index] != bits).any():
        raise ValueError("channels of one scale group have different bits")
    if missing := int((width == 0).sum()):
        raise ValueError(f"{missing} of {groups} scale groups have no channel")
    return width


def _batches(
    bits: UInt8[Tensor, "columns"], scale_group: Int32[Tensor, "columns"], groups: int
) -> Iterator[tuple[int, Int64[Tensor, "chosen"], Int64[Tensor, "chosen size"]]]:
    """Batch the quantized scale groups of equal width and size: width, groups, their channels.

    A batch is a dense tensor, so its reductions are exact and deterministic on every device.
    """
    width = _bits_per_group(bits, scale_group, groups).long()
    size = torch.bincount(scale_group, minlength=groups)
    start = size.cumsum(0) - size
    by_group = scale_group.argsort(stable=True)
    for wide, long in sorted(set(zip(width.tolist(), size.tolist(), strict=True))):
        if wide != UNQUANTIZED:
            chosen = ((width == wide) & (size == long)).nonzero()[:, 0]
            offset = torch.arange(long, device=chosen.device)
            yield wide, chosen, by_group[start[chosen][:, None] + offset]


def _fit(
    weight: Float[Tensor, "rows groups size"],
    bits: int,
    number_format: NumberFormat,
    factors: Float[Tensor, "factors"],
    scale_bits: int,
) -> tuple[Float[Tensor, "rows groups"], Int32[Tensor, "rows groups"]]:
    """Scale and zero point of the best shrink factor for each row and group of one width."""
    scale, zero = number_format.fit(weight, bits, factors[:, None, None], scale_bits)
    if len(factors) == 1:
        return scale[0], zero[0].to(torch.int32)
    step, base = scale[..., None], zero[..., None]
    level = number_format.to_level_(weight / step, bits, base)
    error = level.mul_(step).sub_(weight).square_().sum(-1)
    best = error.argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0].to(torch.int32)
