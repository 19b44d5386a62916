"""How far the groups of a site depend on which calibration tokens were seen."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from mi_experiments.method.grouping import GROUPINGS, Grouping, adjusted_rand_index, group_channels
from mi_experiments.method.hessian import Hessian, HessianAccumulator, factorize
from mi_experiments.method.information import Estimator, measure_information

FROM_TOKENS = {"hessian", "factor", "information"}
"""What a rule may need that comes from activations."""

PRODUCTS = {"factor", "information"}
"""What needs the products of different channels, and not their energies alone."""


def split_half_stability(
    grouping: Grouping,
    n_groups: int,
    sample: Float[Tensor, "tokens columns"],
    *,
    estimator: Estimator,
    damping: float,
    weights_energy: Float[Tensor, "columns"] | None = None,
    seed: int = 0,
    multiple: int = 32,
) -> float | None:
    """Return the adjusted Rand index between the groups that two halves of the tokens give.

    A sample holds its tokens in the order of the calibration sequences, so its halves come from
    different sequences (but for one). Each half is grouped as the whole is, from half the tokens: 1
    means that the groups are a property of the model, 0 that they are one of the sample.

    Args:
        grouping: the rule.
        n_groups: number of groups.
        sample: tokens of the site, in their order.
        estimator: the estimator of mutual information.
        damping: the damping of the factor; more where that is needed.
        weights_energy: the weights energy for `sensitivity`, see `group_channels`.
        seed: the same for both halves.
        multiple: the multiple of the group sizes.

    Returns:
        The index; None where there is nothing to compare: a rule that looks at no token, one group,
        fewer than 8 tokens, or a half in which every channel is zero.
    """
    needs = GROUPINGS[grouping].needs
    halves = torch.tensor_split(sample, 2)
    if n_groups == 1 or len(sample) < 8 or not FROM_TOKENS & {*needs}:
        return None
    if not all(half.any() for half in halves):
        return None

    def group(half: Float[Tensor, "tokens columns"]) -> Int32[Tensor, "columns"]:
        hessian = _measure(half) if PRODUCTS & {*needs} else _energies(half)
        return group_channels(
            grouping,
            n_groups,
            half.shape[1],
            hessian=hessian,
            factor=factorize(hessian, damping=damping) if "factor" in needs else None,
            information=measure_information(hessian, estimator) if "information" in needs else None,
            weights_energy=weights_energy,
            seed=seed,
            multiple=multiple,
        )

    return adjusted_rand_index(*map(group, halves))


def _measure(tokens: Float[Tensor, "tokens columns"]) -> Hessian:
    """Return the Hessian of tokens that are all kept."""
    accumulator = HessianAccumulator(
        tokens.shape[1], sample_tokens=len(tokens), device=tokens.device, dtype=tokens.dtype
    )
    accumulator.update(tokens)
    return accumulator.finish()


def _energies(tokens: Float[Tensor, "tokens columns"]) -> Hessian:
    """Return a Hessian of which only the diagonal was measured."""
    energy = torch.diag(2 * tokens.square().mean(0))
    return Hessian(energy, tokens.mean(0), len(tokens), tokens)
