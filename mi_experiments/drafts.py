"""What is known of a site before the budget is spent: its groups, and what each width would cost.

Each site's Hessian is measured once for all linears that read it, its channels are grouped, and
every group is priced at every width. Drafts of finished blocks are committed, so that a killed run
does not measure them again.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mi_experiments.config import Config
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.sites import Site
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.grouping import Grouping, group_channels
from mi_experiments.method.hessian import Factor, Hessian, factorize, sweep_order
from mi_experiments.method.information import (
    InformationSummary,
    measure_information,
    noise_floor,
    summarize,
)
from mi_experiments.method.pruning import (
    Sparsity,
    choose_pruned,
    possible_parts,
    pruning_costs,
)
from mi_experiments.method.stability import split_half_stability
from mi_experiments.method_config import UNQUANTIZED, Allocation, Cost, DeadChannels, OnSingular
from mi_experiments.shortage import give_back

UNMEASURED = (Grouping.contiguous, Grouping.random)
"""Groupings that need no activations."""


@dataclass(frozen=True)
class GroupCosts:
    """Price list of one linear: the cost of each group at each width, and its number of weights."""

    costs: Float[Tensor, "groups widths"]
    sizes: Int[Tensor, "groups"]


@dataclass(frozen=True)
class DraftLinear:
    """A linear whose groups are known and whose widths and sparsity are still to be chosen.

    Attributes:
        name: of the linear.
        block: index of its block.
        site: name of its site.
        rows: output dimension.
        channel_group: group of each channel.
        prices: of each group at each width; None if there is nothing to choose.
        pruning: what is lost for each number of 128ths that may be kept; None likewise.
    """

    name: str
    block: int
    site: str
    rows: int
    channel_group: Int[Tensor, "columns"]
    prices: GroupCosts | None
    pruning: Float64[Tensor, "choices"] | None = None


@dataclass(frozen=True)
class Draft:
    """The drafts of one block.

    Attributes:
        linears: in execution order.
        information: by site, where it was measured.
    """

    linears: list[DraftLinear]
    information: dict[str, InformationSummary]

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata that hold everything."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for index, linear in enumerate(self.linears):
            tensors[f"{index}.channel_group"] = linear.channel_group.clone()
            if linear.prices is not None:
                tensors[f"{index}.costs"] = linear.prices.costs
                tensors[f"{index}.sizes"] = linear.prices.sizes
            if linear.pruning is not None:
                tensors[f"{index}.pruning"] = linear.pruning
            rows.append([linear.name, linear.block, linear.site, linear.rows])
        information = {site: dataclasses.asdict(item) for site, item in self.information.items()}
        return tensors, {"draft": json.dumps({"linears": rows, "information": information})}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "Draft":
        """Return what `stored` gave."""
        linears = []
        rest = json.loads(metadata["draft"])
        for index, (name, block, site, rows) in enumerate(rest["linears"]):
            prices = None
            if f"{index}.costs" in tensors:
                prices = GroupCosts(tensors[f"{index}.costs"], tensors[f"{index}.sizes"])
            group = tensors[f"{index}.channel_group"]
            pruning = tensors.get(f"{index}.pruning")
            linears.append(DraftLinear(name, block, site, rows, group, prices, pruning))
        return cls(linears, {s: InformationSummary(**i) for s, i in rest["information"].items()})


def draft_site(
    block: Block,
    site: Site,
    hessian: Hessian | None,
    fisher: Mapping[str, Float[Tensor, "_"]],
    config: Config,
) -> tuple[list[DraftLinear], InformationSummary | None]:
    """Group a site's channels and price every group of its linears at every width."""
    groups = config.n_groups
    factor = matrix = summary = None
    if hessian is not None:
        # What this factor is used for can bear more damping; the sweep that skips has its own.
        escalate = config.recipe.on_singular is not OnSingular.error
        factor = factorize(
            hessian,
            damping=config.recipe.damping,
            power=config.recipe.damping_power,
            escalate=escalate,
        )
        # Before the information, so that its own statistics have gone when that is measured.
        generator = torch.Generator().manual_seed(groups.seed)
        noise = noise_floor(hessian.sample, groups.estimator, generator)
        give_back(hessian.matrix.nbytes)
        matrix = measure_information(hessian, groups.estimator)
        summary = summarize(matrix, noise, factor, groups.estimator)
    # An expert without tokens that is to stay as it is has nothing to be grouped by.
    measured = hessian is not None or groups.grouping in UNMEASURED
    energy = sum_energy(site) if hessian is not None else None
    channel_group = group_channels(
        groups.grouping if measured else Grouping.contiguous,
        groups.count,
        site.columns,
        hessian=hessian,
        factor=factor,
        information=matrix,
        weights_energy=energy,
        seed=groups.seed,
        multiple=groups.multiple,
    )
    if hessian is not None and summary is not None:
        del matrix
        stability = split_half_stability(
            groups.grouping,
            groups.count,
            hessian.sample,
            estimator=groups.estimator,
            damping=config.recipe.damping,
            weights_energy=energy,
            seed=groups.seed,
            multiple=groups.multiple,
        )
        summary = dataclasses.replace(summary, stability=stability)
    name = f"{block.name}.{site.name}"
    mixed = config.wbits.allocation is Allocation.mixed
    drafts = []
    for linear in site.linears:
        prices = pruning = None
        if (mixed or config.sparsity.allocated) and hessian is not None and factor is not None:
            weight = linear.read_weight()
            if config.recipe.dead_channels is DeadChannels.zero:
                weight.masked_fill_(hessian.dead, 0)
            loss = fisher.get(linear.name)
            if mixed:
                prices = price_groups(weight, loss, channel_group, hessian, factor, config)
            if config.sparsity.allocated:
                pruning = price_pruning(weight, loss, hessian, factor, config)
        group = channel_group.cpu()
        drafts.append(
            DraftLinear(linear.name, block.index, name, linear.rows, group, prices, pruning)
        )
    return drafts, summary


