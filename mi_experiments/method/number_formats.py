"""Number formats: which levels the codes of a width stand for, and how a scale is fitted to them.

A quantized weight is scale · level. A format says which levels there are, rounds to the nearest
one, turns levels into codes and back, and counts what it stores beside the codes. A new format is a
class and a row of `NUMBER_FORMATS`; what sweeps, refines, audits, counts and packs asks the format.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float32, Int16, Integer
from torch import Tensor

UNQUANTIZED = 16
"""The width that means: keep this channel's weights as they are."""

MAX_BITS = 8
"""With 8-bit codes and 11-bit scales a product is exact in float32."""

SCALE_DTYPES = {16: torch.float16, 32: torch.float32}
"""The numbers that a scale may be, by the bits that it is stored in."""


def store_scale(scale: Float[Tensor, "*shape"], scale_bits: int) -> Float[Tensor, "*shape"]:
    """Round scales to the nearest number that can be stored, in the dtype that they have."""
    return scale.to(SCALE_DTYPES[scale_bits]).to(scale.dtype)


def smallest_scale(scale_bits: int) -> float:
    """Return the smallest positive scale that can be stored; smaller ones are raised to it."""
    limits = torch.finfo(SCALE_DTYPES[scale_bits])
    return limits.smallest_normal * limits.eps


