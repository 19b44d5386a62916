"""Twins: both models on the same samples, and writers found by trying."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mi_experiments.llm.blocks import walk_blocks
from mi_experiments.llm.twins import Twins, find_writers

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    # Gemma normalises what a linear gives before adding it: nothing is added as it is.
    "gemma3": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_those_of_the_textbook(
    name: str, dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    model = tiny_model(name).to(dtype)
    block = next(walk_blocks(model, tiny_tokens(3, 12), batch_size=2))
    writers = find_writers(block)
    found = [linear.removeprefix(f"{block.name}.") for linear in writers]
    assert sorted(found) == sorted(WRITERS[name])


def test_unchanged_blocks_do_not_drift(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    stream = None
    for block in walk_blocks(model, tiny_tokens(3, 12), batch_size=2):
        twins = Twins.open(block, stream)
        for site in block.sites:
            for batch in twins.observe(site):
                assert torch.equal(batch.compressed, batch.dense)
                assert batch.drift is None or (batch.drift == 0).all()
        stream = twins.advance()


def test_both_models_are_what_plain_forwards_see(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]
) -> None:
    tokens = tiny_tokens(2, 12)
    dense, compressed = tiny_model("llama"), tiny_model("llama")
    stream = None
    for block in walk_blocks(compressed, tokens, batch_size=2):
        twins = Twins.open(block, stream)
        for linear in block.linears:
            linear.write_weight(linear.read_weight() * 0.9)
        if block.index == 1:
            break
        stream = twins.advance()
    site = block.sites[-1]
    (batch,) = twins.observe(site)
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
    block = next(walk_blocks(model, tokens, batch_size=2))
    twins = Twins.open(block, None)
    attention = next(linear for linear in block.linears if linear.name.endswith("o_proj"))
    dense_weight = attention.read_weight()
    attention.write_weight(dense_weight * 0.5)
    (batch,) = twins.observe(block.sites[-1])
    assert batch.drift is not None
    (inputs, _), *_ = (
        (observed.dense, observed.drift) for observed in twins.observe(block.sites[1])
    )
    expected = inputs @ dense_weight.T * 0.5
    assert torch.allclose(batch.drift, expected, atol=1e-5)