def sum_energy(site: Site) -> Float[Tensor, "columns"]:
    """Return ‖W_j‖² of each channel, summed over the site's linears."""
    return torch.stack([linear.read_weight().square().sum(0) for linear in site.linears]).sum(0)


def price_groups(
    weight: Float[Tensor, "rows columns"],
    loss: Float[Tensor, "rows"] | None,
    channel_group: Int[Tensor, "columns"],
    hessian: Hessian,
    factor: Factor,
    config: Config,
) -> GroupCosts:
    """Price each group at each width by the output error that its grids, really fitted, would make.

    The price is Σ_j [H'⁻¹]_jj⁻¹ Σ_i f_i (Q_b(W_ij) − W_ij)² over the group's channels j and the
    rows i that survive pruning: the error that remains after the other channels have compensated
    (GPTQ, arXiv:2210.17323, equation 2). `loss` f_i is 1, or with `cost=fisher` the Fisher
    information of the model's loss about output i. Where sparsity is allocated too, the rows that
    survive are those of its average: how much this linear will be pruned is not known yet.
    """
    saliency = 1 / factor.inverse_diagonal()
    felt = weigh_rows(weight, loss, hessian, config.wbits.cost)
    sparsity = sparsity_of(config)
    pruned = choose_pruned(weight.square() * saliency, sparsity) if not sparsity.is_dense else None
    groups = int(channel_group.max()) + 1
    wbits = config.wbits
    scale_group = scale_groups(channel_group, wbits.group_size)
    columns = []
    for width in wbits.candidate_widths():
        bits = torch.full_like(channel_group, width, dtype=torch.uint8)
        error = torch.zeros_like(weight)
        if width < UNQUANTIZED:
            grid = fit_grid(
                weight,
                bits,
                scale_group,
                symmetric=wbits.symmetric,
                clip_search=config.recipe.clip_search,
                scale_bits=config.recipe.scale_bits,
                pruned=pruned,
            )
            error = grid.quantize(weight) - weight
        if pruned is not None:
            error = error.masked_fill(pruned, 0)
        per_channel = (felt @ error.square()).double() * saliency
        columns.append(
            per_channel.new_zeros(groups).index_add_(0, channel_group.long(), per_channel)
        )
    costs = torch.stack(columns, dim=1)
    sizes = torch.bincount(channel_group.long(), minlength=groups) * weight.shape[0]
    return GroupCosts(costs.cpu(), sizes.cpu())


def price_pruning(
    weight: Float[Tensor, "rows columns"],
    loss: Float[Tensor, "rows"] | None,
    hessian: Hessian,
    factor: Factor,
    config: Config,
) -> Float64[Tensor, "choices"]:
    """Price what a linear may keep by the output error of pruning the rest.

    The price is the sum of f_i W_ij² / [H'⁻¹]_jj over the weights with the smallest W_ij² /
    [H'⁻¹]_jj of each mask block: the error that remains after the other channels have compensated
    (arXiv:2301.00774, section 3), one weight at a time. f_i is as in `price_groups`.
    """
    felt = weigh_rows(weight, loss, hessian, config.sparsity.cost)
    order = sweep_order(hessian.diagonal, config.recipe.order)
    score = (weight.square() / factor.inverse_diagonal())[:, order]
    kept = possible_parts(config.sparsity.ratio, config.sparsity.spread)
    return pruning_costs(score, felt, kept, config.sparsity.mask_block_of(weight.shape[1]))


def weigh_rows(
    weight: Float[Tensor, "rows columns"],
    loss: Float[Tensor, "rows"] | None,
    hessian: Hessian,
    cost: Cost,
) -> Float[Tensor, "rows"]:
    """Return what a squared error of each output costs."""
    if cost is Cost.fisher:
        if loss is None:
            raise ValueError("what the loss feels was not measured")
        return loss.to(weight)
    ones = weight.new_ones(len(weight))
    if cost is Cost.distortion:
        return ones
    return ones / (weight @ hessian.matrix * weight).sum().clamp(min=1e-30)


def sparsity_of(config: Config) -> Sparsity:
    """Return the sparsity that every linear gets, or that they get on average."""
    return Sparsity(config.sparsity.ratio, config.sparsity.n, config.sparsity.m)
