"""Windows: evaluation tokens are exactly what their protocol says."""

import hashlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from word_tokenizers import ADDING, BARE, BOS, PLAIN, numbered

from mi_experiments.config.texts import BosPolicy, Windows
from mi_experiments.errors import InputError
from mi_experiments.texts.windows import (
    EvaluationWindows,
    adds_bos,
    evaluation_windows,
    token_hash,
    tokenize,
)


def cut(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    windows: str,
    seqlen: int,
    separator: str = " 5 ",
    max_windows: int | None = None,
    seed: int = 0,
    add_bos: str = "auto",
) -> EvaluationWindows:
    return evaluation_windows(
        tokenizer,
        documents,
        windows=Windows(windows),
        separator=separator,
        seqlen=seqlen,
        max_windows=max_windows,
        seed=seed,
        add_bos=BosPolicy(add_bos),
    )


@pytest.mark.parametrize(
    ("tokenizer", "policy", "expected"),
    [
        (ADDING, "auto", [BOS, 10, 11]),
        (ADDING, "always", [BOS, 10, 11]),
        (ADDING, "never", [10, 11]),
        (PLAIN, "auto", [10, 11]),
        (PLAIN, "always", [BOS, 10, 11]),
        (BARE, "auto", [10, 11]),
        (BARE, "never", [10, 11]),
    ],
)
def test_beginning_token_follows_the_policy(
    tokenizer: PreTrainedTokenizerFast, policy: str, expected: list[int]
) -> None:
    bos = adds_bos(tokenizer, BosPolicy(policy))
    assert tokenize(tokenizer, "10 11", bos).tolist() == expected
    assert tokenize(tokenizer, "", bos).tolist() == []


def test_auto_is_what_the_tokenizer_does() -> None:
    for tokenizer in (ADDING, PLAIN, BARE):
        bos = adds_bos(tokenizer, BosPolicy.auto)
        assert tokenize(tokenizer, "10 11", bos).tolist() == tokenizer("10 11")["input_ids"]


def test_the_beginning_token_is_never_doubled() -> None:
    assert ADDING("<s> 10")["input_ids"] == [BOS, BOS, 10]
    assert tokenize(ADDING, "<s> 10", bos=True).tolist() == [BOS, 10]
    assert tokenize(ADDING, "<s> <s>", bos=True).tolist() == []


def test_always_without_a_beginning_token_is_an_error() -> None:
    with pytest.raises(InputError, match=r"add_bos=always.*no beginning token"):
        adds_bos(BARE, BosPolicy.always)


