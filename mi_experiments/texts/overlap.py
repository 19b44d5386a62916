"""Which documents are the same text: by content, whatever their files are called.

Two documents are equal if they are after Unicode normalisation (NFC) and without white space: line
endings, trailing blanks, wrapped lines and byte order marks do not count. Running text, that is
text without document boundaries, as in a `.txt`, is compared in runs of `RUN` characters.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt32, UInt64
from numpy import ndarray
from torch import Tensor

Span = tuple[int, int, int]
"""A part of a text: the index of its document, its first character, and the one after its last."""

RUN = 64
"""Characters, white space not counted, that are compared at once in running text."""

STRIDE = 8
"""Characters from one run that is looked for to the next; equal text of RUN + STRIDE - 1 characters
is found wherever it begins."""

PASSAGE = 200
"""Characters from which equal text is a passage, and no phrase that two authors may both write."""

MAJORITY = 0.5
"""Share of a document that must stand in running text for the document to be part of it."""

PIECE = 1 << 20
"""Characters that are hashed at a time."""

BASE = 0x9E3779B97F4A7C15
"""Base of the polynomial that hashes a run, modulo 2^64; odd, so that it has an inverse."""

BLANK = np.array([chr(code).isspace() or code == 0xFEFF for code in range(1 << 16)])
"""Whether a code point is white space or a byte order mark; none from 2^16 on is."""

ASCII_BLANKS = bytes(code for code in range(128) if BLANK[code])


@dataclass(frozen=True)
class Overlap:
    """What a calibration text has in common with evaluation texts, and with itself.

    Attributes:
        documents: number of documents of the calibration text.
        duplicates: how many of them repeat an earlier one.
        shared: the documents, and the passages of running text, that an evaluation text has too.
    """

    documents: int
    duplicates: int
    shared: tuple[Span, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the same as tensors, for a file."""
        return {
            "counts": torch.tensor([self.documents, self.duplicates]),
            "shared": torch.tensor(self.shared, dtype=torch.int64).view(-1, 3),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Overlap":
        """Return the value that these tensors were made from."""
        documents, duplicates = tensors["counts"].tolist()
        return cls(
            documents, duplicates, tuple((i, j, k) for i, j, k in tensors["shared"].tolist())
        )


def compare(
    documents: Sequence[str],
    running: bool,
    others: Iterable[tuple[Sequence[str], bool]],
    least: int,
) -> Overlap:
    """Find what a calibration text has in common with evaluation texts.

    A document is shared if an evaluation text has an equal document, or line of running text, or if
    its larger part stands in running text. Of running text, passages are shared that stand in
    documents or running text of an evaluation.

    Args:
        documents: calibration text.
        running: whether it is running text.
        others: evaluation texts, and whether each is running text; read one at a time.
        least: characters, white space not counted, below which a document is only a phrase.
    """
    known = _Known()
    for other, other_running in others:
        known.add(other, other_running, by_runs=running or other_running)
    marks = [fingerprint(document) for document in documents]
    texts = [mark for mark in marks if mark]
    return Overlap(
        documents=len(documents),
        duplicates=len(texts) - len(set(texts)),
        shared=tuple(
            span
            for index, mark in enumerate(marks)
            for span in known.find(index, mark, documents, running, least)
        ),
    )


def cut_out(documents: Sequence[str], spans: Iterable[Span]) -> Sequence[str]:
    """Return documents without parts of them, and without those of which no text is left.

    Args:
        documents: texts, which are not copied.
        spans: parts that do not overlap, in order.
    """
    rest: dict[int, list[str]] = {}
    reached: dict[int, int] = {}
    for index, start, end in spans:
        rest.setdefault(index, []).append(documents[index][reached.get(index, 0) : start])
        reached[index] = end
    changed = {
        index: "".join([*kept, documents[index][reached[index] :]]) for index, kept in rest.items()
    }
    kept = [i for i in range(len(documents)) if i not in changed or changed[i].strip()]
    return Chosen(documents, kept, changed)


def first_equals(documents: Sequence[str]) -> list[int]:
    """Return for every document the index of the first that is equal to it.

    Documents without text are equal to none.
    """
    first: dict[bytes, int] = {}
    marks = map(fingerprint, documents)
    return [first.setdefault(mark, i) if mark else i for i, mark in enumerate(marks)]


def fingerprint(text: str) -> bytes:
    """Return a hash that equal documents share; empty for a document without text."""
    content = squeeze(text)
    return hashlib.blake2b(content, digest_size=16).digest() if content else b""


def squeeze(text: str) -> bytes:
    """Return what counts of a document when it is compared with another."""
    if text.isascii():
        return text.encode().translate(None, ASCII_BLANKS)
    plain = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    return "".join(plain.split()).encode()


class Chosen(Sequence[str]):
    """Some documents of a text, in its order, of which none is copied.

    Args:
        documents: the text.
        places: indices of those that are chosen.
        changed: the changed by index, what stands in the place of a document.
    """

    def __init__(
        self,
        documents: Sequence[str],
        places: Sequence[int],
        changed: Mapping[int, str] | None = None,
    ) -> None:
        self.documents = documents
        self.places = places
        self.changed = changed or {}

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen": ...
    def __getitem__(self, index: int | slice) -> "str | Chosen":
        if isinstance(index, slice):
            return Chosen(self.documents, self.places[index], self.changed)
        place = self.places[index]
        return self.changed[place] if place in self.changed else self.documents[place]


class _Known:
    """Evaluation text, in a form in which it can be found again."""

    def __init__(self) -> None:
        self.marks: set[bytes] = set()
        self.runs: UInt64[ndarray, "runs"] = np.empty(0, np.uint64)

    def add(self, documents: Sequence[str], running: bool, *, by_runs: bool) -> None:
        """Add a text: its documents, its lines if it is running text, and its runs if asked."""
        found = [self.runs]
        for document in documents:
            self.marks.add(fingerprint(document))
            if running:
                self.marks.update(
                    fingerprint(line[0]) for line in re.finditer(r"[^\r\n]+", document)
                )
            if by_runs:
                found += [hashes[::STRIDE] for _, hashes in _hash_runs(document)]
        self.runs = np.unique(np.concatenate(found))

    def find(
        self, index: int, mark: bytes, documents: Sequence[str], running: bool, least: int
    ) -> list[Span]:
        """Return a document if it is known, or the passages that are known if it is running text.

        Args:
            index: the index of the document.
            mark: its fingerprint.
            documents: the text.
            running: whether that is running text.
            least: characters below which a document is only a phrase.
        """
        if mark and mark in self.marks and len(squeeze(documents[index])) >= least:
            return [(index, 0, len(documents[index]))]
        if not len(self.runs):
            return []
        length = len(documents[index])
        passages, share = self._find_passages(documents[index])
        if not running:
            return [(index, 0, length)] if share >= MAJORITY else []
        return [
            (index, start if start >= RUN else 0, end if length - end >= RUN else length)
            for start, end in passages
            if end - start >= PASSAGE
        ]

    def _find_passages(self, text: str) -> tuple[list[tuple[int, int]], float]:
        """Return where a text consists of known runs, and the share of it that does.

        What is between two of them and too short for a run counts as one of them.
        """
        passages: list[tuple[int, int]] = []
        inside = total = 0
        for places, hashes in _hash_runs(text):
            nearest = np.searchsorted(self.runs, hashes).clip(max=len(self.runs) - 1)
            starts = np.flatnonzero(self.runs[nearest] == hashes)
            steps = np.zeros(len(places) + 1, np.int64)
            np.add.at(steps, starts, 1)
            np.add.at(steps, starts + RUN, -1)
            known = np.cumsum(steps[:-1]) > 0
            inside, total = inside + int(known.sum()), total + len(places)
            for start, end in _stretches(known):
                first, last = int(places[start]), int(places[end - 1]) + 1
                if passages and first - passages[-1][1] < RUN:
                    first = passages.pop()[0]
                passages.append((first, last))
        return passages, inside / max(total, 1)


def _stretches(true: Bool[ndarray, "n"]) -> Iterator[tuple[int, int]]:
    """Yield the first index of every stretch that is true, and the one after its last."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], true.astype(np.int8), [0]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _hash_runs(text: str) -> Iterator[tuple[Int64[ndarray, "n"], UInt64[ndarray, "runs"]]]:
    """Yield, for a piece of a text at a time, where its characters are and the hash of every run.

    Pieces overlap, so that no run is missed.
    """
    start = 0
    while start < len(text):
        piece = text[start : start + PIECE]
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        places = np.flatnonzero(~BLANK[np.minimum(codes, len(BLANK) - 1)])
        enough = len(places) >= RUN
        if enough:
            yield places + start, _hash_windows(codes[places])
        start += int(places[1 - RUN]) if enough and len(piece) == PIECE else PIECE


def _hash_windows(codes: UInt32[ndarray, "n"]) -> UInt64[ndarray, "runs"]:
    """Return the hash of every window of RUN characters c: Σ_j c_j·B^j modulo 2^64."""
    powers = _powers(BASE)[: len(codes)]
    inverse = _powers(pow(BASE, -1, 1 << 64))[: len(codes) - RUN + 1]
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(codes * powers)))
    windows: UInt64[ndarray, "runs"] = (sums[RUN:] - sums[:-RUN]) * inverse
    return windows


@cache
def _powers(base: int) -> UInt64[ndarray, "powers"]:
    """Return the first powers of a number modulo 2^64."""
    factors = np.full(PIECE, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
