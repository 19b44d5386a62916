"""Damping: what is added to the diagonal of a Hessian so that its inverse does not exaggerate.

GPTQ and SparseGPT add the same to every channel, a fraction of the mean energy. Where channels are
unequal, as behind a normalization with outlier channels, that is more than all a weak channel has
and next to nothing for a strong one. The problem itself is indifferent to the scale of a channel
(x_j · s and W_ij / s give the same outputs), and so is damping in proportion to a channel's own
energy. With d̄ the mean of the energies d_j, and a power p, what is added is

    δ · d̄ · max((d_j / d̄)^p, 0.01)

p = 0: the same for every channel, as published. p = 1: a share of each channel's own energy, but
never so little that a channel without energy makes the matrix singular. p = ½: between the two.
"""

import math

from jaxtyping import Float
from torch import Tensor

LARGEST_DAMPING = 1.0
SMALLEST_ESCALATION = 1e-4
LEAST_SHARE = 0.01


def damp(
    diagonal: Float[Tensor, "columns"], damping: float, power: float
) -> Float[Tensor, "columns"]:
    """Return the damped diagonal.

    Args:
        diagonal: energy of each channel, not all zero.
        damping: δ, not negative.
        power: p, from 0 to 1.
    """
    mean = diagonal.mean().item()
    if power == 0:
        return diagonal + damping * mean
    share = (diagonal.clamp(min=0) / mean).pow(power).clamp_(min=LEAST_SHARE)
    return diagonal + share.mul_(damping * mean)


def ladder(damping: float) -> list[float]:
    """Return the dampings to try, each ten times the one before, up to 1.

    Raises:
        ValueError: the damping is negative or not finite.
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is {damping}, must be finite and not negative")
    rungs = [damping]
    while rungs[-1] < LARGEST_DAMPING:
        following = rungs[-1] * 10 if rungs[-1] > 0 else SMALLEST_ESCALATION
        rungs.append(min(float(f"{following:.12g}"), LARGEST_DAMPING))
    return rungs
