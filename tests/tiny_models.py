"""Tiny random models and a tokenizer, built without a network; the fixtures hand them out."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}

TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "opt": lambda: OPTConfig(**{**SIZES, "pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=32),
    # A window much shorter than the samples: its blocks are called with different arguments.
    "gemma3": lambda: Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 4},
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=1,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": lambda: PhiConfig(**SIZES, intermediate_size=48),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
}  # fmt: skip


def build_tiny_model(
    name: str, *, device: str = "cpu", attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """Build a random model of an architecture, the same one every time."""
    # Experts one by one, but where there are no tokens to tell which of them run.
    experts = "batched_mm" if device == "meta" else "eager"
    config = TINY_CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, experts_implementation=experts
        )
        with torch.no_grad():
            # Large enough for every part to matter, biases and norms included.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token per byte, which adds one BOS as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
