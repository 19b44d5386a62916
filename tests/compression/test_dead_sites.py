"""Sites that read nothing but zeros: compressed as dead channels are, and named so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_models import compress, config_of
from seldom import seldom
from tiny_models import build_tiny_model

from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import plan_compression

O_PROJ, DOWN_PROJ = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
ATTENTION = {f"model.layers.1.self_attn.{x}_proj" for x in "qkv"} | {O_PROJ}
MLP = {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")} | {DOWN_PROJ}


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    return tiny_tokens(4, 16)


def build_dead(*zeroed: str, name: str = "llama") -> Any:
    model = build_tiny_model(name)
    for module in zeroed:
        model.get_submodule(f"model.layers.1.{module}").weight.zero_()
    return model


WAYS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "a v_proj of zeros": (("self_attn.v_proj",), {O_PROJ}),
    "an up_proj of zeros": (("mlp.up_proj",), {DOWN_PROJ}),
    "a norm gain of zero": (("input_layernorm",), ATTENTION),
    "a layer switched off": (
        ("input_layernorm", "post_attention_layernorm"),
        ATTENTION | MLP,
    ),
}
RECIPES: dict[str, list[str]] = {
    "default": [],
    "textbook": ["recipe=textbook"],
    "sparsegpt": ["recipe=sparsegpt"],
    "gptq": ["recipe=gptq", "sparsity=dense"],
    "unquantized": ["wbits=unquantized"],
    "adaptive": ["n_groups.adaptive=true", "n_groups=mutual_information"],
    "listed widths": ["wbits.widths=[2,8]", "wbits.tied=true", "wbits.cost=distortion"],
    "error": ["recipe.on_singular=error"],
}


@pytest.mark.parametrize(
    ("way", "recipe"),
    seldom(
        [
            *((way, "default") for way in list(WAYS)[::3]),
            *(("a v_proj of zeros", recipe) for recipe in list(RECIPES)[2::2]),
            *((way, "default") for way in list(WAYS)[1:3]),
            *(("a v_proj of zeros", recipe) for recipe in list(RECIPES)[1::2]),
        ],
        always=5,
    ),
)
def test_what_reads_only_zeros_is_compressed_and_named(
    way: str, recipe: str, tokens: torch.Tensor
) -> None:
    zeroed, dead = WAYS[way]
    model = build_dead(*zeroed)
    before = {name: model.get_submodule(name).weight.clone() for name in dead}
    linears = compress(model, tokens, RECIPES[recipe])
    assert {name for name, x in linears.items() if x.report.status == "dead"} == dead
    for name in dead:
        report, weight = linears[name].report, model.get_submodule(name).weight
        assert report.dead_channels == report.columns
        assert (report.output_error, report.total_correlation) == (0.0, None)
        assert report.average_bits <= (16 if recipe == "unquantized" else 4)
        if recipe in ("textbook", "sparsegpt", "gptq"):
            # recipe.dead_channels=zero, as in the published code.
            assert not weight.any()
            continue
        # The largest half of each row or so is there, next to where it was.
        kept = ~linears[name].grids["pruned"]
        assert int(kept.sum()) == pytest.approx(weight.numel() / 2, abs=weight.numel() / 4)
        near = (weight - before[name])[kept].abs().max() / before[name].abs().max()
        assert near < 0.5
        smallest = before[name].abs()[kept].mean()
        assert smallest > before[name].abs()[~kept].mean()


@pytest.mark.parametrize("way", seldom(reversed(WAYS), always=1))
def test_they_are_skipped_if_singular_sites_are(way: str, tokens: torch.Tensor) -> None:
    zeroed, dead = WAYS[way]
    linears = compress(build_dead(*zeroed), tokens, ["recipe.on_singular=skip"])
    statuses = {name: x.report.status for name, x in linears.items()}
    assert {name for name, status in statuses.items() if status == "skipped"} == dead
    assert {linears[name].report.effective_bits for name in dead} == {16}


def test_a_mixture_whose_experts_read_only_zeros(tokens: torch.Tensor) -> None:
    linears = compress(build_dead("post_attention_layernorm", name="mixtral"), tokens)
    dead = {name for name, x in linears.items() if x.report.status == "dead"}
    assert dead == {name for name in linears if name.startswith("model.layers.1.mlp.")}


def test_untouched_linears_need_no_signal(tokens: torch.Tensor) -> None:
    linears = compress(
        build_dead("self_attn.v_proj"), tokens, ["wbits=unquantized", "sparsity=dense"]
    )
    assert {x.report.status for x in linears.values()} == {"untouched"}


def test_the_budget_of_the_others_is_spent_among_them(tokens: torch.Tensor) -> None:
    config = config_of("wbits.scope=model", "wbits.average=3.5", "wbits.cost=distortion")
    made = plan_compression(Walker(build_dead("self_attn.v_proj")), tokens, config)
    assert set(made.linears[O_PROJ].bits.tolist()) == {3}
    others = [linear for name, linear in made.linears.items() if name != O_PROJ]
    spent = sum(linear.rows * int(linear.bits.sum()) for linear in others)
    assert spent <= 3.5 * sum(linear.rows * linear.columns for linear in others)
