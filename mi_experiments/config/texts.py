"""What a run is asked to read: published corpora, calibration text, evaluation protocols."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from mi_experiments.errors import require


class OnNonfinite(Enum):
    """What is done about a sample with a hidden state that is NaN or infinite in the dense model.

    `error`: the run ends. `drop`: all such samples are found first, and left out by everything that
    follows.
    """

    error = "error"
    drop = "drop"


class Windows(Enum):
    """How evaluation text is cut.

    `joined`: as one text. `documents`: each document on its own. `sampled`: random windows, each
    inside one document, see `draw_published`.
    """

    joined = "joined"
    documents = "documents"
    sampled = "sampled"


class BosPolicy(Enum):
    """Whether a text begins with the beginning token; `auto` is what the tokenizer itself does."""

    auto = "auto"
    always = "always"
    never = "never"


class Sampling(Enum):
    """How calibration sequences are drawn.

    `packed`: from documents joined. `document`: each from a long document of its own.
    `published`: as the code of GPTQ, SparseGPT and Wanda does, with Python's generator and with
    replacement, so that sequences may overlap.
    """

    packed = "packed"
    document = "document"
    published = "published"


OWN_CORPORA = ("embedded", "text")
"""What is read without a published corpus: the package's language, and a file of the user."""


@dataclass
class HubCorpusConfig:
    """A published corpus: files of a dataset repository at one revision."""

    hub_id: str
    revision: str
    path: str | None
    text_field: str
    splits: dict[str, list[str]]

    def __post_init__(self) -> None:
        """Check ranges."""
        key = f"corpora of {self.hub_id}"
        require(f"{key}: splits", self.splits, bool(self.splits), "at least one")
        for split, files in self.splits.items():
            require(f"{key}: splits.{split}", files, bool(files), "at least one file")


@dataclass
class DatasetConfig:
    """Calibration text and how it is cut into sequences."""

    corpus: str
    path: str | None
    split: str | None
    text_field: str
    separator: str | None
    nsamples: int
    seqlen: int
    batch_size: int
    sampling: Sampling
    allow_fewer: bool
    add_bos: BosPolicy
    on_nonfinite: OnNonfinite
    holdout: float
    offline: bool
    seed: int

    def __post_init__(self) -> None:
        """Check ranges."""
        require("dataset.nsamples", self.nsamples, self.nsamples >= 1, "at least 1")
        require("dataset.seqlen", self.seqlen, self.seqlen >= 2, "at least 2 tokens")
        require("dataset.batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("dataset.holdout", self.holdout, 0 < self.holdout < 1, "between 0 and 1")
        check_separator("dataset.separator", self.separator)


@dataclass
class CorpusConfig:
    """One evaluation text."""

    corpus: str
    path: str | None
    split: str | None
    text_field: str
    first_rows: int | None
    windows: Windows
    separator: str
    seqlen: int
    max_windows: int | None
    seed: int
    add_bos: BosPolicy

    def __post_init__(self) -> None:
        """Check ranges."""
        require("evaluation.datasets.*.seqlen", self.seqlen, self.seqlen >= 2, "at least 2 tokens")
        for key in ("first_rows", "max_windows"):
            count = getattr(self, key)
            fits = count is None or count >= 1
            require(f"evaluation.datasets.*.{key}", count, fits, "at least 1, or null for all")
        check_separator("evaluation.datasets.*.separator", self.separator)
        drawn = self.windows is Windows.sampled
        counted = not drawn or self.max_windows is not None
        key = "evaluation.datasets.*.max_windows"
        require(key, self.max_windows, counted, "a number of windows to draw, if windows=sampled")


@dataclass
class EvaluationConfig:
    """Perplexity protocol: which texts, cut how."""

    protocol: str
    datasets: dict[str, CorpusConfig]
    batch_tokens: int
    logits_chunk: int

    def __post_init__(self) -> None:
        """Check ranges."""
        require("evaluation.datasets", self.datasets, bool(self.datasets), "at least one text")
        require("evaluation.batch_tokens", self.batch_tokens, self.batch_tokens >= 1, "at least 1")
        require("evaluation.logits_chunk", self.logits_chunk, self.logits_chunk >= 1, "at least 1")


def check_separator(key: str, separator: str | None) -> None:
    """Refuse a line break that arrives as a backslash and a letter, as most quotes leave it."""
    allowed = "text without a backslash; a shell writes a line break as $'\"\\n\"'"
    require(key, separator, "\\" not in (separator or ""), allowed)


def check_texts(
    corpora: Mapping[str, HubCorpusConfig], dataset: DatasetConfig, evaluation: EvaluationConfig
) -> None:
    """Check that every text exists in the config, and that calibration sees no evaluation text.

    Raises:
        InputError: a corpus or split is not known, a file is not named, or a split serves for both.
    """
    check_corpus(corpora, "dataset", dataset)
    for name, text in evaluation.datasets.items():
        check_corpus(corpora, f"evaluation.datasets.{name}", text)
        shared = text.corpus in corpora and text.corpus == dataset.corpus
        require(
            "dataset.split",
            dataset.split,
            not shared or text.split != dataset.split,
            f"another part of {text.corpus} than evaluation.datasets.{name} reads",
        )


def check_corpus(
    corpora: Mapping[str, HubCorpusConfig], key: str, text: DatasetConfig | CorpusConfig
) -> None:
    """Check that a corpus is known, and has the split or the file that is named."""
    known = [*OWN_CORPORA, *corpora]
    require(f"{key}.corpus", text.corpus, text.corpus in known, "one of " + ", ".join(known))
    if text.corpus in OWN_CORPORA:
        require(f"{key}.split", text.split, text.split is None, "null; corpora of the hub have any")
        named = text.corpus != "text" or bool(text.path)
        require(f"{key}.path", text.path, named, "a .txt or .jsonl file")
    else:
        splits = list(corpora[text.corpus].splits)
        require(f"{key}.split", text.split, text.split in splits, "one of " + ", ".join(splits))
