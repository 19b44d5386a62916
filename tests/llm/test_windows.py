"""Windows: calibration and evaluation tokens are exactly what their protocol says."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mi_experiments.errors import InputError
from mi_experiments.llm.windows import (
    BosPolicy,
    Sampling,
    Windows,
    adds_bos,
    calibration_tokens,
    evaluation_windows,
    token_hash,
    tokenize,
)

WORDS = 2000


BOS = 1
WORDS = 2000


def build_tokenizer(*, adds: bool = True, has_bos: bool = True) -> PreTrainedTokenizerFast:
    """A word a token; word `i` has id `i`. With a beginning token or none, adding it or not."""
    names = {0: "<unk>", BOS: "<s>"}
    ids = {names.get(i, str(i)): i for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    options = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


PLAIN = build_tokenizer(adds=False)
ADDING = build_tokenizer(adds=True)
BARE = build_tokenizer(adds=False, has_bos=False)


def numbered(*lengths: int) -> list[str]:
    """Documents of the given lengths in which no word occurs twice, in counting order."""
    counter = itertools.count(10)
    return [" ".join(str(next(counter)) for _ in range(length)) for length in lengths]


def calibrate(tokenizer, documents, nsamples, seqlen, seed=0, sampling="packed", add_bos="auto"):
    return calibration_tokens(
        tokenizer,
        documents,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        sampling=Sampling(sampling),
        add_bos=BosPolicy(add_bos),
    )


def cut(tokenizer, documents, windows, seqlen, separator=" 5 ", max_windows=None, add_bos="auto"):
    return evaluation_windows(
        tokenizer,
        documents,
        windows=Windows(windows),
        separator=separator,
        seqlen=seqlen,
        max_windows=max_windows,
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


# Calibration


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
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
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


# Hash


def test_token_hash_is_sha256_of_shape_and_ids() -> None:
    tokens = torch.arange(6)
    content = b"".join(i.to_bytes(8, "little") for i in range(6))
    assert token_hash(tokens) == hashlib.sha256(b"(6,)" + content).hexdigest()
    hashes = {token_hash(t) for t in (tokens, tokens.view(2, 3), tokens.view(3, 2), tokens.flip(0))}
    assert len(hashes) == 4
    assert token_hash(tokens.view(2, 3).T.contiguous().T) == token_hash(tokens.view(2, 3))
