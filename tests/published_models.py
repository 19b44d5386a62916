"""Tiny random models and corpora in the shapes and file formats of the published ones.

A model has the config entries of its namesake in conf/shapes.yaml, with small sizes; its tokenizer
is of the published class, with a token per character, and comes from the files that the hub has.
"""

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaTokenizer

from mi_experiments.commands.run import conf_directory

SHAPES: dict[str, dict[str, Any]] = OmegaConf.to_container(  # type: ignore[assignment]
    OmegaConf.load(Path(conf_directory()) / "shapes.yaml")
)
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "ffn_dim": 512,
    "vocab_size": 304,
}


def small_shape(name: str, **sizes: int) -> dict[str, Any]:
    """Return the published config entries, sizes made small, with what they say of each other."""
    shape = SHAPES[name]
    small = {key: (SMALL | sizes).get(key, value) for key, value in shape.items()}
    if "word_embed_proj_dim" in shape:
        narrow = shape["hidden_size"] // shape["word_embed_proj_dim"]
        small["word_embed_proj_dim"] = small["hidden_size"] // narrow
    return small


def save_small_model(name: str, directory: Path, **sizes: int) -> None:
    """Write a random model and its tokenizer as a hub directory."""
    shape = small_shape(name, **sizes)
    kind = shape.pop("model_type")
    config = CONFIG_MAPPING[kind](**shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Norms and biases too, so that every part matters.
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    {"opt": save_opt_tokenizer, "llama": save_llama_tokenizer}[kind](directory)


def save_opt_tokenizer(directory: Path) -> None:
    """Write what facebook/opt-* has: GPT-2's files, its class, and `</s>` as beginning token."""
    alphabet = sorted(ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", "<unk>", *alphabet]
    files = {
        "vocab.json": {token: index for index, token in enumerate(names)},
        "special_tokens_map.json": {
            "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace",
            "add_prefix_space": False,
            "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>",
        },
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def save_llama_tokenizer(directory: Path) -> None:
    """Write a tokenizer of LLaMA's class, which puts `<s>` before a text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.")
    vocabulary = {token: index for index, token in enumerate(names)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    tokenizer.save_pretrained(directory)


WORDS = ["".join(word) for word in itertools.product("bdklmnrst", "aeiou", "bdklmnrst", "aeiou")]


def sentences(corpus: str, split: str, lengths: Sequence[int]) -> list[str]:
    """Return a text of each length in characters; every corpus and split has its own."""
    draw = random.Random(f"{corpus} {split}")
    made = []
    for length in lengths:
        words = [draw.choice(WORDS) for _ in range(length // 5 + 1)]
        made.append(" ".join(words)[:length])
    return made


def corpus_rows(corpus: str, split: str) -> list[str]:
    """Return the rows of a constructed corpus, laid out as those of the published one."""
    if corpus == "wikitext2":  # headings and blank rows are rows
        text = sentences(corpus, split, [60 + 7 * (i % 31) for i in range(120)])
        headed = [("", f" = {body[:12]} = \n" if i % 5 == 0 else "", f" {body} \n")
                  for i, body in enumerate(text)]  # fmt: skip
        return [row for rows in headed for row in rows]
    if corpus == "ptb":
        return sentences(corpus, split, [40 + i % 90 for i in range(100)])
    if split == "train":  # short documents among long ones
        return sentences(corpus, split, [40 + 131 * (i % 37) for i in range(80)])
    return sentences(corpus, split, [60 + i % 97 for i in range(1200)])


def save_corpora(root: Path, corpora: Any) -> list[str]:
    """Write every published corpus in the hub's own format, and return where as overrides."""
    for name, corpus in corpora.items():
        for split, files in corpus.splits.items():
            (file,) = files
            path, texts = root / name / file, corpus_rows(name, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pq.write_table(pa.table({corpus.text_field: texts}), path)
            else:
                lines = (json.dumps({corpus.text_field: text, "timestamp": "2019-04-25T12:57:54Z",
                                     "url": "https://example.org"}) for text in texts)  # fmt: skip
                path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return [f"corpora.{name}.path={root / name}" for name in corpora]
