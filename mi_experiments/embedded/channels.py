"""Give the channels of a Llama unequal scales, as large models have, without changing its function.

A model this small, trained this briefly, has channels of nearly equal scale, and so loses almost
nothing at 3 bits; in large language models a few channels are far larger than the rest, which is
what makes low precision hard (arXiv:2208.07339). A channel that passes through no non-linearity may
be multiplied by any positive number where it is made and divided by it where it is read, so the
trained function allows any spread of scales (the inverse of the smoothing in arXiv:2211.10438).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM


def _draw_scales(
    channels: int, spread: float, generator: torch.Generator
) -> Float[Tensor, "channels"]:
    """Draw log-normal scales: `spread` is the standard deviation of the logarithm."""
    return torch.exp(spread * torch.randn(channels, generator=generator))


@torch.no_grad()
def spread_channels_(model: LlamaForCausalLM, spread: float, generator: torch.Generator) -> None:
    """Rescale every channel that a linear of a block reads, in place; the function stays the same.

    Args:
        model: the model, in float32 or float64.
        spread: the standard deviation of the natural logarithm of the scales.
        generator: the source of the scales.
    """
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        after_norms = [
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ]
        for norm, linears in after_norms:
            scales = _draw_scales(len(norm.weight), spread, generator).to(norm.weight)
            norm.weight *= scales
            for linear in linears:
                linear.weight /= scales

        scales = _draw_scales(len(mlp.up_proj.weight), spread, generator).to(mlp.up_proj.weight)
        mlp.up_proj.weight *= scales[:, None]
        mlp.down_proj.weight /= scales

        values = attention.v_proj.weight
        scales = _draw_scales(len(values), spread, generator).to(values)
        values *= scales[:, None]
        # each key-value head is read through several consecutive query heads
        per_head = scales.reshape(-1, 1, attention.head_dim)
        queries = attention.o_proj.weight.shape[1] // len(scales)
        attention.o_proj.weight /= per_head.expand(-1, queries, -1).flatten()
