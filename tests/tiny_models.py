"""Tiny random models and a tokenizer, built without a network; the fixtures hand them out."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **SIZES,
    **EXPERTS,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
"""DeepSeek: low-rank attention, a dense first block, a shared expert beside the routed ones."""

TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama3": (
        "llama",
        {
            **GROUPED,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", {key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "qwen3": ("qwen3", GROUPED),
    "gemma2": ("gemma2", {**GROUPED, "sliding_window": 4}),
    # A window much shorter than the samples: its blocks are called with different arguments.
    "gemma3": (
        "gemma3_text",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi": ("phi", {**SIZES, "intermediate_size": 48}),
    "phi3": ("phi3", {key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "opt": ("opt", {**SIZES, "pad_token_id": 1, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    # Like the 350M one: narrow embeddings, norms behind the sums.
    "opt_narrow": (
        "opt",
        {
            **SIZES,
            "pad_token_id": 1,
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2": ("gpt2", {**SIZES, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 48}),
    "gpt_neo": (
        "gpt_neo",
        {**SIZES, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gptj": ("gptj", {**SIZES, "rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", SIZES),
    "bloom": ("bloom", SIZES),
    "falcon": ("falcon", {**SIZES, "bias": True}),
    "falcon_new": (
        "falcon",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": (
        "falcon",
        {**SIZES, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("mpt", {**SIZES, "max_seq_len": 64}),
    "starcoder2": ("starcoder2", {**GROUPED, "sliding_window": 4}),
    "stablelm": ("stablelm", {**GROUPED, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {**GROUPED, "use_parallel_residual": True}),
    "olmo2": ("olmo2", GROUPED),
    "cohere": ("cohere", GROUPED),
    "granite": ("granite", {**GROUPED, "residual_multiplier": 0.5}),
    "mixtral": (
        "mixtral",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**GROUPED, **EXPERTS, "moe_intermediate_size": 16, "num_experts": 4},
    ),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    # All experts in one product, each with all tokens, those of others as zeros.
    "llama4": (
        "llama4_text",
        {
            **GROUPED,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    # Experts stored as [columns, rows], each with biases.
    "gpt_oss": (
        "gpt_oss",
        {
            **GROUPED,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
"""Of each architecture: the model type of transformers, and the keys of its config."""


def tiny_config(name: str) -> PreTrainedConfig:
    """Build the config of an architecture."""
    kind, values = TINY_CONFIGS[name]
    return CONFIG_MAPPING[kind](**values)


def build_tiny_model(
    name: str, *, device: str = "cpu", attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    """Build a random model of an architecture, the same one every time."""
    # Experts one by one, but where there are no tokens to tell which of them run.
    experts = "batched_mm" if device == "meta" else "eager"
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    if attention is None:
        sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
        attention = "sdpa" if sdpa else "eager"
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
