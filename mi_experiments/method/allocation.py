"""Give every group of channels a bit width, exactly within an average.

The problem is a multiple-choice knapsack: one width per group, smallest total cost, at most
⌊average · Σ size⌋ bits. Small problems (a linear, a site) are solved exactly by dynamic
programming over the bits spent. Large ones (the whole model, one group per channel) are solved
on the lower convex hulls of the costs, which is the Lagrangian relaxation, and repaired exactly
on the groups whose choice was closest: Sinha and Zoltners, Operations Research 27:503 (1979),
and Pisinger, European Journal of Operational Research 83:394 (1995).
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from mi_experiments.method.pruning_costs import PARTS

Costs = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

EXACT_GROUPS = 1024
"""Most groups that the dynamic programme takes: it is the only loop over groups."""

EXACT_CELLS = 2**26
"""Most states × groups × widths that the dynamic programme takes: about 0.1 s and 64 MiB."""

CORE_GROUPS = (128, 32, 8, 2)
"""Sizes of the core that is solved exactly after the relaxation; the first that fits is used."""

LARGEST_DENOMINATOR = 10**6
"""Denominators up to here are taken to be what a decimal average was meant to say."""


def allocate_bits(
    costs: Float64[Tensor, "groups widths"],
    sizes: Int64[Tensor, "groups"],
    widths: Sequence[int],
    average_bits: float,
) -> Int64[Tensor, "groups"]:
    """Choose the width of every group, at the smallest total cost that the budget allows.

    More bits can never hurt, so a cost above that of a smaller width is noise: costs are first
    replaced by their running minimum over the widths, which leaves the optimal total unchanged
    and lets every bit of the budget be spent. Afterwards no group can be raised to its next
    width within what is left over, and the total, of the costs so replaced, is never above that
    of the best uniform width. Between equal costs more bits win, then the earlier group.

    The result is optimal up to float64 rounding for at most `EXACT_GROUPS` groups and
    `EXACT_CELLS` states × groups × widths, where a state is one multiple of the greatest common
    divisor of all size · (width − smallest width). Beyond, it exceeds the optimum by less than
    the largest saving of a single step on the convex hull of a single group's costs, and is
    optimal where sizes are equal, widths consecutive and costs convex.

    Args:
        costs: what each width costs each group, in any additive unit; finite, not negative.
        sizes: number of weights in each group, positive.
        widths: allowed widths in bits, ascending.
        average_bits: bits per weight over all groups. A float stands for the fraction with a
            denominator up to 10⁶ that rounds to it (3.1 is 31/10), else for its shortest decimal.

    Returns:
        The chosen width of every group, in bits.

    Raises:
        ValueError: a cost is not finite or is negative, a size is not positive, the widths are
            not ascending, or the smallest width exceeds the average.
    """
    cost, size = costs.detach().cpu().numpy(), sizes.cpu().numpy()
    _check(cost, size, widths)
    cost = np.minimum.accumulate(cost, axis=1)
    spent = size[:, None] * np.asarray(widths, dtype=np.int64)
    capacity = floor(_as_fraction(average_bits) * int(size.sum()))
    if capacity < spent[:, 0].sum():
        raise ValueError(
            f"average_bits={average_bits} is below the smallest width {widths[0]}: it allows "
            f"{capacity} bits where {size.sum()} weights need at least {spent[:, 0].sum()}"
        )
    if capacity >= spent[:, -1].sum():
        choice = np.full(len(size), len(widths) - 1)
    elif _is_small(spent, capacity):
        choice = _solve_exactly(cost, spent, capacity)
    else:
        choice = _cheaper(
            cost,
            _fill(cost, spent, capacity, _solve_relaxed(cost, spent, capacity)),
            _fill(cost, spent, capacity, _largest_uniform(spent, capacity)),
        )
    return torch.tensor(widths, dtype=torch.int64)[torch.from_numpy(choice)].to(costs.device)


def allocate_kept(
    costs: Float64[Tensor, "linears choices"],
    weights: Int64[Tensor, "linears"],
    kept: Sequence[int],
    ratio: float,
) -> Int64[Tensor, "linears"]:
    """Choose how many 128ths of its weights every linear keeps, at the smallest total cost.

    It is the problem of `allocate_bits` with the 128ths in place of the bits, solved by it: at most
    128 · (1 − ratio) of them are kept on average, and no linear could keep one more.

    Args:
        costs: what is lost by each linear for each choice, in any additive unit.
        weights: number of weights of each linear.
        kept: the choices, ascending, from 1.
        ratio: the ratio of all weights, how many are pruned at least.

    Returns:
        128ths that each linear keeps.

    Raises:
        ValueError: see `allocate_bits`.
    """
    return allocate_bits(costs, weights, kept, float(PARTS * (1 - _as_fraction(ratio))))


def average_bits(widths: Int64[Tensor, "groups"], sizes: Int64[Tensor, "groups"]) -> Fraction:
    """Divide the bits of all codes by the number of weights, exactly."""
    return Fraction(int((widths * sizes).sum()), int(sizes.sum()))


def _check(cost: Costs, size: Integers, widths: Sequence[int]) -> None:
    """Refuse numbers that no allocation can be computed from, naming the first group at fault."""
    if cost.shape != (len(size), len(widths)) or cost.size == 0:
        raise ValueError(f"costs {cost.shape} for {len(size)} groups and {len(widths)} widths")
    if widths[0] < 1 or any(b <= a for a, b in pairwise(widths)):
        raise ValueError(f"widths must be positive and ascending, not {list(widths)}")
    wrong = np.argwhere(~np.isfinite(cost) | (cost < 0))
    if len(wrong):
        group, width = wrong[0]
        raise ValueError(f"group {group} costs {cost[group, width]} at {widths[width]} bits")
    if size.min() < 1:
        raise ValueError(f"group {size.argmin()} has {size.min()} weights")


def _as_fraction(average_bits: float) -> Fraction:
    """Read a float as the simple fraction that it was rounded from."""
    simple = Fraction(average_bits).limit_denominator(LARGEST_DENOMINATOR)
    return simple if float(simple) == average_bits else Fraction(str(float(average_bits)))


def _units(spent: Integers, capacity: int) -> tuple[Integers, int]:
    """Express bits beyond the smallest widths in their greatest common divisor."""
    steps = spent - spent[:, :1]
    unit = max(int(np.gcd.reduce(steps.ravel())), 1)
    room = min(capacity - int(spent[:, 0].sum()), int(steps[:, -1].sum()))
    return steps // unit, room // unit


def _is_small(spent: Integers, capacity: int) -> bool:
    """Decide whether the dynamic programme may be run."""
    _, room = _units(spent, capacity)
    return len(spent) <= EXACT_GROUPS and (room + 1) * spent.size <= EXACT_CELLS


def _solve_exactly(cost: Costs, spent: Integers, capacity: int) -> Integers:
    """Solve by dynamic programming: best[s] is the smallest cost that spends exactly s units.

    The last of the cheapest states is taken. Raising a group never raises a sum of costs, rounding
    included, so a state that left room for it would not have been the last.
    """
    steps, room = _units(spent, capacity)
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(cost), room + 1), dtype=np.uint8)
    for group in range(len(cost)):
        previous, best = best, best + cost[group, 0]
        for width in range(1, cost.shape[1]):
            step = steps[group, width]
            if step > room:
                break
            total = previous[: room + 1 - step] + cost[group, width]
            better = total < best[step:]
            best[step:][better] = total[better]
            taken[group, step:][better] = width
    state = int(np.flatnonzero(best == best.min())[-1])
    choice = np.zeros(len(cost), dtype=np.int64)
    for group in reversed(range(len(cost))):
        choice[group] = taken[group, state]
        state -= int(steps[group, choice[group]])
    return choice


def _solve_relaxed(cost: Costs, spent: Integers, capacity: int) -> Integers:
    """Walk the convex hulls to the multiplier, then solve exactly around it.

    Taking hull steps in order of saving per bit solves the linear relaxation; the first step
    that does not fit is its only fractional group, and its saving per bit is the multiplier.
    """
    to, saving = _hull_steps(cost, spent)
    rank, group = np.nonzero(to >= 0)
    order = np.lexsort((group, rank, -saving[rank, group]))
    rank, group = rank[order], group[order]
    start = np.where(rank > 0, to[rank - 1, group], 0)
    bits = spent[group, to[rank, group]] - spent[group, start]
    fits = np.cumsum(bits) <= capacity - spent[:, 0].sum()
    choice = np.zeros(len(cost), dtype=np.int64)
    np.maximum.at(choice, group[fits], to[rank, group][fits])
    multiplier = saving[rank, group][np.count_nonzero(fits)]
    # Filled first, so that the core starts from, and cannot be worse than, the greedy choice.
    choice = _fill(cost, spent, capacity, choice)
    return _solve_core(cost, spent, capacity, choice, float(multiplier))


def _hull_steps(cost: Costs, spent: Integers) -> tuple[Integers, Costs]:
    """Find the steps along each group's lower convex hull, all groups at once.

    Returns:
        Per step and group, the width that the step leads to (−1 where the hull has ended) and
        its saving per bit, not increasing from step to step.
    """
    groups, widths = cost.shape
    rows, at = np.arange(groups), np.zeros(groups, dtype=np.int64)
    to = np.full((widths - 1, groups), -1, dtype=np.int64)
    saving = np.full((widths - 1, groups), np.inf)
    for rank in range(widths - 1):
        ahead = np.arange(widths) > at[:, None]
        bits = np.where(ahead, spent - spent[rows, at][:, None], 1)
        slope = np.where(ahead, (cost[rows, at][:, None] - cost) / bits, -np.inf)
        steepest = slope.argmax(axis=1)
        live = at < widths - 1
        to[rank, live], saving[rank] = steepest[live], slope[rows, steepest]
        at = np.where(live, steepest, at)
    # Rounding must not let a later step of a group come before an earlier one.
    return to, np.minimum.accumulate(saving, axis=0)


def _solve_core(
    cost: Costs, spent: Integers, capacity: int, choice: Integers, multiplier: float
) -> Integers:
    """Choose again, exactly, for the groups nearest to indifference at this multiplier."""
    reduced = cost + multiplier * spent
    slack = np.sort(reduced, axis=1)[:, 1] - reduced.min(axis=1)
    nearest = np.argsort(slack, kind="stable")
    for groups in CORE_GROUPS:
        core, rest = nearest[:groups], nearest[groups:]
        room = capacity - int(spent[rest, choice[rest]].sum())
        if _is_small(spent[core], room):
            solved = choice.copy()
            solved[core] = _solve_exactly(cost[core], spent[core], room)
            return solved
    return choice


def _fill(cost: Costs, spent: Integers, capacity: int, choice: Integers) -> Integers:
    """Raise groups to their next width, best saving per bit first, until none fits."""
    choice, rows = choice.copy(), np.arange(len(cost))
    last = cost.shape[1] - 1
    while True:
        left = capacity - spent[rows, choice].sum()
        following = np.minimum(choice + 1, last)
        bits = spent[rows, following] - spent[rows, choice]
        open_ = np.flatnonzero((choice < last) & (bits <= left))
        if not len(open_):
            return choice
        saving = (cost[rows, choice] - cost[rows, following])[open_] / bits[open_]
        order = open_[np.argsort(-saving, kind="stable")]
        choice[order[np.cumsum(bits[order]) <= left]] += 1


def _largest_uniform(spent: Integers, capacity: int) -> Integers:
    """Give every group the largest width that all of them can have."""
    return np.full(len(spent), np.flatnonzero(spent.sum(axis=0) <= capacity)[-1])


def _cheaper(cost: Costs, first: Integers, second: Integers) -> Integers:
    """Return the choice with the smaller total cost; the first if they are equal."""
    rows = np.arange(len(cost))
    return first if cost[rows, first].sum() <= cost[rows, second].sum() else second
