"""Spend what a run may spend on its linears: bits for their groups, and weights that are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation, Scope
from mi_experiments.method.allocation import allocate_bits, allocate_kept
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.pruning_costs import keep_parts, possible_parts
from mi_experiments.planning.costs import GroupCosts
from mi_experiments.planning.site_costs import LinearCosts


def allocate_pruning(linears: Sequence[LinearCosts], config: Config) -> dict[str, Sparsity]:
    """Choose how much of each linear is pruned, within the total of the model.

    A linear without a cost, because it is not measured, gets the average.
    """
    chosen = dict.fromkeys((linear.name for linear in linears), config.sparsity.average)
    members = [linear for linear in linears if linear.pruning is not None]
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
    linears: Sequence[LinearCosts], config: Config
) -> dict[str, Int[Tensor, "groups"]]:
    """Choose every group's width within the budget of its linear, its site or the model.

    What is tied is one to the allocation: its cost and its size are the sums of its members'. A
    linear without costs, because it is not measured, gets the largest width within the average.
    """
    wbits = config.wbits
    largest = max(width for width in wbits.candidate_widths() if width <= wbits.average)
    chosen: dict[str, Int[Tensor, "groups"]] = {}
    if wbits.allocation is Allocation.mixed:
        measured = [linear for linear in linears if linear.group_costs is not None]
        budgets: dict[object, list[LinearCosts]] = {}
        for tied in tie(measured) if wbits.tied else measured:
            budgets.setdefault(budget_name(tied.name, tied.site, config), []).append(tied)
        for members in budgets.values():
            chosen |= allocate_budget(members, config)
        if wbits.tied:
            chosen = {linear.name: chosen[linear.site] for linear in measured}
    for linear in linears:
        groups = int(linear.channel_group.max()) + 1
        chosen.setdefault(linear.name, torch.full((groups,), largest))
    return chosen


def tie(linears: Sequence[LinearCosts]) -> list[LinearCosts]:
    """Make one of all linears of each site, by the name of the site; their groups are the same."""
    sites: dict[str, LinearCosts] = {}
    for linear in linears:
        before, now = sites.get(linear.site), linear.group_costs
        if before is not None and before.group_costs is not None and now is not None:
            earlier = before.group_costs
            now = GroupCosts(earlier.costs + now.costs, earlier.sizes + now.sizes)
        sites[linear.site] = replace(linear, name=linear.site, group_costs=now)
    return list(sites.values())


def budget_name(name: str, site: str, config: Config) -> object:
    """Name the budget of bits that a linear draws from."""
    return {Scope.linear: name, Scope.site: site, Scope.model: None}[config.bit_scope]


def allocate_budget(members: list[LinearCosts], config: Config) -> Mapping[str, Tensor]:
    """Spend one budget over the groups of all linears that share it."""
    measured = [member.group_costs for member in members if member.group_costs is not None]
    widths = allocate_bits(
        torch.cat([linear.costs for linear in measured]),
        torch.cat([linear.sizes for linear in measured]),
        config.wbits.candidate_widths(),
        config.wbits.average,
    )
    parts = torch.split(widths, [len(linear.sizes) for linear in measured])
    return {member.name: part for member, part in zip(members, parts, strict=True)}
