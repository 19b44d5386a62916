"""The error of a linear's output relative to the output, whatever the size of its weights."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LEAST = 1e-30
"""Energy per weight above which what single products lose to underflow is small against it."""


def relative_error(
    change: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
) -> float:
    """Return tr(Δ H Δᵀ) / tr(W H Wᵀ): 1 where all of a weight is lost, 0 only where nothing is.

    Squares of numbers below 1e-19 or above 1e19 have no place in float32. Such sums are done again
    in float64 and in units of the largest number, so that no loss is called nothing. Where the
    weight gives nothing the error is 0 if that has stayed so, and else infinite.

    Args:
        change: Δ, of the weight.
        weight: W, before the change.
        hessian: H, of what it reads.
    """
    energy = torch.sum(weight @ hessian * weight, dtype=torch.float64)
    error = torch.sum(change @ hessian * change, dtype=torch.float64)
    sound = LEAST * weight.numel() < energy < math.inf and error.isfinite()
    if sound and (error > 0 or not change.any()):
        return float(error / energy)
    matrix = _in_units(hessian)[0]
    (moved, step), (whole, unit) = _in_units(change), _in_units(weight)
    lost = float(torch.sum(moved @ matrix * moved).clamp(min=0))
    given = float(torch.sum(whole @ matrix * whole).clamp(min=0))
    if given > 0:
        return lost / given * (step / unit) ** 2
    return math.inf if lost > 0 else 0.0


def _in_units(values: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], float]:
    """Return values in units of the largest, in float64, and that unit."""
    exact = values.double()
    unit = float(exact.abs().max()) or 1.0
    return exact / unit, unit
