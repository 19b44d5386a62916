"""From documents to calibration sequences."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.config.texts import BosPolicy, Sampling
from mi_experiments.errors import InputError
from mi_experiments.texts.overlap import fingerprint
from mi_experiments.texts.windows import adds_bos, draw_published, tokenize


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    sampling: Sampling,
    allow_fewer: bool,
    add_bos: BosPolicy,
) -> Int64[Tensor, "sequences seqlen"]:
    """Draw calibration sequences; there is no padding.

    `packed`: documents in a random order, each tokenized on its own, joined until there is enough,
    cut into windows, of which `nsamples` are drawn. `document`: one random window from each of
    `nsamples` random documents that are longer than seqlen (the convention for C4 in GPTQ,
    arXiv:2210.17323, and SparseGPT, arXiv:2301.00774). Neither draws a token twice.
    `published`: see `draw_published`.

    Args:
        tokenizer: the tokenizer of the model.
        documents: texts; a single one is running text.
        nsamples: how many sequences.
        seqlen: tokens in each.
        seed: the seed of the draw.
        sampling: how they are drawn.
        allow_fewer: where the text does not suffice, return the sequences that there are.
        add_bos: whether a document begins with the beginning token.

    Raises:
        InputError: there is not enough text: for all, or for any if fewer are allowed.
    """
    bos = adds_bos(tokenizer, add_bos)
    if sampling is Sampling.published:
        return torch.stack(
            draw_published(tokenizer, documents, bos, count=nsamples, seqlen=seqlen, seed=seed)
        )
    generator = torch.Generator().manual_seed(seed)
    draw = {Sampling.packed: _draw_packed, Sampling.document: _draw_from_documents}[sampling]
    order = torch.randperm(len(documents), generator=generator).tolist()
    texts = (tokenize(tokenizer, documents[i], bos) for i in order)
    return draw(texts, nsamples, seqlen, allow_fewer, generator)


def held_out_tokens(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    count: int,
    nsamples: int,
    seqlen: int,
    seed: int,
    sampling: Sampling,
    add_bos: BosPolicy,
) -> Int64[Tensor, "count seqlen"]:
    """Draw sequences of which `calibration_tokens` draws no token with the same arguments.

    `packed`: the windows that were cut and not drawn, then those of documents that were not read.
    `document`: windows of documents that were not read. Of documents that are equal to one that was
    read, nothing is taken.

    Args:
        tokenizer: the tokenizer of the model.
        documents: the same texts.
        count: how many sequences.
        nsamples: how many calibration has drawn.
        seqlen: tokens in each.
        seed: the seed of the calibration draw.
        sampling: how calibration has drawn.
        add_bos: whether a document begins with the beginning token.

    Raises:
        InputError: there is not enough text, or calibration draws with replacement.
    """
    if sampling is Sampling.published:
        raise InputError(
            "recipe.safety_net=true needs calibration text that nothing was measured on, and "
            "dataset.sampling=published draws with replacement: choose packed or document"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    bos = adds_bos(tokenizer, add_bos)
    marks: list[bytes] = []
    lengths: list[int] = []

    def read_texts() -> Iterator[Tensor]:
        for index in order:
            text = tokenize(tokenizer, documents[index], bos)
            marks.append(fingerprint(documents[index]))
            lengths.append(len(text))
            yield text

    texts = read_texts()
    if sampling is Sampling.packed:
        read = _read(texts, nsamples * seqlen)
        cut = len(read) // seqlen
        unused = torch.randperm(cut, generator=generator)[nsamples:]
        times = Counter(marks)
        copied = torch.tensor([bool(mark) and times[mark] > 1 for mark in marks], dtype=torch.bool)
        copied = copied.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        unused = unused[~copied[: cut * seqlen].view(cut, seqlen).any(dim=1)[unused]]
        rest = read[: cut * seqlen].view(cut, seqlen)[unused]
        further = _read(_unlike(texts, marks), (count - len(rest)) * seqlen)
        more = len(further) // seqlen
        found = torch.cat((rest, further[: more * seqlen].view(more, seqlen)))[:count]
    else:
        _draw_from_documents(texts, nsamples, seqlen, True, generator)
        others = _unlike(texts, marks)
        windows: list[Tensor] = []
        while len(windows) < count and (text := next(others, None)) is not None:
            windows += _draw_window(text, seqlen, generator)
        found = torch.stack(windows) if windows else torch.empty(0, seqlen, dtype=torch.int64)
    if len(found) < count:
        raise InputError(
            f"recipe.safety_net=true needs {count} calibration sequences of {seqlen} tokens beyond "
            f"the {nsamples} that are measured on, and the text has {len(found)}: lower "
            "dataset.nsamples, give more text, or choose recipe.safety_net=false"
        )
    return found


def _unlike(texts: Iterator[Tensor], marks: Sequence[bytes]) -> Iterator[Tensor]:
    """Yield the texts that are equal to none that was read before.

    Args:
        texts: tokens of documents, read when they are asked for.
        marks: fingerprint of each document that was read; grows while texts are read.
    """
    before = {mark for mark in marks if mark}
    return (text for text in texts if marks[-1] not in before)


def _draw_packed(
    texts: Iterator[Int64[Tensor, "_"]],
    nsamples: int,
    seqlen: int,
    allow_fewer: bool,
    generator: torch.Generator,
) -> Int64[Tensor, "sequences seqlen"]:
    """Draw windows of the joined texts, reading no more texts than needed."""
    needed = nsamples * seqlen
    read = _read(texts, needed)
    count = len(read) // seqlen
    if count < (1 if allow_fewer else nsamples):
        raise InputError(
            f"calibration needs nsamples={nsamples} x seqlen={seqlen} = {needed} tokens, and the "
            f"text has {len(read)}: lower nsamples or seqlen, give more text, or take the "
            f"{count} sequences that there are with dataset.allow_fewer=true"
        )
    windows = read[: count * seqlen].view(count, seqlen)
    return windows[torch.randperm(count, generator=generator)[:nsamples]]


def _read(texts: Iterator[Int64[Tensor, "_"]], needed: int) -> Int64[Tensor, "_"]:
    """Join texts until there are enough tokens, or all of them."""
    read, available = [torch.empty(0, dtype=torch.int64)], 0
    while available < needed and (text := next(texts, None)) is not None:
        read.append(text)
        available += len(text)
    return torch.cat(read)


def _draw_from_documents(
    texts: Iterator[Int64[Tensor, "_"]],
    nsamples: int,
    seqlen: int,
    allow_fewer: bool,
    generator: torch.Generator,
) -> Int64[Tensor, "sequences seqlen"]:
    """Draw one window from each of the first texts that are longer than seqlen."""
    windows: list[Tensor] = []
    tokens = longest = 0
    for text in texts:
        tokens, longest = tokens + len(text), max(longest, len(text))
        windows += _draw_window(text, seqlen, generator)
        if len(windows) == nsamples:
            break
    if len(windows) < (1 if allow_fewer else nsamples):
        raise InputError(
            f"sampling=document needs {nsamples} documents longer than seqlen={seqlen} tokens, and "
            f"there are {len(windows)} ({tokens} tokens in all, the longest has {longest}): use "
            "sampling=packed or dataset.allow_fewer=true, lower nsamples or seqlen, or give more "
            "text"
        )
    return torch.stack(windows)


def _draw_window(
    text: Int64[Tensor, "_"], seqlen: int, generator: torch.Generator
) -> list[Int64[Tensor, "seqlen"]]:
    """Draw a window of a text, if it is longer."""
    if len(text) <= seqlen:
        return []
    start = int(torch.randint(len(text) - seqlen + 1, (), generator=generator))
    return [text[start : start + seqlen]]
