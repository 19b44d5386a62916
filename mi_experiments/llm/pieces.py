"""One forward pass of all batches through a block, halted wherever one of its sites reads.

A site is solved on what it reads once the sites before it are compressed. Running the block anew up
to each site would multiply by the same weights again and again. Here every batch is a coroutine
(greenlet) that runs the block's own forward: it halts where it is about to multiply by the weight
of a site, and goes on when that weight has been overwritten. So each linear is multiplied by once a
batch, in any architecture, and what is computed is bit for bit what replays compute.

It costs the memory of what all halted batches hold, see `measure_halted`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_experiments.errors import InputError
from mi_experiments.llm.calls import Call
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input, read_and_change
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.sites import Site


class Pieces:
    """A forward pass of all batches through a block, piece by piece.

    Args:
        name: Path of the block, for messages.
        module: The block.
        sites: Where to halt, in execution order; none is routed.
        stream: What the block reads.
        writers: Linears whose output is added to the residual stream, see `read`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sites: Sequence[Site],
        stream: Stream,
        writers: Collection[str] = (),
    ) -> None:
        self._name, self._module = name, module
        self._sites = {site.linears[0]: site for site in sites}
        self._ahead = list(sites)
        self._writers = [s.linears[0].name for s in sites if s.linears[0].name in writers]
        self._batches = [_Batch(self, *batch) for batch in stream.batches()]

    @property
    def next(self) -> Site | None:
        """The site that can be read now; None after the last one."""
        return self._ahead[0] if self._ahead else None

    def read(
        self, site: Site
    ) -> Iterator[tuple[int, Float[Tensor, "tokens columns"], Float[Tensor, "tokens hidden"]]]:
        """Let every batch go on to the next site.

        Yields:
            The first sample of each batch, what the site reads, and the residual stream: what the
            block read and what writers have added to it, this site's own output not yet.

        Raises:
            InputError: If a batch does not reach it.
            ValueError: If it is not the next one.
        """
        if site is not self.next:
            raise ValueError(f"{site.name} is not the next site of {self._name}")
        for batch in self._batches:
            yield batch.start, batch.run_to(site), batch.residual.flatten(0, -2)
        self._ahead.pop(0)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Let every batch go on to the end, and yield its first sample and its output.

        What a batch has read may be overwritten when its output is there.
        """
        while self._batches:
            batch = self._batches.pop(0)
            yield batch.start, batch.finish()

    def close(self) -> None:
        """End all batches where they are."""
        while self._batches:
            self._batches.pop().close()

    def forward(self, batch: "_Batch", call: Call) -> Tensor:
        """Run the block on a batch, with a halt before each site."""

        def halt(linear: LinearView, inputs: Tensor) -> None:
            if (site := self._sites.get(linear)) is not None:
                getcurrent().parent.switch((site, inputs))

        def add(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
            # After the last writer nobody asks for the residual stream.
            if linear.name in self._writers[:-1]:
                batch.residual = batch.residual + output.reshape(batch.residual.shape)
            return output

        # All linears, so that copies of weights that were made before a halt are made again.
        linears = [linear for site in self._sites.values() for linear in site.linears]
        with read_and_change(linears, halt, add):
            return call.replay(self._module, batch.hidden)

    def refuse(self, batch: "_Batch", linear: LinearView) -> InputError:
        """Return what to raise where a batch does not reach a linear."""
        last = batch.start + len(batch.hidden) - 1
        return InputError(f"samples {batch.start} to {last} reach no {linear.name}")


class _Batch:
    """One batch on its way through a block."""

    def __init__(self, pieces: Pieces, start: int, hidden: Tensor, call: Call) -> None:
        self.start, self.hidden, self.residual = start, hidden, hidden
        self._pieces = pieces
        self._run = greenlet(lambda: pieces.forward(self, call))

    def run_to(self, site: Site) -> Float[Tensor, "tokens columns"]:
        """Go on to a site, and return what it reads."""
        reached = self._go_on()
        if self._run.dead or reached[0] is not site:
            raise self._pieces.refuse(self, site.linears[0])
        inputs: Tensor = reached[1]
        return inputs.flatten(0, -2)

    def finish(self) -> Tensor:
        """Go on to the end, and return what the block returns."""
        output = self._go_on()
        if not self._run.dead:
            raise self._pieces.refuse(self, output[0].linears[0])
        return output  # type: ignore[no-any-return]

    def close(self) -> None:
        """End where it is."""
        self._run.parent = getcurrent()
        if self._run:
            self._run.throw(GreenletExit)

    def _go_on(self) -> Any:
        """Go on to the next halt, or to the end."""
        # Whoever goes on is the one to go back to, and has a grad mode of its own.
        self._run.parent = getcurrent()
        with torch.no_grad():
            return self._run.switch()


def state_of(module: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """Return the attributes and buffers of a module and of all modules in it."""
    return {part: {**vars(part), **part._buffers} for part in module.modules()}


def keeps_state(module: nn.Module, before: dict[nn.Module, dict[str, Any]]) -> bool:
    """Say whether a module, or one in it, has other attributes than before.

    Batches that go by turns through a module that leaves something in itself for later would find
    what another one has left.
    """
    return any(
        state.keys() != before[part].keys()
        or any(before[part][key] is not value for key, value in state.items())
        for part, state in state_of(module).items()
    )


def measure_halted(
    module: nn.Module, sites: Sequence[Site], hidden: Float[Tensor, "1 seqlen hidden"], call: Call
) -> int:
    """Return the most bytes that a sample holds while it is halted at one of the sites.

    Counted is what the block's forward has made and not yet let go of, and the sum of what writers
    have added. It needs no weights: on the meta device the same tensors come and go.
    """
    most = 0

    def halt(linear: LinearView, inputs: Tensor) -> None:
        nonlocal most
        most = max(most, made.bytes_alive())

    linears = [site.linears[0] for site in sites]
    with torch.no_grad(), _Made() as made, on_input(linears, halt):
        call.replay(module, hidden)
    return most + hidden.nbytes


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the memory of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[Any, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        # A view of what was there before, such as a weight, is nothing that was made.
        given = {_reference(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            reference = _reference(tensor)
            if reference in self._sizes or reference not in given:
                self._sizes[reference] = tensor.untyped_storage().nbytes()
        return result

    def bytes_alive(self) -> int:
        """Return the size of what is still there."""
        return sum(size for made, size in self._sizes.items() if not bool(made.expired()))


def _reference(tensor: Tensor) -> Any:
    """Return a weak reference to the memory of a tensor; those to the same memory are equal."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a nest of tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
