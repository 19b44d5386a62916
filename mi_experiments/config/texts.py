"""What a run is asked to read: published corpora, calibration text, evaluation protocols."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval, Len, Predicate

from mi_experiments.config.fields import SEED_RANGE, SEEDS, About
from mi_experiments.errors import require
from mi_experiments.evaluation.measurements import MEASUREMENTS


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


SEPARATOR = Predicate(lambda text: "\\" not in text)
"""Refuses a line break that arrives as a backslash and a letter, as most quotes leave it."""

NO_BACKSLASH = "text without a backslash; a shell writes a line break as $'\"\\n\"'"

KNOWN = "a list of " + ", ".join(MEASUREMENTS)

Files = Annotated[list[str], Len(1), About(allowed="at least one file")]


@dataclass
class HubCorpusConfig:
    """A published corpus: files of a dataset repository at one revision."""

    hub_id: Annotated[str, About("the dataset repository, ORG/NAME")]
    revision: Annotated[str, About("branch, tag or commit of it")]
    path: Annotated[str | None, About("a directory with the same files; null: the hub")]
    text_field: Annotated[str, About("the field that holds the text")]
    splits: Annotated[
        dict[str, Files],
        Len(1),
        About("files of each part: .parquet, .json.gz, .jsonl.gz, .jsonl or .txt"),
    ]


@dataclass
class DatasetConfig:
    """Calibration text and how it is cut into sequences."""

    corpus: Annotated[str, About("embedded, text, or one of corpora")]
    path: Annotated[str | None, About("a .txt file, one document, or .jsonl, one a line")]
    split: Annotated[str | None, About("of a published corpus: train, validation, test")]
    text_field: Annotated[str, About("the field of a .jsonl line that holds the text")]
    separator: Annotated[
        str | None,
        SEPARATOR,
        About("joins the rows to one text; null: each is a document", allowed=NO_BACKSLASH),
    ]
    nsamples: Annotated[int, Ge(1), About("calibration sequences", unit="sequence")]
    seqlen: Annotated[int, Ge(2), About("tokens in a sequence", unit="tokens")]
    batch_size: Annotated[
        int, Ge(1), About("sequences in one forward pass; never padded", unit="sequence")
    ]
    sampling: Annotated[Sampling, About("how sequences are drawn")]
    allow_fewer: Annotated[
        bool, About("where the text is too short, take the sequences that there are")
    ]
    add_bos: Annotated[BosPolicy, About("a beginning token before each document")]
    on_nonfinite: Annotated[
        OnNonfinite, About("a sample that is NaN or infinite in the dense model")
    ]
    holdout: Annotated[
        float,
        Interval(gt=0, lt=1),
        About("the last share of a file is not calibrated on, if the evaluation reads it too"),
    ]
    offline: Annotated[bool, About("texts come from the cache or a directory, never the network")]
    seed: Annotated[int, SEED_RANGE, About("of the sequences that are drawn", allowed=SEEDS)]


@dataclass
class CorpusConfig:
    """One evaluation text."""

    corpus: Annotated[str, About("embedded, text, or one of corpora")]
    path: Annotated[str | None, About("a .txt or .jsonl file")]
    split: Annotated[str | None, About("of a published corpus: train, validation, test")]
    text_field: Annotated[str, About("the field of a .jsonl line that holds the text")]
    first_rows: Annotated[
        int | None,
        Ge(1),
        About("rows taken, from the beginning", allowed="at least 1, or null: all"),
    ]
    windows: Annotated[Windows, About("how the text is cut")]
    separator: Annotated[
        str, SEPARATOR, About("between the rows of a joined text", allowed=NO_BACKSLASH)
    ]
    seqlen: Annotated[int, Ge(2), About("tokens in a window, at most", unit="tokens")]
    max_windows: Annotated[
        int | None, Ge(1), About("windows evaluated, at most", allowed="at least 1, or null: all")
    ]
    seed: Annotated[
        int,
        SEED_RANGE,
        About("of sampled windows; not the run's, so that runs see one text", allowed=SEEDS),
    ]
    add_bos: Annotated[BosPolicy, About("a beginning token before each text")]

    def __post_init__(self) -> None:
        """Check what the fields say of each other."""
        counted = self.windows is not Windows.sampled or self.max_windows is not None
        allowed = "a number of windows to draw, if windows=sampled"
        require("max_windows", self.max_windows, counted, allowed)


@dataclass
class EvaluationConfig:
    """Evaluation protocol: which texts, cut how, and what is measured on them."""

    protocol: Annotated[str, About("its name, recorded with every number")]
    datasets: Annotated[
        dict[str, CorpusConfig], Len(1), About("the texts, by name", allowed="at least one text")
    ]
    measurements: Annotated[
        list[str],
        Len(1),
        Predicate(lambda names: all(name in MEASUREMENTS for name in names)),
        About("what is measured, in one pass; the first is what sweeps look for", allowed=KNOWN),
    ]
    batch_tokens: Annotated[int, Ge(1), About("tokens in one forward pass", unit="token")]
    logits_chunk: Annotated[int, Ge(1), About("tokens whose logits exist at a time", unit="token")]


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
