"""The words of the synthetic language, made of seeded syllables and endings that agree."""

from collections.abc import Sequence
from random import Random

from mi_experiments.embedded.tables import Sizes

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


class Lexicon:
    """The words of the language and where each kind of word begins in the list of them."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        s = sizes
        random = Random(f"words {seed}")
        stems = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
        stems = [stem for _, stem in sorted((random.random(), stem) for stem in stems)]
        endings = [
            vowel + number for vowel in ("a", "o", "i", "u")[: s.classes] for number in ("", "s")
        ]
        self.words: list[str] = list(SPECIAL_TOKENS)

        def add(count: int, forms: Sequence[str]) -> int:
            first = len(self.words)
            self.words += [stems.pop() + form for _ in range(count) for form in forms]
            return first

        self.stop = len(self.words)
        self.words.append(".")
        self.end = add(1, ["ak"])
        self.topics = add(s.topics, ["um"])
        self.names = add(s.names, ["e"])
        self.words[self.names :] = [word.capitalize() for word in self.words[self.names :]]
        self.attributes = add(s.attributes, ["ix"])
        self.numerals = add(s.numerals, ["ul"])
        self.items = add(s.items, ["ot"])
        self.prepositions = add(s.prepositions, [""])
        self.determiners = add(2, endings)
        self.nouns = len(self.words)
        for noun_class in range(s.classes):
            add(s.nouns_per_class, endings[2 * noun_class : 2 * noun_class + 2])
        self.verbs = add(s.verbs, ["et", "ent"])
        self.adjectives = add(s.adjectives, ["n" + ending for ending in endings])
        self.adverbs = add(s.adverbs, ["ly"])
