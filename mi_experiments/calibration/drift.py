"""The dense model beside the compressed one, block by block.

A linear of the compressed model does not read what it read in the dense model, and what it adds to
the residual stream lands on hidden states that have drifted. Both differences are seen by running a
block and its dense copy on the same samples side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import replace_output
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.sites import Site

WRITER_TOLERANCE = 0.1
"""Largest relative deviation at which a linear's output counts as added to the block's output.

Adding is exact but for the rounding of the model's number format, which bfloat16 makes a few
percent; anything else misses by about 1.
"""


@dataclass(frozen=True, eq=False)
class Observation:
    """What a site reads on one batch.

    Attributes:
        compressed: in the compressed model.
        dense: in the dense model.
        drift: dense minus compressed residual stream just before the site's linear adds to it;
            None where it does not.
    """

    compressed: Float[Tensor, "tokens columns"]
    dense: Float[Tensor, "tokens columns"]
    drift: Float[Tensor, "tokens rows"] | None


@dataclass(frozen=True, eq=False)
class DensePair:
    """A block as it is being compressed, and the same block of the dense model.

    Attributes:
        block: the block with its present weights, reading what the compressed model gives it.
        dense: a copy with the dense weights, reading what the dense model gives it.
    """

    block: Block
    dense: Block

    @cached_property
    def writers(self) -> dict[str, tuple[str, ...]]:
        """For each linear that writes to the residual stream, all that run later."""
        return find_writers(self.dense)

    @classmethod
    def open(cls, block: Block, stream: Stream | None) -> "DensePair":
        """Copy a block before it is compressed.

        Args:
            block: the block with its dense weights.
            stream: of the dense model, standing before this block; None before the first block,
                where both models read the same.
        """
        if stream is None:
            stream = block.stream.fork()
        # One of them may have met a shortage of memory that the other did not.
        size = min(stream.batch_size, block.stream.batch_size)
        stream.batch_size = block.stream.batch_size = size
        return cls(block, block.copy(stream))

    def shrink(self, reason: str) -> None:
        """Halve the samples per forward pass of both, because memory is short.

        Raises:
            MemoryShortage: It is one sample already.
        """
        self.block.stream.shrink(reason)
        self.dense.stream.batch_size = self.block.stream.batch_size

    def observe(self, site: Site) -> Iterator[Observation]:
        """Run both models on the same samples up to a site, a batch at a time.

        Raises:
            ValueError: If the site is routed: the two models send it different tokens.
        """
        if site.routed:
            raise ValueError(f"{site.name} reads other tokens in the dense model; do not pair them")
        (dense_site,) = [
            dense_site for dense_site in self.dense.sites if dense_site.name == site.name
        ]
        later = self.writers.get(site.linears[0].name)
        now, before = (
            (walk_inputs(self.block, site), walk_inputs(self.dense, dense_site))
            if later is None
            else (walk_writer(self.block, site, later), walk_writer(self.dense, dense_site, later))
        )
        for (compressed, after), (dense, wanted) in zip(now, before, strict=True):
            drift = wanted - after if wanted is not None and after is not None else None
            yield Observation(compressed, dense, drift)

    def advance(self) -> Stream:
        """Take the dense hidden states through the dense block and return them."""
        self.dense.stream.advance(self.dense.name, self.dense.module)
        return self.dense.stream


@torch.no_grad()
def find_writers(block: Block) -> dict[str, tuple[str, ...]]:
    """Find the linears that read alone and whose output is added to the residual stream, by trying.

    With everything silenced that runs later, a writer is a linear without whose output y the
    block's output is smaller by exactly y. No name and no architecture is looked at; blocks that
    normalise the output before adding it (Gemma-2) have no writers. Experts are not tried: what
    they give is weighted by the router.

    Returns:
        For each writer the linears that run later, in execution order.
    """
    _, hidden, call = next(block.batches())
    later: tuple[str, ...] = ()
    writers: dict[str, tuple[str, ...]] = {}
    for site in reversed(block.sites):
        linear = site.linears[0]
        if len(site.linears) == 1 and not site.routed and linear.rows == hidden.shape[-1]:
            with silence(block, later), capture(linear) as seen:
                with_it = call.replay(block.module, hidden)
            with silence(block, (linear.name, *later)):
                without = call.replay(block.module, hidden)
            added = seen[1].reshape(with_it.shape)
            miss = (with_it - added - without).float().norm() / added.float().norm()
            if miss <= WRITER_TOLERANCE:
                writers[linear.name] = later
        later = (*(linear.name for linear in site.linears), *later)
    return writers


def walk_inputs(block: Block, site: Site) -> Iterator[tuple[Float[Tensor, "tokens columns"], None]]:
    """Yield what a site reads, a batch at a time."""
    read: list[Tensor] = []
    for _ in block.feed_batches([site], lambda _, inputs: read.append(inputs)):
        yield read.pop(), None


def walk_writer(
    block: Block, site: Site, later: Sequence[str]
) -> Iterator[tuple[Float[Tensor, "tokens columns"], Float[Tensor, "tokens rows"]]]:
    """Yield what a writer reads, and the residual stream that it adds to, a batch at a time.

    The stream is the output of the block with this writer and all later linears silenced.
    """
    (linear,) = site.linears
    for _, hidden, call in block.batches():
        silent = silence(block, (linear.name, *later))
        with torch.no_grad(), silent, capture(linear) as inputs:
            residual = call.replay(block.module, hidden)
        yield inputs[0].flatten(0, -2), residual.flatten(0, -2)


@contextmanager
def silence(block: Block, names: Sequence[str]) -> Iterator[None]:
    """Let linears of a block return zeros."""
    silent = set(names)
    chosen = [linear for linear in block.linears if linear.name in silent]
    with replace_output(chosen, lambda linear, inputs, output: torch.zeros_like(output)):
        yield


@contextmanager
def capture(linear: LinearView) -> Iterator[list[Tensor]]:
    """Keep what a linear reads and returns, in this order."""
    seen: list[Tensor] = []

    def keep(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        # Copies, because some blocks go on in place.
        seen.extend((inputs.clone(), output.clone()))
        return output

    with replace_output([linear], keep):
        yield seen
