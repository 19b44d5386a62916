"""Allocation equals brute force, spends the budget, and does not loop over channels."""

import sys
from fractions import Fraction
from itertools import pairwise, product
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.method import allocation
from mi_experiments.method.allocation import allocate_bits, average_bits

COSTS = st.integers(0, 50)
WIDTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def problems(draw, max_groups=5, cost=COSTS):
    """Draw costs that are neither monotone nor convex, unequal sizes, and a feasible average."""
    widths = draw(WIDTHS)
    groups = draw(st.integers(1, max_groups))
    row = st.lists(cost, min_size=len(widths), max_size=len(widths))
    costs = draw(st.lists(row, min_size=groups, max_size=groups))
    sizes = draw(st.lists(st.integers(1, 40), min_size=groups, max_size=groups))
    average = draw(st.integers(100 * widths[0], 100 * widths[-1] + 50)) / 100
    return (
        torch.tensor(costs, dtype=torch.float64),
        torch.tensor(sizes, dtype=torch.int64),
        widths,
        average,
    )


def running_minimum(costs):
    return torch.cummin(costs, dim=1).values


def total(costs, widths, chosen):
    at = torch.tensor([widths.index(int(b)) for b in chosen])
    return float(costs.gather(1, at[:, None]).sum())


def brute_force(costs, sizes, widths, average):
    budget = Fraction(str(average)) * int(sizes.sum())
    size = sizes.tolist()
    return min(
        total(costs, widths, choice)
        for choice in product(widths, repeat=len(costs))
        if sum(s * b for s, b in zip(size, choice, strict=True)) <= budget
    )


def assert_budget_is_spent(chosen, sizes, widths, average):
    left = Fraction(str(average)) * int(sizes.sum()) - int((chosen * sizes).sum())
    assert left >= 0
    for bits, size in zip(chosen.tolist(), sizes.tolist(), strict=True):
        if bits < widths[-1]:
            assert (widths[widths.index(bits) + 1] - bits) * size > left


@given(problems())
@settings(max_examples=200, deadline=None)
def test_the_total_equals_brute_force_over_every_choice(problem):
    costs, sizes, widths, average = problem
    chosen = allocate_bits(costs, sizes, widths, average)
    assert total(running_minimum(costs), widths, chosen) == brute_force(*problem)
    assert_budget_is_spent(chosen, sizes, widths, average)


@given(problems(max_groups=12, cost=st.integers(0, 10_000)))
@settings(max_examples=100, deadline=None)
def test_never_worse_than_uniform_and_nothing_more_could_be_bought(problem):
    costs, sizes, widths, average = problem
    lowest = running_minimum(costs)
    uniform = max(b for b in widths if b <= average)
    limit = total(lowest, widths, [uniform] * len(sizes))
    for core in ((), (2,), (4,), None):
        chosen = allocate_around_a_core(costs, sizes, widths, average, core)
        assert_budget_is_spent(chosen, sizes, widths, average)
        cost = total(lowest, widths, chosen)
        assert cost <= limit * (1 + 1e-12)
        # Every core, and the exact solution, is at least as good as no core.
        limit = min(limit, cost) if core == () else limit


