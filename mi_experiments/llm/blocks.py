"""Walk the decoder blocks of any causal language model, without a line per architecture.

The linears of a block are grouped by the tensor that they read (a site), seen by running the block;
what an architecture adds is at most the path of its block list.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView, take_inventory
from mi_experiments.llm.replay import Allocate, Stop, Stream, hooks, open_stream
from mi_experiments.llm.streaming import BlockWeights


@dataclass(frozen=True, eq=False)
class Site:
    """One input tensor and the linears that read it, in the order in which they run.

    Attributes:
        name: The linears, relative to the block: ``self_attn.q_proj+k_proj+v_proj``.
        columns: Channels of the input.
        linears: Never empty.
    """

    name: str
    columns: int
    linears: tuple[LinearView, ...]


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

        Each batch ends as soon as the last of the sites has been read, so one call per site, each
        after compressing the earlier ones, is true-sequential and wastes little.

        Args:
            sites: Sites of this block.
            consume: Called once per batch and site, in execution order, with a view of the
                activations in the dtype of the model; it must neither change nor keep them.

        Raises:
            InputError: If a batch does not reach one of the sites, or reaches it twice.
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
        if self.stream.position != self.index:
            raise RuntimeError(f"the walk has left {self.name}; feed a block before the next one")
        if foreign := [site.name for site in sites if site not in self.sites]:
            raise ValueError(f"{self.name} has no such sites: {foreign}")
        if not sites:
            return
        pending: set[Site] = set()

        def read(linear: LinearView, tensor: Tensor) -> None:
            site = reader[linear]
            if site not in pending:
                raise InputError(f"{linear.name} is called twice in one pass; ignore it by name")
            pending.remove(site)
            consume(site, tensor.flatten(0, -2))
            if not pending:
                raise Stop

        reader = {site.linears[0]: site for site in sites}
        with hooks(_watch(linear, read) for linear in reader):
            for start, hidden, call in self.stream.batches():
                pending.update(sites)
                try:
                    # Here and not around the generator, whose caller has a grad mode of its own.
                    with torch.no_grad():
                        call.replay(self.module, hidden)
                except Stop:
                    yield start
                    continue
                names = sorted(site.linears[0].name for site in pending)
                raise InputError(f"samples {start} to {start + len(hidden) - 1} reach no {names}")

    def copy(self, stream: Stream) -> "Block":
        """Copy the block with its present weights, to read other hidden states."""
        module = copy.deepcopy(self.module)

        def copied(linear: LinearView) -> LinearView:
            return LinearView(
                linear.name, module.get_submodule(linear.name.removeprefix(f"{self.name}."))
            )

        views = {linear: copied(linear) for linear in self.linears}
        sites = tuple(
            Site(site.name, site.columns, tuple(views[linear] for linear in site.linears))
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
        linears = inventory.linears[index]
        with held(weights, index):
            sites = _find_sites(name, module, linears, stream)
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
    with _Shapes():  # type: ignore[no-untyped-call]
        return list(walk_blocks(model, tokens, batch_size=1, ignore=ignore, path=path))


@torch.no_grad()
def _find_sites(
    name: str, module: nn.Module, linears: Sequence[LinearView], stream: Stream
) -> tuple[Site, ...]:
    """Group linears by the tensor that they read in the first batch."""
    readers: dict[tuple[Any, ...], list[LinearView]] = {}
    # Kept alive until the end: a freed tensor's memory would be taken for the same tensor.
    tensors: list[Tensor] = []

    def read(linear: LinearView, tensor: Tensor) -> None:
        if any(linear in group for group in readers.values()):
            raise InputError(f"{linear.name} is called twice in one pass; ignore it by name")
        tensors.append(tensor)
        readers.setdefault(_identity(tensor), []).append(linear)

    with hooks(_watch(linear, read) for linear in linears):
        _, hidden, call = next(stream.batches())
        call.replay(module, hidden)
    called = set(itertools.chain(*readers.values()))
    if idle := [linear.name for linear in linears if linear not in called]:
        raise InputError(f"{', '.join(idle)} not called when the block runs; ignore it by name")
    return tuple(
        Site(_join_names(name, group), group[0].columns, tuple(group)) for group in readers.values()
    )


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors share exactly if they are the same rows of numbers in memory.

    The version counts changes in place. The storage, unlike the data pointer, is also distinct on
    the meta device. [batch, seqlen, columns] and [tokens, columns] over the same memory are equal.
    """
    contiguous = tensor.is_contiguous()
    layout = tensor.numel() if contiguous else (tensor.shape, tensor.stride())
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), layout, tensor.shape[-1], tensor.dtype, tensor._version


def _join_names(block: str, linears: Sequence[LinearView]) -> str:
    """Join the names of linears, relative to their block, without repeating a parent."""
    parts: list[str] = []
    parent = ""
    for linear in linears:
        relative = linear.name.removeprefix(f"{block}.")
        prefix, _, leaf = relative.rpartition(".")
        parts.append(leaf if parts and prefix == parent else relative)
        parent = prefix
    return "+".join(parts)


def _watch(linear: LinearView, read: Callable[[LinearView, Tensor], None]) -> RemovableHandle:
    """Call ``read`` with the input of a linear whenever it is about to run."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(linear, next(iter((*args, *kwargs.values()))))

    return linear.module.register_forward_pre_hook(before, with_kwargs=True)


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
                raise InputError("this model's shapes depend on its activations: no dry run")
            return True
        return func(*args, **(kwargs or {}))
