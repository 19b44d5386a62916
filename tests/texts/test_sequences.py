"""Calibration: sequences are exactly what their sampling says, and enough of them or an error."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from word_tokenizers import ADDING, BOS, PLAIN, numbered

from mi_experiments.config.texts import BosPolicy, Sampling
from mi_experiments.errors import InputError
from mi_experiments.llm.walker import Walker
from mi_experiments.method.hessian import HessianAccumulator
from mi_experiments.texts.sequences import calibration_tokens


def calibrate(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    sampling: str = "packed",
    add_bos: str = "auto",
    allow_fewer: bool = False,
) -> Tensor:
    return calibration_tokens(
        tokenizer,
        documents,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        sampling=Sampling(sampling),
        allow_fewer=allow_fewer,
        add_bos=BosPolicy(add_bos),
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    nsamples=st.integers(1, 6),
    seqlen=st.integers(2, 12),
    seed=st.integers(0, 5),
)
def test_packed_windows_are_disjoint_pieces_or_an_error(
    lengths: list[int], nsamples: int, seqlen: int, seed: int
) -> None:
    documents = numbered(*lengths)
    if sum(lengths) < nsamples * seqlen:
        with pytest.raises(InputError, match=f"= {nsamples * seqlen} tokens, and the text has"):
            calibrate(PLAIN, documents, nsamples, seqlen, seed)
        return
    tokens = calibrate(PLAIN, documents, nsamples, seqlen, seed)
    assert tokens.shape == (nsamples, seqlen)
    assert len(tokens.unique()) == tokens.numel()
    # A jump in the counting is the border of a document: its last word, then another's first.
    starts = set(itertools.accumulate(lengths, initial=10))
    for window in tokens.tolist():
        for word, following in itertools.pairwise(window):
            assert following == word + 1 or (following in starts and word + 1 in starts)


def test_packed_uses_every_token_where_the_text_just_suffices() -> None:
    documents = numbered(7, 13, 4)
    tokens = calibrate(ADDING, documents, nsamples=9, seqlen=3)
    assert (tokens == BOS).sum() == 3
    assert sorted(tokens.flatten().tolist()) == [BOS] * 3 + list(range(10, 34))
    with pytest.raises(InputError, match="nsamples=10 x seqlen=3 = 30 tokens, and the text has 27"):
        calibrate(ADDING, documents, nsamples=10, seqlen=3)


def test_packed_draws_from_the_whole_of_a_single_document() -> None:
    (document,) = numbered(100)
    firsts = {calibrate(PLAIN, [document], 1, 10, seed)[0, 0].item() for seed in range(60)}
    assert firsts == set(range(10, 110, 10))


@pytest.mark.parametrize("sampling", ["packed", "document"])
def test_calibration_is_a_function_of_the_seed(sampling: str) -> None:
    documents = numbered(*range(10, 40))
    first, again, other = (calibrate(PLAIN, documents, 5, 9, seed, sampling) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_packed_reads_no_more_documents_than_needed() -> None:
    class Counting(list[str]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    documents = Counting(numbered(*[10] * 100))
    calibrate(PLAIN, documents, nsamples=4, seqlen=10)
    assert documents.reads < 10  # the four, and those that checking the argument's type looks at


def test_document_windows_lie_inside_different_long_documents() -> None:
    documents = numbered(5, 12, 6, 20, 7, 30)
    places = {10 + s: n for s, n in zip((5, 23, 50), (12, 20, 30), strict=True)}
    seen: dict[int, set[int]] = {start: set() for start in places}
    for seed in range(300):
        tokens = calibrate(PLAIN, documents, 3, 7, seed, "document")
        owners = []
        for window in tokens.tolist():
            assert window == list(range(window[0], window[0] + 7))
            owner = max(start for start in places if start <= window[0])
            assert window[-1] < owner + places[owner]
            owners.append(owner)
            seen[owner].add(window[0] - owner)
        assert sorted(owners) == sorted(places)
    assert {start: len(offsets) for start, offsets in seen.items()} == {
        start: length - 6 for start, length in places.items()
    }


def test_document_sampling_never_gives_fewer_and_ends() -> None:
    documents = numbered(5, 12, 7)
    with pytest.raises(
        InputError, match=r"needs 2 documents.*seqlen=7.*there are 1 \(24 tokens.*longest has 12\)"
    ):
        calibrate(PLAIN, documents, 2, 7, sampling="document")


# Too little text


@pytest.mark.parametrize("lengths", [(7, 13, 4), (24,), (3,) * 8])
def test_packed_takes_what_there_is_only_where_that_is_allowed(lengths: tuple[int, ...]) -> None:
    documents = numbered(*lengths)
    with pytest.raises(
        InputError, match=r"nsamples=9 x seqlen=5 = 45 .* has 24: .* 4 sequences .*allow_fewer=true"
    ):
        calibrate(PLAIN, documents, nsamples=9, seqlen=5)
    tokens = calibrate(PLAIN, documents, nsamples=9, seqlen=5, allow_fewer=True)
    assert tokens.shape == (4, 5)
    assert len(tokens.unique()) == 20
    enough = {"nsamples": 3, "seqlen": 5}
    assert torch.equal(
        calibrate(PLAIN, documents, **enough, allow_fewer=True),
        calibrate(PLAIN, documents, **enough),
    )


def test_document_sampling_takes_what_there_is_only_where_that_is_allowed() -> None:
    documents = numbered(5, 12, 7, 9)
    tokens = calibrate(PLAIN, documents, 4, 7, sampling="document", allow_fewer=True)
    assert tokens.shape == (2, 7)
    with pytest.raises(InputError, match=r"there are 2 .* dataset.allow_fewer=true"):
        calibrate(PLAIN, documents, 4, 7, sampling="document")


@pytest.mark.parametrize("sampling", ["packed", "document", "published"])
def test_nothing_at_all_is_an_error_even_where_fewer_are_allowed(sampling: str) -> None:
    with pytest.raises(InputError, match="seqlen=20"):
        calibrate(PLAIN, numbered(5, 12), 4, 20, sampling=sampling, allow_fewer=True)


# As published


def test_published_starts_in_running_text_are_those_of_pythons_generator() -> None:
    # random.seed(0); randint(0, 99) gives 49, 97, 53, 5; the text has 99 + 1 + 4 tokens.
    tokens = calibrate(PLAIN, numbered(104), nsamples=4, seqlen=4, sampling="published")
    assert tokens[:, 0].tolist() == [10 + 49, 10 + 97, 10 + 53, 10 + 5]
    assert (tokens == tokens[:, :1] + torch.arange(4)).all()


def test_published_windows_of_documents_are_those_of_pythons_generator() -> None:
    # random.seed(0); documents are drawn until one has more than 7 tokens, then a start in it:
    # 3, start 12; 3, start 0; 2 and 4 are too short, then 3, start 6; 2 is too short, 3, start 5.
    # Document 3 begins with 33.
    documents = numbered(5, 12, 6, 20, 7, 30)
    tokens = calibrate(PLAIN, documents, nsamples=4, seqlen=7, sampling="published")
    assert tokens[:, 0].tolist() == [33 + 12, 33 + 0, 33 + 6, 33 + 5]
    assert (tokens == tokens[:, :1] + torch.arange(7)).all()


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=2, max_size=8),
    seqlen=st.integers(2, 12),
    seed=st.integers(0, 2**32),
    adds=st.booleans(),
)
def test_published_draws_follow_the_published_order_of_calls(
    lengths: list[int], seqlen: int, seed: int, adds: bool
) -> None:
    tokenizer = ADDING if adds else PLAIN
    documents = numbered(*lengths)
    tokenized = [tokenizer(document)["input_ids"] if document else [] for document in documents]
    if max(map(len, tokenized)) <= seqlen:
        with pytest.raises(InputError, match=f"longer than seqlen={seqlen} tokens, and of"):
            calibrate(tokenizer, documents, 5, seqlen, seed, "published")
        return
    random.seed(seed)
    expected = []
    for _ in range(5):
        while True:
            ids = tokenized[random.randint(0, len(documents) - 1)]
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        expected.append(ids[start : start + seqlen])
    assert calibrate(tokenizer, documents, 5, seqlen, seed, "published").tolist() == expected


def test_running_text_is_tokenized_once() -> None:
    class Counting(list[str]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    documents = Counting(numbered(100))
    calibrate(PLAIN, documents, nsamples=50, seqlen=10, sampling="published")
    assert documents.reads < 10  # once for all draws, and when the type of the argument is checked


# Beginning token


@pytest.mark.parametrize(
    ("tokenizer", "policy", "begins"),
    [
        (ADDING, "auto", True),
        (ADDING, "always", True),
        (ADDING, "never", False),
        (PLAIN, "auto", False),
        (PLAIN, "always", True),
    ],
)
@pytest.mark.parametrize("sampling", ["packed", "document", "published"])
def test_a_document_begins_with_one_beginning_token_or_none(
    tokenizer: PreTrainedTokenizerFast, policy: str, begins: bool, sampling: str
) -> None:
    documents = numbered(*[9] * 20)
    if begins:  # the text brings one of its own: there is still one
        documents = [f"<s> {document}" for document in documents]
    tokens = calibrate(tokenizer, documents, 18, 8, 0, sampling, policy)
    first_words = {10 + 9 * i for i in range(20)}
    for window in tokens.tolist():
        for word, following in itertools.pairwise([None, *window]):
            # One before the first word of each document, and nowhere else.
            assert (following == BOS) <= begins
            assert word is None or not begins or (word == BOS) == (following in first_words)


# No padding


@pytest.mark.parametrize("seqlen", [8, 24])
def test_the_hessian_does_not_depend_on_the_batch(
    seqlen: int, tiny_model: Callable[..., Any]
) -> None:
    """There is no padding in a batch, so four sequences at a time weigh as one at a time."""
    words = [" ".join(str(10 + (7 * i + j) % 100) for j in range(30 + i)) for i in range(20)]
    tokens = calibrate(ADDING, words, nsamples=10, seqlen=seqlen)
    hessians = []
    for batch_size in (1, 4):
        model = tiny_model("llama").double()
        found = {}
        for block in Walker(model, batch_size=batch_size).walk(tokens):
            sums = {
                site.name: HessianAccumulator(site.columns, dtype=torch.float64)
                for site in block.sites
            }
            block.feed(block.sites, lambda site, inputs, sums=sums: sums[site.name].update(inputs))
            found |= {f"{block.name}.{name}": each.finish() for name, each in sums.items()}
        hessians.append(found)
    alone, together = hessians
    assert alone.keys() == together.keys()
    assert len(alone) == 8
    for name, hessian in alone.items():
        assert hessian.tokens == together[name].tokens == 10 * seqlen
        torch.testing.assert_close(hessian.matrix, together[name].matrix, rtol=1e-12, atol=1e-12)