def allocate_around_a_core(costs, sizes, widths, average, core):
    """Allocate by the relaxation and cores of the given sizes; exactly if there are none given."""
    small, refusals = allocation._is_small, iter([] if core is None else [False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "CORE_GROUPS", core)
        patch.setattr(allocation, "_is_small", lambda *a: next(refusals, True) and small(*a))
        return allocate_bits(costs, sizes, widths, average)


def test_a_core_is_no_worse_than_the_greedy_choice_that_it_starts_from():
    costs = torch.tensor([[23, 23, 12], [4, 4, 4], [29, 10, 6]], dtype=torch.float64)
    problem = costs, torch.tensor([10, 2, 9]), [3, 4, 6], 93 / 21
    without = allocate_around_a_core(*problem, core=())
    around = allocate_around_a_core(*problem, core=(2,))
    assert total(costs, [3, 4, 6], around) <= total(costs, [3, 4, 6], without) == 33


def test_what_a_core_leaves_over_is_spent():
    costs = [[10, 10, 3], [26, 19, 0], [21, 11, 11], [25, 12, 12]]
    problem = torch.tensor([15, 15, 11, 9]), [5, 6, 7], 5.96
    chosen = allocate_around_a_core(torch.tensor(costs, dtype=torch.float64), *problem, core=(2,))
    assert_budget_is_spent(chosen, *problem)


def largest_hull_step(cost, widths):
    """Return the largest saving of one step on a lower convex hull, found by brute force."""
    points = [
        b
        for b in range(len(widths))
        if not any(
            (cost[c] - cost[b]) * (widths[b] - widths[a])
            < (cost[b] - cost[a]) * (widths[c] - widths[b])
            for a in range(b)
            for c in range(b + 1, len(widths))
        )
    ]
    return max((float(cost[a] - cost[b]) for a, b in pairwise(points)), default=0.0)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_the_relaxation_alone_stays_within_one_hull_step_of_the_optimum(problem):
    costs, sizes, widths, average = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "EXACT_GROUPS", 0)
        chosen = allocate_bits(costs, sizes, widths, average)
    lowest = running_minimum(costs)
    bound = max(largest_hull_step(row, widths) for row in lowest)
    assert total(lowest, widths, chosen) <= brute_force(*problem) + bound


@given(problems())
@settings(max_examples=100, deadline=None)
def test_a_core_of_all_groups_makes_the_relaxation_exact(problem):
    chosen = allocate_around_a_core(*problem, core=allocation.CORE_GROUPS)
    assert total(running_minimum(problem[0]), problem[2], chosen) == brute_force(*problem)


