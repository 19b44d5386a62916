"""One decoder block of a walk, with the hidden states that it reads."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_experiments.errors import InputError
from mi_experiments.llm.calls import Call, Stop
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.sites import Site


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
        hessian_bytes: See `Walker`.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearView, ...]
    sites: tuple[Site, ...]
    stream: Stream
    hessian_bytes: int | None = None

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
        linears = tuple(views.values())
        return replace(self, module=module, linears=linears, sites=sites, stream=stream)
