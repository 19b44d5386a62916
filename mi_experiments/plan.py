"""plan_compression: what every linear will get, and why.

One pass over the dense model: each site's Hessian is measured once for all linears that read it,
its channels are grouped, every group is priced at every width, and the budget is spent exactly.
A `Plan` is a value: groups and widths of every linear. Plans that depend on no activation
(uniform widths on contiguous or random groups) need no pass.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.config import UNQUANTIZED, Allocation, Config, Cost, NGroupsConfig, Scope
from mi_experiments.errors import InputError
from mi_experiments.llm.blocks import Block, walk_blocks
from mi_experiments.llm.sites import Site
from mi_experiments.measure import measure_hessians, measure_loss, site_context
from mi_experiments.method.allocation import allocate_bits
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.grouping import Grouping, group_channels
from mi_experiments.method.hessian import Factor, Hessian, factorize
from mi_experiments.method.information import (
    InformationSummary,
    measure_information,
    noise_floor,
    summarize,
)
from mi_experiments.method.pruning import Sparsity, choose_pruned
from mi_experiments.record import write_atomically

log = logging.getLogger(__name__)

UNMEASURED = (Grouping.contiguous, Grouping.random)
"""Groupings that need no activations."""


@dataclass(frozen=True)
class LinearPlan:
    """Groups and widths of one weight matrix.

    Attributes:
        block: index of the decoder block.
        site: name of the site, unique in the model.
        rows: output dimension.
        columns: input dimension.
        channel_group: group of each channel.
        bits: width of each channel; 16 is not quantized.
        scale_group: channels with one scale and zero point per row.
    """

    block: int
    site: str
    rows: int
    columns: int
    channel_group: Int[Tensor, "columns"]
    bits: UInt8[Tensor, "columns"]
    scale_group: Int[Tensor, "columns"]


@dataclass(frozen=True)
class Plan:
    """What every linear gets.

    Attributes:
        linears: by name, in the order of the model.
        information: by site, where it was measured.
        sparsity: of every linear.
        requested: average bits asked for.
    """

    linears: dict[str, LinearPlan]
    information: dict[str, InformationSummary]
    sparsity: Sparsity
    requested: float

    def save(self, path: Path) -> None:
        """Write groups and widths as safetensors, atomically."""
        tensors = {}
        for name, linear in self.linears.items():
            tensors[f"{name}.bits"] = linear.bits
            tensors[f"{name}.channel_group"] = linear.channel_group.clone()
        write_atomically(path, to_safetensors(tensors, {"requested": repr(self.requested)}))

    def fingerprint(self) -> str:
        """SHA-256 of all groups and widths."""
        digest = hashlib.sha256()
        for name, linear in self.linears.items():
            shape = [name, linear.rows, linear.columns, repr(self.sparsity)]
            digest.update(json.dumps(shape).encode())
            for tensor in (linear.bits, linear.channel_group, linear.scale_group):
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class GroupCosts:
    """Price list of one linear: the cost of each group at each width, and its number of weights."""

    costs: Float[Tensor, "groups widths"]
    sizes: Int[Tensor, "groups"]


@dataclass(frozen=True)
class DraftLinear:
    """A linear whose groups are known and whose widths are still to be chosen."""

    name: str
    block: int
    site: str
    rows: int
    channel_group: Int[Tensor, "columns"]
    prices: GroupCosts | None


def needs_activations(config: Config) -> bool:
    """Say whether the plan depends on what the channels carry."""
    measured = config.n_groups.grouping not in UNMEASURED and config.n_groups.count > 1
    return measured or config.wbits.allocation is Allocation.mixed


def plan_compression(
    model: PreTrainedModel,
    calibration: Int[Tensor, "nsamples seqlen"],
    config: Config,
    on_block: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Group the channels of every site and allocate the bit budget.

    Args:
        model: the dense model; not changed.
        calibration: token ids.
        config: of the run.
        on_block: called with the name of each block when its sites are priced, for progress.

    Returns:
        Groups and widths of every linear; the average width is at most the budget, exactly.

    Raises:
        InputError: more groups than channels.
        NumericalError: activations that are not finite, or a Hessian that cannot be factorized.
    """
    fisher = measure_loss(model, calibration, config)
    drafts: list[DraftLinear] = []
    information: dict[str, InformationSummary] = {}
    activations = needs_activations(config)
    sequences = calibration if activations else calibration[:1, :2]
    walk = walk_blocks(
        model,
        sequences,
        batch_size=config.dataset.batch_size,
        ignore=tuple(config.model.ignore),
        path=config.model.blocks,
    )
    for block in walk:
        for site in block.sites:
            check_count(site.columns, f"{block.name}.{site.name}", config.n_groups)
        hessians = measure_hessians(block, block.sites, config) if activations else {}
        for site in block.sites:
            with site_context(block, site):
                site_drafts, summary = draft_site(
                    block, site, hessians.pop(site.name, None), fisher, config
                )
            drafts += site_drafts
            if summary is not None:
                information[site_drafts[0].site] = summary
        on_block(block.name)
    linears = allocate(drafts, config)
    return Plan(linears, information, sparsity_of(config), config.wbits.average)


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
        factor = factorize(hessian, damping=config.recipe.damping)
        matrix = measure_information(hessian, groups.estimator)
        generator = torch.Generator().manual_seed(groups.seed)
        noise = noise_floor(hessian.sample, groups.estimator, generator)
        summary = summarize(matrix, noise, factor, groups.estimator)
    channel_group = group_channels(
        groups.grouping,
        groups.count,
        site.columns,
        hessian=hessian,
        factor=factor,
        information=matrix,
        weights_energy=sum_energy(site) if hessian is not None else None,
        seed=groups.seed,
        multiple=groups.multiple,
    )
    name = f"{block.name}.{site.name}"
    mixed = config.wbits.allocation is Allocation.mixed
    drafts = []
    for linear in site.linears:
        prices = None
        if mixed and hessian is not None and factor is not None:
            weight = linear.read_weight()
            loss = fisher.get(linear.name, weight.new_ones(linear.rows))
            prices = price_groups(weight, loss, channel_group, hessian, factor, config)
        drafts.append(
            DraftLinear(linear.name, block.index, name, linear.rows, channel_group.cpu(), prices)
        )
    return drafts, summary


