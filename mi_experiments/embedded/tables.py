"""Sizes of the synthetic language and its seeded tables of conditional probabilities."""

import math
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes and probabilities of a language of this grammar.

    `*_branch` is the number of continuations with a positive probability in one row of a table;
    all counts are lemmas, not forms.
    """

    topics: int = 8
    names: int = 34
    attributes: int = 28
    items: int = 36
    prepositions: int = 7
    classes: int = 3
    nouns_per_class: int = 32
    verbs: int = 32
    adjectives: int = 16
    adverbs: int = 24
    longest_list: int = 6
    entities: int = 3
    longest_document: int = 20  # sentences
    end_probability: float = 0.09  # after each sentence
    kind_probabilities: tuple[float, float, float] = (0.47, 0.35, 0.18)  # plain, reference, list
    adjective_probability: float = 0.25
    preposition_probability: float = 0.2
    adverb_probability: float = 0.25
    determiner_branch: int = 6
    subject_branch: int = 10
    branch: int = 5
    zipf_exponent: float = 1.3
    popularity_exponent: float = 0.5

    @property
    def determiners(self) -> int:
        """Count the determiners: two (definite or not) for each class and number."""
        return 4 * self.classes

    @property
    def nouns(self) -> int:
        """Count the noun lemmas of all classes."""
        return self.classes * self.nouns_per_class

    @property
    def numerals(self) -> int:
        """Count the numerals, from two to `longest_list`."""
        return self.longest_list - 1


def zipf(count: int, exponent: float) -> list[float]:
    """Return `count` probabilities proportional to 1 / rank ** exponent."""
    weights = [(rank + 1) ** -exponent for rank in range(count)]
    return [weight / math.fsum(weights) for weight in weights]


class Tables:
    """The seeded conditional probabilities; the last dimension of every table sums to one.

    Only `Random.random` is used, whose stream Python keeps across versions: the tables must be the
    same wherever the model trained on them is evaluated.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._random = Random(f"tables {seed}")
        self._sizes = s = sizes
        branch = s.branch
        self.topic = torch.tensor(zipf(s.topics, 0.3), dtype=torch.float64)
        self.numeral = torch.tensor(zipf(s.numerals, 0.5), dtype=torch.float64)
        self.entity = torch.tensor(zipf(s.entities, 0.5), dtype=torch.float64)
        self.attribute = self._rows((s.topics,), s.attributes, branch)
        self.subject_determiner = self._rows((s.topics,), s.determiners, s.determiner_branch)
        self.place_determiner = self._rows((s.prepositions,), s.determiners, s.determiner_branch)
        self.object_determiner = self._rows((s.verbs,), s.determiners, s.determiner_branch)
        self.subject = self._rows((s.topics, s.classes), s.nouns_per_class, s.subject_branch)
        self.place = self._rows((s.prepositions, s.classes), s.nouns_per_class, s.subject_branch)
        self.object = self._rows((s.topics, s.verbs, s.classes), s.nouns_per_class, branch)
        self.verb = self._rows((s.topics, s.nouns), s.verbs, branch)
        self.attribute_verb = self._rows((s.attributes,), s.verbs, branch)
        self.adjective = self._rows((s.nouns,), s.adjectives, branch)
        self.preposition = self._rows((s.nouns,), s.prepositions, branch)
        self.adverb = self._rows((s.verbs,), s.adverbs, branch)
        self.first_item = self._rows((s.topics,), s.items, s.subject_branch)
        self.next_item = self._rows((s.items,), s.items, branch)

    def _rows(self, shape: tuple[int, ...], columns: int, branch: int) -> Float64[Tensor, "..."]:
        """Draw a table of sparse Zipf rows over columns of unequal popularity."""
        values = zipf(min(branch, columns), self._sizes.zipf_exponent)
        table = torch.zeros(math.prod(shape), columns, dtype=torch.float64)
        popularity = zipf(columns, self._sizes.popularity_exponent)
        for row in table:
            # the largest log(u) / weight: sampling without replacement by weight
            keys = [math.log(1.0 - self._random.random()) / weight for weight in popularity]
            chosen = sorted(range(columns), key=lambda column: -keys[column])[: len(values)]
            row[chosen] = torch.tensor(values, dtype=torch.float64)
        return table.reshape(*shape, columns)
