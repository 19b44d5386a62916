"""Replay decoder blocks one at a time, exactly as the model runs them.

Each block is called with the arguments that the model itself passed to it (`calls`), on the hidden
states that the block before it returned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mi_experiments.errors import InputError, MemoryShortage
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.calls import BlockOutput, Call
from mi_experiments.llm.nonfinite import FiniteCheck
from mi_experiments.out_of_memory import REMEDY, note_retry, until_it_fits


@dataclass(eq=False)
class Stream:
    """The hidden states of all samples between two blocks, held once and overwritten in place.

    Attributes:
        hidden: What block ``position`` reads, in the dtype of the model; in `place`.
        batch_size: Samples per forward pass; halved where memory is short.
        calls: For each batch size that occurs, how the model calls each block.
        record: Finds that out for a batch size, in a pass without blocks.
        form: What a block returns beside the hidden state.
        device: Where blocks run.
        allocate: Makes room for hidden states.
        finite: What happens to samples that are not finite.
        position: Index of the block that reads ``hidden``.
    """

    hidden: Float[Tensor, "nsamples seqlen hidden"]
    batch_size: int
    calls: dict[int, list[Call]]
    record: Callable[[int], list[Call]]
    form: BlockOutput
    device: torch.device
    allocate: Allocate
    finite: FiniteCheck
    position: int = 0

    def fork(self) -> "Stream":
        """Copy the hidden states, for another model with the same blocks."""
        hidden = self.allocate(self.hidden.shape, self.hidden.dtype)
        return replace(self, hidden=hidden.copy_(self.hidden))

    def batches(self) -> Iterator[tuple[int, Float[Tensor, "batch seqlen hidden"], Call]]:
        """Yield the first sample, the hidden states and the call of every batch, in order."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield start, *self._batch(start)

    def _batch(self, start: int) -> tuple[Float[Tensor, "batch seqlen hidden"], Call]:
        """Return a batch of hidden states where blocks run, and how the model calls the block."""
        hidden = self.hidden[start : start + self.batch_size].to(self.device)
        if len(hidden) not in self.calls:
            self.calls[len(hidden)] = self.record(len(hidden))
        return hidden, self.calls[len(hidden)][self.position]

    def probe(self) -> tuple[Float[Tensor, "1 seqlen hidden"], Call]:
        """Return the first sample where blocks run, and how the model calls the block on it."""
        if 1 not in self.calls:
            self.calls[1] = self.record(1)
        return self.hidden[:1].to(self.device), self.calls[1][self.position]

    def shrink(self, reason: str) -> None:
        """Halve the samples per forward pass, because memory is short.

        Raises:
            MemoryShortage: It is one sample already.
        """
        size = min(self.batch_size, len(self.hidden))
        if size == 1:
            raise MemoryShortage(f"no memory for one sample at a time ({reason}): {REMEDY}")
        self.batch_size = size // 2
        note_retry(f"batches of {self.batch_size} samples", reason)

    def samples(self) -> Iterator[Float[Tensor, "seqlen hidden"]]:
        """Yield the hidden states of every sample, in order, where blocks run."""
        for hidden in self.hidden:
            yield hidden.to(self.device)

    @torch.no_grad()
    def advance(self, name: str, module: nn.Module, start: int = 0) -> None:
        """Replace the hidden states by what the block makes of them, with its present weights.

        Args:
            name: Path of the block, for messages.
            module: The block at ``position``.
            start: The first sample for which that is still to be done.

        Raises:
            InputError: If the output is no hidden state of the same shape and dtype.
            MemoryShortage: If there is no room for a single sample.
            NumericalError: If a sample is not finite in it.
        """
        while start < len(self.hidden):
            start = until_it_fits(partial(self._advance_batch, name, module, start), self.shrink)
        self.position += 1

    def _advance_batch(self, name: str, module: nn.Module, start: int) -> int:
        """Do as `advance` on the batch that begins with a sample, and return where it ends."""
        hidden, call = self._batch(start)
        return self.put(name, module, start, call.replay(module, hidden))

    def put(self, name: str, module: nn.Module, start: int, output: Tensor) -> int:
        """Put what a block returned in the place of what it read, and return where the batch ends.

        Args:
            name: Path of the block, for messages.
            module: The block at ``position``.
            start: The first sample of the batch.
            output: What the block returned.

        Raises:
            InputError: If that is no hidden state of the same shape and dtype.
            NumericalError: If a sample is not finite in it.
        """
        hidden = self.hidden[start : start + self.batch_size]
        if output.shape != hidden.shape or output.dtype != hidden.dtype:
            raise InputError(
                f"{name} turns {hidden.dtype} {[*hidden.shape]} into {output.dtype} "
                f"{[*output.shape]}; only blocks that keep shape and dtype can be chained"
            )
        self.finite.check_(output, start, f"the output of {name}", (name, module))
        self.hidden[start : start + len(output)].copy_(output)
        return start + len(output)


def check_tokens(model: PreTrainedModel, tokens: Int[Tensor, "nsamples seqlen"]) -> None:
    """Raise if a sample is longer, or a token id larger, than the model allows.

    Raises:
        InputError: If so.
    """
    limit = context_limit(model)
    if limit is not None and tokens.shape[1] > limit:
        raise InputError(f"dataset.seqlen={tokens.shape[1]} exceeds the {limit} of the model")
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if not tokens.is_meta and int(tokens.max()) >= vocabulary:
        raise InputError(
            f"token {int(tokens.max())} is beyond the {vocabulary} embeddings of the model; "
            "are the tokens from another tokenizer?"
        )


def context_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model reads, if its config says so."""
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit
