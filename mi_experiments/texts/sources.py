"""From config to tokens: calibration sequences and evaluation windows that never overlap."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.config.config import Config
from mi_experiments.config.texts import CorpusConfig, DatasetConfig, Windows
from mi_experiments.embedded import language
from mi_experiments.errors import InputError
from mi_experiments.texts.corpora import existing_file, locate_corpus, read_documents
from mi_experiments.texts.sequences import calibration_tokens, held_out_tokens
from mi_experiments.texts.token_cache import cache_key, cached
from mi_experiments.texts.windows import EvaluationWindows, evaluation_windows, token_hash

EMBEDDED_EVALUATION_DOCUMENTS = 1000
"""Documents of the synthetic language when the number of windows is not limited."""


@dataclass(frozen=True)
class EvaluationText:
    """One evaluation text, cut.

    Attributes:
        name: of the text in the config.
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
        files: that hold its rows, in order.
        text_field: the field or column of a row that holds the text.
        first_rows: how many rows are taken; None for all.
        separator: joins the rows to one document; None where each is a document of its own.
        holdout: the last share of the documents, which only the evaluation reads; None where the
            text serves for one purpose.
        purpose: calibration or evaluation.
    """

    files: tuple[Path, ...]
    text_field: str
    first_rows: int | None
    separator: str | None
    holdout: float | None
    purpose: Literal["calibration", "evaluation"]

    def read(self) -> Sequence[str]:
        """Return the documents."""
        read = [read_documents(file, self.text_field) for file in self.files]
        documents = read[0] if len(read) == 1 else [row for rows in read for row in rows]
        if self.first_rows is not None:
            documents = documents[: self.first_rows]
        if self.holdout is not None:
            documents = hold_out(documents, self.holdout)[self.purpose == "evaluation"]
        return documents if self.separator is None else [self.separator.join(documents)]

    def key(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, object]) -> str:
        """Return the name in the token cache of this text, cut with these options."""
        reading = {name: value for name, value in vars(self).items() if name != "files"}
        kinds = [file.suffix for file in self.files]
        return cache_key(tokenizer, self.files, {"reading": reading, "kinds": kinds, **options})


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
    shared = any(shares_file(dataset.path, text) for text in config.evaluation.datasets.values())
    return Source(
        files=find_files(dataset, config),
        text_field=dataset.text_field,
        first_rows=None,
        separator=dataset.separator,
        holdout=dataset.holdout if shared and dataset.corpus == "text" else None,
        purpose="calibration",
    )


def evaluation_source(text: CorpusConfig, config: Config) -> Source | None:
    """Find an evaluation text; None for the package's own language."""
    if text.corpus == "embedded":
        return None
    shared = text.corpus == "text" and shares_file(config.dataset.path, text)
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
    source = calibration_source(config)
    if source is None:
        wanted = dataset.nsamples * dataset.seqlen
        documents = language.documents("calibration", calibration_documents(wanted))
        return calibration_tokens(tokenizer, documents, **options)

    def draw() -> dict[str, Tensor]:
        return {"tokens": calibration_tokens(tokenizer, source.read(), **options)}

    return tokens_of(source.key(tokenizer, options), draw, config)["tokens"]


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
    source = calibration_source(config)
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
    return cached(source.key(tokenizer, key), draw)["tokens"]


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
            tokens_of(source.key(tokenizer, options), compute, config)
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


def tokens_of(
    key: str, compute: Callable[[], dict[str, Tensor]], config: Config
) -> dict[str, Tensor]:
    """Return tokens from their cache, or computed where nothing is to come from a cache."""
    return cached(key, compute) if config.cache else compute()


def shares_file(path: str | None, text: CorpusConfig) -> bool:
    """Say whether an evaluation text is the file that calibration reads."""
    if path is None or text.path is None:
        return False
    return Path(path).expanduser().resolve() == Path(text.path).expanduser().resolve()


def hold_out(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Split documents into those for calibration and the last share, for evaluation.

    A single document is cut at the white space nearest before the share.

    Raises:
        InputError: nothing would be left on one side.
    """
    if len(documents) > 1:
        kept = len(documents) - math.ceil(share * len(documents))
        parts = list(documents[:kept]), list(documents[kept:])
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


def true_perplexity(documents: Sequence[str], seqlen: int) -> float:
    """Return the perplexity of the true distribution on documents cut to `seqlen` tokens."""
    losses = torch.cat([language.true_nll(document)[: seqlen - 1] for document in documents])
    return math.exp(losses.mean().item())
