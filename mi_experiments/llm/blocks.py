"""Walk the decoder blocks of any causal language model, without a line per architecture.

The linears of a block are grouped by the tensor that they read (a site), seen by running the block;
what an architecture adds is at most the path of its block list.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mi_experiments.errors import InputError
from mi_experiments.llm.activations import Allocate
from mi_experiments.llm.calls import Call, Stop
from mi_experiments.llm.inventory import LinearView, take_inventory
from mi_experiments.llm.matmul_hooks import on_input
from mi_experiments.llm.replay import Stream, open_stream
from mi_experiments.llm.sites import Site, find_sites
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.out_of_memory import until_it_fits

NO_SHAPES = "the shapes in this model depend on its activations, so it has no dry run; run it"


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block, at the moment when the stream stands before it.

    Attributes:
        index: Position in the block list, from 0.
        name: Path in the model, such as ``model.layers.0``.
        module: The block itself.
        linears: The linears to compress, in the order of the module.
        sites: The same linears by the tensor that they read, in execution order.
        stream: The hidden states that the block reads.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearView, ...]
    sites: tuple[Site, ...]
    stream: Stream

    def feed(
        self,
        sites: Sequence[Site],
        consume: Callable[[Site, Float[Tensor, "tokens columns"]], None],
    ) -> None:
        """Run the block with its present weights and hand over what the sites read.

        Each batch ends as soon as the last of the sites has been read, so one call per stage, each
        after compressing the earlier ones, is true-sequential and wastes little.

        Args:
            sites: Sites of this block.
            consume: Called once per batch and site, in execution order, with a view of the
                activations in the dtype in which they are multiplied; it must neither change nor
                keep them. A routed site gets the tokens routed to it, and no call if there is none.

        Raises:
            InputError: If a batch reaches a site twice, or one that is not routed not at all.
            RuntimeError: If the walk has already gone past this block.
            ValueError: If a site belongs to another block.
        """
        for _ in self.feed_batches(sites, consume):
            pass

    def feed_batches(
        self,
        sites: Sequence[Site],
        consume: Callable[[Site, Float[Tensor, "tokens columns"]], None],
    ) -> Iterator[int]:
        """Do as `feed`, and stop after each batch to yield its first sample."""
        if foreign := [site.name for site in sites if site not in self.sites]:
            raise ValueError(f"{self.name} has no such sites: {foreign}")
        if not sites:
            return
        reached: set[Site] = set()

        def read(linear: LinearView, tensor: Tensor) -> None:
            site = reader[linear]
            if site in reached:
                raise InputError(f"{linear.name} is called twice in one pass; ignore it by name")
            reached.add(site)
            # An expert may be called although no token is routed to it.
            if tensor.numel() or not site.routed:
                consume(site, tensor.flatten(0, -2))
            if len(reached) == len(reader):
                raise Stop

        reader = {site.linears[0]: site for site in sites}
        with on_input(reader, read):
            for start, hidden, call in self.batches():
                reached.clear()
                # Here and not around the generator, whose caller has a grad mode of its own.
                with suppress(Stop), torch.no_grad():
                    call.replay(self.module, hidden)
                missed = {site for site in sites if not site.routed} - reached
                if names := sorted(site.linears[0].name for site in missed):
                    last = start + len(hidden) - 1
                    raise InputError(f"samples {start} to {last} reach no {names}")
                yield start

    def batches(self) -> Iterator[tuple[int, Float[Tensor, "batch seqlen hidden"], Call]]:
        """Yield the first sample, the hidden states and the call of every batch, in order.

        Raises:
            RuntimeError: If the walk has already gone past this block.
        """
        if self.stream.position != self.index:
            raise RuntimeError(f"the walk has left {self.name}; feed a block before the next one")
        return self.stream.batches()

    def copy(self, stream: Stream) -> "Block":
        """Copy the block with its present weights, to read other hidden states."""
        module = copy.deepcopy(self.module)
        modules = dict(zip(self.module.modules(), module.modules(), strict=True))
        views = {l: replace(l, module=modules[l.module]) for l in self.linears}  # noqa: E741
        sites = tuple(
            replace(site, linears=tuple(views[linear] for linear in site.linears))
            for site in self.sites
        )
        return Block(self.index, self.name, module, tuple(views.values()), sites, stream)


def walk_blocks(
    model: PreTrainedModel,
    tokens: Int[Tensor, "nsamples seqlen"],
    *,
    batch_size: int,
    ignore: Sequence[str] = (),
    path: str | None = None,
    weights: BlockWeights | None = None,
    allocate: Allocate | None = None,
) -> Iterator[Block]:
    """Yield the decoder blocks in order, each with the hidden states that it reads.

    When the next block is asked for, the hidden states are taken through the present one as it then
    is, so that later blocks see what compression has done. With unchanged weights they are, bit for
    bit, those of the model run on the same batches.

    Args:
        model: A causal language model in eval mode.
        tokens: Token ids; samples are not padded.
        batch_size: Samples per forward pass; the last batch may be smaller.
        ignore: Weights to leave as they are, see ``take_inventory``.
        path: Path of the block list, see ``block_list``.
        weights: Loads each block when its turn comes and drops it afterwards; None for a model that
            holds all its weights.
        allocate: Makes room for hidden states; by default where blocks run.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("the model must be in eval mode: dropout would make every pass different")
    inventory = take_inventory(model, ignore=ignore, path=path)
    path, modules = inventory.path, inventory.modules
    with held(weights, 0):
        stream = open_stream(model, path, modules, tokens, batch_size, allocate)
    for index, module in enumerate(modules):
        name = f"{path}.{index}"
        with held(weights, index):
            find = partial(find_sites, name, module, inventory.linears[index], stream)
            sites = until_it_fits(find, stream.shrink)
            # As the sites see them: running the block has shown which way round each one is.
            views = {linear.name: linear for site in sites for linear in site.linears}
            linears = tuple(views[linear.name] for linear in inventory.linears[index])
            yield Block(index, name, module, linears, sites, stream)
            stream.advance(name, module)


@contextmanager
def held(weights: BlockWeights | None, index: int) -> Iterator[None]:
    """Let a block hold its weights for the length of a with statement."""
    if weights is None:
        yield
        return
    weights.load(index)
    try:
        yield
    finally:
        weights.drop(index)


def describe_blocks(
    model: PreTrainedModel, seqlen: int, *, ignore: Sequence[str] = (), path: str | None = None
) -> list[Block]:
    """List the blocks of a model that has shapes but no weights, for plans made before loading.

    Args:
        model: A causal language model on the meta device.
        seqlen: Tokens per sample.
        ignore: Weights to leave as they are, see ``take_inventory``.
        path: Path of the block list, see ``block_list``.

    Returns:
        The blocks, with names, sites and dimensions; they cannot be fed.
    """
    tokens = torch.zeros(1, seqlen, dtype=torch.int64, device="meta")
    try:
        with _Shapes():  # type: ignore[no-untyped-call]
            return list(walk_blocks(model, tokens, batch_size=1, ignore=ignore, path=path))
    except NotImplementedError as error:
        # What meta tensors say when their numbers are asked for.
        raise InputError(NO_SHAPES) from error


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
