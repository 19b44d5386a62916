"""Spend what a run may spend on its linears: bits for their groups, and weights that are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from mi_experiments.config.config import Config, sparsity_of
from mi_experiments.config.method import Allocation, Scope
from mi_experiments.method.allocation import allocate_bits, allocate_kept
from mi_experiments.method.pruning import Sparsity, keep_parts, possible_parts
from mi_experiments.planning.costs import GroupCosts
from mi_experiments.planning.site_costs import DraftLinear


def allocate_pruning(drafts: Sequence[DraftLinear], config: Config) -> dict[str, Sparsity]:
    """Choose how much of each linear is pruned, within the total of the model.

    A linear without a price, because it is not measured, gets the average.
    """
    chosen = dict.fromkeys((draft.name for draft in drafts), sparsity_of(config))
    members = [draft for draft in drafts if draft.pruning is not None]
    if members:
        kept = allocate_kept(
            torch.stack([member.pruning for member in members if member.pruning is not None]),
            torch.tensor([member.rows * len(member.channel_group) for member in members]),
            possible_parts(config.sparsity.ratio, config.sparsity.spread),
            config.sparsity.ratio,
        )
        for member, parts in zip(members, kept.tolist(), strict=True):
            chosen[member.name] = keep_parts(parts)
    return chosen


def allocate_widths(
    drafts: Sequence[DraftLinear], config: Config
) -> dict[str, Int[Tensor, "groups"]]:
    """Choose every group's width within the budget of its linear, its site or the model.

    What is tied is one to the allocation: its cost and its size are the sums of its members'.
    """
    wbits = config.wbits
    chosen: dict[str, Int[Tensor, "groups"]] = {}
    if wbits.allocation is Allocation.mixed:
        priced = [draft for draft in drafts if draft.prices is not None]
        shares: dict[object, list[DraftLinear]] = {}
        for tied in tie(priced) if wbits.tied else priced:
            shares.setdefault(share(tied.name, tied.site, config), []).append(tied)
        for members in shares.values():
            chosen |= allocate_share(members, config)
        if wbits.tied:
            chosen = {draft.name: chosen[draft.site] for draft in priced}
    for draft in drafts:
        groups = int(draft.channel_group.max()) + 1
        chosen.setdefault(draft.name, torch.full((groups,), int(wbits.average)))
    return chosen


def tie(drafts: Sequence[DraftLinear]) -> list[DraftLinear]:
    """Make one of all linears of each site, by the name of the site; their groups are the same."""
    sites: dict[str, DraftLinear] = {}
    for draft in drafts:
        before, prices = sites.get(draft.site), draft.prices
        if before is not None and before.prices is not None and prices is not None:
            costs, sizes = before.prices.costs + prices.costs, before.prices.sizes + prices.sizes
            prices = GroupCosts(costs, sizes)
        sites[draft.site] = replace(draft, name=draft.site, prices=prices)
    return list(sites.values())


def share(name: str, site: str, config: Config) -> object:
    """Name the budget of bits that a linear draws from."""
    return {Scope.linear: name, Scope.site: site, Scope.model: None}[config.bit_scope]


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
