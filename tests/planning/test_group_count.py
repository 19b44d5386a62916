"""A site gets as many groups as pay for their scales, and never more than are asked for."""

import itertools
import math

import numpy as np
import pytest
import torch
from composed import config_of
from scipy.optimize import minimize

from mi_experiments.llm.walker import Walker
from mi_experiments.planning.cost_key import cost_config
from mi_experiments.planning.group_count import LEAST, log_cost, scale_bits
from mi_experiments.planning.plan import plan_compression

DENSE = ["sparsity=dense", "wbits.average=3", "n_groups.multiple=1",
         "n_groups.count=4", "recipe.damping=0.01"]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_price_of_a_partition_is_what_the_best_widths_lose(seed: int) -> None:
    """Theorem: of all fractional widths with the same total, none loses less."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 9, 4) * 32
    costs = sizes * np.exp(generator.normal(size=4))
    best = minimize(
        lambda more: (costs * 4.0**-more).sum() / sizes.sum(), np.zeros(4),
        constraints={"type": "eq", "fun": lambda more: (sizes * more).sum()},
        method="SLSQP", options={"ftol": 1e-14},
    )  # fmt: skip
    assert best.success
    found = log_cost(torch.from_numpy(costs), torch.from_numpy(sizes))
    assert found == pytest.approx(math.log(best.fun), abs=1e-5)


def test_equal_groups_are_worth_nothing_and_unequal_ones_are() -> None:
    """The mean is the same; Jensen's inequality is strict where the groups differ."""
    sizes = torch.tensor([64, 64])
    equal = log_cost(torch.tensor([3.0, 3.0]).double(), sizes)
    assert equal == pytest.approx(log_cost(torch.tensor([6.0]).double(), torch.tensor([128])))
    assert log_cost(torch.tensor([1.0, 5.0]).double(), sizes) < equal


def test_a_group_that_loses_nothing_does_not_pay_for_everything() -> None:
    sizes = torch.tensor([32, 32])
    bounded = log_cost(torch.tensor([0.0, 2.0]).double(), sizes)
    mean = 2 / 64
    assert bounded == pytest.approx((math.log(LEAST * mean) + math.log(2 / 32)) / 2)
    assert log_cost(torch.zeros(2).double(), sizes) == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 3 * (16 + 4) / 96),  # a float16 scale and a zero point of 4 bits for each group
        (["wbits.symmetric=true"], 3 * 16 / 96),
        (["wbits.group_size=16"], 6 * (16 + 4) / 96),
        (["recipe.scale_bits=32"], 3 * (32 + 4) / 96),
        (["sparsity.ratio=0.5"], 3 * (16 + 4) / 96 / 0.5),  # of the half that is kept
        (["sparsity.ratio=1", "sparsity.scope=linear"], math.inf),
    ],
)
def test_the_bits_of_scales_are_counted_by_hand(overrides: list[str], expected: float) -> None:
    group = torch.arange(3, dtype=torch.int32).repeat_interleave(32)
    config = config_of("sparsity=unstructured", "sparsity.ratio=0", *overrides)
    assert scale_bits(group, config) == pytest.approx(expected, rel=1e-12)


def plan_groups(model, tokens, *overrides: str) -> dict[str, int]:
    plan = plan_compression(Walker(model), tokens, config_of(*DENSE, *overrides))
    return {name: int(linear.channel_group.max()) + 1 for name, linear in plan.linears.items()}


def test_no_more_groups_than_asked_for_and_one_where_scales_are_dear(
    tiny_model, tiny_tokens
) -> None:
    """The tiny model's channels are alike, and its rows are so short that every scale is dear."""
    model, tokens = tiny_model("llama"), tiny_tokens(8, 16)
    assert set(plan_groups(model, tokens).values()) == {1}
    assert set(plan_groups(model, tokens, "n_groups.adaptive=false").values()) == {4}


def test_unequal_channels_get_more_groups(tiny_model, tiny_tokens) -> None:
    """A few inputs a thousand times stronger: their own widths are worth more than their scales."""
    model, tokens = tiny_model("llama"), tiny_tokens(8, 16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::4] *= 1000
    found = plan_groups(model, tokens)
    inputs = {name: count for name, count in found.items() if name.endswith("q_proj")}
    assert all(2 <= count <= 4 for count in inputs.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["wbits.scope=linear"],
        ["wbits.scope=site"],
        ["sparsity.ratio=0.5", "sparsity.scope=linear"],  # wbits.scope=auto is then each linear
        ["wbits=uniform", "n_groups=contiguous"],
    ],
)
def test_where_linears_do_not_share_the_budget_all_groups_are_made(
    overrides: list[str], tiny_model, tiny_tokens
) -> None:
    """There a linear with one group could spend no fraction of a bit."""
    common = [*DENSE, "sparsity=unstructured", "sparsity.ratio=0", *overrides]
    plan = plan_compression(Walker(tiny_model("llama")), tiny_tokens(8, 16), config_of(*common))
    assert {int(linear.channel_group.max()) + 1 for linear in plan.linears.values()} == {4}


def test_the_budget_is_met_whatever_the_groups(tiny_model, tiny_tokens) -> None:
    for average, grouping in itertools.product((2.5, 3), ("energy", "mutual_information")):
        config = config_of(*DENSE, f"wbits.average={average}", f"n_groups={grouping}")
        plan = plan_compression(Walker(tiny_model("llama")), tiny_tokens(8, 16), config)
        bits = sum(linear.rows * int(linear.bits.sum()) for linear in plan.linears.values())
        weights = sum(linear.rows * linear.columns for linear in plan.linears.values())
        smallest = min(linear.rows * linear.columns for linear in plan.linears.values())
        assert average * weights - smallest < bits <= average * weights


def test_budgets_share_their_site_costs_and_scopes_do_not() -> None:
    """The groups do not depend on the budget, so that a sweep over budgets groups once."""
    first, second = (cost_config(config_of(*DENSE, f"wbits.average={a}")) for a in (3, 3.5))
    assert first.n_groups == second.n_groups
    assert first.n_groups.adaptive
    assert not cost_config(config_of(*DENSE, "wbits.scope=linear")).n_groups.adaptive
