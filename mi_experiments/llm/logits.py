"""Logits of the model's own head, and what is measured on them, without holding all of them."""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mi_experiments.errors import InputError
from mi_experiments.llm.calls import BlockOutput, replaced_blocks
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.walker import Walker

PROBE_TOKENS = 8
"""Positions on which the tail is tried out before its logits are used."""


PROBE_TOLERANCE = 1e-3
"""Share of the largest logit: far above rounding, far below a missing scale or cap."""


def compute_logits(
    walker: Walker,
    form: BlockOutput,
    hidden: Float[Tensor, "tokens hidden"],
    before: Float[Tensor, "tokens hidden"] | None = None,
) -> Float[Tensor, "tokens vocabulary"]:
    """Let the model make logits of what its last block returned.

    Args:
        walker: the walker of the model, whose blocks are replaced by their answer.
        form: what a block returns.
        hidden: the last block's answer.
        before: the answer of the other blocks; the same by default.
    """
    placeholder = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    earlier = hidden if before is None else before
    count = itertools.count(1)

    def respond(_: Tensor) -> Tensor:
        # A copy: some models go on in place, which must not change what the caller holds.
        return (hidden if next(count) == len(walker.blocks) else earlier)[None].clone()

    with replaced_blocks(walker.blocks, form, respond):
        logits: Tensor = walker.model(input_ids=placeholder, use_cache=False).logits
    return logits[0]


@torch.no_grad()
def check_tail(walker: Walker, stream: Stream, positions: int) -> None:
    """Require that logits depend on the last block's output at their own position, and only on it.

    Args:
        walker: the walker of the model.
        stream: hidden states to try it on, of any block.
        positions: the positions of the first sample that are tried.

    Raises:
        InputError: they do not.
    """
    probe = next(stream.samples())[:positions]
    half = len(probe) // 2
    other = probe.roll(1, -1)
    whole = compute_logits(walker, stream.form, probe)
    alone = compute_logits(walker, stream.form, probe[half:], before=other[half:])
    tolerance = PROBE_TOLERANCE * whole.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
    # Values that are not finite are the window's fault, which is reported with its number.
    if not torch.allclose(alone, whole[half:], rtol=0.0, atol=tolerance, equal_nan=True):
        raise InputError(
            f"{type(walker.model).__name__}: its logits cannot be computed in chunks, because they "
            "are not a function of the last block's output alone"
        )


def measure_tokens(
    walker: Walker,
    form: BlockOutput,
    hidden: Float[Tensor, "tokens hidden"],
    window: Int64[Tensor, "tokens"],
    logits_chunk: int,
    measures: Sequence[Callable[[Tensor, Tensor], Tensor]],
) -> Float64[Tensor, "measures predicted"]:
    """Measure the prediction of each token after the first given those before it.

    Args:
        walker: the walker of the model; the caller decides about gradients.
        form: what a block returns.
        hidden: what the last block returned for the window.
        window: token ids, on the same device.
        logits_chunk: tokens whose logits exist at one time.
        measures: each takes logits and the tokens that came, and returns a number a token.
    """
    inputs, targets = hidden[:-1], window[1:]
    measured = torch.empty(len(measures), len(targets), dtype=torch.float64, device=window.device)
    for start in range(0, len(targets), logits_chunk):
        chunk = slice(start, start + logits_chunk)
        logits = compute_logits(walker, form, inputs[chunk])
        for row, measure in zip(measured, measures, strict=True):
            row[chunk] = measure(logits, targets[chunk])
        # They are gone before the next ones are computed.
        del logits
    return measured


def open_wave(
    walker: Walker,
    windows: Sequence[Int64[Tensor, "_"]],
    wave: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[Stream]:
    """Open a stream for the windows of each length in a wave."""
    with walker.hold(0):
        return [
            walker.open_stream(
                torch.stack([windows[i] for i in group]),
                batch_size=max(1, batch_tokens // len(windows[group[0]])),
                names=[describe(windows, i) for i in group],
            )
            for group in wave
        ]


def plan_waves(
    windows: Sequence[Int64[Tensor, "_"]], batch_tokens: int, wave_tokens: int
) -> list[list[list[int]]]:
    """Divide windows into waves, and each wave into groups of equal length.

    Args:
        windows: token ids.
        batch_tokens: tokens in one forward pass.
        wave_tokens: tokens in a wave, at least one batch.

    Returns:
        Indices of windows, by wave and length; every group but the last of its length is a whole
        number of batches.
    """
    by_length: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(i)
    waves: list[list[list[int]]] = [[]]
    room = wave_tokens
    for length, indices in by_length.items():
        batch = max(1, batch_tokens // length)
        while indices:
            fitting = max(0, room) // length
            count = len(indices) if fitting >= len(indices) else fitting // batch * batch
            if count == 0 and waves[-1]:
                waves.append([])
                room = wave_tokens
                continue
            count = count or min(len(indices), batch)
            waves[-1].append(indices[:count])
            indices = indices[count:]
            room -= count * length
    return waves


def describe(windows: Sequence[Int64[Tensor, "_"]], i: int) -> str:
    """Name a window."""
    return f"window {i} of {len(windows)} ({len(windows[i])} tokens)"
