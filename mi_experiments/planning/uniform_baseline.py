"""The uniform alternative to a mixed plan: what the same budget buys without a measurement."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from mi_experiments.config.config import Config
from mi_experiments.method.grid import scale_groups
from mi_experiments.method.grouping import group_sizes
from mi_experiments.planning.budgets import budget_name
from mi_experiments.planning.plan import LinearPlan, Plan


def uniform_alternative(plan: Plan, config: Config) -> Plan:
    """Return the plan that spends the same budget evenly, whatever was measured.

    Every linear has as many groups as in the mixed plan, of contiguous channels, so that it stores
    as many scales and the same index. Where the requested average is a width, all groups have it.
    Otherwise the budget is what the mixed plan really spends: the first groups of each linear have
    the width above its average and the others the one below, as many as the linear's even share
    pays; what a linear leaves goes to the next one of the same scope. With one group a linear that
    means whole linears.

    Args:
        plan: mixed.
        config: the config of the run.

    Returns:
        A plan with the same linears, sparsity and requested average.
    """
    members = {
        name: budget_name(name, linear.site, config) for name, linear in plan.linears.items()
    }
    averages = scope_averages(plan, members, config)
    spare: dict[object, Fraction] = {}
    linears: dict[str, LinearPlan] = {}
    for name, linear in plan.linears.items():
        scope, average = members[name], averages[members[name]]
        low = max(width for width in config.wbits.candidate_widths() if width <= average)
        above = [width for width in config.wbits.candidate_widths() if width > average]
        high = min(above, default=low)
        budget = average * linear.rows * linear.columns + spare.get(scope, Fraction(0))
        groups = int(linear.channel_group.max()) + 1
        multiple = config.n_groups.multiple
        unit = group_unit(linear.columns, groups, multiple)
        raised = channels_above(budget, linear, low, high, unit)
        spare[scope] = budget - linear.rows * (low * linear.columns + (high - low) * raised)
        group = contiguous_groups(linear.columns, raised, groups, multiple)
        bits = torch.full((linear.columns,), low, dtype=torch.uint8)
        bits[:raised] = high
        linears[name] = replace(
            linear,
            channel_group=group,
            bits=bits,
            scale_group=scale_groups(group, config.wbits.group_size),
        )
    # Groups that no token has a part in are not stable or unstable.
    information = {site: replace(i, stability=None) for site, i in plan.information.items()}
    return replace(plan, linears=linears, information=information)


def scope_averages(
    plan: Plan, members: Mapping[str, object], config: Config
) -> dict[object, Fraction]:
    """Return the average width that each budget pays for."""
    if plan.requested in config.wbits.candidate_widths():
        return dict.fromkeys(members.values(), Fraction(plan.requested))
    spent: dict[object, int] = {}
    weights: dict[object, int] = {}
    for name, linear in plan.linears.items():
        scope = members[name]
        bits = linear.rows * int(linear.bits.sum(dtype=torch.int64))
        spent[scope] = spent.get(scope, 0) + bits
        weights[scope] = weights.get(scope, 0) + linear.rows * linear.columns
    return {scope: Fraction(spent[scope], weights[scope]) for scope in spent}


def group_unit(columns: int, groups: int, multiple: int) -> int:
    """Return of how many channels groups are made; of all of them, if there is one group."""
    if groups == 1:
        return columns
    return multiple if columns >= groups * multiple else 1


def channels_above(budget: Fraction, linear: LinearPlan, low: int, high: int, unit: int) -> int:
    """Return how many channels of a linear a budget of bits can give the width above."""
    if high == low:
        return 0
    extra = budget - low * linear.rows * linear.columns
    paid = int(extra / ((high - low) * linear.rows)) if extra > 0 else 0
    return linear.columns if paid >= linear.columns else paid // unit * unit


def contiguous_groups(
    columns: int, border: int, groups: int, multiple: int
) -> Int[Tensor, "columns"]:
    """Return groups of contiguous channels, as equal as they can be with that border."""
    sizes = group_sizes(columns, groups, multiple)
    if 0 < border < columns:
        first = min(max(round(groups * border / columns), 1), groups - 1)
        sizes = group_sizes(border, first, multiple)
        sizes += group_sizes(columns - border, groups - first, multiple)
    return torch.arange(groups, dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
