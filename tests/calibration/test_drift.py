"""DensePair: both models on the same samples, and writers found by trying."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mi_experiments.calibration.drift import DensePair, find_writers
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.walker import Walker

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    # Goes on in place on the output of its last linear.
    "falcon_new": ["self_attention.dense", "mlp.dense_4h_to_h"],
    # Gemma normalises what a linear gives before adding it: nothing is added as it is.
    "gemma3": [],
    # Nor are scaled outputs, or those of experts, which the router weights.
    "granite": [],
    "mixtral": ["self_attn.o_proj"],
    "gpt_oss": ["self_attn.o_proj"],
    "qwen2_moe": ["self_attn.o_proj"],
    "deepseek_v3": ["self_attn.o_proj", "mlp.shared_experts.down_proj"],
}


def walk_until(model: Any, tokens: torch.Tensor, index: int) -> Iterator[Block]:
    """Walk to a block, and stay there."""
    for block in Walker(model, batch_size=2).walk(tokens):
        yield block
        if block.index == index:
            return


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_those_of_the_textbook(
    name: str, dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    model = tiny_model(name).to(dtype)
    *_, block = walk_until(model, tiny_tokens(3, 12), 1)
    writers = find_writers(block)
    found = [linear.removeprefix(f"{block.name}.") for linear in writers]
    assert sorted(found) == sorted(WRITERS[name])


@pytest.mark.parametrize("name", ["llama", "falcon_new", "deepseek_v3"])
def test_unchanged_blocks_do_not_drift(
    name: str, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    model = tiny_model(name)
    stream = None
    for block in Walker(model, batch_size=2).walk(tiny_tokens(3, 12)):
        pair = DensePair.open(block, stream)
        for site in block.sites:
            if site.routed:
                continue
            for batch in pair.observe(site):
                assert torch.equal(batch.compressed, batch.dense)
                assert batch.drift is None or (batch.drift == 0).all()
        stream = pair.advance()


def test_both_models_are_what_plain_forwards_see(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    tokens = tiny_tokens(2, 12)
    dense, compressed = tiny_model("llama"), tiny_model("llama")
    stream = None
    for block in Walker(compressed, batch_size=2).walk(tokens):
        pair = DensePair.open(block, stream)
        for linear in block.linears:
            linear.write_weight(linear.read_weight() * 0.9)
        if block.index == 1:
            break
        stream = pair.advance()
    site = block.sites[-1]
    (batch,) = pair.observe(site)
    name = site.linears[0].name
    for model, read in ((dense, batch.dense), (compressed, batch.compressed)):
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        handle.remove()
        assert torch.allclose(seen[0], read, atol=1e-6)


def test_the_drift_is_that_of_the_residual_stream(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    tokens = tiny_tokens(2, 12)
    model = tiny_model("llama")
    block = next(Walker(model, batch_size=2).walk(tokens))
    pair = DensePair.open(block, None)
    attention = next(linear for linear in block.linears if linear.name.endswith("o_proj"))
    dense_weight = attention.read_weight()
    attention.write_weight(dense_weight * 0.5)
    (batch,) = pair.observe(block.sites[-1])
    assert batch.drift is not None
    (inputs, _), *_ = (
        (observed.dense, observed.drift) for observed in pair.observe(block.sites[1])
    )
    expected = inputs @ dense_weight.T * 0.5
    assert torch.allclose(batch.drift, expected, atol=1e-5)


def test_experts_drift_into_what_is_added_after_them(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    """The shared expert of DeepSeek comes last: it sees the drift that the routed ones made."""
    model = tiny_model("deepseek_v3")
    *_, block = walk_until(model, tiny_tokens(2, 12), 1)
    pair = DensePair.open(block, None)
    _, hidden, call = next(block.batches())
    with torch.no_grad():
        before = call.replay(block.module, hidden)
        for site in block.sites:
            for linear in site.linears if site.routed else ():
                linear.write_weight(linear.read_weight() * 0.9)
        after = call.replay(block.module, hidden)
    (batch,) = pair.observe(block.sites[-1])
    assert batch.drift is not None
    assert batch.drift.abs().max() > 0.01
    assert torch.allclose(batch.drift, (before - after).flatten(0, -2), atol=1e-5)
    attention = next(site for site in block.sites if site.name == "self_attn.o_proj")
    (batch,) = pair.observe(attention)
    assert batch.drift is not None
    assert not batch.drift.any()


def test_experts_are_not_paired(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    block = next(Walker(tiny_model("mixtral"), batch_size=2).walk(tiny_tokens(2, 12)))
    pair = DensePair.open(block, None)
    with pytest.raises(ValueError, match=r"gate_up_proj\.0 reads other tokens"):
        next(pair.observe(block.sites[-8]))
