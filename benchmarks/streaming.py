"""Peak memory of a whole run on a model larger than what is held of it.

Writes random sharded bfloat16 checkpoints of TinyLlama's shape (1.1 billion parameters, 22 blocks)
and of twice as many blocks, sends both through a full run (plan, compression at 50 % and 4 bits,
evaluation before and after), and compares the peak resident sets of the two processes.

    python benchmarks/streaming.py [--blocks 22 44] [--nsamples 8] [--keep DIR]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000


def write_checkpoint(directory: Path, blocks: int) -> int:
    """Write a random Llama, one shard a block, and return its number of parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    write_tokenizer(directory)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return weight.to(torch.bfloat16)

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shards = {
        "model-rest.safetensors": {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": ones,
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        }
    }
    places, parameters = {}, 0
    for block in range(-1, blocks):
        if block >= 0:
            prefix = f"model.layers.{block}."
            tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = ones.clone()
            shards = {f"model-{block:05}.safetensors": tensors}
        for name, tensors in shards.items():
            save_file(tensors, directory / name, {"format": "pt"})
            places |= dict.fromkeys(tensors, name)
            parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


def write_text(path: Path, words: int) -> None:
    """Write text that a random model finds as good as any other."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(97, 123, (words, 6), generator=generator).tolist()
    path.write_text(" ".join("".join(map(chr, word)) for word in codes))


def peak_of_run(model: Path, text: Path, run_dir: Path, nsamples: int) -> tuple[float, float]:
    """Run mi-run in a process of its own; return its peak resident gigabytes and its seconds."""
    command = [
        str(Path(sys.executable).with_name("mi-run")),
        "model=local",
        f"model.path={model}",
        "model.seqlen=256",
        "dataset=text",
        f"dataset.path={text}",
        f"dataset.nsamples={nsamples}",
        "evaluation.datasets.text.max_windows=8",
        "tracking=disabled",
        f"hydra.run.dir={run_dir}",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"mi-run failed with status {status}: see {run_dir}/run.log")
    return usage.ru_maxrss * 1024 / 1e9, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[22, 44])
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="a directory to leave everything in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "text.txt", 20000)
        peaks = []
        for blocks in arguments.blocks:
            model = folder / f"llama-{blocks}"
            parameters = write_checkpoint(model, blocks)
            run_dir = folder / f"run-{blocks}-{time.time_ns()}"
            peak, seconds = peak_of_run(model, folder / "text.txt", run_dir, arguments.nsamples)
            peaks.append(peak)
            print(
                f"{blocks:3} blocks  {parameters / 1e9:.2f} B parameters  "
                f"peak {peak:.3f} GB  {seconds:.0f} s  "
                f"{peak / peaks[0] - 1:+.1%} against {arguments.blocks[0]} blocks",
                flush=True,
            )


if __name__ == "__main__":
    main()
