"""The shipped model speaks the language nearly as well as is possible, and feels low precision."""

import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mi_experiments.embedded import MODEL_DIRECTORY, language
from mi_experiments.embedded.tokenizer import build_tokenizer

LINEARS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        MODEL_DIRECTORY, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return language.documents("evaluation", 120)


@torch.inference_mode()
def document_nll(model: LlamaForCausalLM, tokenizer, texts: list[str]) -> list[Tensor]:
    """Return the nats of every predicted token, one forward pass for each document."""
    nll = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
        nll.append(-log_probabilities.gather(1, ids[0, 1:, None])[:, 0])
    return nll


def perplexity(nll: list[Tensor]) -> float:
    return math.exp(float(torch.cat(nll).mean()))


def test_model_is_near_the_floor_and_not_below(model, tokenizer, held_out) -> None:
    model_nll = document_nll(model, tokenizer, held_out)
    true_nll = [language.true_nll(text) for text in held_out]
    assert [len(nll) for nll in model_nll] == [len(nll) for nll in true_nll]
    assert perplexity(model_nll) < 1.10 * perplexity(true_nll)
    excess = torch.stack([(m - t).sum() for m, t in zip(model_nll, true_nll, strict=True)])
    standard_error = float(excess.std()) / len(held_out) ** 0.5
    assert float(excess.mean()) > -3 * standard_error


def test_lists_are_counted_and_attributes_remembered(model, tokenizer, held_out) -> None:
    """Ends of lists are certain; attributes of the document are preferred to others of its topic.

    The model does not know whose the attributes are: with that, they would be certain as well.
    """
    ends, attributes, by_topic = [], [], []
    for text, nll in zip(held_out, document_nll(model, tokenizer, held_out), strict=True):
        words, true_nll = text.split(), language.true_nll(text)
        for i in range(8, len(words)):
            if words[i] == "." and words[i - 1].endswith("ot"):
                ends.append(float(nll[i]))
            if words[i].endswith("ix"):
                attributes.append(float(nll[i]))
                by_topic.append(float(true_nll[words.index(words[i])]))
    assert min(len(ends), len(attributes)) > 100
    assert sum(ends) / len(ends) < 0.02
    assert sum(attributes) < 0.65 * sum(by_topic)


def rounded_to_nearest(weight: Float[Tensor, "rows columns"], bits: int) -> Tensor:
    """Round to an asymmetric grid of 2^bits levels per row."""
    low = weight.amin(1, keepdim=True).clamp(max=0)
    high = weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return scale * ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def half_pruned(weight: Float[Tensor, "rows columns"]) -> Tensor:
    """Set the smaller half of the weights to zero."""
    return weight * (weight.abs() > weight.abs().median())


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        (lambda weight: rounded_to_nearest(weight, 8), 0.99, 1.003),
        (lambda weight: rounded_to_nearest(weight, 3), 1.03, math.inf),
        (half_pruned, 1.03, math.inf),
    ],
    ids=["8 bits", "3 bits", "half pruned"],
)
def test_sensitivity(
    model, tokenizer, held_out, change: Callable[[Tensor], Tensor], least: float, most: float
) -> None:
    dense = perplexity(document_nll(model, tokenizer, held_out[:40]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if LINEARS.intersection(name.split(".")):
                parameter.copy_(change(parameter))
    assert least < perplexity(document_nll(model, tokenizer, held_out[:40])) / dense < most


def test_architecture_and_size(model) -> None:
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (256, 96, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (4, 256)
    assert config.tie_word_embeddings
    assert config.vocab_size == len(language.vocabulary())
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    assert sum(file.stat().st_size for file in MODEL_DIRECTORY.iterdir()) <= 8e6
    stored = AutoModelForCausalLM.from_pretrained(
        MODEL_DIRECTORY, dtype="auto", local_files_only=True
    )
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


def test_tokenizer_round_trip(tokenizer, held_out) -> None:
    vocabulary = language.vocabulary()
    for text in held_out:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *map(vocabulary.index, text.split())]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) <= 256


def test_shipped_tokenizer_is_the_one_of_the_language(tokenizer) -> None:
    built = build_tokenizer(language.vocabulary(), 256)
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.convert_ids_to_tokens(range(512)) == language.vocabulary()
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unk>", "<s>", "</s>", "<pad>")
    assert tokenizer.model_max_length == 256
    assert tokenizer("unheard")["input_ids"] == [1, 0]
