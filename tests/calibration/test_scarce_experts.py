"""An expert that is shown all tokens reads what the formulas say that it would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_experiments.calibration.scarce_experts import feed_all_tokens
from mi_experiments.errors import InputError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.walker import Walker

Builder = Callable[..., Any]
SEQLEN = 12


def rare_experts(tiny_model: Builder) -> Any:
    """Build a Mixtral whose tokens all go to expert 0 or 1, whichever has the positive logit."""
    model = tiny_model("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
        layer.mlp.gate.weight[2:] = 0
    return model


def feed_everything(block: Block) -> dict[str, list[Tensor]]:
    fed: dict[str, list[Tensor]] = {}
    routed = [site for site in block.sites if site.routed]
    feed_all_tokens(block, routed, lambda site, x: fed.setdefault(site.name, []).append(x.clone()))
    return fed


def activate(name: str, experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What goes down in an expert, from the formulas of the papers."""
    if name == "gpt_oss":
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_every_token_passes_every_expert_once(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(5, SEQLEN)
    for block in Walker(model, batch_size=2).walk(tokens):
        if not any(site.routed for site in block.sites):
            continue
        experts = block.module.mlp.experts
        # The present weights count: what goes down changes with what comes up.
        for site in block.sites:
            for linear in site.linears if "gate_up" in site.name else ():
                linear.write_weight(linear.read_weight() / 2)
        entering: list[Tensor] = []
        handle = experts.register_forward_pre_hook(
            lambda module, args, entering=entering: entering.append(args[0].clone())
        )
        with torch.no_grad():
            for _, hidden, call in block.batches():
                call.replay(block.module, hidden)
        handle.remove()
        fed = feed_everything(block)
        assert len(fed) == 8
        for site in (site for site in block.sites if site.routed):
            expert = site.linears[0].expert
            for reads, hidden in zip(fed[site.name], entering, strict=True):
                if "gate_up" in site.name:
                    assert torch.equal(reads, hidden)
                else:
                    torch.testing.assert_close(reads, activate(name, experts, expert, hidden))


def test_experts_without_tokens_have_sites_and_are_shown_all(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = rare_experts(tiny_model), tiny_tokens(4, SEQLEN)
    for block in Walker(model, batch_size=2).walk(tokens):
        assert [site.name for site in block.sites[-8:]] == [
            f"mlp.experts.{kind}.{expert}"
            for kind in ("gate_up_proj", "down_proj")
            for expert in range(4)
        ]
        assert [site.stage for site in block.sites] == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4]
        tokens_of: dict[str, int] = {}

        def count(site: Any, x: Tensor, tokens_of: dict[str, int] = tokens_of) -> None:
            tokens_of[site.name] = tokens_of.get(site.name, 0) + len(x)

        block.feed(block.sites, count)
        reached = {site.name for site in block.sites if site.linears[0].expert in {None, 0, 1}}
        assert set(tokens_of) <= reached
        for kind in ("gate_up_proj", "down_proj"):
            of = [tokens_of.get(f"mlp.experts.{kind}.{expert}", 0) for expert in range(4)]
            assert sum(of) == 4 * SEQLEN
            assert of[2:] == [0, 0]
        # Alone too: a batch without one of its tokens is no error.
        block.feed(block.sites[-1:], lambda site, x: pytest.fail(site.name))
        fed = feed_everything(block)
        assert {name: sum(map(len, parts)) for name, parts in fed.items()} == {
            site.name: 4 * SEQLEN for site in block.sites[-8:]
        }


def test_what_cannot_be_shown_all_tokens_is_refused(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    block = next(Walker(tiny_model("mixtral"), batch_size=2).walk(tiny_tokens(2, SEQLEN)))
    with pytest.raises(ValueError, match=r"\['mlp\.gate'\] read every token"):
        feed_all_tokens(block, block.sites[2:], lambda site, x: None)
    block = next(Walker(tiny_model("llama4"), batch_size=2).walk(tiny_tokens(2, SEQLEN)))
    routed = [site for site in block.sites if site.routed]
    with pytest.raises(
        InputError, match=r"experts\.gate_up_proj\.0 cannot be calibrated on all tokens"
    ):
        feed_all_tokens(block, routed, lambda site, x: None)
    block = next(Walker(tiny_model("mixtral"), batch_size=2).walk(tiny_tokens(2, SEQLEN)))
    block.module.mlp.experts.forward = lambda hidden, chosen, shares: hidden
    with pytest.raises(InputError, match=r"down_proj\.3 cannot be calibrated on all tokens"):
        feed_all_tokens(block, block.sites[-1:], lambda site, x: None)
    walk = Walker(tiny_model("mixtral"), batch_size=2).walk(tiny_tokens(2, SEQLEN))
    first, _ = next(walk), next(walk)
    with pytest.raises(RuntimeError, match=r"the walk has left model\.layers\.0"):
        feed_all_tokens(first, first.sites[-1:], lambda site, x: None)
