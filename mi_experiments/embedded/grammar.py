"""The grammar of the synthetic language: a probabilistic program whose every choice is one word.

A document is written by `Grammar.write`, which asks a `draw` function for one word at a time and
hands it the exact distribution of that word. The grammar is unambiguous (every choice is visible as
the word it emits), so the state is a function of the words written so far and the distribution
handed to `draw` is the true conditional distribution given the document so far. Sampling, replay
and enumeration are three ways to answer `draw`.

A document names its topic, introduces entities as `Name attribute` pairs, and goes on with
sentences of three kinds until it ends:

- plain: `determiner noun [adjective] [preposition determiner noun] verb OBJECT .`
- reference: `Name attribute verb OBJECT .`, where the attribute is the one introduced with the name
- list: a numeral n, exactly n items, `.`

with `OBJECT = determiner noun [adjective] [adverb]`. Nouns and adjectives agree with their
determiner in class and number, the verb agrees in number with its subject (not with the noun of
the prepositional phrase in between). Which noun, verb, object, ... is likely is stored in seeded
tables.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from mi_experiments.embedded.lexicon import Lexicon
from mi_experiments.embedded.tables import Sizes, Tables


class Choice(NamedTuple):
    """The exact distribution of one word."""

    words: tuple[int, ...]
    probabilities: tuple[float, ...]
    cumulative: tuple[float, ...]


Draw = Callable[[Choice], int]


def choice_of(options: Sequence[tuple[int, float]]) -> Choice:
    """Build the choice among (word, probability) pairs, leaving out the impossible ones."""
    words, probabilities = zip(*((w, p) for w, p in options if p > 0), strict=True)
    # the last edge is 1 by definition, so that no rounding can fall outside
    cumulative = (*list(accumulate(probabilities))[:-1], 1.0)
    return Choice(words, probabilities, cumulative)


class Grammar:
    """A language: sizes, words, tables, and the program that writes a document.

    Args:
        sizes: the sizes and probabilities.
        seed: the seed of the words and of the tables.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self.tables = Tables(sizes, seed)
        self.lexicon = Lexicon(sizes, seed)
        # bound here, not on the methods, so that the memory belongs to this grammar
        self._by_table = cache(self._choice_by_table)
        self._after_noun = cache(self._choice_after_noun)
        self._after_object = cache(self._choice_after_object)

    def write(self, draw: Draw) -> None:
        """Write one document by asking `draw` for every word, the closing word included."""
        lexicon, sizes = self.lexicon, self.sizes
        topic = draw(self._by_table("topic", (), lexicon.topics)) - lexicon.topics
        attributes: dict[int, int] = {}
        for _ in range(sizes.entities):
            names = range(lexicon.names, lexicon.names + sizes.names)
            unused = [name for name in names if name not in attributes]
            name = draw(choice_of([(name, 1 / len(unused)) for name in unused]))
            attributes[name] = draw(self._by_table("attribute", (topic,), lexicon.attributes))
        draw(choice_of([(lexicon.stop, 1.0)]))
        begin = self._begin(topic, list(attributes))
        end = sizes.end_probability
        go_on = choice_of([(lexicon.end, end), *((w, p * (1 - end)) for w, p in begin)])
        self._sentence(draw, topic, attributes, draw(choice_of(begin)))
        for _ in range(sizes.longest_document - 1):
            word = draw(go_on)
            if word == lexicon.end:
                return
            self._sentence(draw, topic, attributes, word)
        draw(choice_of([(lexicon.end, 1.0)]))

    def _choice_by_table(
        self, table: str, row: tuple[int, ...], first: int, step: int = 1
    ) -> Choice:
        """Choose a word by a row of a table; column j stands for the word first + step * j."""
        return choice_of(self._options(table, row, first, step))

    def _options(
        self, table: str, row: tuple[int, ...], first: int, step: int = 1, weight: float = 1.0
    ) -> list[tuple[int, float]]:
        probabilities = getattr(self.tables, table)[row].tolist()
        return [(first + step * j, weight * p) for j, p in enumerate(probabilities) if p > 0]

    def _begin(self, topic: int, names: list[int]) -> list[tuple[int, float]]:
        """List how a sentence may begin: with a determiner, a known name or a numeral."""
        plain, reference, listing = self.sizes.kind_probabilities
        entity = zip(names, self.tables.entity.tolist(), strict=True)
        return [
            *self._options("subject_determiner", (topic,), self.lexicon.determiners, weight=plain),
            *((name, reference * p) for name, p in entity),
            *self._options("numeral", (), self.lexicon.numerals, weight=listing),
        ]

    def _sentence(self, draw: Draw, topic: int, attributes: dict[int, int], word: int) -> None:
        lexicon = self.lexicon
        if word in attributes:
            attribute = draw(choice_of([(attributes[word], 1.0)])) - lexicon.attributes
            verb = draw(self._by_table("attribute_verb", (attribute,), lexicon.verbs, 2))
            self._object(draw, topic, (verb - lexicon.verbs) // 2)
        elif lexicon.numerals <= word < lexicon.items:
            self._list(draw, topic, word - lexicon.numerals + 2)
        else:
            self._object(draw, topic, self._subject(draw, topic, word))

    def _list(self, draw: Draw, topic: int, length: int) -> None:
        items = self.lexicon.items
        item = draw(self._by_table("first_item", (topic,), items))
        for _ in range(length - 1):
            item = draw(self._by_table("next_item", (item - items,), items))
        draw(choice_of([(self.lexicon.stop, 1.0)]))

    def _noun(
        self, draw: Draw, table: str, row: tuple[int, ...], determiner: int
    ) -> tuple[int, int]:
        """Draw the noun that agrees with a determiner; return its lemma and number."""
        form = determiner - self.lexicon.determiners
        noun_class, number = form // 2 % self.sizes.classes, form % 2
        first = self.lexicon.nouns + 2 * self.sizes.nouns_per_class * noun_class + number
        word = draw(self._by_table(table, (*row, noun_class), first, 2))
        return (word - self.lexicon.nouns) // 2, number

    def _subject(self, draw: Draw, topic: int, determiner: int) -> int:
        """Draw the rest of the subject and the verb that agrees; return the verb's lemma."""
        lexicon = self.lexicon
        noun, number = self._noun(draw, "subject", (topic,), determiner)
        word = draw(self._after_noun(topic, noun, number, True))
        if word >= lexicon.adjectives:
            word = draw(self._after_noun(topic, noun, number, False))
        if word < lexicon.determiners:
            preposition = word - lexicon.prepositions
            inner = draw(self._by_table("place_determiner", (preposition,), lexicon.determiners))
            self._noun(draw, "place", (preposition,), inner)
            word = draw(self._by_table("verb", (topic, noun), lexicon.verbs + number, 2))
        return (word - lexicon.verbs) // 2

    def _adjectives(self, noun: int, number: int) -> int:
        """Locate the form of the first adjective that agrees with a noun."""
        return self.lexicon.adjectives + 2 * (noun // self.sizes.nouns_per_class) + number

    def _choice_after_noun(self, topic: int, noun: int, number: int, fresh: bool) -> Choice:
        """Choose adjective (only when `fresh`), preposition or verb after a subject noun."""
        lexicon, sizes = self.lexicon, self.sizes
        adjective = sizes.adjective_probability if fresh else 0.0
        preposition = (1 - adjective) * sizes.preposition_probability
        forms, first = 2 * sizes.classes, self._adjectives(noun, number)
        return choice_of([
            *self._options("adjective", (noun,), first, forms, adjective),
            *self._options("preposition", (noun,), lexicon.prepositions, 1, preposition),
            *self._options(
                "verb", (topic, noun), lexicon.verbs + number, 2, 1 - adjective - preposition
            ),
        ])

    def _object(self, draw: Draw, topic: int, verb: int) -> None:
        lexicon = self.lexicon
        determiner = draw(self._by_table("object_determiner", (verb,), lexicon.determiners))
        noun, number = self._noun(draw, "object", (topic, verb), determiner)
        word = draw(self._after_object(verb, noun, number, True))
        if lexicon.adjectives <= word < lexicon.adverbs:
            word = draw(self._after_object(verb, noun, number, False))
        if word != lexicon.stop:
            draw(choice_of([(lexicon.stop, 1.0)]))

    def _choice_after_object(self, verb: int, noun: int, number: int, fresh: bool) -> Choice:
        """Choose adjective (only when `fresh`), adverb or full stop after an object noun."""
        lexicon, sizes = self.lexicon, self.sizes
        adjective = sizes.adjective_probability if fresh else 0.0
        adverb = (1 - adjective) * sizes.adverb_probability
        forms, first = 2 * sizes.classes, self._adjectives(noun, number)
        return choice_of([
            *self._options("adjective", (noun,), first, forms, adjective),
            *self._options("adverb", (verb,), lexicon.adverbs, 1, adverb),
            (lexicon.stop, 1 - adjective - adverb),
        ])
