"""Entropy and length of a document in closed form: the chain rule over the grammar's tables.

Nothing is sampled, and nothing is shared with the program that writes documents but the tables.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from mi_experiments.embedded.grammar import Grammar


def entropy(table: Float64[Tensor, "*rows columns"]) -> Float64[Tensor, "*rows"]:
    """Compute the entropy of each row of probabilities, in nats."""
    total: Tensor = torch.special.entr(table).sum(-1)
    return total


def _binary(probability: float) -> float:
    return float(entropy(torch.tensor([probability, 1 - probability], dtype=torch.float64)))


def _object(grammar: Grammar) -> Float64[Tensor, "topics verbs"]:
    """Compute the entropy of what follows a verb up to the full stop."""
    sizes, tables = grammar.sizes, grammar.tables
    classes = _classes(grammar, tables.object_determiner)
    nouns = (classes[None, :, :, None] * tables.object).flatten(2)
    return (
        entropy(tables.object_determiner)
        + (classes * entropy(tables.object)).sum(-1)
        + _binary(sizes.adjective_probability)
        + sizes.adjective_probability * nouns @ entropy(tables.adjective)
        + _binary(sizes.adverb_probability)
        + sizes.adverb_probability * entropy(tables.adverb)
    )


def _classes(
    grammar: Grammar, determiner: Float64[Tensor, "rows determiners"]
) -> Float64[Tensor, "rows classes"]:
    """Sum the probabilities of determiners over definiteness and number."""
    return determiner.reshape(len(determiner), 2, grammar.sizes.classes, 2).sum((1, 3))


def _plain(
    grammar: Grammar, following: Float64[Tensor, "topics verbs"]
) -> Float64[Tensor, "topics"]:
    """Compute the entropy of a plain sentence."""
    sizes, tables = grammar.sizes, grammar.tables
    classes = _classes(grammar, tables.subject_determiner)
    nouns = (classes[:, :, None] * tables.subject).flatten(1)
    verbs = torch.einsum("tn,tnv->tv", nouns, tables.verb)
    place = entropy(tables.place_determiner) + (
        _classes(grammar, tables.place_determiner) * entropy(tables.place)
    ).sum(-1)
    prepositional = entropy(tables.preposition) + tables.preposition @ place
    return (
        entropy(tables.subject_determiner)
        + (classes * entropy(tables.subject)).sum(-1)
        + _binary(sizes.adjective_probability)
        + sizes.adjective_probability * nouns @ entropy(tables.adjective)
        + _binary(sizes.preposition_probability)
        + sizes.preposition_probability * nouns @ prepositional
        + (nouns * entropy(tables.verb)).sum(-1)
        + (verbs * following).sum(-1)
    )


def _reference(
    grammar: Grammar, following: Float64[Tensor, "topics verbs"]
) -> Float64[Tensor, "topics"]:
    """Compute the entropy of a reference sentence: its attribute has none."""
    tables = grammar.tables
    verbs = tables.attribute @ tables.attribute_verb
    return (
        entropy(tables.entity)
        + tables.attribute @ entropy(tables.attribute_verb)
        + (verbs * following).sum(-1)
    )


def _list(grammar: Grammar) -> Float64[Tensor, "topics"]:
    """Compute the entropy of a list: the items are a Markov chain, its end has none."""
    tables = grammar.tables
    total = entropy(tables.numeral) + entropy(tables.first_item)
    item, longer = tables.first_item, 1.0
    for probability in tables.numeral.tolist():  # the numeral n adds the n-th item
        total = total + longer * item @ entropy(tables.next_item)
        item, longer = item @ tables.next_item, longer - probability
    return total


def _expected_sentences(grammar: Grammar) -> float:
    """Compute the mean of a geometric number of sentences that is cut at the longest document."""
    going_on = 1 - grammar.sizes.end_probability
    return math.fsum(going_on**k for k in range(grammar.sizes.longest_document))


def _expected_sentence_tokens(grammar: Grammar) -> float:
    sizes = grammar.sizes
    following = 3 + sizes.adjective_probability + sizes.adverb_probability  # . included
    plain = 3 + sizes.adjective_probability + 3 * sizes.preposition_probability + following
    numeral = grammar.tables.numeral
    listing = 2 + float(numeral @ torch.arange(2.0, len(numeral) + 2, dtype=torch.float64))
    lengths = (plain, 3 + following, listing)
    return math.fsum(p * n for p, n in zip(sizes.kind_probabilities, lengths, strict=True))


def expected_document(grammar: Grammar) -> tuple[float, float]:
    """Compute the entropy of a document in nats and its expected number of words, both exactly.

    The closing word counts; the beginning token, which is not predicted, does not.
    """
    sizes, tables = grammar.sizes, grammar.tables
    following = _object(grammar)
    kinds = torch.tensor(sizes.kind_probabilities, dtype=torch.float64)
    sentence = entropy(kinds) + kinds @ torch.stack([
        _plain(grammar, following),
        _reference(grammar, following),
        _list(grammar),
    ])
    sentences = _expected_sentences(grammar)
    names = math.fsum(math.log(sizes.names - k) for k in range(sizes.entities))
    given_topic = sizes.entities * entropy(tables.attribute) + sentences * sentence
    # the cap makes the end certain after the longest document: one choice fewer than sentences
    going_on = 1 - sizes.end_probability
    choices = sentences - going_on ** (sizes.longest_document - 1)
    ending = choices * _binary(sizes.end_probability)
    nats = float(entropy(tables.topic) + tables.topic @ given_topic) + names + ending
    tokens = 3 + 2 * sizes.entities + sentences * _expected_sentence_tokens(grammar)
    return nats, tokens
