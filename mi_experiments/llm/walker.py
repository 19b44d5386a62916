"""Walk the decoder blocks of any causal language model, without a line per architecture.

The linears of a block are grouped by the tensor that they read (a site), seen by running the block;
what an architecture adds is at most the path of its block list.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mi_experiments.errors import InputError
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.calls import (
    Call,
    check_replayable,
    observe_output,
    record_calls,
    run_to_first_block,
)
from mi_experiments.llm.inventory import Inventory, block_list, take_inventory
from mi_experiments.llm.nonfinite import FiniteCheck
from mi_experiments.llm.pieces import keeps_state, measure_halted, state_of
from mi_experiments.llm.replay import Stream, check_tokens
from mi_experiments.llm.sites import find_sites
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.out_of_memory import until_it_fits

NO_SHAPES = "the shapes in this model depend on its activations, so it has no dry run; run it"


@dataclass(frozen=True, eq=False)
class Walker:
    """How a model is walked, block by block.

    Attributes:
        model: A causal language model in eval mode, on its device.
        weights: Loads each block when its turn comes and drops it afterwards; None for a model that
            holds all its weights.
        path: Path of the block list; None for the one that `block_list` finds.
        ignore: Shell patterns of the weights to leave as they are, see `take_inventory`.
        batch_size: Samples per forward pass; the last batch may be smaller.
        allocate: Makes room for hidden states; None for where blocks run.
        hessian_bytes: Bytes that the Hessians measured in one pass may take; None for no limit.
        piecewise: Whether there is room for all batches halted inside a block, see `Pieces`.
    """

    model: PreTrainedModel
    weights: BlockWeights | None = None
    path: str | None = None
    ignore: Sequence[str] = ()
    batch_size: int = 1
    allocate: Allocate | None = None
    hessian_bytes: int | None = None
    piecewise: bool = True

    @cached_property
    def inventory(self) -> Inventory:
        """What becomes of every weight inside the blocks."""
        return take_inventory(self.model, ignore=self.ignore, path=self.path)

    @cached_property
    def _block_list(self) -> tuple[str, nn.ModuleList]:
        """The path of the blocks, and the blocks, whatever they are made of."""
        return block_list(self.model, self.path)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self._block_list[1]

    def name(self, index: int) -> str:
        """Return the path of a block in the model, such as ``model.layers.0``."""
        return f"{self._block_list[0]}.{index}"

    @contextmanager
    def hold(self, index: int) -> Iterator[None]:
        """Let a block hold its weights for the length of a with statement."""
        if self.weights is None:
            yield
            return
        self.weights.load(index)
        try:
            yield
        finally:
            self.weights.drop(index)

    def advance(self, index: int, *streams: Stream) -> None:
        """Take hidden states through a block, see `Stream.advance`."""
        with self.hold(index):
            for stream in streams:
                stream.advance(self.name(index), self.blocks[index])

    def walk(self, tokens: Int[Tensor, "nsamples seqlen"]) -> Iterator[Block]:
        """Yield the decoder blocks in order, each with the hidden states that it reads.

        When the next block is asked for, the hidden states are taken through the present one as it
        then is, so that later blocks see what compression has done. With unchanged weights they
        are, bit for bit, those of the model run on the same batches.

        Args:
            tokens: Token ids; samples are not padded.

        Raises:
            InputError: If a matrix in the blocks is neither a linear nor ignored, or as
                `open_stream` does.
            NumericalError: If a sample is not finite.
            ValueError: If the model is in training mode.
        """
        with self.hold(0):
            stream = self.open_stream(tokens)
        for index in range(len(self.blocks)):
            with self.hold(index):
                block = self.outline(index, stream)
                try:
                    yield block
                    block.advance()
                finally:
                    block.close_pieces()

    def outline(self, index: int, stream: Stream) -> Block:
        """Return a block, which must hold its weights, with the sites that running it shows."""
        name, module, linears = self.name(index), self.blocks[index], self.inventory.linears[index]
        before = state_of(module)
        sites = until_it_fits(partial(find_sites, name, module, linears, stream), stream.shrink)
        piecewise = self.piecewise and not keeps_state(module, before)
        # As the sites see them: running the block has shown which way round each one is.
        views = {linear.name: linear for site in sites for linear in site.linears}
        seen = tuple(views[linear.name] for linear in linears)
        return Block(index, name, module, seen, sites, stream, self.hessian_bytes, piecewise)

    def open_stream(
        self,
        tokens: Int[Tensor, "nsamples seqlen"],
        *,
        batch_size: int | None = None,
        names: Sequence[str] | None = None,
        dropped: dict[int, str] | None = None,
    ) -> Stream:
        """Compute what the first block reads for all samples, and how the model calls each block.

        Only the first block must hold its weights.

        Args:
            tokens: Token ids.
            batch_size: Samples per forward pass, where it is not that of the walker.
            names: What messages call the samples; ``sample 0`` and so on by default.
            dropped: Takes, here and later, the samples that are not finite and where they were
                found; zeros go on in their place. None: such a sample is an error.

        Raises:
            InputError: If a sample is longer or a token larger than the model allows, or an
                argument of a block depends on the tokens: then a block cannot be replayed alone.
            NumericalError: If a sample is not finite.
            ValueError: If there is no sample, or the model is in training mode.
        """
        model, path, modules = self.model, *self._block_list
        if model.training:
            raise ValueError("the model is in training mode, where dropout is active: model.eval()")
        if not len(tokens):
            raise ValueError("there is no sample")
        check_tokens(model, tokens)
        size = self.batch_size if batch_size is None else batch_size
        finite = FiniteCheck(names or [f"sample {index}" for index in range(len(tokens))], dropped)
        form = observe_output(model, modules, tokens[:1])
        calls: dict[int, list[Call]] = {}

        def record(count: int) -> list[Call]:
            batch = tokens[:count]
            found = record_calls(model, path, modules, batch, form)
            # The same tokens in another order must lead to the same arguments in every block.
            others = record_calls(model, path, modules, batch.flip(-1), form)
            check_replayable(path, found, others)
            return found

        def enter(start: int) -> Tensor:
            batch = tokens[start : start + size]
            if len(batch) not in calls:
                calls[len(batch)] = record(len(batch))
            entering, call = run_to_first_block(model, modules, batch)
            check_replayable(path, calls[len(batch)][:1], [call])
            finite.check_(entering, start, f"the input of {self.name(0)}")
            return entering

        entering = enter(0)
        device = entering.device
        allocate = self.allocate or partial(_allocate_on, device)
        hidden = allocate((len(tokens), *entering.shape[1:]), entering.dtype)
        hidden[:size] = entering
        del entering
        for start in range(size, len(tokens), size):
            hidden[start : start + size] = enter(start)
        return Stream(hidden, size, calls, record, form, device, allocate, finite)

    def describe_blocks(self, seqlen: int) -> list[Block]:
        """List the blocks of a model that has shapes but no weights, for plans made before loading.

        Args:
            seqlen: Tokens per sample.

        Returns:
            The blocks, with names, sites and dimensions; they cannot be fed.
        """
        tokens = torch.zeros(1, seqlen, dtype=torch.int64, device="meta")
        try:
            blocks = []
            with _Shapes():  # type: ignore[no-untyped-call]
                for block in self.walk(tokens):
                    hidden, call = block.stream.probe()
                    block.halted = measure_halted(block.module, block.leading, hidden, call)
                    blocks.append(block)
            return blocks
        except NotImplementedError as error:
            # What meta tensors say when their numbers are asked for.
            raise InputError(NO_SHAPES) from error


def _allocate_on(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make room for hidden states on a device."""
    return torch.empty(*shape, dtype=dtype, device=device)


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer yes where a model without weights asks for a truth value.

    The only such questions in a forward pass without padding are checks that nothing is masked.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, or answer in its place."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype != torch.bool:
                raise InputError(NO_SHAPES)
            return True
        return func(*args, **(kwargs or {}))
