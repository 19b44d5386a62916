"""Calibration and evaluation text apart: a share held out, and what both have left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from mi_experiments.errors import InputError
from mi_experiments.persistence.atomic import file_hash
from mi_experiments.persistence.cache import content_key
from mi_experiments.texts.corpora import kind
from mi_experiments.texts.overlap import Chosen, Overlap, compare, cut_out, first_equals
from mi_experiments.texts.token_cache import FORMAT, tokens_of


@runtime_checkable
class Text(Protocol):
    """A text that was found, and not read yet."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold it."""

    @property
    def holdout(self) -> float | None:
        """Share of a file that only evaluation reads; None where it serves for one purpose."""

    def documents(self) -> Sequence[str]:
        """Return its documents."""

    def reading(self) -> dict[str, object]:
        """Return what decides the documents, beside the content of the files."""


def hold_out(documents: Sequence[str], share: float) -> tuple[Sequence[str], Sequence[str]]:
    """Split documents into those for calibration and the last share, for evaluation.

    Documents that are equal are on the side of the first of them, and count as one. A single
    document is cut at the white space nearest before the share.

    Raises:
        InputError: nothing would be left on one side.
    """
    parts: tuple[Sequence[str], Sequence[str]]
    if len(documents) > 1:
        first = first_equals(documents)
        different = sorted(set(first))
        kept = len(different) - math.ceil(share * len(different))
        held = [place >= different[kept] for place in first]
        places: tuple[list[int], list[int]] = ([], [])
        for index, side in enumerate(held):
            places[side].append(index)
        parts = Chosen(documents, places[0]), Chosen(documents, places[1])
    else:
        text = documents[0]
        cut = text.rfind(" ", 0, int(len(text) * (1 - share)))
        parts = [text[: max(cut, 0)]], [text[max(cut, 0) :]]
    if not all(any(document.strip() for document in part) for part in parts):
        raise InputError(
            f"dataset.holdout={share} leaves no text on one side: "
            "give a longer file, or another file to the evaluation"
        )
    return parts


def find_overlap(
    calibration: Text, evaluation: Mapping[str, Text], *, least: int, use_cache: bool
) -> Overlap:
    """Find what a calibration text has in common with evaluation texts.

    Args:
        calibration: text.
        evaluation: texts by name.
        least: characters, white space not counted, below which a document is only a phrase.
        use_cache: whether the answer may come from the cache.

    Raises:
        InputError: nothing would be left, or both are to read a file that is not split.
    """
    files = {file_hash(file): file for file in calibration.files}
    others = {name: [file_hash(file) for file in text.files] for name, text in evaluation.items()}
    for name, text in evaluation.items():
        common = [files[file] for file in others[name] if file in files]
        if common and text.holdout is None:
            raise InputError(
                f"{common[0]}: calibration and evaluation.datasets.{name} both read this file; "
                "give another split or file to one of them"
            )

    def compute() -> dict[str, Tensor]:
        documents = calibration.documents()
        overlap = compare(documents, is_running(calibration, documents), read(), least)
        if not any(document.strip() for document in cut_out(documents, overlap.shared)):
            raise InputError(
                f"{calibration.files[0]}: evaluation has all of its {len(documents)} documents, "
                "and none is left to calibrate on; give another text, or this file to both, so "
                "that dataset.holdout splits it"
            )
        return overlap.to_tensors()

    def read() -> Iterator[tuple[Sequence[str], bool]]:
        for text in evaluation.values():
            documents = text.documents()
            yield documents, is_running(text, documents)

    readings = [(others[name], text.reading()) for name, text in evaluation.items()]
    key = {"format": FORMAT, "least": least, "evaluation": readings}
    key |= {"calibration": (list(files), calibration.reading())}
    return Overlap.from_tensors(tokens_of(content_key(key), compute, use_cache))


def is_running(text: Text, documents: Sequence[str]) -> bool:
    """Say whether the documents have no boundaries of their own."""
    return len(documents) == 1 or any(kind(file) == ".txt" for file in text.files)