def sum_energy(site: Site) -> Float[Tensor, "columns"]:
    """Return ‖W_j‖² of each channel, summed over the site's linears."""
    return torch.stack([linear.read_weight().square().sum(0) for linear in site.linears]).sum(0)


def price_groups(
    weight: Float[Tensor, "rows columns"],
    loss: Float[Tensor, "rows"],
    channel_group: Int[Tensor, "columns"],
    hessian: Hessian,
    factor: Factor,
    config: Config,
) -> GroupCosts:
    """Price each group at each width by the output error that its grids, really fitted, would make.

    The price is Σ_j [H'⁻¹]_jj⁻¹ Σ_i f_i (Q_b(W_ij) − W_ij)² over the group's channels j and the
    rows i that survive pruning: the error that remains after the other channels have compensated
    (GPTQ, arXiv:2210.17323, equation 2). `loss` f_i is 1, or with `cost=fisher` the Fisher
    information of the model's loss about output i.
    """
    saliency = 1 / factor.inverse_diagonal()
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
                clip_search=wbits.clip_search,
                pruned=pruned,
            )
            error = grid.quantize(weight) - weight
        if pruned is not None:
            error = error.masked_fill(pruned, 0)
        per_channel = (loss @ error.square()).double() * saliency
        columns.append(
            per_channel.new_zeros(groups).index_add_(0, channel_group.long(), per_channel)
        )
    costs = torch.stack(columns, dim=1)
    if wbits.cost is Cost.relative:
        costs = costs / (weight @ hessian.matrix * weight).sum().double().clamp(min=1e-30)
    sizes = torch.bincount(channel_group.long(), minlength=groups) * weight.shape[0]
    return GroupCosts(costs.cpu(), sizes.cpu())


def allocate(drafts: Iterable[DraftLinear], config: Config) -> dict[str, LinearPlan]:
    """Choose every group's width within the budget of its linear, its site or the model."""
    drafts = list(drafts)
    wbits = config.wbits
    chosen: dict[str, Int[Tensor, "groups"]] = {}
    if wbits.allocation is Allocation.mixed:
        shares: dict[object, list[DraftLinear]] = {}
        for draft in drafts:
            shares.setdefault(share(draft, wbits.scope), []).append(draft)
        for members in shares.values():
            chosen |= allocate_share(members, config)
    else:
        width = int(wbits.average)
        for draft in drafts:
            groups = int(draft.channel_group.max()) + 1
            chosen[draft.name] = torch.full((groups,), width)
    return {draft.name: finish(draft, chosen[draft.name], config) for draft in drafts}


def share(draft: DraftLinear, scope: Scope) -> object:
    """Name the budget that a linear draws from."""
    return {Scope.linear: draft.name, Scope.site: draft.site, Scope.model: None}[scope]


def allocate_share(members: list[DraftLinear], config: Config) -> Mapping[str, Tensor]:
    """Spend one budget over the groups of all linears that share it."""
    prices = [member.prices for member in members if member.prices is not None]
    widths = allocate_bits(
        torch.cat([price.costs for price in prices]),
        torch.cat([price.sizes for price in prices]),
        config.wbits.candidate_widths(),
        config.wbits.average,
    )
    parts = torch.split(widths, [len(price.sizes) for price in prices])
    return {member.name: part for member, part in zip(members, parts, strict=True)}


def finish(draft: DraftLinear, widths: Int[Tensor, "groups"], config: Config) -> LinearPlan:
    """Spread the groups' widths over the channels."""
    group = draft.channel_group
    return LinearPlan(
        block=draft.block,
        site=draft.site,
        rows=draft.rows,
        columns=len(group),
        channel_group=group,
        bits=widths[group.long()].to(torch.uint8),
        scale_group=scale_groups(group, config.wbits.group_size),
    )


def sparsity_of(config: Config) -> Sparsity:
    """Return the sparsity that every linear gets."""
    return Sparsity(config.sparsity.ratio, config.sparsity.n, config.sparsity.m)


def check_count(columns: int, name: str, n_groups: NGroupsConfig) -> None:
    """Refuse more groups than channels."""
    if n_groups.count > columns:
        raise InputError(
            f"n_groups.count={n_groups.count} is more than the {columns} channels of {name}: "
            f"choose at most {columns}"
        )
