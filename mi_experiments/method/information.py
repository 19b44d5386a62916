"""Measure the information between the channels of a site, always in nats.

Pairwise: a matrix I(i; j) by one of three estimators, with the floor that the same estimator
reports when there is nothing to find (`noise_floor`). Joint: from a `Factor` alone, how much the
other channels know about each one (redundancy) and how much all share (total correlation).
"""

from collections.abc import Callable
from enum import Enum

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from mi_experiments.method.gram import add_gram_, mirror_
from mi_experiments.method.hessian import Factor, Hessian

INFORMATION_CAP = 5.0
"""Nats at which a pair of (nearly) identical channels saturates: |ρ| = 0.99998 and beyond.

Identical Gaussian channels share infinite information; float32 covariances resolve 1 − ρ² down to
about 1e-6, well below the e^(−10) of the cap.
"""

SUMMARY_CHANNELS = 256
"""Channels that stand for all of a site where pairs are only summarized."""

_RANKED_TOGETHER = 512
_CELLS_TOGETHER = 2048


class Estimator(Enum):
    """How the information between two channels is estimated."""

    gaussian = "gaussian"
    copula = "copula"
    binned = "binned"


class Pairs(Enum):
    """Of which pairs of channels the information is measured."""

    full = "full"
    summary = "summary"
    none = "none"


def some_channels(hessian: Hessian, count: int) -> Hessian:
    """Return the statistics of so many channels, evenly spaced; of all where there are no more."""
    columns = len(hessian.mean)
    if columns <= count:
        return hessian
    chosen = torch.arange(count, device=hessian.mean.device) * columns // count
    return Hessian(
        matrix=hessian.matrix[chosen][:, chosen],
        mean=hessian.mean[chosen],
        tokens=hessian.tokens,
        sample=hessian.sample[:, chosen],
    )


def gaussian_information(
    covariance: Float[Tensor, "columns columns"], tokens: int | None = None
) -> Float[Tensor, "columns columns"]:
    """Return −½ ln(1 − ρ²) of every pair: their information if they are jointly Gaussian.

    Otherwise it is a summary of linear dependence only, and outlying tokens dominate it. The
    diagonal is 0, so is everything about a channel without variance, and nothing exceeds
    `INFORMATION_CAP`.

    Args:
        covariance: centred.
        tokens: how many tokens the covariance was estimated from. If given, the bias of the three
            Gaussian entropies is removed in closed form, ½[ψ((n−1)/2) − ψ((n−2)/2)] ≈ 1/(2n)
            (Ince et al. 2017, Human Brain Mapping 38:1541, section on bias correction). The
            result is then unbiased, so near independence it may be negative; whoever needs an
            affinity clamps it.

    Raises:
        ValueError: fewer than 4 tokens, where the correction does not exist.
    """
    if tokens is not None and tokens < 4:
        raise ValueError(f"information needs at least 4 tokens, got {tokens}")
    variance = covariance.diagonal()
    constant = variance <= 0
    scale = torch.where(constant, 0, variance.rsqrt())
    information = torch.outer(scale, scale).mul_(covariance)
    information.square_().clamp_(max=1).neg_().log1p_().mul_(-0.5)
    if tokens is not None:
        information -= gaussian_bias(tokens)
    information.clamp_(max=INFORMATION_CAP).fill_diagonal_(0)
    information[constant, :] = 0
    information[:, constant] = 0
    return information


def gaussian_bias(tokens: int) -> float:
    """Return ½[ψ((n−1)/2) − ψ((n−2)/2)], what −½ ln(1 − r²) is on average where ρ = 0, in nats."""
    halves = torch.tensor([tokens - 1, tokens - 2], dtype=torch.float64) / 2
    return torch.digamma(halves).diff().neg().item() / 2


def copula_information(sample: Float[Tensor, "tokens columns"]) -> Float[Tensor, "columns columns"]:
    """Return the Gaussian-copula information of every pair, bias-corrected.

    Each channel is replaced by the normal scores of its ranks, then `gaussian_information` is
    taken (Ince et al. 2017, Human Brain Mapping 38:1541). This is a lower bound on the true
    information for any marginals, exact when the copula is Gaussian, and bit for bit invariant
    under strictly monotone maps of any channel. Tied values share their average rank: breaking
    ties by position would correlate all channels that are zero on the same many tokens.
    """
    scores = _normal_scores(sample)
    scores -= scores.mean(0)
    covariance = scores.new_zeros(scores.shape[1], scores.shape[1])
    add_gram_(covariance, scores)
    return gaussian_information(mirror_(covariance).div_(len(scores)), len(scores))


