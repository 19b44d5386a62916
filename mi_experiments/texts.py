"""From config to tokens: calibration sequences and evaluation windows that never overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.config import Config, CorpusConfig
from mi_experiments.embedded import language
from mi_experiments.errors import InputError
from mi_experiments.llm.corpora import load_hub_documents, read_documents
from mi_experiments.llm.windows import (
    Windows,
    calibration_tokens,
    evaluation_windows,
    token_hash,
)

EMBEDDED_EVALUATION_DOCUMENTS = 1000
"""Documents of the synthetic language when the number of windows is not limited."""


@dataclass(frozen=True)
class EvaluationText:
    """One evaluation text, cut.

    Attributes:
        name: of the text in the config.
        cut: `joined` or `documents`.
        seqlen: tokens in a window, at most.
        windows: token ids of each window.
        dropped_tokens: tokens that filled no window.
        sha256: content hash of the windows.
        floor: perplexity of the true distribution on the same predicted tokens, where known.
    """

    name: str
    cut: str
    seqlen: int
    windows: Sequence[Int[Tensor, "_"]]
    dropped_tokens: int
    sha256: str
    floor: float | None


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, config: Config
) -> Int[Tensor, "nsamples seqlen"]:
    """Return the calibration tokens of a run."""
    dataset = config.dataset
    documents: Sequence[str]
    if dataset.corpus == "embedded":
        wanted = dataset.nsamples * dataset.seqlen
        documents = language.documents("calibration", wanted // 32 + 64)
    elif dataset.corpus == "text":
        documents = list(read_documents(str(dataset.path), dataset.text_field))
        if any(shares_file(dataset.path, text) for text in config.evaluation.datasets.values()):
            documents, _ = hold_out(documents, dataset.holdout)
    else:
        documents = load_hub_documents(
            dataset.corpus,
            "calibration",
            directory=dataset.path,
            offline=config.model.offline,
        )
    return calibration_tokens(
        tokenizer,
        documents,
        nsamples=dataset.nsamples,
        seqlen=dataset.seqlen,
        seed=dataset.seed,
        sampling=dataset.sampling,
        add_bos=dataset.add_bos,
    )


def evaluation_texts(tokenizer: PreTrainedTokenizerBase, config: Config) -> list[EvaluationText]:
    """Return every evaluation text of a run, cut into windows."""
    return [
        cut_text(tokenizer, name, text, config) for name, text in config.evaluation.datasets.items()
    ]


def cut_text(
    tokenizer: PreTrainedTokenizerBase, name: str, text: CorpusConfig, config: Config
) -> EvaluationText:
    """Read one evaluation text and cut it into windows."""
    documents = evaluation_documents(text, config)
    cut = evaluation_windows(
        tokenizer,
        documents,
        windows=text.windows,
        separator=text.separator,
        seqlen=text.seqlen,
        max_windows=text.max_windows,
        add_bos=text.add_bos,
    )
    floor = None
    if text.corpus == "embedded" and text.windows is Windows.documents:
        floor = true_perplexity(documents[: len(cut.windows)], text.seqlen)
    return EvaluationText(
        name=name,
        cut=text.windows.name,
        seqlen=text.seqlen,
        windows=cut.windows,
        dropped_tokens=cut.dropped_tokens,
        sha256=token_hash(torch.cat(list(cut.windows))),
        floor=floor,
    )


def evaluation_documents(text: CorpusConfig, config: Config) -> Sequence[str]:
    """Return the documents of an evaluation text, without any that calibration sees."""
    if text.corpus == "embedded":
        return language.documents("evaluation", text.max_windows or EMBEDDED_EVALUATION_DOCUMENTS)
    if text.corpus == "text":
        documents = list(read_documents(str(text.path), text.text_field))
        if shares_file(config.dataset.path, text):
            _, documents = hold_out(documents, config.dataset.holdout)
        return documents
    return load_hub_documents(
        text.corpus, "evaluation", directory=text.path, offline=config.model.offline
    )


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
