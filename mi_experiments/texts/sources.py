"""From config to tokens: calibration sequences and evaluation windows that never overlap."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.config.config import Config
from mi_experiments.config.texts import CorpusConfig, DatasetConfig, Sampling, Windows
from mi_experiments.embedded import language
from mi_experiments.texts.corpora import (
    existing_file,
    kind,
    locate_corpus,
    read_documents,
    same_content,
)
from mi_experiments.texts.overlap import PASSAGE, Overlap, Span, cut_out
from mi_experiments.texts.separation import find_overlap, hold_out
from mi_experiments.texts.sequences import calibration_tokens, held_out_tokens
from mi_experiments.texts.token_cache import cache_key, tokens_of
from mi_experiments.texts.windows import EvaluationWindows, evaluation_windows, token_hash

log = logging.getLogger(__name__)

EMBEDDED_EVALUATION_DOCUMENTS = 1000
"""Documents of the synthetic language when the number of windows is not limited."""


@dataclass(frozen=True)
class EvaluationText:
    """One evaluation text, cut.

    Attributes:
        name: the name of the text in the config.
        cut: `joined`, `documents` or `sampled`.
        seqlen: tokens in a window, at most.
        windows: token ids of each window.
        dropped_tokens: tokens that filled no window.
        bos: whether a beginning token was put before each text.
        sha256: content hash of the windows.
        floor: perplexity of the true distribution on the same predicted tokens, where known.
    """

    name: str
    cut: str
    seqlen: int
    windows: Sequence[Int[Tensor, "_"]]
    dropped_tokens: int
    bos: bool
    sha256: str
    floor: float | None


@dataclass(frozen=True)
class Source:
    """A text that was found, and not read yet.

    Attributes:
        files: the files that hold its rows, in order.
        text_field: the field or column of a row that holds the text.
        first_rows: how many rows are taken; None for all.
        separator: joins the rows to one document; None where each is a document of its own.
        holdout: the last share of the documents, which only the evaluation reads; None where the
            text serves for one purpose.
        purpose: calibration or evaluation.
        left_out: the documents, and the parts of them, that are not read.
    """

    files: tuple[Path, ...]
    text_field: str
    first_rows: int | None
    separator: str | None
    holdout: float | None
    purpose: Literal["calibration", "evaluation"]
    left_out: tuple[Span, ...] = ()

    def documents(self) -> Sequence[str]:
        """Return the documents before they are joined: held out first, then counted."""
        read = [read_documents(file, self.text_field) for file in self.files]
        documents = read[0] if len(read) == 1 else [row for rows in read for row in rows]
        if self.holdout is not None:
            documents = hold_out(documents, self.holdout)[self.purpose == "evaluation"]
        if self.first_rows is not None:
            documents = documents[: self.first_rows]
        return cut_out(documents, self.left_out) if self.left_out else documents

    def read(self) -> Sequence[str]:
        """Return the documents, or the one that they are joined to."""
        documents = self.documents()
        return documents if self.separator is None else [self.separator.join(documents)]

    def reading(self) -> dict[str, object]:
        """Return what decides the documents, beside the content of the files."""
        return vars(self) | {"files": [kind(file) for file in self.files]}

    def key(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, object]) -> str:
        """Return the name in the token cache of this text, cut with these options."""
        return cache_key(tokenizer, self.files, {"reading": self.reading(), **options})


def find_texts(config: Config) -> list[Path]:
    """Find every text of a run, downloading what is missing, and return the files.

    Afterwards nothing of a run needs the network.

    Raises:
        InputError: a text cannot be found; names it and the remedy.
    """
    sources = [calibration_source(config)]
    sources += [evaluation_source(text, config) for text in config.evaluation.datasets.values()]
    return [file for source in sources if source for file in source.files]


def calibration_source(config: Config) -> Source | None:
    """Find the calibration text; None for the package's own language."""
    dataset = config.dataset
    if dataset.corpus == "embedded":
        return None
    shared = any(shares_file(dataset, text) for text in config.evaluation.datasets.values())
    return Source(
        files=find_files(dataset, config),
        text_field=dataset.text_field,
        first_rows=None,
        separator=dataset.separator,
        holdout=dataset.holdout if shared else None,
        purpose="calibration",
    )


def evaluation_source(text: CorpusConfig, config: Config) -> Source | None:
    """Find an evaluation text; None for the package's own language."""
    if text.corpus == "embedded":
        return None
    shared = shares_file(config.dataset, text)
    return Source(
        files=find_files(text, config),
        text_field=text.text_field,
        first_rows=text.first_rows,
        separator=None,
        holdout=config.dataset.holdout if shared else None,
        purpose="evaluation",
    )


def find_files(text: DatasetConfig | CorpusConfig, config: Config) -> tuple[Path, ...]:
    """Find the file of the user, or the files of a published corpus."""
    if text.corpus == "text":
        return (existing_file(str(text.path)),)
    corpus = config.corpora[text.corpus]
    return tuple(
        locate_corpus(
            corpus.hub_id,
            corpus.revision,
            corpus.splits[str(text.split)],
            directory=text.path,
            offline=config.dataset.offline,
        )
    )


def separate_calibration(config: Config) -> tuple[Source | None, Overlap | None]:
    """Find the calibration text without what evaluation texts have too, and say what that is.

    A published draw of a published corpus is left as it is. Of such a corpus, what is shorter than
    a passage is a phrase, such as a heading, and no document.

    Raises:
        InputError: nothing is left, or calibration is to read a file that evaluation reads.
    """
    source = calibration_source(config)
    if source is None:
        return None, None
    texts = config.evaluation.datasets
    others = {name: evaluation_source(text, config) for name, text in texts.items()}
    published = config.dataset.corpus in config.corpora
    overlap = find_overlap(
        source,
        {name: other for name, other in others.items() if other is not None},
        least=PASSAGE if published else 1,
        use_cache=config.cache,
    )
    if published and config.dataset.sampling is Sampling.published:
        return source, overlap
    return dataclasses.replace(source, left_out=overlap.shared), overlap


