"""What is spent equals the best of all ways to spend it."""

import itertools

import pytest
import torch
from composed import config_of

from mi_experiments.method.allocation import allocate_kept
from mi_experiments.method.pruning_costs import keep_parts, possible_parts
from mi_experiments.planning.budgets import allocate_pruning, allocate_widths
from mi_experiments.planning.costs import GroupCosts
from mi_experiments.planning.site_costs import LinearCosts


def falling(rows: int, choices: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(rows, choices, generator=generator, dtype=torch.float64)
    return steps.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.5, 1 / 3, 0.61])
def test_what_is_kept_equals_brute_force(seed: int, ratio: float) -> None:
    kept = possible_parts(ratio, 0.02)
    costs, weights = falling(3, len(kept), seed), torch.tensor([64, 96, 40])
    chosen = allocate_kept(costs, weights, kept, ratio)
    room = 128 * (1 - ratio) * int(weights.sum()) + 1e-6
    best = min(
        sum(float(costs[row, place]) for row, place in enumerate(places))
        for places in itertools.product(range(len(kept)), repeat=3)
        if sum(kept[place] * int(weights[row]) for row, place in enumerate(places)) <= room
    )
    places = [kept.index(int(parts)) for parts in chosen]
    assert sum(float(costs[row, place]) for row, place in enumerate(places)) == pytest.approx(best)
    left = room - int((chosen * weights).sum())
    raisable = [int(w) for w, parts in zip(weights, chosen, strict=True) if parts < kept[-1]]
    assert left >= 0
    assert all(left < weight for weight in raisable)


def test_more_to_keep_never_costs_more() -> None:
    kept = list(range(20, 110))
    costs, weights = falling(7, len(kept), 0), torch.tensor([32, 64, 64, 17, 96, 32, 5])
    totals = []
    for ratio in (0.7, 0.65, 0.6, 0.5, 0.4, 0.3):
        chosen = allocate_kept(costs, weights, kept, ratio)
        totals.append(sum(float(costs[row, int(parts) - 20]) for row, parts in enumerate(chosen)))
        even = int(128 * (1 - ratio))
        assert totals[-1] <= float(costs[:, even - 20].sum())
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("ratio", "spread", "least", "most"),
    [
        (0.5, 0.2, 39, 89),
        (0.5, 0.0, 64, 64),
        (0.1, 0.2, 90, 128),
        (0.9, 0.2, 1, 38),
        (0.3, 0.0, 89, 89),
    ],
)
def test_the_choices_are_within_the_spread(
    ratio: float, spread: float, least: int, most: int
) -> None:
    parts = possible_parts(ratio, spread)
    assert (parts[0], parts[-1]) == (least, most)
    assert parts[0] <= 128 * (1 - ratio)


def linear_costs(name: str, site: str, rows: int, seed: int) -> LinearCosts:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(2, 3, generator=generator, dtype=torch.float64).sort(1, descending=True)
    group_costs = GroupCosts(costs.values, torch.tensor([8 * rows, 8 * rows]))
    return LinearCosts(name, 0, site, rows, torch.arange(16) // 8, group_costs)


@pytest.mark.parametrize("scope", ["linear", "site", "model"])
def test_tied_widths_equal_brute_force_over_what_is_tied(scope: str) -> None:
    config = config_of(
        "wbits.tied=true", "wbits.widths=[2,3,4]", "wbits.average=3", f"wbits.scope={scope}"
    )
    linears = [
        linear_costs("q", "qk", 4, 0),
        linear_costs("k", "qk", 2, 1),
        linear_costs("o", "o", 4, 2),
    ]
    chosen = allocate_widths(linears, config)
    assert torch.equal(chosen["q"], chosen["k"])
    free = list(itertools.product([2, 3, 4], repeat=2))

    def bits(name: str, widths: tuple[int, ...]) -> int:
        rows = {"q": 4, "k": 2, "o": 4}[name]
        return sum(8 * rows * width for width in widths)

    def cost(row: LinearCosts, widths: tuple[int, ...]) -> float:
        assert row.group_costs is not None
        return sum(float(row.group_costs.costs[g, w - 2]) for g, w in enumerate(widths))

    best = []
    for together, alone in itertools.product(free, free):
        spent = bits("q", together) + bits("k", together), bits("o", alone)
        fits = sum(spent) <= 3 * 160 if scope == "model" else spent[0] <= 288 and spent[1] <= 192
        if fits:
            best.append(
                cost(linears[0], together) + cost(linears[1], together) + cost(linears[2], alone)
            )
    found = [tuple(chosen[row.name].tolist()) for row in linears]
    total = sum(cost(row, widths) for row, widths in zip(linears, found, strict=True))
    assert total == pytest.approx(min(best))


def test_a_linear_without_a_price_is_pruned_as_the_average() -> None:
    kept = possible_parts(0.5, 0.2)
    config = config_of("sparsity.scope=model", "sparsity.ratio=0.5")
    costly = torch.linspace(1, 0, len(kept), dtype=torch.float64)
    group = torch.zeros(8, dtype=torch.int32)
    linears = [
        LinearCosts("a", 0, "a", 4, group, None, 9 * costly),
        LinearCosts("b", 0, "b", 4, group, None, costly),
        LinearCosts("c", 0, "c", 4, group, None, None),
    ]
    chosen = allocate_pruning(linears, config)
    assert [chosen[name].ratio for name in "abc"] == [39 / 128, 89 / 128, 0.5]
    assert chosen["a"] == keep_parts(89)