def binned_information(
    sample: Float[Tensor, "tokens columns"], bins: int = 8
) -> Float[Tensor, "columns columns"]:
    """Return the information between equal-mass bins of every pair; sees non-linear dependence.

    The entropies carry the Miller-Madow correction, (occupied cells − 1)/(2n) each (Miller 1955),
    so near independence the result may be negative. Identical channels reach about ln(bins).
    Joint histograms are products of one-hot matrices, tile by tile, in memory of
    O(tokens·2048 + 2048²) besides the result. The work is bins² times that of a covariance: meant
    for validation and for accelerators.

    Args:
        sample: tokens; tied values share a bin.
        bins: number of bins of each channel.
    """
    tokens, columns = sample.shape
    codes = (_doubled_ranks(sample) * bins).div_(2 * tokens, rounding_mode="floor")
    information = sample.new_zeros(columns, columns)
    width = max(1, _CELLS_TOGETHER // bins)
    for top in range(0, columns, width):
        rows = slice(top, top + width)
        left = _one_hot(codes[:, rows], bins, sample.dtype)
        for start in range(top, columns, width):
            others = slice(start, start + width)
            right = _one_hot(codes[:, others], bins, sample.dtype)
            joint = torch.einsum("tib,tjc->ijbc", left, right).flatten(2)
            tile = _entropy(left.sum(0))[:, None] + _entropy(right.sum(0)) - _entropy(joint)
            information[rows, others] = tile
    information = information.clamp_(max=INFORMATION_CAP).triu(1)
    return information + information.T


ESTIMATORS: dict[Estimator, Callable[[Hessian, int], Tensor]] = {
    Estimator.gaussian: lambda hessian, _: gaussian_information(
        hessian.covariance(), hessian.tokens
    ),
    Estimator.copula: lambda hessian, _: copula_information(hessian.sample),
    Estimator.binned: lambda hessian, bins: binned_information(hessian.sample, bins),
}


def measure_information(
    hessian: Hessian, estimator: Estimator, *, bins: int = 8
) -> Float[Tensor, "columns columns"]:
    """Return the information of every pair of channels, symmetric with a zero diagonal.

    Args:
        hessian: of the site; `gaussian` reads the second moments of all tokens, the other
            estimators its sample.
        estimator: all are corrected for bias, so estimates of nothing scatter around 0.
        bins: the bins of the binned estimator.
    """
    return ESTIMATORS[estimator](hessian, bins)


def redundancy(factor: Factor) -> Float[Tensor, "columns"]:
    """Return I_j = ½ ln(H′_jj [H′⁻¹]_jj), what the other channels know about each channel.

    This is the information I(x_j; x_rest) of zero-mean Gaussians with second moments H′, and the
    link between information and OBS: w²/[H′⁻¹]_jj = w² H′_jj e^(−2·I_j), so every bit of it
    lowers the best width of the channel by one bit. Factorise `Hessian.covariance()` instead to
    leave the means out; the sweep cannot, since it has no bias to absorb them.

    The damping acts as independent noise of that variance in every channel: it keeps the
    information of duplicated channels finite and can only lower it. Not negative but for rounding.
    """
    return (factor.diagonal() * factor.inverse_diagonal()).log() / 2


def total_correlation(factor: Factor) -> float:
    """Return ½(Σ ln H′_jj − ln det H′), the information that all channels share.

    It is the sum over the sweep of ½ ln(H′_jj / R_jj²), what the channels still to come know about
    the present one: the order of the sweep moves redundancy about and never changes the total.
    The damping acts as in `redundancy`.
    """
    pivots = factor.upper.diagonal().to(torch.float64)
    return (factor.diagonal().to(torch.float64).log().sum() / 2 - pivots.log().sum()).item()


def _doubled_ranks(sample: Float[Tensor, "tokens columns"]) -> Int32[Tensor, "tokens columns"]:
    """Return twice the rank of each value in its channel plus one: 1, 3, …, 2·tokens − 1.

    Tied values share the average, so the result stays an integer.
    """
    ranks = torch.empty(sample.shape, dtype=torch.int32, device=sample.device)
    position = torch.arange(len(sample), dtype=torch.int32, device=sample.device)
    last = position[-1]
    for start in range(0, sample.shape[1], _RANKED_TOGETHER):
        values = sample[:, start : start + _RANKED_TOGETHER].T.contiguous()
        ordered, places = values.sort(dim=1)
        # The first and last position of each run of equal values.
        steps = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 1), value=True)
        first = torch.where(steps[:, :-1], position, 0).cummax(1).values
        final = torch.where(steps[:, 1:], position, last).flip(1).cummin(1).values.flip(1)
        doubled = (first + final + 1).to(torch.int32)
        ranks[:, start : start + _RANKED_TOGETHER] = doubled.scatter(1, places, doubled).T
    return ranks


def _normal_scores(sample: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
    """Return Φ⁻¹(rank/(tokens + 1)), exactly odd: a reversed channel has the opposite scores."""
    centred = _doubled_ranks(sample) - len(sample)
    tail = (len(sample) + 1 - centred.abs()).to(sample.dtype) / (2 * (len(sample) + 1))
    scores: Tensor = torch.special.ndtri(tail)
    return scores.mul_(-centred.sign())


def _one_hot(
    codes: Int32[Tensor, "tokens columns"], bins: int, dtype: torch.dtype
) -> Float[Tensor, "tokens columns bins"]:
    return (codes[:, :, None] == torch.arange(bins, device=codes.device)).to(dtype)


def _entropy(counts: Float[Tensor, "... cells"]) -> Float[Tensor, "..."]:
    tokens = counts.sum(-1)
    plug_in = tokens.log() - torch.xlogy(counts, counts).sum(-1) / tokens
    return plug_in + (counts.count_nonzero(-1) - 1) / (2 * tokens)
