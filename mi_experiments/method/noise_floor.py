"""What an estimator of information reports on channels that are independent."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import beta
from torch import Tensor

from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.information import (
    SUMMARY_CHANNELS,
    Estimator,
    gaussian_bias,
    measure_information,
)


@dataclass(frozen=True)
class NoiseFloor:
    """What an estimator reports on channels that are independent, in nats.

    Attributes:
        mean: over pairs; about 0 for an unbiased estimator.
        p95: 95th percentile over pairs: smaller estimates are no evidence of dependence.
    """

    mean: float
    p95: float


def noise_floor(
    hessian: Hessian, estimator: Estimator, generator: torch.Generator, *, bins: int = 8
) -> NoiseFloor:
    """Return what the estimator reports on independent channels, from as many tokens.

    This is the null of independent tokens. Neighbouring tokens of a text are alike, so the
    scatter of real estimates is somewhat larger.

    Where ρ = 0, r² of n tokens of Gaussian channels follows Beta(½, (n − 2)/2) (Fisher 1915), so
    that the mean of the corrected estimate is 0 and its percentiles are known; the same holds for
    normal scores of ranks, whatever the channels, but for their ties. `binned` has no such form:
    there the tokens of the channels are shuffled apart.

    Args:
        hessian: of the site.
        estimator: the estimator to be judged.
        generator: draws the shuffles.
        bins: the bins of the binned estimator.

    Returns:
        Mean and 95th percentile over pairs; 0 where fewer than two channels vary.
    """
    if estimator is Estimator.binned:
        return shuffled_floor(hessian.sample, estimator, generator, bins=bins)
    varying = (hessian.sample != hessian.sample[:1]).any(0).sum()
    if varying < 2:
        return NoiseFloor(0.0, 0.0)
    tokens = hessian.tokens if estimator is Estimator.gaussian else len(hessian.sample)
    square = beta.ppf(0.95, 0.5, (tokens - 2) / 2)
    return NoiseFloor(0.0, float(-math.log1p(-square) / 2) - gaussian_bias(tokens))


def shuffled_floor(
    sample: Float[Tensor, "tokens columns"],
    estimator: Estimator,
    generator: torch.Generator,
    *,
    bins: int = 8,
) -> NoiseFloor:
    """Return what the estimator reports when the tokens of each channel are shuffled apart.

    Args:
        sample: tokens of the site.
        estimator: the estimator to be judged.
        generator: draws the shuffles, and `SUMMARY_CHANNELS` of more channels that vary.
        bins: the bins of the binned estimator.
    """
    varying = (sample != sample[:1]).any(0).nonzero().flatten()
    if len(varying) < 2:
        return NoiseFloor(0.0, 0.0)
    drawn = torch.randperm(len(varying), generator=generator, device=generator.device)
    chosen = sample[:, varying[drawn[:SUMMARY_CHANNELS].to(sample.device)]]
    keys = torch.rand(chosen.shape, generator=generator, device=generator.device)
    shuffled = chosen.gather(0, keys.argsort(0).to(sample.device))
    accumulator = HessianAccumulator(
        shuffled.shape[1], sample_tokens=len(shuffled), device=sample.device, dtype=sample.dtype
    )
    accumulator.update(shuffled)
    pairs = _pairs(measure_information(accumulator.finish(), estimator, bins=bins))
    return NoiseFloor(pairs.mean().item(), pairs.quantile(0.95).item())


def _pairs(information: Float[Tensor, "columns columns"]) -> Float[Tensor, "pairs"]:
    return information[torch.ones_like(information, dtype=torch.bool).triu(1)]
