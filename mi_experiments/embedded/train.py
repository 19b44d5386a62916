"""Train the shipped model: `python -m mi_experiments.embedded.train [directory]`.

Everything is seeded; the only argument is where the model goes (default: the package's own
`model` directory). The hidden matrices learn by Muon, embeddings and norms by AdamW; the learning
rates rise linearly and then fall linearly to zero. At the end the channels are given unequal scales
(see `channels`) and the weights are rounded to bfloat16.
"""

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mi_experiments.embedded import MODEL_DIRECTORY
from mi_experiments.embedded.channels import spread_channels_
from mi_experiments.embedded.language import documents, stream, true_nll, vocabulary
from mi_experiments.embedded.lexicon import SPECIAL_TOKENS
from mi_experiments.embedded.tokenizer import build_tokenizer

CONTEXT = 256
STEPS = 5000
WARMUP = 100
BATCH_TOKENS = 2048
POOL_BATCHES = 16
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WEIGHT_DECAY = 0.1
SPREAD = 0.6
EVALUATE_EVERY = 500
IGNORED = -100
_, BEGIN, END, PAD = range(len(SPECIAL_TOKENS))


def build_model() -> LlamaForCausalLM:
    """Build the untrained model: 4 blocks, 8 query and 4 key-value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def walk_batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[Int[Tensor, "documents tokens"]]:
    """Yield batches of about `BATCH_TOKENS` tokens, padded with `<pad>`.

    Documents of similar length share a batch, so that little is padded; the batches of a pool are
    shuffled.
    """
    text, random = stream("train"), Random(0)
    while True:
        pool: list[list[int]] = []
        while sum(map(len, pool)) < BATCH_TOKENS * POOL_BATCHES:
            pool += tokenizer(list(islice(text, 64)))["input_ids"]
        batches: list[list[list[int]]] = [[]]
        for document in sorted(pool, key=len):
            if len(batches[-1]) * len(document) >= BATCH_TOKENS:
                batches.append([])
            batches[-1].append(document)
        random.shuffle(batches)
        for batch in batches:
            width = max(map(len, batch))
            yield torch.tensor([ids + [PAD] * (width - len(ids)) for ids in batch])


def loss_of(
    model: LlamaForCausalLM, batch: Int[Tensor, "documents tokens"], reduction: str
) -> Tensor:
    """Compute the negative log-likelihood of the predicted tokens of padded documents, in nats."""
    # causal attention: padding on the right cannot reach a document's own tokens
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    padding = torch.eq(batch[:, 1:], PAD)
    targets = batch[:, 1:].masked_fill(padding, IGNORED)
    return cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.inference_mode()
def excess_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[float, float]:
    """Measure model and true negative log-likelihood, both in nats per token of the same tokens."""
    floor = torch.cat([true_nll(text) for text in texts])
    total = 0.0
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, return_tensors="pt")
        total += float(loss_of(model, batch["input_ids"], "sum"))
    return total / len(floor), float(floor.mean())


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Give the blocks' matrices to Muon and everything else to AdamW."""
    matrices = {n: p for n, p in model.model.layers.named_parameters() if p.ndim == 2}
    attention = [p for n, p in matrices.items() if "self_attn" in n]
    mlp = [p for n, p in matrices.items() if "mlp" in n]
    taken = set(map(id, matrices.values()))
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        *(
            torch.optim.Muon(part, lr=MUON_RATE, weight_decay=WEIGHT_DECAY)
            for part in (mlp, attention)
        ),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def add_gradients(
    model: LlamaForCausalLM, part: Int[Tensor, "documents tokens"], predicted: int
) -> float:
    """Add the gradient of a part's loss, divided by the batch's predicted tokens."""
    # without the cache, because threads may not share the casts of the weights
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = loss_of(model, part, "sum") / predicted
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def train_(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    """Train the model in place, printing its loss on held-out documents beside the floor."""
    optimizers = optimizers_of(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        )
        for optimizer in optimizers
    ]
    held_out = documents("evaluation", 64)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]:.4f} nats"))
    # one thread for each half of a batch: they meet once a step, not once an operation
    torch.set_num_threads(1)
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(2) as pool:
        task = progress.add_task("training", total=STEPS, loss=float("nan"))
        for step, batch in zip(range(STEPS), walk_batches(tokenizer), strict=False):
            predicted = int((batch[:, 1:] != PAD).sum())
            add = partial(add_gradients, model, predicted=predicted)
            loss = sum(pool.map(add, batch.chunk(2)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            model.zero_grad()
            for schedule in schedules:
                schedule.step()
            progress.update(task, advance=1, loss=loss)
            if (step + 1) % EVALUATE_EVERY == 0:
                dense, floor = excess_loss(model, tokenizer, held_out)
                console.print(f"step {step + 1}: {dense:.4f} nats, floor {floor:.4f}")


def build(directory: Path, console: Console) -> None:
    """Train a model and write it with its tokenizer as a Hugging Face directory."""
    model, tokenizer = build_model(), build_tokenizer(vocabulary(), CONTEXT)
    train_(model, tokenizer, console)
    spread_channels_(model, SPREAD, torch.Generator().manual_seed(0))
    model.bfloat16().save_pretrained(directory)
    # A fresh one: padding batches has left its mark on the tokenizer of the training.
    build_tokenizer(vocabulary(), CONTEXT).save_pretrained(directory)
    model.float()  # type: ignore[no-untyped-call]
    dense, floor = excess_loss(model, tokenizer, documents("evaluation", 256))
    console.print(f"perplexity {math.exp(dense):.4f}, floor {math.exp(floor):.4f}: {directory}")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_DIRECTORY, Console())
