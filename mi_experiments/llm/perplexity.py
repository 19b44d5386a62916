"""Perplexity of a causal language model, in memory that depends neither on vocabulary nor text.

The logits of a window of 2048 tokens over 128,000 words are a gigabyte in float32. Here the decoder
runs once for a batch of windows, and the model's own head then reads its output a chunk of tokens
at a time. The head is not rebuilt from the output embedding, because some architectures scale or
cap their logits: the model's forward runs for every chunk, with the decoder replaced by its answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from mi_experiments.errors import InputError, NumericalError

PROBE_TOKENS = 8
"""Positions on which chunked logits are compared with the model's own before measuring."""

PROBE_TOLERANCE = 1e-3
"""Of the largest logit: far above rounding, far below a missing scale or cap."""


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
    model: PreTrainedModel,
    windows: Sequence[Int64[Tensor, "_"]],
    *,
    batch_tokens: int,
    logits_chunk: int,
    on_windows: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on token windows.

    Every window is read by itself, from position zero and without padding. The mean is over
    tokens, not over the means of windows; sums are in float64.

    Args:
        model: in evaluation mode, on its device.
        windows: token ids, at least two a window.
        batch_tokens: tokens in one forward pass, at least one window.
        logits_chunk: tokens whose logits exist at one time.
        on_windows: called after each forward pass with the number of windows that it read.

    Raises:
        InputError: the model's logits cannot be computed in chunks.
        NumericalError: the likelihood of a window is not finite, or the perplexity overflows.
        ValueError: no windows, a window of fewer than two tokens, or a model in training mode.
    """
    if not windows or min(map(len, windows)) < 2:
        raise ValueError("perplexity needs windows of at least two tokens")
    if batch_tokens < 1 or logits_chunk < 1:
        raise ValueError("batch_tokens and logits_chunk are at least 1")
    if model.training:
        raise ValueError("the model is in training mode, where dropout is active: model.eval()")
    sums = [0.0] * len(windows)
    with torch.inference_mode():
        probe = windows[0][: min(PROBE_TOKENS, logits_chunk)].to(model.device)
        _check_chunked_logits(model, probe)
        for indices in _batches(windows, batch_tokens):
            batch = torch.stack([windows[i] for i in indices]).to(model.device)
            totals = measure_token_nll(model, batch, logits_chunk).sum(dim=1).tolist()
            for i, total in zip(indices, totals, strict=True):
                if not math.isfinite(total):
                    raise NumericalError(
                        f"window {i} of {len(windows)} ({len(windows[i])} tokens): its negative "
                        f"log-likelihood is {total}; the model's outputs are not finite there"
                    )
                sums[i] = total
            if on_windows is not None:
                on_windows(len(indices))
    return summarize(sums, [len(window) - 1 for window in windows])


def summarize(sums: Sequence[float], counts: Sequence[int]) -> Perplexity:
    """Turn the summed nats and the predicted tokens of each window into a perplexity.

    The standard error is that of a ratio of sums over windows, so that long windows weigh as much
    as they do in the mean (Cochran, Sampling Techniques, 1977, section 6.4); for windows of equal
    length it is that of the mean of their means.

    Raises:
        NumericalError: the perplexity is beyond float64.
    """
    tokens, windows = sum(counts), len(sums)
    nll = math.fsum(sums) / tokens
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        raise NumericalError(f"the perplexity overflows: {nll:.1f} nats per token") from None
    standard_error = None
    if windows > 1:
        residuals = (total - nll * count for total, count in zip(sums, counts, strict=True))
        variance = math.fsum(residual**2 for residual in residuals) * windows / (windows - 1)
        standard_error = math.sqrt(variance) / tokens
    return Perplexity(nll, perplexity, tokens, windows, standard_error)


def measure_token_nll(
    model: PreTrainedModel, windows: Int64[Tensor, "windows tokens"], logits_chunk: int
) -> Float64[Tensor, "windows predicted"]:
    """Measure the nats that each token after the first costs given those before it.

    Args:
        model: in evaluation mode; the caller decides about gradients.
        windows: token ids on the device of the model.
        logits_chunk: tokens whose logits exist at one time.
    """
    hidden, head = _decode(model, windows)
    inputs, targets = hidden[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    nll = torch.empty(len(targets), dtype=torch.float64, device=windows.device)
    for start in range(0, len(targets), logits_chunk):
        chunk = slice(start, start + logits_chunk)
        # The logits have no name here, so that they are gone before the next ones are computed.
        nll[chunk] = _cross_entropy(head(inputs[chunk]), targets[chunk])
    return nll.view(len(windows), -1)


def _cross_entropy(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int64[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Return the nats of each target, in float32 or better: half precision would round them."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.to(logits.device), reduction="none")


Head = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens vocabulary"]]


def _decode(
    model: PreTrainedModel, windows: Int64[Tensor, "windows tokens"]
) -> tuple[Float[Tensor, "windows tokens hidden"], Head]:
    """Return the decoder's output, and the rest of the model's forward as a function of it."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    outputs: list[ModelOutput] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: object) -> ModelOutput | None:
        if not isinstance(output, ModelOutput) or "last_hidden_state" not in output:
            return None
        outputs.append(output)
        # This pass is for the decoder alone, so the head gets a single position to work on.
        return _hidden_only(output, output["last_hidden_state"][:1, :1])

    handle = decoder.register_forward_hook(keep)
    try:
        model(input_ids=windows, use_cache=False)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise InputError(
            f"{type(model).__name__}: its logits cannot be computed in chunks, because its forward "
            f"does not read the hidden states of {type(decoder).__name__} exactly once"
        )
    (output,) = outputs

    def head(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        with _answer(decoder, _hidden_only(output, hidden[None])):
            placeholder = windows.new_zeros(1, len(hidden))
            logits: Tensor = model(input_ids=placeholder, use_cache=False).logits
        return logits[0]

    return output["last_hidden_state"], head


def _hidden_only(output: ModelOutput, hidden: Tensor) -> ModelOutput:
    """Return an output of the same class that holds nothing but hidden states."""
    return type(output)(last_hidden_state=hidden)


@contextmanager
def _answer(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Let a module return a given output instead of running."""
    # An instance may already carry a forward of its own, as with accelerate's hooks.
    own = vars(module).get("forward")
    vars(module)["forward"] = lambda *arguments, **options: output
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _check_chunked_logits(model: PreTrainedModel, tokens: Int64[Tensor, "tokens"]) -> None:
    """Require that decoder and head, one after the other, give the model's own logits."""
    expected = model(input_ids=tokens[None], use_cache=False).logits[0]
    hidden, head = _decode(model, tokens[None])
    chunked = head(hidden[0])
    tolerance = PROBE_TOLERANCE * expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
    # Values that are not finite are the window's fault, which is reported with its number.
    if not torch.allclose(chunked, expected, rtol=0.0, atol=tolerance, equal_nan=True):
        raise InputError(
            f"{type(model).__name__}: its logits cannot be computed in chunks, because they are "
            "not a function of the decoder's output alone"
        )


def _batches(windows: Sequence[Int64[Tensor, "_"]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of windows of equal length that are read in one forward pass."""
    by_length: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(i)
    for length, indices in by_length.items():
        size = max(1, batch_tokens // length)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
