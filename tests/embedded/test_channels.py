"""Unequal channel scales leave the function of a model as it was."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mi_experiments.embedded.channels import spread_channels_


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def test_function_is_unchanged(model: LlamaForCausalLM) -> None:
    tokens = torch.arange(15)[None]
    before = model(tokens).logits
    spread_channels_(model, 0.8, torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_every_channel_that_a_linear_reads_has_its_scale(model: LlamaForCausalLM) -> None:
    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str):
        return lambda _, read: inputs.update({name: read[0].flatten(0, 1).clone()})

    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(remember(name))
    tokens = torch.arange(15)[None]
    model(tokens)
    before = dict(inputs)
    spread_channels_(model, 0.8, torch.Generator().manual_seed(1))
    model(tokens)
    assert len(inputs) == 2 * 7
    for name, after in inputs.items():
        ratio = after / before[name]
        # one scale a channel, the same for all tokens, log-normal of the standard deviation asked
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-8, atol=0)
        assert 0.5 < float(ratio[0].log().std()) < 1.1
