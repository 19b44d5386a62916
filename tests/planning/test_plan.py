"""Prices are the errors of grids really fitted, and a saved plan holds every decision."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config_of
from safetensors.torch import load_file

from mi_experiments.compression.pipeline import compress_model
from mi_experiments.compression.totals import check_sparsity
from mi_experiments.errors import AuditError, InputError
from mi_experiments.llm.walker import Walker
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.hessian import Factor, Hessian, HessianAccumulator, factorize
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.pruning_costs import possible_parts
from mi_experiments.persistence.atomic import save_atomically
from mi_experiments.planning.costs import measure_group_costs, measure_pruning_costs
from mi_experiments.planning.plan import Plan, plan_compression
from mi_experiments.planning.site_costs import BlockCosts, measure_block_costs

ROWS, COLUMNS, GROUPS = 6, 12, 3


@pytest.fixture
def site() -> tuple[torch.Tensor, Hessian, Factor]:
    torch.manual_seed(0)
    accumulator = HessianAccumulator(COLUMNS)
    accumulator.update(torch.randn(200, COLUMNS) @ torch.randn(COLUMNS, COLUMNS))
    hessian = accumulator.finish()
    return torch.randn(ROWS, COLUMNS), hessian, factorize(hessian, damping=0.1)


@pytest.mark.parametrize("cost", ["distortion", "relative", "fisher"])
@pytest.mark.parametrize("pruning", ["sparsity=dense", "sparsity.ratio=0.5"])
def test_prices_are_those_of_a_plain_loop(
    cost: str, pruning: str, site: tuple[torch.Tensor, Hessian, Factor]
) -> None:
    weight, hessian, factor = site
    config = config_of(f"wbits.cost={cost}", "wbits.widths=[2,4,16]", pruning)
    group = torch.tensor([0, 1, 2] * 4, dtype=torch.int32)
    loss = torch.rand(ROWS) + 0.5
    costs = measure_group_costs(weight, loss, group, hessian, factor, config)
    damped = hessian.matrix + 0.1 * hessian.diagonal.mean() * torch.eye(COLUMNS)
    inverse = torch.linalg.inv(damped.double()).diagonal()
    score = weight.double().square() / inverse
    pruned = None
    if pruning != "sparsity=dense":
        pruned = torch.zeros_like(weight, dtype=torch.bool)
        pruned.view(-1)[score.view(-1).argsort()[: ROWS * COLUMNS // 2]] = True
    felt = loss if cost == "fisher" else torch.ones(ROWS)
    expected = torch.zeros(GROUPS, 3, dtype=torch.float64)
    for place, width in enumerate((2, 4)):
        bits = torch.full((COLUMNS,), width, dtype=torch.uint8)
        grid = fit_grid(
            weight, bits, scale_groups(group, None), clip_search=True, coarse=True,
            pruned=pruned,
        )  # fmt: skip
        error = (grid.quantize(weight) - weight).double()
        for row in range(ROWS):
            for column in range(COLUMNS):
                if pruned is None or not pruned[row, column]:
                    lost = float(felt[row]) * float(error[row, column]) ** 2 / inverse[column]
                    expected[int(group[column]), place] += lost
    if cost == "relative":
        expected /= float((weight @ hessian.matrix * weight).sum())
    assert torch.allclose(costs.costs, expected, rtol=1e-4)
    assert costs.sizes.tolist() == [4 * ROWS] * GROUPS


def test_a_stored_plan_holds_groups_and_widths(tmp_path: Path, tiny_model, tiny_tokens) -> None:
    config = config_of("n_groups.count=2", "n_groups.multiple=1")
    made = plan_compression(Walker(tiny_model("llama")), tiny_tokens(4, 16), config)
    save_atomically(tmp_path / "plan.safetensors", *made.stored())
    saved = load_file(tmp_path / "plan.safetensors")
    assert len(saved) == 3 * len(made.linears)
    for name, linear in made.linears.items():
        assert torch.equal(saved[f"{name}.bits"], linear.bits)
        assert torch.equal(saved[f"{name}.channel_group"], linear.channel_group)
        assert torch.equal(saved[f"{name}.scale_group"], linear.scale_group)


def same(left: Any, right: Any) -> bool:
    """Compare values field by field, tensors bit by bit, floats exactly."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and same(vars(left), vars(right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@pytest.mark.parametrize("grouping", ["mutual_information", "contiguous"])
@pytest.mark.parametrize("allocation", ["mixed", "uniform"])
def test_a_plan_is_read_back_as_the_value_it_was(
    grouping: str, allocation: str, tiny_model, tiny_tokens
) -> None:
    config = config_of(
        f"n_groups={grouping}", f"wbits={allocation}", "n_groups.count=2", "n_groups.multiple=1",
    )  # fmt: skip
    made = plan_compression(Walker(tiny_model("llama")), tiny_tokens(4, 16), config)
    again = Plan.read(*made.stored())
    assert same(again, made)
    assert again.sha256() == made.sha256()


@pytest.mark.parametrize("allocation", ["mixed", "uniform"])
def test_block_costs_are_read_back_as_the_value_it_was(
    allocation: str, tiny_model, tiny_tokens
) -> None:
    config = config_of(
        f"wbits={allocation}", "n_groups.count=2", "n_groups.multiple=1",
        "wbits.cost=relative", "sparsity.cost=distortion",
    )  # fmt: skip
    walk = Walker(tiny_model("llama"), batch_size=2).walk(tiny_tokens(4, 16))
    for block in walk:
        block_costs = measure_block_costs(block, {}, True, config)
        assert same(BlockCosts.read(*block_costs.stored()), block_costs)


