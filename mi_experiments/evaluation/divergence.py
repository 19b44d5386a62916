"""How far a compressed model is from the dense one: KL divergence of their predictions, per token.

Both models share all but their blocks. The text goes through both block by block, side by side, as
in `measure_text`, and their logits exist for a chunk of tokens at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.evaluation.measurements import average
from mi_experiments.llm.calls import BlockOutput
from mi_experiments.llm.logits import (
    PROBE_TOKENS,
    check_tail,
    compute_logits,
    describe,
    open_wave,
    plan_waves,
)
from mi_experiments.llm.replay import context_limit
from mi_experiments.llm.walker import Walker

CHUNKS = 4
"""Into how many a chunk of logits is divided, because they are here twice and in float64."""


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of another.

    Attributes:
        kl: mean of KL(dense ‖ compressed) over all tokens, nats; 0 for equal models.
        standard_error: over windows, nats; None for one window.
        tokens: after which the next one is predicted.
        windows: number of windows.
    """

    kl: float
    standard_error: float | None
    tokens: int
    windows: int


def measure_divergence(
    dense: Walker,
    compressed: Walker,
    windows: Sequence[Int64[Tensor, "_"]],
    *,
    batch_tokens: int,
    logits_chunk: int,
    wave_tokens: int | None = None,
    on_block: Callable[[], None] | None = None,
) -> Divergence:
    """Measure the mean KL(dense ‖ compressed) of the next token, after every token of a text.

    Every window is read by itself; sums are in float64.

    Args:
        dense: the walker of the dense model.
        compressed: the walker of the compressed model, whose blocks take turns with the dense ones.
        windows: token ids.
        batch_tokens: tokens in one forward pass, at least one window.
        logits_chunk: tokens whose logits, of one model and in float32, may exist at one time.
        wave_tokens: tokens whose hidden states may exist at one time, of both models together; at
            least one batch of each. None: all.
        on_block: called after each block of each wave; see `plan_waves` for half of `wave_tokens`.

    Raises:
        InputError: the model's logits cannot be computed in chunks.
        NumericalError: a window leads to values that are not finite.
        ValueError: they walk two models, or there are no windows.
    """
    if compressed.model is not dense.model:
        raise ValueError("dense and compressed weights take turns in one model")
    if not windows:
        raise ValueError("a divergence needs windows")
    limit = context_limit(dense.model)
    chunk = max(1, (logits_chunk if limit is None else min(logits_chunk, limit)) // CHUNKS)
    room = 2 * sum(map(len, windows)) if wave_tokens is None else wave_tokens
    sums = [0.0] * len(windows)
    with torch.no_grad():
        for wave in plan_waves(windows, batch_tokens, room // 2):
            streams = open_wave(dense, windows, wave, batch_tokens)
            if wave[0][0] == 0:
                check_tail(dense, streams[0], PROBE_TOKENS)
            twins = [stream.fork() for stream in streams]
            for index in range(len(dense.blocks)):
                dense.advance(index, *streams)
                compressed.advance(index, *twins)
                if on_block is not None:
                    on_block()
            for group, stream, twin in zip(wave, streams, twins, strict=True):
                pairs = zip(group, stream.samples(), twin.samples(), strict=True)
                for i, hidden, other in pairs:
                    nats = measure_token_divergence(dense, stream.form, hidden, other, chunk)
                    sums[i] = nats.sum().item()
            # Before the next wave makes room for its own.
            del streams, twins, stream, twin, pairs, hidden, other, nats
    for i, total in enumerate(sums):
        if not math.isfinite(total):
            raise NumericalError(
                f"{describe(windows, i)}: the divergence of the compressed model is {total}; "
                "logits are not finite there"
            )
    kl, standard_error = average(sums, [len(window) for window in windows])
    return Divergence(kl, standard_error, sum(map(len, windows)), len(windows))


def measure_token_divergence(
    walker: Walker,
    form: BlockOutput,
    dense: Float[Tensor, "tokens hidden"],
    compressed: Float[Tensor, "tokens hidden"],
    logits_chunk: int,
) -> Float64[Tensor, "tokens"]:
    """Measure KL(dense ‖ compressed) of the next token after each token, in nats.

    Args:
        walker: the walker of the model.
        form: what a block returns.
        dense: what the last block of the dense model returned.
        compressed: what that of the compressed model did.
        logits_chunk: tokens whose logits exist at one time.
    """
    nats = torch.empty(len(dense), dtype=torch.float64, device=dense.device)
    for start in range(0, len(dense), logits_chunk):
        chunk = slice(start, start + logits_chunk)
        nats[chunk] = divergence(
            compute_logits(walker, form, dense[chunk]),
            compute_logits(walker, form, compressed[chunk]),
        )
    return nats


def divergence(
    dense: Float[Tensor, "tokens vocabulary"], compressed: Float[Tensor, "tokens vocabulary"]
) -> Float64[Tensor, "tokens"]:
    """Return Σ p (ln p − ln q) of the distributions that two sets of logits mean, in nats.

    Words that the dense model excludes (p = 0) count nothing.
    """
    log_p = dense.double().log_softmax(-1)
    log_q = compressed.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * log_p.sub_(log_q), 0).sum(-1)
