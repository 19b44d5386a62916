"""Replay decoder blocks one at a time, exactly as the model runs them.

Each block is called with the arguments that the model itself passed to it (`calls`), on the hidden
states that the block before it returned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mi_experiments.errors import InputError, MemoryShortage
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.calls import (
    BlockOutput,
    Call,
    check_replayable,
    observe_output,
    record_calls,
    run_to_first_block,
)
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
    def advance(self, name: str, module: nn.Module) -> None:
        """Replace the hidden states by what the block makes of them, with its present weights.

        Args:
            name: Path of the block, for messages.
            module: The block at ``position``.

        Raises:
            InputError: If the output is no hidden state of the same shape and dtype.
            MemoryShortage: If there is no room for a single sample.
            NumericalError: If a sample is not finite in it.
        """
        start = 0
        while start < len(self.hidden):
            start += until_it_fits(partial(self._advance_batch, name, module, start), self.shrink)
        self.position += 1

    def _advance_batch(self, name: str, module: nn.Module, start: int) -> int:
        """Do as `advance` on the batch that begins with a sample, and return its size."""
        hidden, call = self._batch(start)
        output = call.replay(module, hidden)
        if output.shape != hidden.shape or output.dtype != hidden.dtype:
            raise InputError(
                f"{name} turns {hidden.dtype} {[*hidden.shape]} into {output.dtype} "
                f"{[*output.shape]}; only blocks that keep shape and dtype can be chained"
            )
        self.finite.check_(output, start, f"the output of {name}", (name, module))
        self.hidden[start : start + len(output)].copy_(output)
        return len(output)


def open_stream(
    model: PreTrainedModel,
    path: str,
    modules: nn.ModuleList,
    tokens: Int[Tensor, "nsamples seqlen"],
    batch_size: int,
    allocate: Allocate | None = None,
    names: Sequence[str] | None = None,
    dropped: dict[int, str] | None = None,
) -> Stream:
    """Compute what the first block reads for all samples, and how the model calls each block.

    Only the first block must hold its weights.

    Args:
        model: A causal language model.
        path: Path of its blocks, for messages.
        modules: Its blocks.
        tokens: Token ids.
        batch_size: Samples per forward pass.
        allocate: Makes room for hidden states; by default where blocks run.
        names: What messages call the samples; ``sample 0`` and so on by default.
        dropped: Takes, here and later, the samples that are not finite and where they were found;
            zeros go on in their place. None: such a sample is an error.

    Raises:
        InputError: If a sample is longer or a token larger than the model allows, or an argument of
            a block depends on the tokens: then a block cannot be replayed alone.
        NumericalError: If a sample is not finite.
    """
    check_tokens(model, tokens)
    finite = FiniteCheck(names or [f"sample {index}" for index in range(len(tokens))], dropped)
    form = observe_output(model, modules, tokens[:1])
    calls: dict[int, list[Call]] = {}
    hidden: Tensor | None = None

    def record(size: int) -> list[Call]:
        batch = tokens[:size]
        found = record_calls(model, path, modules, batch, form)
        # The same tokens in another order must lead to the same arguments in every block.
        others = record_calls(model, path, modules, batch.flip(-1), form)
        check_replayable(path, found, others)
        return found

    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        if len(batch) not in calls:
            calls[len(batch)] = record(len(batch))
        entering, call = run_to_first_block(model, modules, batch)
        check_replayable(path, calls[len(batch)][:1], [call])
        finite.check_(entering, start, f"the input of {path}.0")
        if hidden is None:
            allocate = allocate or partial(_allocate_beside, entering)
            hidden = allocate((len(tokens), *entering.shape[1:]), entering.dtype)
        hidden[start : start + len(batch)] = entering
    if hidden is None or allocate is None:
        raise ValueError("there is no sample")
    return Stream(hidden, batch_size, calls, record, form, entering.device, allocate, finite)


def _allocate_beside(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make room for hidden states where a tensor is."""
    return tensor.new_empty(*shape, dtype=dtype)


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
