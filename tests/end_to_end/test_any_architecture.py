"""A whole run on every architecture: streamed, compressed, stored, evaluated and reloaded."""

import random
from pathlib import Path

import composed
import pytest
import torch
from evaluations import measure_perplexity
from safetensors import safe_open
from tiny_models import TINY_CONFIGS, build_byte_tokenizer, build_tiny_model
from transformers import AutoModelForCausalLM

from mi_experiments.config.config import Config
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import run_experiment
from mi_experiments.llm.loading import open_model
from mi_experiments.llm.walker import Walker
from mi_experiments.records.linears import read_linears
from mi_experiments.records.tracking import Tracker

EVERY_DAY = ("llama", "gpt2", "bloom", "mixtral", "deepseek_v3", "gpt_oss")
"""Tied and not, Conv1D, tuples, fused experts, blocks that differ, transposed experts."""

SCARCE = {"llama4": "keep"}

EXACT = 1e-5
"""Relative, in float32: the whole model and the streamed one sum logits in another order."""


def config_of(directory: Path, text: Path, *overrides: str) -> Config:
    base = [
        "model=local", f"model.path={directory}", "model.seqlen=32",
        "dataset=text", f"dataset.path={text}", "dataset.nsamples=6", "dataset.batch_size=2",
        "evaluation.datasets.text.max_windows=4", "evaluation.batch_tokens=64",
        "n_groups.multiple=1", "n_groups.count=2", "tracking=disabled", "export=dense",
        "recipe.max_escalated=1",
    ]  # fmt: skip
    return composed.config_of(*overrides, base=base)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow)
        for name in TINY_CONFIGS
    ],
)
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    directory, run_dir, text = tmp_path / "model", tmp_path / "run", tmp_path / "text.txt"
    model = build_tiny_model(name, vocab_size=260)
    model.save_pretrained(directory, max_shard_size="40KB")
    build_byte_tokenizer().save_pretrained(directory)
    words = ["channel", "block", "linear", "site", "grid", "width", "budget", "sweep"]
    text.write_text(" ".join(random.Random(0).choices(words, k=2000)))
    run_dir.mkdir()
    # Llama 4 has no way to show an expert tokens that are not routed to it.
    config = config_of(directory, text, f"recipe.scarce_tokens={SCARCE.get(name, 'all_tokens')}")
    tracker = Tracker.open(config, run_dir, sweep_dir=None, job="test")
    result = run_experiment(config, run_dir, tracker, Progress())

    # The dense numbers are those of the model held whole.
    whole = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()
    opened = open_model(str(directory), revision=None, dtype="auto", device="cpu", offline=True)
    tokens = torch.randint(2, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    (dense,) = result.dense.values()
    windows = list(torch.randint(2, 250, (3, 32), generator=torch.Generator().manual_seed(1)))
    kwargs = {"batch_tokens": 64, "logits_chunk": 16}
    streamed = measure_perplexity(Walker(opened.model, weights=opened.weights), windows, **kwargs)
    with torch.no_grad():
        logits = [whole(input_ids=window[None]).logits[0, :-1].double() for window in windows]
    by_hand = torch.stack([
        torch.nn.functional.cross_entropy(z, w[1:]) for z, w in zip(logits, windows, strict=True)
    ]).mean()  # fmt: skip
    assert streamed.mean == pytest.approx(by_hand.item(), rel=EXACT)
    assert dense.perplexity > 1

    # Every weight of the blocks is compressed, and the compressed model is the one on disk.
    assert result.coverage == 1
    assert result.bits is not None
    # What is kept counts what it is, and the record says how much that is.
    assert (result.bits.average <= 4) is ("kept" not in result.statuses)
    linears = read_linears(run_dir)
    blocks = dict(opened.weights.model.named_parameters())
    inside = [
        parameter
        for key, parameter in blocks.items()
        if key.startswith(f"{opened.weights.path}.") and parameter.ndim > 1 and "bias" not in key
    ]
    assert sum(linear.weights for linear in linears) == sum(p.numel() for p in inside)
    reloaded = AutoModelForCausalLM.from_pretrained(
        run_dir / "model", experts_implementation="eager"
    ).eval()
    stored = open_model(
        str(run_dir / "model"), revision=None, dtype="auto", device="cpu", offline=True
    )
    (compressed,) = result.compressed.values()
    again = measure_perplexity(Walker(stored.model, weights=stored.weights), windows, **kwargs)
    stored.weights.load_all()
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=tokens).logits, stored.model(tokens).logits)
    assert again.mean != streamed.mean
    assert compressed.perplexity > 1
    embedding = reloaded.get_input_embeddings().weight
    assert torch.equal(embedding, whole.get_input_embeddings().weight)
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (reloaded.get_output_embeddings().weight is embedding) is tied

    # The files hold what the originals hold, under the same names.
    def names(folder: Path) -> set[str]:
        found: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened_file:
                found |= set(opened_file.keys())
        return found

    assert names(run_dir / "model") == names(directory)
