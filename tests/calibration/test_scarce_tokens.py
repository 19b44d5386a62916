"""An expert that sees too few tokens gets what the recipe says, in the record, and never zeros."""

from collections.abc import Callable
from typing import Any

import composed
import pytest
import torch

from mi_experiments.calibration.hessians import measure_hessians, measure_scarce
from mi_experiments.compression.pipeline import CompressedLinear, compress_model
from mi_experiments.compression.totals import check_budget
from mi_experiments.config.config import Config
from mi_experiments.errors import NumericalError
from mi_experiments.llm.walker import Walker
from mi_experiments.method.hessian import HessianAccumulator
from mi_experiments.planning.plan import plan_compression

Builder = Callable[..., Any]
STARVED = (2, 3)
CHOSEN = (0, 1)


def config_of(*overrides: str) -> Config:
    base = [
        "n_groups.multiple=1",
        "n_groups.count=2",
        "sparsity.scope=linear",
    ]
    return composed.config_of(*overrides, base=base)


@pytest.fixture
def starved(tiny_model: Builder) -> Any:
    """A mixture of experts whose routers choose experts 0 and 1 for every token."""
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        # One channel of the residual stream is large and positive in every token.
        model.model.embed_tokens.weight[:, 0] = 20
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[0] = 1
            layer.mlp.gate.weight[:, 0] = torch.tensor([9.0, 9.0, -9.0, -9.0])
    return model


def run(model: Any, tokens: torch.Tensor, config: Config) -> dict[str, CompressedLinear]:
    walker = Walker(model, ignore=["*.mlp.gate"], batch_size=2)
    plan = plan_compression(walker, tokens, config)
    blocks = compress_model(walker, tokens, plan, config)
    linears = {linear.report.name: linear for block in blocks for linear in block.linears}
    check_budget([linear.report for linear in linears.values()], plan)
    return linears


def experts(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{index}.mlp.experts.{key}.{expert}": getattr(layer.mlp.experts, key)[expert]
        for index, layer in enumerate(model.model.layers)
        for key in ("gate_up_proj", "down_proj")
        for expert in range(4)
    }


def test_all_tokens_calibrate_an_expert_that_sees_none(starved: Any, tiny_tokens: Builder) -> None:
    before = {name: weight.clone() for name, weight in experts(starved).items()}
    linears = run(starved, tiny_tokens(4, 16), config_of("recipe.scarce_tokens=all_tokens"))
    for name, weight in experts(starved).items():
        report = linears[name].report
        hungry = int(name[-1]) in STARVED
        assert (report.tokens == 0) is hungry
        assert report.all_tokens is hungry
        assert report.status == "compressed"
        assert report.sparsity == pytest.approx(0.5, abs=0.01)
        # As good as a fed one: neither erased nor left, on what it would read.
        assert 0 < report.output_error < 1
        assert weight.count_nonzero() > 0.3 * weight.numel()
        assert not torch.equal(weight, before[name])


def test_all_tokens_are_those_that_enter_the_experts(starved: Any, tiny_tokens: Builder) -> None:
    """The Hessian of a starved expert is 2/n XᵀX over every token, by an independent hook."""
    config, tokens = config_of(), tiny_tokens(4, 16)
    block = next(Walker(starved, batch_size=2).walk(tokens))
    entered: list[torch.Tensor] = []
    experts_module = block.module.mlp.experts
    handle = experts_module.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    sites = [site for site in block.sites if site.name.startswith("mlp.experts.gate_up_proj")]
    hessians = measure_hessians(block, sites, config)
    handle.remove()
    seen = torch.cat(entered)
    assert len(seen) == tokens.numel()
    by_hand = HessianAccumulator(seen.shape[1])
    by_hand.update(seen)
    scarce = measure_scarce(block, hessians, sites, config)
    assert scarce.keys() == {f"mlp.experts.gate_up_proj.{expert}" for expert in STARVED}
    for hessian in scarce.values():
        torch.testing.assert_close(hessian.matrix, by_hand.finish().matrix)
        assert hessian.tokens == tokens.numel()
    for expert in CHOSEN:
        assert hessians[f"mlp.experts.gate_up_proj.{expert}"].tokens == tokens.numel()


def test_kept_experts_keep_every_bit_and_count_sixteen(starved: Any, tiny_tokens: Builder) -> None:
    before = {name: weight.clone() for name, weight in experts(starved).items()}
    linears = run(starved, tiny_tokens(4, 16), config_of("recipe.scarce_tokens=keep"))
    for name, weight in experts(starved).items():
        report = linears[name].report
        if int(name[-1]) in STARVED:
            assert torch.equal(weight, before[name].half().float())
            assert (report.status, report.tokens, report.average_bits) == ("kept", 0, 16)
            assert report.sparsity == 0
        else:
            assert report.status == "compressed"
            assert not torch.equal(weight, before[name])


def test_error_names_the_expert_and_the_remedy(starved: Any, tiny_tokens: Builder) -> None:
    with pytest.raises(NumericalError, match=r"gate_up_proj\.2: 0 tokens.*min_tokens=32.*3 more"):
        run(starved, tiny_tokens(4, 16), config_of("recipe.scarce_tokens=error"))


def test_the_least_number_of_tokens_decides(starved: Any, tiny_tokens: Builder) -> None:
    """64 tokens are enough for 64 and too few for 65; ordinary linears do not mind."""
    tokens = tiny_tokens(4, 16)
    for least, all_tokens in ((64, set(STARVED)), (65, {0, 1, 2, 3})):
        block = next(Walker(starved, batch_size=2).walk(tokens))
        config = config_of(f"recipe.min_tokens={least}")
        hessians = measure_hessians(block, block.sites, config)
        scarce = measure_scarce(block, hessians, block.sites, config)
        assert {int(name[-1]) for name in scarce} == all_tokens
        assert all("experts" in name for name in scarce)
