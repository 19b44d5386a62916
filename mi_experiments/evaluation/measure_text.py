"""Measure a causal language model on a text, in memory that grows neither with words nor depth.

The windows go through the model block by block, as calibration does, so that only one block must
hold its weights. The logits of a window of 2048 tokens over 128,000 words are a gigabyte in
float32, so the model's own tail (final norm, head) reads the last block's output a chunk of tokens
at a time. The tail is not rebuilt from the output embedding, because some architectures project,
scale or cap: the model's forward runs for every chunk, with the blocks replaced by their answer.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.evaluation.measurements import (
    MEASUREMENTS,
    PERPLEXITY,
    Measurement,
    average,
    measurement,
)
from mi_experiments.llm.logits import (
    PROBE_TOKENS,
    check_tail,
    describe,
    measure_tokens,
    open_wave,
    plan_waves,
)
from mi_experiments.llm.replay import context_limit
from mi_experiments.llm.walker import Walker


def measure_text(
    walker: Walker,
    windows: Sequence[Int64[Tensor, "_"]],
    names: Sequence[str] = (PERPLEXITY,),
    *,
    batch_tokens: int,
    logits_chunk: int,
    wave_tokens: int | None = None,
    on_block: Callable[[], None] | None = None,
) -> dict[str, Measurement]:
    """Measure a model on token windows; all that is asked comes from one pass over its logits.

    Every window is read by itself, from position zero and without padding. The mean is over
    tokens, not over the means of windows; sums are in float64.

    Args:
        walker: the walker of the model; its batch size is not asked.
        windows: token ids, at least two a window.
        names: what is measured, of `MEASUREMENTS`.
        batch_tokens: tokens in one forward pass, at least one window.
        logits_chunk: tokens whose logits exist at one time.
        wave_tokens: tokens whose hidden states exist at one time, at least one batch: every wave
            of windows reads all blocks once. None: all of them, or where the model holds all its
            weights, one batch.
        on_block: called after each block of each wave; see `plan_waves`.

    Raises:
        InputError: the model's logits cannot be computed in chunks.
        NumericalError: a window leads to values that are not finite, or the result is none.
        ValueError: no windows, a window of fewer than two tokens, or a model in training mode.
    """
    if not windows or min(map(len, windows)) < 2:
        raise ValueError("a measurement needs windows of at least two tokens")
    if batch_tokens < 1 or logits_chunk < 1:
        raise ValueError("batch_tokens and logits_chunk are at least 1")
    if wave_tokens is None:
        wave_tokens = batch_tokens if walker.weights is None else sum(map(len, windows))
    limit = context_limit(walker.model)
    chunk = logits_chunk if limit is None else min(logits_chunk, limit)
    kinds = [MEASUREMENTS[name] for name in names]
    sums = {name: [0.0] * len(windows) for name in names}
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
                    measures = [kind.of_tokens for kind in kinds]
                    rows = measure_tokens(walker, stream.form, hidden, window, chunk, measures)
                    for name, row in zip(names, rows, strict=True):
                        sums[name][i] = row.sum().item()
            # Before the next wave makes room for its own.
            del streams, stream, hidden, window, rows, row
    counts = [len(window) - 1 for window in windows]
    for name, totals in sums.items():
        for i, total in enumerate(totals):
            if not math.isfinite(total):
                raise NumericalError(
                    f"{describe(windows, i)}: its {name} is {total / counts[i]} "
                    f"{MEASUREMENTS[name].unit}; the model's logits are not finite there"
                )
    return {name: summarize(name, totals, counts) for name, totals in sums.items()}


def summarize(name: str, sums: Sequence[float], counts: Sequence[int]) -> Measurement:
    """Turn what was summed over the tokens of each window, and their number, into a measurement.

    Raises:
        NumericalError: the value is beyond float64.
    """
    mean, standard_error = average(sums, counts)
    found = measurement(name, mean, standard_error)
    if not math.isfinite(found.value):
        raise NumericalError(f"the {name} overflows: {mean:.1f} {found.unit}")
    return found
