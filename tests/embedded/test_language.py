"""The language keeps its rules, and its likelihood and entropy are exact."""

import math
import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.embedded import language
from mi_experiments.embedded.entropy import expected_document
from mi_experiments.embedded.grammar import Choice, Grammar
from mi_experiments.embedded.lexicon import SPECIAL_TOKENS
from mi_experiments.embedded.tables import Sizes, Tables
from mi_experiments.errors import InputError

MINIATURE = Sizes(
    topics=2, names=3, attributes=2, items=2, prepositions=1, classes=2, nouns_per_class=2, verbs=2,
    adjectives=2, adverbs=2, longest_list=3, entities=2, longest_document=1, determiner_branch=2,
    subject_branch=2, branch=1,
)  # fmt: skip
MINIATURES = {
    "every table": replace(
        MINIATURE, branch=2, names=1, items=1, prepositions=1, adjectives=1, adverbs=1, entities=1,
        longest_list=2, topics=1, attributes=1,
    ),
    "topics and entities": replace(MINIATURE, nouns_per_class=1, items=1, longest_list=2),
    "several sentences": replace(
        MINIATURE, topics=1, names=2, entities=1, longest_document=2, determiner_branch=1,
        subject_branch=1,
    ),
    "long lists": replace(
        MINIATURE, longest_list=5, items=3, branch=2, nouns_per_class=1, verbs=1, adjectives=1,
        adverbs=1, prepositions=1, determiner_branch=1, names=2, attributes=1, entities=1,
    ),
}  # fmt: skip


class Suspended(Exception):
    """The enumeration reached a choice that it has not made yet."""


def enumerate_documents(grammar: Grammar) -> list[tuple[float, int]]:
    """Return -ln p and the number of words of every document that a grammar can write."""
    finished = []
    waiting: list[list[tuple[int, float]]] = [[]]
    while waiting:
        made = waiting.pop()
        ahead = iter(made)
        offered: list[Choice] = []

        def draw(choice, ahead=ahead, offered=offered):
            word, _ = next(ahead, (None, None))
            if word is None:
                offered.append(choice)
                raise Suspended
            return word

        try:
            grammar.write(draw)
        except Suspended:
            choice = offered[0]
            waiting += [
                [*made, option] for option in zip(choice.words, choice.probabilities, strict=True)
            ]
        else:
            finished.append((-math.fsum(math.log(p) for _, p in made), len(made)))
    return finished


@pytest.mark.parametrize("name", MINIATURES)
def test_entropy_equals_brute_force_over_all_documents(name: str) -> None:
    grammar = Grammar(MINIATURES[name], seed=3)
    found = torch.tensor(enumerate_documents(grammar), dtype=torch.float64)
    probabilities = (-found[:, 0]).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-10)
    nats, tokens = expected_document(grammar)
    assert nats == pytest.approx(float(probabilities @ found[:, 0]), rel=1e-10)
    assert tokens == pytest.approx(float(probabilities @ found[:, 1]), rel=1e-10)


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return language.documents("train", 1000, seed=7)


def test_replay_agrees_with_the_closed_form(sample: list[str]) -> None:
    replayed = [language.true_nll(text) for text in sample]
    nats = torch.stack([nll.sum() for nll in replayed])
    lengths = torch.tensor([float(len(nll)) for nll in replayed], dtype=torch.float64)
    expected_nats, expected_tokens = expected_document(language.grammar())
    for measured, expected in [
        (nats, expected_nats),
        (lengths, expected_tokens),
        (nats - language.entropy_per_token() * lengths, 0.0),  # the error of the ratio
    ]:
        standard_error = float(measured.std()) / len(sample) ** 0.5
        assert abs(float(measured.mean()) - expected) < 3 * standard_error
    assert language.entropy_per_document() == expected_nats
    assert 4 < math.exp(language.entropy_per_token()) < 9


def test_every_choice_is_a_distribution() -> None:
    grammar = language.grammar()
    for name, table in vars(Tables(grammar.sizes, language.SEED)).items():
        if isinstance(table, torch.Tensor):
            ones = torch.ones(table.shape[:-1], dtype=torch.float64)
            torch.testing.assert_close(table.sum(-1), ones, rtol=0, atol=1e-12, msg=name)
            assert bool((table >= 0).all())

    random = language.Random("choices")

    def draw(choice: Choice) -> int:
        assert len(set(choice.words)) == len(choice.words)
        assert math.fsum(choice.probabilities) == pytest.approx(1, abs=1e-12)
        steps = torch.tensor([0.0, *choice.cumulative], dtype=torch.float64).diff()
        assert steps.tolist() == pytest.approx(choice.probabilities, abs=1e-12)
        return choice.words[int(random.random() * len(choice.words))]  # rare branches too

    for _ in range(200):
        grammar.write(draw)