def convex_problem(groups, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(groups, generator=generator, dtype=torch.float64).mul(8).exp()
    costs = energy[:, None] * 4.0 ** -torch.tensor(widths, dtype=torch.float64)
    return costs, torch.full((groups,), 96, dtype=torch.int64)


def test_the_relaxation_is_optimal_for_equal_sizes_and_convex_costs(monkeypatch):
    widths = [2, 3, 4, 5]
    costs, sizes = convex_problem(60, widths)
    exact = allocate_bits(costs, sizes, widths, 3.1)
    monkeypatch.setattr(allocation, "EXACT_GROUPS", 0)
    relaxed = allocate_bits(costs, sizes, widths, 3.1)
    assert torch.equal(exact, relaxed)
    assert average_bits(relaxed, sizes) == Fraction(31, 10)


def dual_bound(costs, spent, capacity):
    """Return the greatest lower bound that a multiplier gives on the total, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        multiplier = (low + high) / 2
        choice = (costs + multiplier * spent).argmin(dim=1, keepdim=True)
        if spent.gather(1, choice).sum() > capacity:
            low = multiplier
        else:
            high = multiplier
    return float((costs + high * spent).amin(dim=1).sum() - high * capacity)


def test_the_core_brings_many_unequal_groups_within_a_ten_thousandth_of_the_dual_bound(monkeypatch):
    widths, generator = [2, 4, 8], torch.Generator().manual_seed(2)
    costs, _ = convex_problem(2000, widths)
    sizes = 32 * torch.randint(1, 60, (2000,), generator=generator)
    costs *= sizes[:, None] * torch.rand(costs.shape, generator=generator, dtype=torch.float64)
    lowest = running_minimum(costs)
    chosen = allocate_bits(costs, sizes, widths, 3.3)
    with_core = total(lowest, widths, chosen)
    assert_budget_is_spent(chosen, sizes, widths, 3.3)
    monkeypatch.setattr(allocation, "CORE_GROUPS", ())
    without_core = total(lowest, widths, allocate_bits(costs, sizes, widths, 3.3))
    spent = sizes[:, None].double() * torch.tensor(widths)
    bound = dual_bound(lowest, spent, floor(Fraction(33, 10) * int(sizes.sum())))
    assert bound <= with_core < without_core
    assert with_core <= bound * (1 + 1e-4)


def lines_run(function):
    """Count the lines that the module runs: a loop over channels runs some for each."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != allocation.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def test_no_loop_over_channels():
    widths = [2, 3, 4]
    counts = []
    for groups in (13_824, 2 * 13_824):
        costs, sizes = convex_problem(groups, widths)
        counts.append(lines_run(lambda c=costs, s=sizes: allocate_bits(c, s, widths, 3.25)))
    assert max(counts) < 13_824 / 2
    assert counts[1] < counts[0] * 1.1
    costs, _ = convex_problem(432, widths)
    sizes = torch.full((432,), 32 * 5120, dtype=torch.int64)
    assert lines_run(lambda: allocate_bits(costs, sizes, widths, 3.25)) < 432 * 3 * 10


@pytest.mark.parametrize(
    ("average", "fraction"),
    [
        (3.25, Fraction(13, 4)),
        (3.1, Fraction(31, 10)),
        (8 / 3, Fraction(8, 3)),
        (2.7, Fraction(27, 10)),
        (3.0000000123, Fraction("3.0000000123")),
    ],
)
def test_an_average_means_the_fraction_it_was_rounded_from(average, fraction):
    sizes = torch.ones(60, dtype=torch.int64)
    costs = torch.tensor([[8.0, 4.0, 2.0]], dtype=torch.float64).expand(60, 3)
    chosen = allocate_bits(costs, sizes, [2, 3, 4], average)
    assert int(chosen.sum()) == floor(fraction * 60)


def test_an_average_with_many_decimals_is_not_rounded():
    costs = torch.tensor([[2.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    sizes = torch.tensor([10**9, 1])
    assert allocate_bits(costs, sizes, [3, 4], 3.000000005).tolist() == [3, 4]


def test_uniform_wins_where_the_hull_misses_it_and_is_filled(monkeypatch):
    monkeypatch.setattr(allocation, "EXACT_GROUPS", 0)
    costs = torch.tensor([[10, 5.1, 0], [9.8, 0, 0], [0, 0, 0]], dtype=torch.float64)
    sizes = torch.tensor([10, 20, 3])
    assert allocate_bits(costs, sizes, [2, 3, 4], 3.1).tolist() == [3, 3, 4]


def test_ties_prefer_more_bits_and_then_the_earlier_group():
    sizes = torch.tensor([1, 1, 1, 1])
    flat = torch.ones(4, 3, dtype=torch.float64)
    assert allocate_bits(flat, sizes, [2, 3, 4], 2.5).sum() == 10
    falling = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64).expand(4, 3)
    assert allocate_bits(falling, sizes, [2, 3, 4], 2.5).tolist() == [3, 3, 2, 2]


def test_a_cost_that_rises_with_the_width_does_not_leave_budget_unspent():
    costs = torch.tensor([[1.0, 5.0], [1.0, 0.5]], dtype=torch.float64)
    assert allocate_bits(costs, torch.tensor([7, 3]), [2, 3], 3.0).tolist() == [3, 3]


def test_average_bits_is_exact():
    assert average_bits(torch.tensor([2, 3]), torch.tensor([1, 2])) == Fraction(8, 3)


def test_what_cannot_be_allocated_is_refused_with_its_numbers():
    costs, sizes = torch.ones(3, 2, dtype=torch.float64), torch.tensor([4, 4, 4])
    with pytest.raises(ValueError, match=r"average_bits=2\.5 is below the smallest width 3: .* 30"):
        allocate_bits(costs, sizes, [3, 4], 2.5)
    for bad in (float("nan"), float("inf"), -1.0):
        wrong = costs.clone()
        wrong[1, 1] = bad
        with pytest.raises(ValueError, match=r"group 1 costs .* at 4 bits"):
            allocate_bits(wrong, sizes, [3, 4], 3.5)
    with pytest.raises(ValueError, match="group 2 has 0 weights"):
        allocate_bits(costs, torch.tensor([4, 4, 0]), [3, 4], 3.5)
    with pytest.raises(ValueError, match="ascending"):
        allocate_bits(costs, sizes, [4, 3], 3.5)
    with pytest.raises(ValueError, match="3 groups and 3 widths"):
        allocate_bits(costs, sizes, [3, 4, 5], 3.5)
