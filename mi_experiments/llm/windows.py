"""From documents to token windows: calibration sequences and evaluation windows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.errors import InputError


class Sampling(Enum):
    """How calibration sequences are drawn: from documents joined, or each from a long document."""

    packed = "packed"
    document = "document"


class Windows(Enum):
    """How evaluation text is cut: one joined text, or each document on its own."""

    joined = "joined"
    documents = "documents"


class BosPolicy(Enum):
    """Whether a text begins with the beginning token; `auto` is what the tokenizer itself does."""

    auto = "auto"
    always = "always"
    never = "never"


def adds_bos(tokenizer: PreTrainedTokenizerBase, add_bos: BosPolicy) -> bool:
    """Say whether texts will begin with the beginning token.

    Raises:
        InputError: it is always wanted, and the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if add_bos is BosPolicy.always and bos is None:
        raise InputError("add_bos=always: this tokenizer has no beginning token; use add_bos=auto")
    if add_bos is BosPolicy.auto:
        # Asked of its output: flags such as `add_bos_token` do not always say what happens.
        return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return add_bos is BosPolicy.always


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, bos: bool) -> Int64[Tensor, "tokens"]:
    """Tokenize one text, with or without one beginning token before it.

    Where it is added, beginning tokens that the text itself starts with are not repeated. A text
    that holds nothing gives no tokens, not even the beginning token.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if bos:
        start = next((i for i, token in enumerate(ids) if token != tokenizer.bos_token_id), None)
        ids = [] if start is None else [tokenizer.bos_token_id, *ids[start:]]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    sampling: Sampling,
    add_bos: BosPolicy,
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw calibration sequences; none overlaps another, and there is no padding.

    `packed`: documents in a random order, each tokenized on its own, joined until there is enough,
    cut into windows, of which `nsamples` are drawn. `document`: one random window from each of
    `nsamples` random documents that are longer than seqlen (the convention for C4 in GPTQ,
    arXiv:2210.17323, and SparseGPT, arXiv:2301.00774).

    Raises:
        InputError: there is not enough text; never fewer samples than asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = {Sampling.packed: _draw_packed, Sampling.document: _draw_from_documents}[sampling]
    order = torch.randperm(len(documents), generator=generator).tolist()
    bos = adds_bos(tokenizer, add_bos)
    texts = (tokenize(tokenizer, documents[i], bos) for i in order)
    return draw(texts, nsamples, seqlen, generator)


def _draw_packed(
    texts: Iterator[Int64[Tensor, "_"]], nsamples: int, seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw windows of the joined texts, reading no more texts than needed."""
    needed, available, read = nsamples * seqlen, 0, []
    for text in texts:
        read.append(text)
        available += len(text)
        if available >= needed:
            break
    if available < needed:
        raise InputError(
            f"calibration needs nsamples={nsamples} x seqlen={seqlen} = {needed} tokens, and the "
            f"text has {available}: lower nsamples or seqlen, or give more text"
        )
    count = available // seqlen
    windows = torch.cat(read)[: count * seqlen].view(count, seqlen)
    return windows[torch.randperm(count, generator=generator)[:nsamples]]


def _draw_from_documents(
    texts: Iterator[Int64[Tensor, "_"]], nsamples: int, seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw one window from each of the first texts that are longer than seqlen."""
    windows: list[Tensor] = []
    tokens = longest = 0
    for text in texts:
        tokens, longest = tokens + len(text), max(longest, len(text))
        if len(text) > seqlen:
            starts = len(text) - seqlen + 1
            start = int(torch.randint(starts, (), generator=generator))
            windows.append(text[start : start + seqlen])
        if len(windows) == nsamples:
            return torch.stack(windows)
    raise InputError(
        f"sampling=document needs {nsamples} documents longer than seqlen={seqlen} tokens, and "
        f"there are {len(windows)} ({tokens} tokens in all, the longest has {longest}): use "
        "sampling=packed, lower nsamples or seqlen, or give more text"
    )


@dataclass(frozen=True)
class EvaluationWindows:
    """What a model is evaluated on, and what of the text is not in it.

    Attributes:
        windows: token ids; nothing is padded, so lengths may differ.
        tokens: their number over all windows.
        dropped_tokens: tokenized but in no window: the tail, what was cut from long documents, and
            what a joined text has beyond `max_windows`.
        skipped_documents: with fewer than two tokens, so that nothing can be predicted.
        bos: whether a beginning token was put before each text.
    """

    windows: list[Int64[Tensor, "_"]]
    tokens: int
    dropped_tokens: int
    skipped_documents: int
    bos: bool


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    windows: Windows,
    separator: str,
    seqlen: int,
    max_windows: int | None,
    add_bos: BosPolicy,
) -> EvaluationWindows:
    r"""Cut evaluation text into windows that do not overlap.

    Args:
        tokenizer: of the model.
        documents: rows of the text, in order.
        windows: `joined`: the documents joined with the separator, tokenized once, cut at every
            seqlen tokens, the tail dropped (the protocol of arXiv:2210.17323 and 2301.00774: one
            beginning token for the whole text). `documents`: each document on its own, cut off
            after seqlen tokens, one forward pass a document.
        separator: what `joined` puts between documents: "\n\n" for WikiText-2.
        seqlen: tokens in a window, at most; at least 2.
        max_windows: take only the first ones; None for all.
        add_bos: whether a text begins with the beginning token.

    Raises:
        InputError: the text does not fill a single window.
    """
    bos = adds_bos(tokenizer, add_bos)
    cut: list[Tensor] = []
    tokenized = skipped = 0
    if windows is Windows.joined:
        text = tokenize(tokenizer, separator.join(documents), bos)
        tokenized = len(text)
        count = tokenized // seqlen
        cut = list(text[: count * seqlen].view(count, seqlen)[:max_windows])
    else:
        for document in documents:
            if len(cut) == max_windows:
                break
            text = tokenize(tokenizer, document, bos)
            tokenized += len(text)
            if len(text) < 2:
                skipped += 1
            else:
                cut.append(text[:seqlen])
    if not cut:
        raise InputError(
            f"the evaluation text has {tokenized} tokens in {len(documents)} documents and fills "
            f"no window of seqlen={seqlen} tokens (windows={windows.value}): give more text"
        )
    tokens = sum(len(window) for window in cut)
    return EvaluationWindows(
        windows=cut,
        tokens=tokens,
        dropped_tokens=tokenized - tokens,
        skipped_documents=skipped,
        bos=bos,
    )


def token_hash(tokens: Int64[Tensor, "..."]) -> str:
    """Return the SHA-256 of the shape and the token ids, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
