"""How many groups a site gets: as many as pay for the scales that each of them brings."""

import math
from collections.abc import Iterable, Mapping

from jaxtyping import Float, Float64, Int, Int32
from torch import Tensor

from mi_experiments.config.config import Config
from mi_experiments.llm.sites import Site
from mi_experiments.method.grid import scale_groups
from mi_experiments.method.hessian import Factor, Hessian
from mi_experiments.planning.costs import measure_group_costs, read_weight

COMPARED_AT = 4
"""The width at which partitions are compared, so that the choice does not depend on the budget; of
a number format without it, the nearest width that it has."""

LEAST = 4.0**-4
"""What no group counts less than, of its linear's mean: widths are not many bits apart."""


def best_partition(
    site: Site,
    partitions: Iterable[Int32[Tensor, "columns"]],
    fisher: Mapping[str, Float[Tensor, "_"]],
    hessian: Hessian,
    factor: Factor,
    config: Config,
) -> Int32[Tensor, "columns"]:
    """Return the partition that loses least for what is stored; of equal ones the first.

    One bit more divides an error by four. So log 4 times the bits of a weight that scales and zero
    points take, and that codes must do without, stands against `log_cost`.

    Args:
        site: the site of which all linears count, by their weights.
        partitions: group of each channel.
        fisher: Fisher information about each output, by linear.
        hessian: the hessian of the site.
        factor: the factor of the Hessian.
        config: the config of the run.
    """

    def score(channel_group: Int32[Tensor, "columns"]) -> float:
        total, weights = 0.0, 0
        for linear in site.linears:
            weight = read_weight(linear, hessian, config)
            costs = measure_group_costs(
                weight,
                fisher.get(linear.name),
                channel_group,
                hessian,
                factor,
                config,
                [compared_width(config)],
            )
            total += log_cost(costs.costs[:, 0].double(), costs.sizes) * weight.numel()
            weights += weight.numel()
        return total / weights + math.log(4) * scale_bits(channel_group, config)

    return min(partitions, key=score)


def log_cost(costs: Float64[Tensor, "groups"], sizes: Int[Tensor, "groups"]) -> float:
    """Return the logarithm of what a weight loses once the bits are where they are worth most.

    Widths b_g, fractions allowed, that minimize Σ_g cost_g 4^(-b_g) at a given Σ_g size_g b_g make
    the loss per weight of all groups the same: the geometric mean of cost_g / size_g, by size.
    Where nothing is lost it is 0, whatever the groups.

    Args:
        costs: the costs of the groups at equal widths.
        sizes: number of weights in each group.
    """
    mean = costs.sum() / sizes.sum()
    if mean == 0:
        return 0.0
    share = (costs / sizes).clamp(min=LEAST * mean)
    return float((sizes * share.log()).sum() / sizes.sum())


def compared_width(config: Config) -> int:
    """Return the width at which partitions are compared."""
    return min(config.wbits.number_format.widths, key=lambda width: abs(width - COMPARED_AT))


def scale_bits(channel_group: Int[Tensor, "columns"], config: Config) -> float:
    """Return how many bits of a kept weight are scales and zero points; inf if none is kept."""
    if config.sparsity.ratio == 1:
        return math.inf
    scales = int(scale_groups(channel_group, config.wbits.group_size).max()) + 1
    zero_bits = config.wbits.number_format.zero_bits(compared_width(config))
    each = config.recipe.scale_bits + zero_bits
    return scales * each / len(channel_group) / (1 - config.sparsity.ratio)
