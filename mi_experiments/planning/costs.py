"""What every width of every group costs, and what pruning costs: output errors, weighted by row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mi_experiments.config.config import Config
from mi_experiments.config.method import Cost
from mi_experiments.config.recipe import DeadChannels
from mi_experiments.errors import NumericalError
from mi_experiments.llm.inventory import LinearView
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.hessian import Factor, Hessian, sweep_order
from mi_experiments.method.number_formats import UNQUANTIZED
from mi_experiments.method.pruning import choose_pruned
from mi_experiments.method.pruning_costs import possible_parts, pruning_costs


@dataclass(frozen=True)
class GroupCosts:
    """Cost of each group of one linear at each width, and its number of weights."""

    costs: Float[Tensor, "groups widths"]
    sizes: Int[Tensor, "groups"]


def measure_group_costs(
    weight: Float[Tensor, "rows columns"],
    fisher: Float[Tensor, "rows"] | None,
    channel_group: Int[Tensor, "columns"],
    hessian: Hessian,
    factor: Factor,
    config: Config,
    widths: Sequence[int] | None = None,
) -> GroupCosts:
    """Measure the cost of each group at each width: the output error of its grids, really fitted.

    The cost is Σ_j [H'⁻¹]_jj⁻¹ Σ_i f_i (Q_b(W_ij) − W_ij)² over the group's channels j and the
    rows i that survive pruning: the error that remains after the other channels have compensated
    (GPTQ, arXiv:2210.17323, equation 2). `fisher` f_i is 1, or with `cost=fisher` the Fisher
    information of the model's loss about output i. Where sparsity is allocated too, the rows that
    survive are those of its average: how much this linear will be pruned is not known yet. The
    widths are those that the config allows, unless others are given.
    """
    saliency = 1 / factor.inverse_diagonal()
    # A power of two: squares of small weights do not underflow, and all others keep their bits.
    unit = unit_of(weight)
    row_cost = weigh_rows(weight, fisher, hessian, config.wbits.cost)
    sparsity = config.sparsity.average
    pruned = None
    if not sparsity.is_dense:
        pruned = choose_pruned((weight * unit).square() * saliency, sparsity)
    groups = int(channel_group.max()) + 1
    wbits = config.wbits
    scale_group = scale_groups(channel_group, wbits.group_size)
    columns = []
    for width in widths or wbits.candidate_widths():
        bits = torch.full_like(channel_group, width, dtype=torch.uint8)
        error = torch.zeros_like(weight)
        if width < UNQUANTIZED:
            grid = fit_grid(
                weight,
                bits,
                scale_group,
                clip_search=config.recipe.clip_search,
                coarse=True,
                number_format=wbits.number_format,
                scale_bits=config.recipe.scale_bits,
                pruned=pruned,
            )
            error = (grid.quantize(weight) - weight) * unit
        if pruned is not None:
            error = error.masked_fill(pruned, 0)
        per_channel = (row_cost @ error.square()).double() * saliency
        columns.append(
            per_channel.new_zeros(groups).index_add_(0, channel_group.long(), per_channel)
        )
    costs = in_outputs(torch.stack(columns, dim=1), unit, config.wbits.cost)
    sizes = torch.bincount(channel_group.long(), minlength=groups) * weight.shape[0]
    return GroupCosts(costs.cpu(), sizes.cpu())


def measure_pruning_costs(
    weight: Float[Tensor, "rows columns"],
    fisher: Float[Tensor, "rows"] | None,
    hessian: Hessian,
    factor: Factor,
    config: Config,
) -> Float64[Tensor, "choices"]:
    """Measure what each share that a linear may keep costs: the output error of pruning the rest.

    The cost is the sum of f_i W_ij² / [H'⁻¹]_jj over the weights with the smallest W_ij² /
    [H'⁻¹]_jj of each mask block: the error that remains after the other channels have compensated
    (arXiv:2301.00774, section 3), one weight at a time. f_i is as in `measure_group_costs`.
    """
    row_cost = weigh_rows(weight, fisher, hessian, config.sparsity.cost)
    order = sweep_order(hessian.diagonal, config.recipe.order)
    unit = unit_of(weight)
    score = ((weight * unit).square() / factor.inverse_diagonal())[:, order]
    kept = possible_parts(config.sparsity.ratio, config.sparsity.spread)
    block = config.sparsity.mask_block_of(weight.shape[1])
    costs = pruning_costs(score, row_cost, kept, block)
    return in_outputs(costs, unit, config.sparsity.cost)


def unit_of(weight: Float[Tensor, "rows columns"]) -> float:
    """Return the power of two that brings the largest of the weights to between ½ and 1."""
    largest = float(weight.abs().max())
    return 2.0 ** -max(-120, math.frexp(largest)[1]) if largest > 0 else 1.0


def in_outputs(
    costs: Float64[Tensor, "*shape"], unit: float, cost: Cost
) -> Float64[Tensor, "*shape"]:
    """Return costs of scaled weights as those of the weights; relative ones have no unit.

    Raises:
        NumericalError: one is not finite.
    """
    costs = costs if cost is Cost.relative else costs / unit**2
    if bad := int((~costs.isfinite()).count_nonzero()):
        raise NumericalError(
            f"{bad} of {costs.numel()} costs of widths or sparsities are not finite: weights, "
            "activations or Fisher information are too large"
        )
    return costs


def read_weight(
    linear: LinearView, hessian: Hessian, config: Config
) -> Float[Tensor, "rows columns"]:
    """Return a copy of a weight in float32, without what `recipe.dead_channels` takes away."""
    weight = linear.read_weight()
    if config.recipe.dead_channels is DeadChannels.zero:
        weight.masked_fill_(hessian.dead, 0)
    return weight


def weigh_rows(
    weight: Float[Tensor, "rows columns"],
    fisher: Float[Tensor, "rows"] | None,
    hessian: Hessian,
    cost: Cost,
) -> Float[Tensor, "rows"]:
    """Return what a squared error of each output costs; relative to the scaled weight's energy."""
    if cost is Cost.fisher:
        if fisher is None:
            raise ValueError("cost=fisher needs Fisher information, which was not measured")
        return fisher.to(weight)
    ones = weight.new_ones(len(weight))
    if cost is Cost.distortion:
        return ones
    scaled = weight * unit_of(weight)
    return ones / (scaled @ hessian.matrix * scaled).sum().clamp(min=1e-30)
