"""The few numbers of a site's information that are worth a record."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_experiments.method.hessian import Factor
from mi_experiments.method.information import Estimator, redundancy, total_correlation
from mi_experiments.method.noise_floor import NoiseFloor


@dataclass(frozen=True)
class InformationSummary:
    """The information in one site, in nats, as plain numbers for the record.

    Attributes:
        mean_pairwise: over the pairs of different channels that were measured, all or those of
            `SUMMARY_CHANNELS`; None where none were.
        max_pairwise: over the same pairs; `INFORMATION_CAP` when two channels are identical.
        noise_mean: mean of the estimator on independent channels.
        noise_p95: 95th percentile of the estimator on independent channels.
        total_correlation: shared by all channels, whatever the order of the sweep.
        mean_redundancy: mean over channels of what all the others know about one.
        estimator: name of the estimator of the pairwise and noise values.
        damping: of the Hessian whose factor gave the two above; None in records without it.
        stability: adjusted Rand index between the groups of two halves of the tokens; None where
            groups do not come from tokens, and in records without it.
    """

    mean_pairwise: float | None
    max_pairwise: float | None
    noise_mean: float | None
    noise_p95: float | None
    total_correlation: float
    mean_redundancy: float
    estimator: str | None
    damping: float | None = None
    stability: float | None = None


def summarize(
    information: Float[Tensor, "chosen chosen"] | None,
    noise: NoiseFloor | None,
    factor: Factor,
    estimator: Estimator,
) -> InformationSummary:
    """Return the few numbers of a site that are worth a record.

    Args:
        information: the information of every pair, from `measure_information`; None if it was not
            measured.
        noise: the noise from `noise_floor` with the same estimator; None likewise.
        factor: the factor of the Hessian (or covariance) of the site.
        estimator: the estimator that gave `information`.
    """
    mean = most = None
    if information is not None:
        columns = len(information)
        mean = information.sum(dtype=torch.float64).item() / max(columns * (columns - 1), 1)
        # The diagonal is zero and would hide pairs that are all below zero.
        apart = information.clone().fill_diagonal_(-math.inf)
        most = apart.max().item() if columns > 1 else 0.0
    return InformationSummary(
        mean_pairwise=mean,
        max_pairwise=most,
        noise_mean=noise.mean if noise else None,
        noise_p95=noise.p95 if noise else None,
        total_correlation=total_correlation(factor),
        mean_redundancy=redundancy(factor).mean().item(),
        estimator=estimator.value if information is not None else None,
        damping=factor.damping,
    )
