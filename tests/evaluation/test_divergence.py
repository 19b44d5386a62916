"""The divergence is that of whole forward passes, zero for equal models, and never negative."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import build_byte_tokenizer, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from mi_experiments.errors import NumericalError
from mi_experiments.evaluation.divergence import divergence, measure_divergence
from mi_experiments.llm.loading import OpenModel, open_model
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.walker import Walker

ROUNDING = 1e-5
"""Relative: the models compute in float32, in other batches and chunks than the reference."""


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_closed_forms() -> None:
    halves, quarters = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    assert divergence(halves, quarters).item() == pytest.approx(math.log(4 / 3) / 2)
    assert divergence(quarters, halves).item() == pytest.approx(
        math.log(2) - 0.25 * math.log(4) - 0.75 * math.log(4 / 3)
    )
    # A word that the dense model excludes counts nothing; one that the other excludes, all.
    certain, open_ = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert divergence(certain, open_).item() == pytest.approx(math.log(2))
    assert divergence(certain, certain).item() == 0
    assert divergence(open_, certain).item() == math.inf


def test_it_is_quadratic_where_models_are_near() -> None:
    """KL(p ‖ p e^(εd)) → ε²/2 · Var_p(d): resolved far below the rounding of float32."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).double()
    change = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).double()
    p = logits.softmax(-1)
    variance = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
    found = divergence(logits, logits + 1e-5 * change)
    torch.testing.assert_close(found, 0.5e-10 * variance, rtol=1e-3, atol=1e-15)


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.integers(0, 9), st.floats(-9, 9))
def test_never_negative_and_blind_to_constants(
    values: list[float], seed: int, constant: float
) -> None:
    dense = torch.tensor([values])
    other = dense + torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed))
    assert divergence(dense, other).item() >= -1e-14
    assert divergence(dense, dense).item() == 0
    assert divergence(dense.double(), dense.double() + constant).item() == pytest.approx(
        0, abs=1e-12
    )


@pytest.fixture(params=["llama", "gpt2", "gemma3"], scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    directory = tmp_path_factory.mktemp(request.param)
    build_tiny_model(request.param, vocab_size=260).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return open_model(str(directory), revision=None, dtype="auto", device="cpu", offline=True)


@pytest.fixture
def changed(opened: OpenModel, tmp_path: Path) -> BlockWeights:
    """The same model with other weights in its blocks."""
    weights = opened.weights.fork()
    generator = torch.Generator().manual_seed(1)
    for block in range(len(weights.blocks)):
        weights.load(block)
        tensors = weights.stored(block)
        for tensor in tensors.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, tmp_path / f"{block}.safetensors", {"format": "pt"})
        weights.drop(block)
        weights.redirect(block, tmp_path / f"{block}.safetensors")
    return weights


def windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 260, (length,), generator=generator) for length in lengths]


def measure(dense: BlockWeights, other: BlockWeights, texts: list[Tensor], **options: int):
    asked = {"batch_tokens": 40, "logits_chunk": 32} | options
    walkers = (Walker(weights.model, weights=weights) for weights in (dense, other))
    return measure_divergence(*walkers, texts, **asked)


def reference(opened: OpenModel, changed: BlockWeights, texts: list[Tensor]) -> list[Tensor]:
    """Return the divergence after every token, from whole models and whole logits."""
    dense = AutoModelForCausalLM.from_pretrained(opened.model.name_or_path).eval()
    other = AutoModelForCausalLM.from_pretrained(opened.model.name_or_path).eval()
    state = {}
    for files in (changed.files[block] for block in range(len(changed.blocks))):
        for file in set(files.values()):
            state |= load_file(file)
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    nats = []
    with torch.no_grad():
        for text in texts:
            p, q = (m(text[None]).logits[0].double().log_softmax(-1) for m in (dense, other))
            nats.append((p.exp() * (p - q)).sum(-1))
    return nats


def test_it_is_the_mean_over_whole_forward_passes(opened: OpenModel, changed: BlockWeights) -> None:
    texts = windows(20, 20, 20, 13)
    nats = reference(opened, changed, texts)
    found = measure(opened.weights, changed, texts)
    assert (found.tokens, found.windows) == (73, 4)
    assert found.kl > 1e-3
    assert found.kl == pytest.approx(torch.cat(nats).mean().item(), rel=ROUNDING)
    # A ratio of sums over windows.
    residuals = torch.stack([(each - found.kl).sum() for each in nats])
    expected = math.sqrt(residuals.square().sum().item() * 4 / 3) / 73
    assert found.standard_error == pytest.approx(expected, rel=1e-3)


def test_waves_and_chunks_do_not_show(opened: OpenModel, changed: BlockWeights) -> None:
    texts = windows(20, 20, 20, 13)
    whole = measure(opened.weights, changed, texts)
    calls: list[int] = []
    options = {"batch_tokens": 20, "logits_chunk": 1, "wave_tokens": 40}
    parts = measure(opened.weights, changed, texts, on_block=lambda: calls.append(1), **options)
    assert parts.kl == pytest.approx(whole.kl, rel=ROUNDING)
    assert len(calls) == 4 * len(changed.blocks)


def test_equal_models_are_not_apart_at_all(opened: OpenModel) -> None:
    found = measure(opened.weights, opened.weights.fork(), windows(20, 13))
    assert found.kl == 0
    assert found.standard_error == 0
    assert all(p.is_meta for block in opened.weights.blocks for p in block.parameters())


def test_what_is_not_finite_is_named(opened: OpenModel, changed: BlockWeights) -> None:
    changed.load(1)
    tensors = changed.stored(1)
    changed.drop(1)
    next(iter(tensors.values())).fill_(math.nan)
    file = next(iter(changed.files[1].values()))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericalError, match="window 0"):
        measure(opened.weights, changed, windows(20))


def test_two_models_are_refused(opened: OpenModel) -> None:
    directory = opened.model.name_or_path
    other = open_model(directory, revision=None, dtype="auto", device="cpu", offline=True)
    with pytest.raises(ValueError, match="take turns in one model"):
        measure(opened.weights, other.weights, windows(20))
    with pytest.raises(ValueError, match="needs windows"):
        measure(opened.weights, opened.weights, [])
