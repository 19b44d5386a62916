"""From documents to tokens, with or without a beginning token, and to evaluation windows."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.config.texts import BosPolicy, Windows
from mi_experiments.errors import InputError


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


def draw_published(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    bos: bool,
    *,
    count: int,
    seqlen: int,
    seed: int,
) -> list[Int64[Tensor, "seqlen"]]:
    """Draw windows as the code published with GPTQ, SparseGPT and Wanda does.

    Python's generator is seeded; for every window, documents are drawn until one is longer than
    seqlen, then a start in it, the last possible one excluded. Of a single document only starts are
    drawn. Windows may overlap or repeat. (arXiv:2210.17323, 2301.00774 and 2306.11695, in the file
    of each repository that loads the data.)

    Args:
        tokenizer: the tokenizer of the model.
        documents: texts; a single one is running text.
        bos: whether a document begins with the beginning token.
        count: windows to draw.
        seqlen: tokens in a window.
        seed: the seed of the generator.

    Raises:
        InputError: no document is longer than seqlen.
    """
    # Running text is one document, which every draw reads.
    read = lru_cache(maxsize=1)(lambda index: tokenize(tokenizer, documents[index], bos))
    generator = random.Random(seed)
    windows: list[Tensor] = []
    misses = 0
    while len(windows) < count:
        text = read(generator.randint(0, len(documents) - 1) if len(documents) > 1 else 0)
        if len(text) > seqlen:
            start = generator.randint(0, len(text) - seqlen - 1)
            windows.append(text[start : start + seqlen])
            misses = 0
            continue
        misses += 1
        if misses == len(documents):  # there may be none; looking does not disturb the generator
            longest = max(len(read(index)) for index in range(len(documents)))
            if longest <= seqlen:
                raise InputError(
                    f"windows are drawn from documents longer than seqlen={seqlen} tokens, and of "
                    f"{len(documents)} the longest has {longest}: lower seqlen or give more text"
                )
    return windows


@dataclass(frozen=True)
class EvaluationWindows:
    """What a model is evaluated on, and what of the text is not in it.

    Attributes:
        windows: token ids; nothing is padded, so lengths may differ.
        tokens: their number over all windows.
        dropped_tokens: tokenized but in no window: the tail, what was cut from long documents, and
            what a joined text has beyond `max_windows`; 0 where windows are a sample.
        skipped_documents: with fewer than two tokens, so that nothing can be predicted.
        bos: whether a beginning token was put before each text.
    """

    windows: list[Int64[Tensor, "_"]]
    tokens: int
    dropped_tokens: int
    skipped_documents: int
    bos: bool

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the same as tensors, for a file."""
        counts = [self.tokens, self.dropped_tokens, self.skipped_documents, int(self.bos)]
        return {
            "tokens": torch.cat(self.windows),
            "lengths": torch.tensor([len(window) for window in self.windows]),
            "counts": torch.tensor(counts),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "EvaluationWindows":
        """Return the value that these tensors were made from."""
        windows = list(torch.split(tensors["tokens"], tensors["lengths"].tolist()))
        tokens, dropped, skipped, bos = tensors["counts"].tolist()
        return cls(windows, tokens, dropped, skipped, bool(bos))


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    windows: Windows,
    separator: str,
    seqlen: int,
    max_windows: int | None,
    seed: int,
    add_bos: BosPolicy,
) -> EvaluationWindows:
    r"""Cut evaluation text into windows, which do not overlap unless they are drawn.

    Args:
        tokenizer: the tokenizer of the model.
        documents: rows of the text, in order.
        windows: `joined`: the documents joined with the separator, tokenized once, cut at every
            seqlen tokens, the tail dropped (the protocol of arXiv:2210.17323 and 2301.00774: one
            beginning token for the whole text). `documents`: each document on its own, cut off
            after seqlen tokens, one forward pass a document. `sampled`: `max_windows` random ones
            (`draw_published`), as GPTQ evaluates on C4.
        separator: what `joined` puts between documents: "\n\n" for WikiText-2.
        seqlen: tokens in a window, at most; at least 2.
        max_windows: take only the first ones; None for all. How many are drawn, if sampled.
        seed: the seed of windows that are drawn.
        add_bos: whether a text begins with the beginning token.

    Raises:
        InputError: the text does not fill a single window.
        ValueError: windows are to be drawn, and their number is not given.
    """
    bos = adds_bos(tokenizer, add_bos)
    cut: list[Tensor] = []
    tokenized = skipped = 0
    if windows is Windows.joined:
        text = tokenize(tokenizer, separator.join(documents), bos)
        tokenized = len(text)
        count = tokenized // seqlen
        cut = list(text[: count * seqlen].view(count, seqlen)[:max_windows])
    elif windows is Windows.sampled:
        if max_windows is None:
            raise ValueError("windows=sampled needs max_windows")
        cut = draw_published(tokenizer, documents, bos, count=max_windows, seqlen=seqlen, seed=seed)
        tokenized = max_windows * seqlen
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