# Evaluation


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    seqlen=st.integers(2, 12),
    max_windows=st.none() | st.integers(1, 4),
)
def test_joined_windows_are_the_text_from_its_beginning(
    lengths: list[int], seqlen: int, max_windows: int | None
) -> None:
    documents = numbered(*lengths)
    whole = ADDING(" 5 ".join(documents))["input_ids"]
    whole = [] if whole == [BOS] else whole
    count = min(len(whole) // seqlen, len(whole) if max_windows is None else max_windows)
    if count == 0:
        with pytest.raises(InputError, match=f"has {len(whole)} tokens .* seqlen={seqlen}"):
            cut(ADDING, documents, "joined", seqlen, max_windows=max_windows)
        return
    result = cut(ADDING, documents, "joined", seqlen, max_windows=max_windows)
    assert [len(window) for window in result.windows] == [seqlen] * count
    assert torch.cat(result.windows).tolist() == whole[: count * seqlen]
    assert result.tokens == count * seqlen
    assert result.dropped_tokens == len(whole) - count * seqlen
    assert result.skipped_documents == 0
    assert result.bos
    assert (torch.cat(result.windows) == BOS).sum() == 1


def test_document_windows_are_bos_and_text_cut_and_counted() -> None:
    documents = numbered(3, 0, 9, 1)
    result = cut(ADDING, documents, "documents", seqlen=6)
    assert [window.tolist() for window in result.windows] == [
        [BOS, 10, 11, 12],
        [BOS, 13, 14, 15, 16, 17],
        [BOS, 22],
    ]
    assert (result.tokens, result.dropped_tokens, result.skipped_documents) == (12, 4, 1)
    plain = cut(PLAIN, documents, "documents", seqlen=6)
    assert [len(window) for window in plain.windows] == [3, 6]
    assert (plain.dropped_tokens, plain.skipped_documents, plain.bos) == (4, 2, False)
    first = cut(ADDING, documents, "documents", seqlen=6, max_windows=2)
    assert [window.tolist() for window in first.windows] == [
        window.tolist() for window in result.windows[:2]
    ]


def test_documents_that_predict_nothing_are_an_error() -> None:
    with pytest.raises(InputError, match="fills no window"):
        cut(PLAIN, ["10", ""], "documents", seqlen=6)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_windows_are_drawn_as_published(seed: int) -> None:
    documents = numbered(3, 9, 5, 14)
    random.seed(seed)
    expected = []
    while len(expected) < 20:
        ids = ADDING(documents[random.randint(0, 3)])["input_ids"]
        if len(ids) > 6:
            start = random.randint(0, len(ids) - 6 - 1)
            expected.append(ids[start : start + 6])
    result = cut(ADDING, documents, "sampled", seqlen=6, max_windows=20, seed=seed)
    assert [window.tolist() for window in result.windows] == expected
    assert (result.tokens, result.dropped_tokens, result.skipped_documents) == (120, 0, 0)
    # Inside one document each, and a beginning token only where a window begins its document.
    assert any(BOS in window for window in expected)
    assert all(BOS not in window[1:] for window in expected)


def test_sampled_windows_need_their_number_and_a_long_document() -> None:
    with pytest.raises(ValueError, match="max_windows"):
        cut(PLAIN, numbered(9), "sampled", seqlen=6)
    with pytest.raises(InputError, match="seqlen=9 tokens, and of 2 the longest has 9"):
        cut(PLAIN, numbered(9, 3), "sampled", seqlen=9, max_windows=2)


@pytest.mark.parametrize(
    ("tokenizer", "policy", "bos"),
    [
        (ADDING, "auto", True),
        (ADDING, "always", True),
        (ADDING, "never", False),
        (PLAIN, "auto", False),
        (PLAIN, "always", True),
        (BARE, "auto", False),
        (BARE, "never", False),
    ],
)
def test_one_beginning_token_or_none_as_the_protocol_says(
    tokenizer: PreTrainedTokenizerFast, policy: str, bos: bool
) -> None:
    texts = numbered(7, 8)
    joined = cut(tokenizer, texts, "joined", seqlen=4, add_bos=policy)
    documents = cut(tokenizer, texts, "documents", seqlen=4, add_bos=policy)
    assert joined.bos is documents.bos is bos
    # One for the whole text, which has several windows; one for each document.
    whole = torch.cat(joined.windows)
    assert (whole == BOS).nonzero().flatten().tolist() == ([0] if bos else [])
    assert len(joined.windows) == 4
    for window in documents.windows:
        assert (window == BOS).nonzero().flatten().tolist() == ([0] if bos else [])


@pytest.mark.parametrize("windows", ["joined", "documents"])
def test_windows_survive_as_tensors(windows: str) -> None:
    value = cut(ADDING, numbered(3, 0, 9, 1), windows, seqlen=6)
    again = EvaluationWindows.from_tensors(value.to_tensors())
    assert [w.tolist() for w in again.windows] == [w.tolist() for w in value.windows]
    assert (again.tokens, again.dropped_tokens) == (value.tokens, value.dropped_tokens)
    assert (again.skipped_documents, again.bos) == (value.skipped_documents, value.bos)


# Hash


def test_token_hash_is_sha256_of_shape_and_ids() -> None:
    tokens = torch.arange(6)
    content = b"".join(i.to_bytes(8, "little") for i in range(6))
    assert token_hash(tokens) == hashlib.sha256(b"(6,)" + content).hexdigest()
    hashes = {token_hash(t) for t in (tokens, tokens.view(2, 3), tokens.view(3, 2), tokens.flip(0))}
    assert len(hashes) == 4
    assert token_hash(tokens.view(2, 3).T.contiguous().T) == token_hash(tokens.view(2, 3))