def top_code(bits: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
    """Return the largest code of each width."""
    return 2 ** bits.int() - 1


class NumberFormat(ABC):
    """The levels of every width. Zero is one of them, so that pruned weights stay exactly zero.

    Widths, levels, zero points and codes of one call have shapes that broadcast.
    """

    name: str
    widths: tuple[int, ...] = tuple(range(1, MAX_BITS + 1))

    def zero_bits(self, bits: int) -> int:
        """Return the bits that a stored zero point takes; 0 if the width implies it."""
        return 0

    @abstractmethod
    def implied_zero(self, bits: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Return the code of zero at each width, where it is not stored."""

    @abstractmethod
    def fit(
        self,
        weight: Float[Tensor, "rows groups size"],
        bits: int,
        shrink: Float[Tensor, "factors 1 1"],
        scale_bits: int,
    ) -> tuple[Float[Tensor, "factors rows groups"], Float[Tensor, "factors rows groups"]]:
        """Return a scale, as it is stored, and a zero point for each shrunk range of the weights.

        Where all weights are zero the scale is 1.
        """

    @abstractmethod
    def limits(
        self, bits: Integer[Tensor, "..."], zero: Tensor
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Return the least and the greatest level, on the device of the zero points."""

    @abstractmethod
    def round_(self, value: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
        """Round to the nearest level in place; the caller clamps to `limits`."""

    def to_level_(
        self, value: Float[Tensor, "*shape"], bits: int, zero: Float[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """Turn values into the nearest levels of one width, in place."""
        limits = self.limits(torch.tensor(bits, device=zero.device), zero)
        return self.round_(value, bits).clamp_(*limits)

    def round_step_(
        self, step: Float[Tensor, "*shape"], level: Float[Tensor, "*shape"], bits: int
    ) -> Float[Tensor, "*shape"]:
        """Turn a step away from levels, in place, into the one to the level nearest to its end."""
        return self.round_(step.add_(level), bits).sub_(level)

    @abstractmethod
    def encode(
        self, value: Float[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Int16[Tensor, "*shape"]:
        """Return the code of the level nearest to each value."""

    @abstractmethod
    def decode(
        self, codes: Integer[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Tensor:
        """Return the level of each code."""


@dataclass(frozen=True)
class Uniform(NumberFormat):
    """Equally spaced levels: code − zero point, from −zero point to 2^bits − 1 − zero point.

    Asymmetric: they span [min(w, 0), max(w, 0)], and the zero point is stored in as many bits as a
    code. Symmetric: they span ±max |w|, with zero point 2^(bits − 1).
    """

    symmetric: bool = False
    name = "uniform"

    def zero_bits(self, bits: int) -> int:
        """Return the bits of a code, or none if the zero point is in the middle."""
        return 0 if self.symmetric else bits

    def implied_zero(self, bits: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Return the middle code."""
        return 2 ** (bits.int() - 1)

    def fit(
        self,
        weight: Float[Tensor, "rows groups size"],
        bits: int,
        shrink: Float[Tensor, "factors 1 1"],
        scale_bits: int,
    ) -> tuple[Float[Tensor, "factors rows groups"], Float[Tensor, "factors rows groups"]]:
        """Shrink both ends of the range together."""
        top = 2**bits - 1
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = store_scale(shrink * ((high - low) / top), scale_bits)
        scale = scale.clamp(min=smallest_scale(scale_bits))
        scale = torch.where(high == low, 1.0, scale)
        if self.symmetric:
            return scale, torch.full_like(scale, 2 ** (bits - 1))
        return scale, (-low * shrink / scale).round().clamp(0, top)

    def limits(self, bits: Integer[Tensor, "..."], zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels of the codes 0 and 2^bits − 1."""
        return -zero, top_code(bits).to(zero.dtype) - zero

    def round_(self, value: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
        """Round to whole numbers."""
        return value.round_()

    def to_level_(
        self, value: Float[Tensor, "*shape"], bits: int, zero: Float[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """Clamp codes, whose limits are two numbers: five times faster than a tensor of limits."""
        return value.round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)

    def round_step_(
        self, step: Float[Tensor, "*shape"], level: Float[Tensor, "*shape"], bits: int
    ) -> Float[Tensor, "*shape"]:
        """Round the step, not the level, half to even: a tie keeps the old level."""
        return step.round_()

    def encode(
        self, value: Float[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Int16[Tensor, "*shape"]:
        """Return the level, counted from the least one."""
        least, most = self.limits(bits, zero)
        return value.round().clamp_(least, most).add_(zero).to(torch.int16)

    def decode(
        self, codes: Integer[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Tensor:
        """Return code − zero point."""
        return codes - zero


class Codebook(NumberFormat):
    """A list of levels for each width, in ascending order; zero is one of them."""

    @abstractmethod
    def levels(self, bits: int) -> Float32[Tensor, "levels"]:
        """Return the levels of a width, at most 2^bits: ascending, distinct, and 0 exactly once."""

    def implied_zero(self, bits: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Return where zero is among the levels."""
        places = [0] * (UNQUANTIZED + 1)
        for width in self.widths:
            places[width] = int((_table(self, width)[0] < 0).sum())
        return torch.tensor(places, dtype=torch.int32, device=bits.device)[bits.long()]

    def fit(
        self,
        weight: Float[Tensor, "rows groups size"],
        bits: int,
        shrink: Float[Tensor, "factors 1 1"],
        scale_bits: int,
    ) -> tuple[Float[Tensor, "factors rows groups"], Float[Tensor, "factors rows groups"]]:
        """Let the outermost levels reach the outermost weights, and shrink from there."""
        least, most = _table(self, bits)[0][[0, -1]].tolist()
        needed = weight.new_zeros(weight.shape[:-1])
        if most > 0:
            needed = torch.maximum(needed, weight.amax(-1) / most)
        if least < 0:
            needed = torch.maximum(needed, weight.amin(-1) / least)
        scale = store_scale(shrink * needed, scale_bits).clamp(min=smallest_scale(scale_bits))
        scale = torch.where(needed == 0, 1.0, scale)
        zero = self.implied_zero(torch.tensor(bits, device=weight.device))
        return scale, zero.to(scale.dtype).expand_as(scale)

    def limits(self, bits: Integer[Tensor, "..."], zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outermost levels."""
        ends = torch.zeros(UNQUANTIZED + 1, 2)
        for width in self.widths:
            ends[width] = _table(self, width)[0][[0, -1]]
        dtype = zero.dtype if zero.is_floating_point() else ends.dtype
        found = ends.to(zero.device, dtype)[bits.long()]
        return found[..., 0], found[..., 1]

    def round_(self, value: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
        """Take the nearest of the levels, the lower one of two that are equally near."""
        levels, between = _table(self, bits, value.dtype, value.device)
        return value.copy_(levels[torch.bucketize(value.contiguous(), between)])

    def encode(
        self, value: Float[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Int16[Tensor, "*shape"]:
        """Return the place of the nearest level in the list; 0 where a channel has no list."""
        codes = torch.zeros_like(value, dtype=torch.int16)
        for width in set(bits.flatten().tolist()) & set(self.widths):
            _, between = _table(self, width, value.dtype, value.device)
            codes = torch.where(
                bits == width, torch.bucketize(value.contiguous(), between).short(), codes
            )
        return codes

    def decode(
        self, codes: Integer[Tensor, "*shape"], bits: Integer[Tensor, "..."], zero: Tensor
    ) -> Tensor:
        """Look the levels up."""
        level = torch.zeros_like(codes, dtype=torch.float32)
        for width in set(bits.flatten().tolist()) & set(self.widths):
            table, _ = _table(self, width, level.dtype, level.device)
            found = table[codes.long().clamp(0, len(table) - 1)]
            level = torch.where(bits == width, found, level)
        return level


@lru_cache(maxsize=256)
def _table(
    codebook: Codebook,
    bits: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "levels"], Float[Tensor, "gaps"]]:
    """Return levels and the middles between neighbours, which a device is given once."""
    levels = codebook.levels(bits).to(device, dtype)
    return levels, (levels[1:] + levels[:-1]) / 2


@dataclass(frozen=True)
class NormalFloat(Codebook):
    """NormalFloat: quantiles of the normal distribution (QLoRA, arXiv:2305.14314, appendix E).

    2^(bits − 1) positive levels, zero, and 2^(bits − 1) − 1 negative ones are each equally likely
    under a normal distribution, from the tail probability ½ (1/2^(bits + 1) + 1/(2^(bits + 1) − 2))
    to the middle, divided by the largest. One scale a (row, scale group) and no zero point.
    """

    name = "normal_float"
    widths = tuple(range(2, MAX_BITS + 1))

    def levels(self, bits: int) -> Float32[Tensor, "levels"]:
        """Return the quantiles as the published code computes them, which is in float32."""
        tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
        # For four bits 0.9677083 is published: seven digits.
        first, middle = torch.tensor([round(1 - tail, 7), 0.5], dtype=torch.float32)

        def quantiles(count: int) -> Float32[Tensor, "quantiles"]:
            # Counted from the nearer end, as `torch.linspace` does, but alike on every machine.
            step, at = (middle - first) / count, torch.arange(count, dtype=torch.float32)
            near = at < (count + 1) // 2
            chance = torch.where(near, first + step * at, middle - step * (count - at))
            found: Tensor = torch.special.ndtri(chance.double()).float()
            return found

        positive, negative = quantiles(2 ** (bits - 1)), -quantiles(2 ** (bits - 1) - 1)
        levels = torch.cat([negative, positive.new_zeros(1), positive.flip(0)])
        return levels / levels.max()


UNIFORM, SYMMETRIC = Uniform(), Uniform(symmetric=True)

NUMBER_FORMATS: dict[str, NumberFormat] = {
    format_.name: format_ for format_ in (UNIFORM, NormalFloat())
}
"""The formats by the name that `wbits.grid` gives them."""


def find_format(name: str, *, symmetric: bool = False) -> NumberFormat:
    """Return a format by its name; the uniform one also symmetric about zero."""
    return SYMMETRIC if symmetric else NUMBER_FORMATS[name]
