"""Round what no grid quantizes to 16 bits, so that what is counted is what is stored and evaluated.

A weight of an unquantized channel is counted at 16 bits. In a checkpoint of 32 bits it has more, so
it is rounded once, before it is evaluated, exported or packed: everything after that is exact. Only
a linear of which nothing is asked stays what it is, and counts what that takes.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_experiments.method.grid import Grid
from mi_experiments.method.sparsegpt import Swept

LEAST_LARGEST = 2.0**-16
"""Largest weight of a row below which float16, whose steps are 2⁻²⁴ there, is the coarser type."""


def choose_half(weight: Float[Tensor, "rows chosen"], held_in: torch.dtype) -> torch.dtype:
    """Return the 16-bit type in which weights are stored.

    That is the type of the model where it has 16 bits. Else the type that holds them exactly,
    as for a bfloat16 checkpoint that is computed with in float32; else float16, unless a weight
    overflows or a whole row falls where float16 is coarser than bfloat16, or vanishes.

    Args:
        weight: Weights of the unquantized channels.
        held_in: Number format that the model holds them in.
    """
    if (exact := choose_exact(weight, held_in)).itemsize == 2:
        return exact
    largest = weight.abs().amax(1)
    fits = largest.to(torch.float16).isfinite() & ((largest >= LEAST_LARGEST) | (largest == 0))
    return torch.float16 if fits.all() else torch.bfloat16


def choose_exact(weight: Float[Tensor, "rows chosen"], held_in: torch.dtype) -> torch.dtype:
    """Return a 16-bit type that holds weights exactly, else the type that they are held in."""
    if held_in.itemsize == 2:
        return held_in
    for half in (torch.float16, torch.bfloat16):
        if torch.equal(weight.to(half).to(weight.dtype), weight):
            return half
    return held_in


def round_to_half(
    swept: Swept, grid: Grid | None, held_in: torch.dtype
) -> tuple[Swept, torch.dtype | None]:
    """Round the weights of the unquantized channels of a linear to 16 bits.

    Args:
        swept: The linear; its quantized channels stay as they are.
        grid: Levels of the quantized channels; None if there are none.
        held_in: Number format that the model holds the weights in.

    Returns:
        The linear with those weights rounded, and their type; None where all channels are
        quantized.
    """
    whole: Bool[Tensor, "columns"] = torch.ones_like(swept.pruned[0])
    if grid is not None:
        whole = ~grid.quantized
    columns = whole.nonzero()[:, 0]
    if not columns.numel():
        return swept, None
    chosen = swept.weight[:, columns]
    dtype = choose_half(chosen, held_in)
    rounded = chosen.to(dtype).to(chosen.dtype)
    return replace(swept, weight=swept.weight.index_copy(1, columns, rounded)), dtype
