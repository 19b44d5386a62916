"""The shipped language: sampled documents, their true likelihood and the exact entropy.

A document is text: words separated by one space, the last of which is the closing word (an ordinary
word of the language, so that it survives every way to tokenize and detokenize). After the beginning
token each word is one token, and every word of a document, the closing word included, is predicted;
no document exceeds the context of the shipped model (256 tokens), so nothing is ever cut.

Splits. A document belongs to the split that a hash of its text selects, and sampling rejects the
others: no text can occur in two splits. Rejection conditions the distribution on an event of the
hash, which is independent of the words for every predictor that does not invert BLAKE2; so the
unconditional likelihood stays the floor of the loss in every split.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from random import Random

import torch
from jaxtyping import Float64
from torch import Tensor

from mi_experiments.embedded.entropy import expected_document
from mi_experiments.embedded.grammar import Choice, Grammar
from mi_experiments.embedded.lexicon import SPECIAL_TOKENS
from mi_experiments.embedded.tables import Sizes
from mi_experiments.errors import InputError

SEED = 1
# of 16 hash buckets
SPLITS = {"evaluation": range(1), "calibration": range(1, 2), "train": range(2, 16)}


@cache
def grammar() -> Grammar:
    """Build the grammar of the shipped language."""
    return Grammar(Sizes(), SEED)


def vocabulary() -> list[str]:
    """List all words in the order of their token ids, special tokens first."""
    return list(grammar().lexicon.words)


def sample_document(grammar: Grammar, random: Random) -> list[int]:
    """Sample one document of a grammar as word ids, the closing word included."""
    document: list[int] = []

    def draw(choice: Choice) -> int:
        word = choice.words[bisect_right(choice.cumulative, random.random())]
        document.append(word)
        return word

    grammar.write(draw)
    return document


def replay_nll(grammar: Grammar, document: list[int]) -> Float64[Tensor, "tokens"]:
    """Compute -ln of the true conditional probability of each word of a document, in nats.

    Raises:
        ValueError: if the grammar cannot write the document.
    """
    nll: list[float] = []

    def draw(choice: Choice) -> int:
        position = len(nll)
        if position == len(document) or document[position] not in choice.words:
            raise ValueError(f"no such document: word {position} cannot be written by the grammar")
        word = document[position]
        nll.append(-math.log(choice.probabilities[choice.words.index(word)]))
        return word

    grammar.write(draw)
    if len(nll) != len(document):
        raise ValueError(f"no such document: it ends at word {len(nll)} of {len(document)}")
    return torch.tensor(nll, dtype=torch.float64)


def split_of(text: str) -> str:
    """Name the split that a document belongs to."""
    bucket = blake2b(text.encode(), digest_size=1).digest()[0] % 16
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def stream(split: str, seed: int = 0) -> Iterator[str]:
    """Yield the endless sequence of documents of a split.

    Raises:
        InputError: if there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    random = Random(f"{split} {seed}")
    words = grammar().lexicon.words
    while True:
        text = " ".join(words[word] for word in sample_document(grammar(), random))
        if split_of(text) == split:
            yield text


def documents(split: str, count: int, seed: int = 0) -> list[str]:
    """Sample the first `count` documents of a split ("train", "calibration" or "evaluation").

    Raises:
        InputError: if there is no such split or `count` is negative.
    """
    if count < 0:
        raise InputError(f"count {count} is negative: ask for at least 0 documents")
    return [text for text, _ in zip(stream(split, seed), range(count), strict=False)]


@cache
def _ids() -> dict[str, int]:
    return {word: i for i, word in enumerate(vocabulary()) if word not in SPECIAL_TOKENS}


def true_nll(text: str) -> Float64[Tensor, "tokens"]:
    """Compute -ln p(token | document so far) under the language for each predicted token, in nats.

    The order is that of the tokenizer's tokens after the beginning token.

    Raises:
        InputError: if the text is no document of the language.
    """
    try:
        return replay_nll(grammar(), [_ids()[word] for word in text.split()])
    except (KeyError, ValueError) as error:
        raise InputError(f"text {text[:40]!r} is no document of the language: {error}") from error


def entropy_per_document() -> float:
    """Compute the entropy of a document in nats, exactly."""
    return expected_document(grammar())[0]


def entropy_per_token() -> float:
    """Compute expected nats per document over expected tokens per document, exactly.

    This is the limit of the token-weighted mean of `true_nll` over many documents.
    """
    nats, tokens = expected_document(grammar())
    return nats / tokens
