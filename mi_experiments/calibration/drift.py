"""The dense model beside the compressed one, block by block.

A linear of the compressed model does not read what it read in the dense model, and what it adds to
the residual stream lands on hidden states that have drifted. Both differences are seen by running a
block and its dense copy on the same samples side by side.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input, replace_output, replace_product
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.sites import Site
from mi_experiments.out_of_memory import until_it_fits

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
    def writers(self) -> dict[str, "Writer"]:
        """The linears that write to the residual stream."""
        return until_it_fits(partial(find_writers, self.dense), self.shrink)

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

    def open_pieces(self) -> None:
        """Begin one forward pass of each model, if the sums of what writers add are exact."""
        leading = {linear.name for site in self.block.leading for linear in site.linears}
        if all(writer.summed for name, writer in self.writers.items() if name in leading):
            self.block.open_pieces(self.writers)
            self.dense.open_pieces(self.writers)

    def shrink(self, reason: str) -> None:
        """Go on with less memory, see `Block.shrink`.

        Raises:
            MemoryShortage: If there is no room for a replay of one sample.
        """
        self.dense.close_pieces()
        self.block.shrink(reason)
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
        writer = self.writers.get(site.linears[0].name)
        for (compressed, after), (dense, wanted) in zip(
            walk_site(self.block, site, writer),
            walk_site(self.dense, dense_site, writer),
            strict=True,
        ):
            drift = wanted - after if wanted is not None and after is not None else None
            yield Observation(compressed, dense, drift)

    def advance(self) -> Stream:
        """Take the dense hidden states through the dense block and return them."""
        self.dense.advance()
        return self.dense.stream


@dataclass(frozen=True)
class Writer:
    """A linear whose output is added to the residual stream.

    Attributes:
        later: All linears that run after it, in execution order.
        summed: Whether the stream that it adds to is, bit for bit, what the block reads plus the
            outputs of the writers before it, added in execution order.
    """

    later: tuple[str, ...]
    summed: bool


@torch.no_grad()
def find_writers(block: Block) -> dict[str, Writer]:
    """Find the linears that read alone and whose output is added to the residual stream, by trying.

    With everything silenced that runs later, a writer is a linear without whose output y the
    block's output is smaller by exactly y. No name and no architecture is looked at; blocks that
    normalise the output before adding it (Gemma-2) have no writers. Experts are not tried: what
    they give is weighted by the router.

    Tried is the first sample. Every linear but the experts is multiplied by once; in the trials it
    answers from memory.

    Returns:
        The writers by name, in execution order.
    """
    hidden, call = block.stream.probe()
    remembered: dict[str, Tensor] = {}

    def remember(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        remembered[linear.name] = output.clone()
        return output

    plain = [linear for linear in block.linears if linear.expert is None]
    with replace_output(plain, remember):
        call.replay(block.module, hidden)

    def result(silenced: Collection[str]) -> Tensor:
        with silence(block, silenced, remembered):
            return call.replay(block.module, hidden)

    order = [linear.name for site in block.sites for linear in site.linears]
    writers: dict[str, Writer] = {}
    total = hidden
    for site in block.sites:
        linear = site.linears[0]
        if len(site.linears) > 1 or site.routed or linear.rows != hidden.shape[-1]:
            continue
        later = tuple(order[order.index(linear.name) + 1 :])
        with_it, without = result(later), result((linear.name, *later))
        added = remembered[linear.name].reshape(with_it.shape)
        miss = (with_it - added - without).float().norm() / added.float().norm()
        if miss <= WRITER_TOLERANCE:
            writers[linear.name] = Writer(later, summed=torch.equal(total, without))
            total = total + added
    return writers


def walk_site(
    block: Block, site: Site, writer: Writer | None
) -> Iterator[tuple[Float[Tensor, "tokens columns"], Float[Tensor, "tokens rows"] | None]]:
    """Yield what a site reads, and the residual stream that its writer adds to, batch by batch."""
    if block.pieces is not None and block.pieces.next is site:
        for _, inputs, residual in block.pieces.read(site):
            yield inputs, residual if writer is not None else None
        return
    block.close_pieces()
    if writer is not None:
        yield from walk_writer(block, site, writer.later)
        return
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
    inputs: list[Tensor] = []
    for _, hidden, call in block.batches():
        silent = silence(block, (linear.name, *later))
        # A copy, because some blocks go on in place.
        read = on_input([linear], lambda _, x: inputs.append(x.clone()))
        with torch.no_grad(), silent, read:
            residual = call.replay(block.module, hidden)
        yield inputs.pop().flatten(0, -2), residual.flatten(0, -2)


@contextmanager
def silence(
    block: Block, names: Collection[str], remembered: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Let linears of a block return zeros, and others what is remembered of them."""
    silent, known = set(names), remembered or {}
    chosen = [linear for linear in block.linears if linear.name in silent or linear.name in known]

    def answer(linear: LinearView) -> Tensor | None:
        return None if linear.name in silent else known[linear.name]

    with replace_product(chosen, answer):
        yield