def test_splits_are_disjoint_and_reproducible() -> None:
    splits = {split: language.documents(split, 60) for split in language.SPLITS}
    for split, texts in splits.items():
        assert {language.split_of(text) for text in texts} == {split}
        assert language.documents(split, 4) == texts[:4]
        assert language.documents(split, 4, seed=1) != texts[:4]
    together = [text for texts in splits.values() for text in set(texts)]
    assert len(together) == len(set(together))
    buckets = sorted(bucket for buckets in language.SPLITS.values() for bucket in buckets)
    assert buckets == list(range(16))


def test_unknown_split_and_negative_count_are_named() -> None:
    with pytest.raises(InputError, match="'validation'"):
        language.documents("validation", 1)
    with pytest.raises(InputError, match="-1"):
        language.documents("train", -1)


class Parser:
    """Read documents by the endings of their words alone, independently of the grammar."""

    def __init__(self) -> None:
        self.lengths: dict[str, set[int]] = defaultdict(set)

    def read(self, text: str) -> None:
        """Check every rule on one document."""
        introduction, *sentences = text.split(" . ")
        topic, *pairs = introduction.split()
        assert topic.endswith("um")
        attributes = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(attributes) == 3
        assert all(name.istitle() and a.endswith("ix") for name, a in attributes.items())
        assert re.fullmatch(r"[a-z]{3}ak", sentences.pop())
        assert 1 <= len(sentences) <= 20
        for sentence in sentences:
            self.sentence(sentence.split(), attributes)

    def sentence(self, words: list[str], attributes: dict[str, str]) -> None:
        if words[0].endswith("ul"):
            assert all(item.endswith("ot") for item in words[1:])
            self.lengths[words[0]].add(len(words) - 1)
            return
        plural = False
        if words[0].istitle():
            assert attributes[words[0]] == words[1]
            del words[:2]
        else:
            plural = self.noun_phrase(words).endswith("s")
            if len(words[0]) == 3:
                del words[0]
                self.noun_phrase(words, may_be_described=False)
        assert words.pop(0)[3:] == ("ent" if plural else "et")
        self.noun_phrase(words)
        assert not words or (len(words) == 1 and words[0].endswith("ly"))

    def noun_phrase(self, words: list[str], may_be_described: bool = True) -> str:
        """Take a noun phrase off the front of a sentence and return its ending."""
        ending = words.pop(0)[3:]
        assert re.fullmatch("[aoi]s?", ending)
        assert words.pop(0)[3:] == ending
        if may_be_described and words and re.fullmatch("n[aoi]s?", words[0][3:]):
            assert words.pop(0)[3:] == "n" + ending
        return ending


def test_agreement_reference_and_counting_hold(sample: list[str]) -> None:
    parser = Parser()
    for text in sample:
        parser.read(text)
        assert len(text.split()) < 256
    assert sorted(map(sorted, parser.lengths.values())) == [[2], [3], [4], [5], [6]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.floats(0, 1, exclude_max=True))
def test_a_document_with_a_word_lost_is_not_in_the_language(seed: int, place: float) -> None:
    words = language.documents("train", 1, seed)[0].split()
    del words[int(place * len(words))]
    text = " ".join(words)  # without an adjective it is well formed: only such a text may pass
    try:
        language.true_nll(text)
    except InputError:
        return
    Parser().read(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: words[:-1],
        lambda words: [*words, words[0]],
        lambda words: [*words[:3], words[1], *words[4:]],  # the same entity twice
        lambda words: ["nonsense", *words[1:]],
        lambda words: ["<s>", *words],
    ],
)
def test_text_outside_the_language_is_an_error(damage) -> None:
    words = language.documents("train", 1)[0].split()
    with pytest.raises(InputError, match="is no document of the language"):
        language.true_nll(" ".join(damage(words)))


def test_reference_and_terminators_are_certain(sample: list[str]) -> None:
    """What the document has settled costs nothing: attributes, ends of lists."""
    for text in sample[:100]:
        words, nll = text.split(), language.true_nll(text).tolist()
        for i in range(8, len(words)):
            if words[i].endswith("ix") or (words[i] == "." and words[i - 1].endswith("ot")):
                assert nll[i] == 0
        assert nll[1] == pytest.approx(math.log(34))


def test_vocabulary_has_distinct_words() -> None:
    words = language.vocabulary()
    assert len(words) == len(set(words)) == 512
    assert tuple(words[:4]) == SPECIAL_TOKENS
