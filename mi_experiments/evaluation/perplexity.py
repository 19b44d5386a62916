"""Perplexity of a causal language model, in memory that depends neither on vocabulary nor depth.

The windows go through the model block by block, as calibration does, so that only one block must
hold its weights. The logits of a window of 2048 tokens over 128,000 words are a gigabyte in
float32, so the model's own tail (final norm, head) reads the last block's output a chunk of tokens
at a time. The tail is not rebuilt from the output embedding, because some architectures project,
scale or cap: the model's forward runs for every chunk, with the blocks replaced by their answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.llm.logits import (
    PROBE_TOKENS,
    check_tail,
    describe,
    measure_token_nll,
    open_wave,
    plan_waves,
)
from mi_experiments.llm.replay import context_limit
from mi_experiments.llm.walker import Walker


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nll: mean negative log-likelihood over all predicted tokens, nats per token.
        perplexity: exp(nll).
        tokens: predicted tokens; the first of each window is only read.
        windows: number of windows.
        standard_error: of `nll` over windows, as a ratio of window sums, nats; None for one window.
    """

    nll: float
    perplexity: float
    tokens: int
    windows: int
    standard_error: float | None


def measure_perplexity(
    walker: Walker,
    windows: Sequence[Int64[Tensor, "_"]],
    *,
    batch_tokens: int,
    logits_chunk: int,
    wave_tokens: int | None = None,
    on_block: Callable[[], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on token windows.

    Every window is read by itself, from position zero and without padding. The mean is over
    tokens, not over the means of windows; sums are in float64.

    Args:
        walker: the walker of the model; its batch size is not asked.
        windows: token ids, at least two a window.
        batch_tokens: tokens in one forward pass, at least one window.
        logits_chunk: tokens whose logits exist at one time.
        wave_tokens: tokens whose hidden states exist at one time, at least one batch: every wave
            of windows reads all blocks once. None: all of them, or where the model holds all its
            weights, one batch.
        on_block: called after each block of each wave; see `plan_waves`.

    Raises:
        InputError: the model's logits cannot be computed in chunks.
        NumericalError: a window leads to values that are not finite, or the perplexity overflows.
        ValueError: no windows, a window of fewer than two tokens, or a model in training mode.
    """
    if not windows or min(map(len, windows)) < 2:
        raise ValueError("perplexity needs windows of at least two tokens")
    if batch_tokens < 1 or logits_chunk < 1:
        raise ValueError("batch_tokens and logits_chunk are at least 1")
    if wave_tokens is None:
        wave_tokens = batch_tokens if walker.weights is None else sum(map(len, windows))
    limit = context_limit(walker.model)
    chunk = logits_chunk if limit is None else min(logits_chunk, limit)
    sums = [0.0] * len(windows)
    with torch.no_grad():
        for wave in plan_waves(windows, batch_tokens, wave_tokens):
            streams = open_wave(walker, windows, wave, batch_tokens)
            if wave[0][0] == 0:
                check_tail(walker, streams[0], min(PROBE_TOKENS, chunk))
            for index in range(len(walker.blocks)):
                walker.advance(index, *streams)
                if on_block is not None:
                    on_block()
            for group, stream in zip(wave, streams, strict=True):
                for i, hidden in zip(group, stream.samples(), strict=True):
                    window = windows[i].to(hidden.device)
                    nll = measure_token_nll(walker, stream.form, hidden, window, chunk)
                    sums[i] = nll.sum().item()
            # Before the next wave makes room for its own.
            del streams, stream, hidden, window, nll
    for i, total in enumerate(sums):
        if not math.isfinite(total):
            raise NumericalError(
                f"{describe(windows, i)}: its negative log-likelihood is {total}; the model's "
                "logits are not finite there"
            )
    return summarize(sums, [len(window) - 1 for window in windows])


def summarize(sums: Sequence[float], counts: Sequence[int]) -> Perplexity:
    """Turn the summed nats and the predicted tokens of each window into a perplexity.

    Raises:
        NumericalError: the perplexity is beyond float64.
    """
    nll, standard_error = average(sums, counts)
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        raise NumericalError(f"the perplexity overflows: {nll:.1f} nats per token") from None
    return Perplexity(nll, perplexity, sum(counts), len(sums), standard_error)


def average(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Return the mean over all tokens of all windows, and its standard error.

    The standard error is that of a ratio of sums over windows, so that long windows weigh as much
    as they do in the mean (Cochran, Sampling Techniques, 1977, section 6.4); for windows of equal
    length it is that of the mean of their means. None for one window.
    """
    tokens, windows = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    if windows == 1:
        return mean, None
    residuals = (total - mean * count for total, count in zip(sums, counts, strict=True))
    variance = math.fsum(residual**2 for residual in residuals) * windows / (windows - 1)
    return mean, math.sqrt(variance) / tokens
