"""Calibration and evaluation text never overlap."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mi_experiments.embedded import language
from mi_experiments.errors import InputError
from mi_experiments.texts import hold_out, true_perplexity


@given(count=st.integers(2, 50), share=st.floats(0.05, 0.9))
def test_documents_are_split_once_and_in_order(count: int, share: float) -> None:
    documents = [f"document {number}" for number in range(count)]
    if math.ceil(share * count) == count:
        with pytest.raises(InputError, match=r"dataset\.holdout"):
            hold_out(documents, share)
        return
    kept, held = hold_out(documents, share)
    assert kept + held == documents
    assert len(held) == math.ceil(share * count)


@given(words=st.lists(st.text("abc", min_size=1, max_size=5), min_size=10, max_size=40))
def test_one_document_is_cut_between_words(words: list[str]) -> None:
    text = " ".join(words)
    (kept,), (held,) = hold_out([text], 0.2)
    assert kept + held == text
    assert kept.split() + held.split() == words
    assert len(held) >= 0.2 * len(text) - 1


def test_a_single_word_cannot_be_split() -> None:
    with pytest.raises(InputError, match="leaves no text on one side"):
        hold_out(["word"], 0.2)


def test_the_floor_is_the_true_likelihood_of_the_same_tokens() -> None:
    documents = language.documents("evaluation", 5)
    losses = [language.true_nll(document) for document in documents]
    assert true_perplexity(documents, 10_000) == pytest.approx(
        math.exp(float(torch.cat(losses).mean()))
    )
    cut = [loss[:9] for loss in losses]
    assert true_perplexity(documents, 10) == pytest.approx(math.exp(float(torch.cat(cut).mean())))
