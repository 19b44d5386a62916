"""The sequential layer pipeline on every architecture: audits, orders, and counts of work."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import composed
import pytest
import torch
from seldom import seldom

from mi_experiments.calibration import hessians, measure_sites
from mi_experiments.compression import factorize_site
from mi_experiments.compression.pipeline import CompressedLinear, compress_model
from mi_experiments.config.config import Config
from mi_experiments.llm.walker import Walker
from mi_experiments.planning import site_costs
from mi_experiments.planning.plan import Plan, plan_compression

ARCHITECTURES = ["llama", "qwen3", "opt", "gemma3", "gpt2", "gpt_neox"]


def config_of(*overrides: str) -> Config:
    small = [
        "n_groups.count=2", "n_groups.multiple=1",
        "sparsity.scope=linear", "wbits.scope=linear", "wbits.cost=distortion",
    ]  # fmt: skip
    return composed.config_of(*overrides, base=small)


def compressed(model: Any, tokens: torch.Tensor, *overrides: str) -> list[CompressedLinear]:
    config = config_of(*overrides)
    return compress_all(model, tokens, plan_compression(Walker(model), tokens, config), config)


def compress_all(
    model: Any, tokens: torch.Tensor, made: Plan, config: Config
) -> list[CompressedLinear]:
    """Return the linears of all blocks, whose weights stay in the model."""
    blocks = list(compress_model(Walker(model, batch_size=8), tokens, made, config))
    assert [block.index for block in blocks] == list(range(len(blocks)))
    return [linear for block in blocks for linear in block.linears]


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    return tiny_tokens(8, 16)


def test_sixteen_bits_and_no_sparsity_change_no_weight(
    tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    linears = compressed(model, tokens, "wbits=unquantized", "sparsity=dense")
    assert {linear.report.status for linear in linears} == {"untouched"}
    assert {linear.report.output_error for linear in linears} == {0.0}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "recipe"),
    list(zip(ARCHITECTURES, itertools.cycle(["default", "textbook"]))),
)
def test_half_sparsity_and_four_bits_are_met_exactly(
    name: str, recipe: str, tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    model = tiny_model(name)
    linears = compressed(model, tokens, f"recipe={recipe}")
    for linear in linears:
        report, grids = linear.report, linear.grids
        assert report.status == "compressed"
        assert report.average_bits <= 4.0
        assert report.sparsity == 0.5
        assert report.levels <= 2 ** max(report.bits)
        assert 0 < report.output_error < 1
        weight = model.get_parameter(f"{report.name}.weight")
        assert int((weight == 0).sum()) >= int(grids["pruned"].sum()) == report.weights // 2


def test_every_site_has_one_hessian_and_one_factor(
    tiny_model: Callable[..., Any], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"hessians": 0, "plan factors": 0, "sweep factors": 0}

    def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(
        hessians, "HessianAccumulator", counting("hessians", hessians.HessianAccumulator)
    )
    monkeypatch.setattr(site_costs, "factorize", counting("plan factors", site_costs.factorize))
    factorize = counting("sweep factors", factorize_site.factorize)
    monkeypatch.setattr(factorize_site, "factorize", factorize)
    linears = compressed(tiny_model("llama"), tokens)
    sites = {linear.report.site for linear in linears}
    assert (len(linears), len(sites)) == (14, 8)
    assert counts == {"hessians": 16, "plan factors": 8, "sweep factors": 8}


def test_true_sequential_linears_read_what_compressed_ones_give(
    tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    """The last site's Hessian must be that of the model with all earlier sites compressed."""
    model = tiny_model("llama")
    config = config_of("recipe.input_correction=0", "recipe.residual_correction=0")
    seen: dict[str, torch.Tensor] = {}
    original = measure_sites.measure_hessians

    def spy(block: Any, sites: Any, config: Config) -> Any:
        hessians = original(block, sites, config)
        seen.update({f"{block.name}.{name}": found.matrix for name, found in hessians.items()})
        return hessians

    made = plan_compression(Walker(model), tokens, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_sites, "measure_hessians", spy)
        compress_all(model, tokens, made, config)
    last = "model.layers.1.mlp.down_proj"
    read: list[torch.Tensor] = []
    handle = model.get_submodule(last).register_forward_pre_hook(
        lambda module, args: read.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    expected = 2 / len(read[0]) * read[0].T @ read[0]
    assert torch.allclose(seen[last], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("nsamples", "share", "other"), [(4, 0.5, 1.0), (96, 1.0, 0.5)])
def test_without_a_share_it_is_the_one_that_suits_the_tokens(
    tiny_model: Callable[..., Any],
    tiny_tokens: Callable[..., torch.Tensor],
    nsamples: int,
    share: float,
    other: float,
) -> None:
    """Whatever the site of this model, 4 × 16 tokens are few and 96 × 16 enough."""
    blind = ["wbits=uniform", "n_groups=contiguous"]
    tokens, weights = tiny_tokens(nsamples, 16), {}
    for value in ("null", share, other):
        overrides = [f"recipe.input_correction={value}", "recipe.residual_correction=0", *blind]
        linears = compressed(tiny_model("llama"), tokens, *overrides)
        weights[value] = [linear.linear.read_weight() for linear in linears]
    pairs = list(zip(weights["null"], weights[share], weights[other], strict=True))
    assert all(torch.equal(chosen, same) for chosen, same, _ in pairs)
    assert not all(torch.equal(chosen, different) for chosen, _, different in pairs)


def test_mixed_widths_are_those_of_the_plan(
    tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    model = tiny_model("llama")
    config = config_of("wbits.average=3.5", "wbits.scope=model", "wbits.cost=relative")
    made = plan_compression(Walker(model), tokens, config)
    for linear in compress_all(model, tokens, made, config):
        assert torch.equal(linear.grids["bits"], made.linears[linear.report.name].bits)


@pytest.mark.parametrize(
    ("scope", "average"),
    seldom(
        [
            ("linear", "2.5"), ("site", "3.25"), ("model", "3.0"), ("linear", "4.0"),
            ("site", "2.5"), ("model", "3.25"), ("linear", "3.0"), ("site", "4.0"),
            ("model", "2.5"), ("linear", "3.25"), ("site", "3.0"), ("model", "4.0"),
        ],
        always=3,
    ),
)  # fmt: skip
def test_every_scope_spends_its_budget_to_less_than_one_group(
    scope: str, average: str, tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    config = config_of(f"wbits.scope={scope}", f"wbits.average={average}", "wbits.cost=relative")
    made = plan_compression(Walker(tiny_model("llama")), tokens, config)
    shares: dict[object, list[Any]] = {}
    for name, linear in made.linears.items():
        key = {"linear": name, "site": linear.site, "model": None}[scope]
        shares.setdefault(key, []).append(linear)
    widths = config.wbits.candidate_widths()
    for members in shares.values():
        weights = sum(linear.rows * linear.columns for linear in members)
        spent = sum(linear.rows * int(linear.bits.sum()) for linear in members)
        left = float(average) * weights - spent
        assert left >= 0
        for linear in members:
            for group in linear.channel_group.unique():
                chosen = linear.channel_group == group
                width = int(linear.bits[chosen][0])
                if width < max(widths):
                    size = linear.rows * int(chosen.sum())
                    step = min(other for other in widths if other > width) - width
                    assert step * size > left


def test_groups_belong_to_the_site(tiny_model: Callable[..., Any], tokens: torch.Tensor) -> None:
    made = plan_compression(Walker(tiny_model("llama")), tokens, config_of())
    by_site: dict[str, list[torch.Tensor]] = {}
    for linear in made.linears.values():
        by_site.setdefault(linear.site, []).append(linear.channel_group)
    assert sorted(map(len, by_site.values())) == [1, 1, 1, 1, 2, 2, 3, 3]
    for groups in by_site.values():
        assert all(torch.equal(groups[0], other) for other in groups)


@pytest.mark.parametrize("grouping", ["contiguous", "random"])
def test_uniform_widths_on_controls_need_no_pass(
    grouping: str,
    tiny_model: Callable[..., Any],
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site_costs, "measure_hessians", lambda *_: pytest.fail("measured"))
    config = config_of("wbits=uniform", f"n_groups={grouping}")
    made = plan_compression(Walker(tiny_model("llama")), tokens, config)
    assert all((linear.bits == 4).all() for linear in made.linears.values())
    assert made.information == {}


def test_a_plan_has_a_hash_of_all_it_decides(
    tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    made = plan_compression(Walker(tiny_model("llama")), tokens, config_of())
    name, linear = next(iter(made.linears.items()))
    bits = linear.bits.clone()
    bits[0] += 1
    changed = dataclasses.replace(
        made, linears=made.linears | {name: dataclasses.replace(linear, bits=bits)}
    )
    assert changed.sha256() != made.sha256()
    again = plan_compression(Walker(tiny_model("llama")), tokens, config_of())
    assert again.sha256() == made.sha256()


def test_a_bad_activation_names_block_and_site(
    tiny_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.post_attention_layernorm").weight[3] = float("inf")
    with pytest.raises(Exception, match=r"block 1, mlp.gate_proj\+up_proj"):
        compressed(model, tokens)
