"""One decoder block of a walk, with the hidden states that it reads."""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_experiments.errors import InputError
from mi_experiments.llm.calls import Call, Stop
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input
from mi_experiments.llm.pieces import Pieces
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.sites import Site
from mi_experiments.out_of_memory import note_retry, until_it_fits


@dataclass(eq=False)
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
        piecewise: Whether batches may go through it by turns, see `open_pieces`.
        pieces: The forward pass that has begun.
        halted: Bytes that a sample holds while it is halted at a site; known of described blocks.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearView, ...]
    sites: tuple[Site, ...]
    stream: Stream
    hessian_bytes: int | None = None
    piecewise: bool = False
    pieces: Pieces | None = field(default=None, init=False)
    halted: int = field(default=0, init=False)

    @property
    def leading(self) -> tuple[Site, ...]:
        """The sites before the first routed one, whose batches each have tokens for them."""
        return tuple(itertools.takewhile(lambda site: not site.routed, self.sites))

    def open_pieces(self, writers: Collection[str] = ()) -> None:
        """Begin one forward pass that goes from site to site as they are fed, and then to the end.

        It serves the sites before the first routed one. Experts are fed by replays: those of one
        parameter run in turns with those of another, on tokens that differ from batch to batch.

        Args:
            writers: Linears whose output is added to the residual stream, see `Pieces.read`.
        """
        if self.piecewise and self.leading:
            self._check_position()
            self.pieces = Pieces(self.name, self.module, self.leading, self.stream, writers)

    def close_pieces(self) -> None:
        """End a forward pass that has begun; what comes after it is replayed."""
        if self.pieces is not None:
            self.pieces.close()
            self.pieces = None

    def shrink(self, reason: str) -> None:
        """Go on with less memory: with replays, and when they do not fit with smaller batches.

        Raises:
            MemoryShortage: If there is no room for a replay of one sample.
        """
        if self.pieces is None:
            self.stream.shrink(reason)
            return
        self.close_pieces()
        note_retry("a replay of the block for each site", reason)

    def advance(self) -> None:
        """Take the hidden states through the block, by the pass that has begun or by a replay.

        Raises:
            InputError: As `Stream.advance` does, and the other errors too.
        """
        if self.stream.position != self.index:
            return
        done = 0

        def finish() -> None:
            nonlocal done
            if self.pieces is None:
                return
            if self.pieces.next is not None:
                self.close_pieces()
                return
            for start, output in self.pieces.outputs():
                done = self.stream.put(self.name, self.module, start, output)
            self.pieces = None

        until_it_fits(finish, self.shrink)
        self.stream.advance(self.name, self.module, done)

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
        if self.pieces is not None:
            if [*sites] == [self.pieces.next]:
                self._check_position()
                for start, inputs, _ in self.pieces.read(sites[0]):
                    consume(sites[0], inputs)
                    yield start
                return
            self.close_pieces()
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
        self._check_position()
        return self.stream.batches()

    def _check_position(self) -> None:
        """Raise if the walk has gone past this block."""
        if self.stream.position != self.index:
            raise RuntimeError(f"the walk has left {self.name}; feed a block before the next one")

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