def test_fisher_costs_weigh_linears_against_each_other(tiny_model, tiny_tokens) -> None:
    """Linears that the loss does not feel must give their bits to those that it feels."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    config = config_of(
        "n_groups.count=2", "n_groups.multiple=1", "wbits.scope=model",
        "wbits.cost=fisher", "wbits.fisher_samples=2", "wbits.average=3", "sparsity=dense",
    )  # fmt: skip
    made = plan_compression(Walker(model), tiny_tokens(4, 16), config)
    silent = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    felt = [linear for name, linear in made.linears.items() if name not in silent]
    assert all((made.linears[name].bits == 2).all() for name in silent)
    assert max(float(linear.bits.float().mean()) for linear in felt) > 3


@pytest.mark.parametrize("cost", ["distortion", "relative", "fisher"])
def test_prices_of_pruning_are_those_of_a_plain_loop(
    cost: str, site: tuple[torch.Tensor, Hessian, Factor]
) -> None:
    weight, hessian, factor = site
    config = config_of(
        "sparsity.scope=model", f"sparsity.cost={cost}", "sparsity.mask_block=5",
        "sparsity.ratio=0.4", "sparsity.spread=0.3", "recipe.order=natural",
    )  # fmt: skip
    loss = torch.rand(ROWS) + 0.5
    costs = measure_pruning_costs(weight, loss, hessian, factor, config)
    damped = hessian.matrix + 0.1 * hessian.diagonal.mean() * torch.eye(COLUMNS)
    inverse = torch.linalg.inv(damped.double()).diagonal()
    score = weight.double().square() / inverse
    felt = loss.double() if cost == "fisher" else torch.ones(ROWS, dtype=torch.float64)
    if cost == "relative":
        felt /= float((weight @ hessian.matrix * weight).sum())
    kept = list(range(39, 116))  # 128 · (1 − 0.4 ± 0.3), whole
    expected = []
    for parts in kept:
        lost = 0.0
        for start in range(0, COLUMNS, 5):
            block = [
                (float(score[row, column]), float(felt[row]))
                for row in range(ROWS)
                for column in range(start, min(start + 5, COLUMNS))
            ]
            count = round((1 - parts / 128) * len(block))
            lost += sum(error * weighed for error, weighed in sorted(block)[:count])
        expected.append(lost)
    assert possible_parts(0.4, 0.3) == kept
    assert torch.allclose(costs, torch.tensor(expected, dtype=torch.float64), rtol=1e-4)
    assert (costs.diff() <= 0).all()


def test_pruned_weights_are_allocated_exactly_and_the_plan_is_followed(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., torch.Tensor]
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 16)
    config = config_of(
        "sparsity.scope=model", "sparsity.cost=fisher", "sparsity.ratio=0.55",
        "sparsity.spread=0.3", "wbits=unquantized", "n_groups.count=2", "n_groups.multiple=1",
    )  # fmt: skip
    plan = plan_compression(Walker(model), tokens, config)
    weights = {name: linear.rows * linear.columns for name, linear in plan.linears.items()}
    ratios = {name: linear.sparsity.ratio for name, linear in plan.linears.items()}
    assert len(set(ratios.values())) > 1
    assert all(0.25 <= ratio <= 0.85 for ratio in ratios.values())
    over = sum(ratios[name] * weights[name] for name in weights) - 0.55 * sum(weights.values())
    assert 0 <= over < min(weights.values()) / 128
    reports = {}
    for block in compress_model(Walker(model), tokens, plan, config):
        reports |= {linear.report.name: linear.report for linear in block.linears}
    for name, report in reports.items():
        blocks = [
            min(config.sparsity.mask_block, report.columns - start)
            for start in range(0, report.columns, config.sparsity.mask_block)
        ]
        count = sum(round(ratios[name] * report.rows * width) for width in blocks)
        assert round(report.sparsity * weights[name]) == count
        assert int((model.get_parameter(f"{name}.weight") == 0).sum()) >= count
    saved = Plan.read(*plan.stored())
    assert saved.sha256() == plan.sha256()
    other = dataclasses.replace(plan.linears[name], sparsity=Sparsity(0.5))
    changed = dataclasses.replace(plan, linears=plan.linears | {name: other})
    assert changed.sha256() != plan.sha256()
    short = dataclasses.replace(plan, sparsity=Sparsity(0.56))
    with pytest.raises(AuditError, match=r"a share of 0\.55\d* is pruned where 0\.56 were"):
        check_sparsity(list(reports.values()), short)


def test_an_even_share_is_the_plan_of_scope_linear(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., torch.Tensor]
) -> None:
    """Where no linear may differ from the average, allocation changes nothing."""
    model, tokens = tiny_model("llama"), tiny_tokens(4, 16)
    even = plan_compression(
        Walker(model),
        tokens,
        config_of("sparsity.scope=model", "sparsity.spread=0", "sparsity.ratio=0.5"),
    )
    alike = config_of("sparsity.scope=linear", "sparsity.ratio=0.5")
    assert even.sha256() == plan_compression(Walker(model), tokens, alike).sha256()


def test_windows_are_fixed_and_so_not_allocated() -> None:
    with pytest.raises(InputError, match=r"sparsity\.scope=model.*linear: 2:4 is fixed"):
        config_of("sparsity=semistructured_2_4", "sparsity.scope=model")