def report_overlap(config: Config) -> tuple[Overlap | None, int]:
    """Warn of calibration text that evaluation has too; return that, and how much is left out."""
    source, overlap = separate_calibration(config)
    if source is None or overlap is None:
        return None, 0
    if overlap.shared:
        log.warning(
            "of the %d calibration documents, evaluation has %d documents or passages too; %s",
            overlap.documents,
            len(overlap.shared),
            "they are left out" if source.left_out else "they stay, as the draw is the published",
        )
    return overlap, len(source.left_out)


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, config: Config
) -> Int[Tensor, "sequences seqlen"]:
    """Return the calibration tokens of a run: nsamples sequences, or fewer if that is allowed."""
    dataset = config.dataset
    options: dict[str, Any] = {
        "nsamples": dataset.nsamples,
        "seqlen": dataset.seqlen,
        "seed": dataset.seed,
        "sampling": dataset.sampling,
        "allow_fewer": dataset.allow_fewer,
        "add_bos": dataset.add_bos,
    }
    source, _ = separate_calibration(config)
    if source is None:
        wanted = dataset.nsamples * dataset.seqlen
        documents = language.documents("calibration", calibration_documents(wanted))
        return calibration_tokens(tokenizer, documents, **options)

    def draw() -> dict[str, Tensor]:
        return {"tokens": calibration_tokens(tokenizer, source.read(), **options)}

    return tokens_of(source.key(tokenizer, options), draw, config.cache)["tokens"]


def held_out_sequences(
    tokenizer: PreTrainedTokenizerBase, config: Config
) -> Int[Tensor, "sequences seqlen"]:
    """Return sequences of the calibration text on which nothing is measured.

    They are an eighth as many as nsamples, and at least 4; no token of them is in
    `calibration_sequences` or in an evaluation text.

    Raises:
        InputError: the text does not have as many, or calibration draws with replacement.
    """
    dataset = config.dataset
    count = max(4, dataset.nsamples // 8)
    options: dict[str, Any] = {
        "seqlen": dataset.seqlen,
        "seed": dataset.seed,
        "sampling": dataset.sampling,
        "add_bos": dataset.add_bos,
    }
    source, _ = separate_calibration(config)
    if source is None:
        # The synthetic language never ends: documents that calibration does not reach.
        first = calibration_documents(dataset.nsamples * dataset.seqlen)
        further = calibration_documents(count * dataset.seqlen)
        documents = language.documents("calibration", first + further)[first:]
        return calibration_tokens(
            tokenizer, documents, nsamples=count, allow_fewer=False, **options
        )

    def draw() -> dict[str, Tensor]:
        held_out = held_out_tokens(
            tokenizer, source.read(), count=count, nsamples=dataset.nsamples, **options
        )
        return {"tokens": held_out}

    key = {**options, "held_out": count, "nsamples": dataset.nsamples}
    return tokens_of(source.key(tokenizer, key), draw, config.cache)["tokens"]


def calibration_documents(tokens: int) -> int:
    """Return how many documents of the synthetic language surely hold so many tokens."""
    return tokens // 32 + 64


def evaluation_texts(tokenizer: PreTrainedTokenizerBase, config: Config) -> list[EvaluationText]:
    """Return every evaluation text of a run, cut into windows."""
    return [
        cut_text(tokenizer, name, text, config) for name, text in config.evaluation.datasets.items()
    ]


def cut_text(
    tokenizer: PreTrainedTokenizerBase, name: str, text: CorpusConfig, config: Config
) -> EvaluationText:
    """Read one evaluation text and cut it into windows."""
    options: dict[str, Any] = {
        "windows": text.windows,
        "separator": text.separator,
        "seqlen": text.seqlen,
        "max_windows": text.max_windows,
        "seed": text.seed,
        "add_bos": text.add_bos,
    }
    source = evaluation_source(text, config)
    floor = None
    if source is None:
        count = text.max_windows or EMBEDDED_EVALUATION_DOCUMENTS
        documents = language.documents("evaluation", count)
        cut = evaluation_windows(tokenizer, documents, **options)
        if text.windows is Windows.documents:
            floor = true_perplexity(documents[: len(cut.windows)], text.seqlen)
    else:

        def compute() -> dict[str, Tensor]:
            return evaluation_windows(tokenizer, source.read(), **options).to_tensors()

        cut = EvaluationWindows.from_tensors(
            tokens_of(source.key(tokenizer, options), compute, config.cache)
        )
    return EvaluationText(
        name=name,
        cut=text.windows.name,
        seqlen=text.seqlen,
        windows=cut.windows,
        dropped_tokens=cut.dropped_tokens,
        bos=cut.bos,
        sha256=token_hash(torch.cat(list(cut.windows))),
        floor=floor,
    )


def shares_file(dataset: DatasetConfig, text: CorpusConfig) -> bool:
    """Say whether an evaluation text is the user's file that calibration reads, or a copy of it."""
    if not dataset.corpus == text.corpus == "text":
        return False
    return same_content(existing_file(str(dataset.path)), existing_file(str(text.path)))


def true_perplexity(documents: Sequence[str], seqlen: int) -> float:
    """Return the perplexity of the true distribution on documents cut to `seqlen` tokens."""
    losses = torch.cat([language.true_nll(document)[: seqlen - 1] for document in documents])
    return math.exp(losses.mean().item())
