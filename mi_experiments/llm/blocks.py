"""Walk the decoder blocks of any causal language model, without a line per architecture.

The linears of a block are grouped by the tensor that they read (a site), seen by running the block;
what an architecture adds is at most the path of its block list.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView, take_inventory
from mi_experiments.llm.replay import Stop, Stream, open_stream
from mi_experiments.llm.watching import watch


@dataclass(frozen=True, eq=False)
class Site:
    """One input tensor and the linears that read it, in the order in which they run.

    Attributes:
        name: The linears, relative to the block: ``self_attn.q_proj+k_proj+v_proj``.
        columns: Channels of the input.
        linears: Never empty.
        stage: Sites of one stage do not influence what the others read, so that one pass measures
            them all: the experts of one 3-D parameter. Stages are numbered in execution order.
    """

    name: str
    columns: int
    linears: tuple[LinearView, ...]
    stage: int

    @property
    def routed(self) -> bool:
        """Whether it reads only the tokens that are routed to it, which may be none.

        Which they are differs between a model and its compressed twin.
        """
        return self.linears[0].expert is not None

    @property
    def family(self) -> str:
        """The name, with a star in the place of the expert."""
        expert = self.linears[0].expert
        return self.name if expert is None else re.sub(rf"\.{expert}(?=\+|$)", ".*", self.name)


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
        if self.stream.position != self.index:
            raise RuntimeError(f"the walk has left {self.name}; feed a block before the next one")
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
        with watch(reader, read):
            for start, hidden, call in self.stream.batches():
                reached.clear()
                # Here and not around the generator, whose caller has a grad mode of its own.
                with suppress(Stop), torch.no_grad():
                    call.replay(self.module, hidden)
                missed = {site for site in sites if not site.routed} - reached
                if names := sorted(site.linears[0].name for site in missed):
                    last = start + len(hidden) - 1
                    raise InputError(f"samples {start} to {last} reach no {names}")
                yield start

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

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("the model must be in eval mode: dropout would make every pass different")
    inventory = take_inventory(model, ignore=ignore, path=path)
    stream = open_stream(model, inventory, tokens, batch_size)
    for index, module in enumerate(inventory.modules):
        name = f"{inventory.path}.{index}"
        sites = _find_sites(name, module, inventory.linears[index], stream)
        # As the sites see them: running the block has shown which way round each one is.
        views = {linear.name: linear for site in sites for linear in site.linears}
        linears = tuple(views[linear.name] for linear in inventory.linears[index])
        yield Block(index, name, module, linears, sites, stream)
        stream.advance(name, module)


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
    """Group linears by the tensor that they read in the first batch.

    An expert that no token of that batch reaches is grouped as those that are reached.
    """
    readers: dict[tuple[Any, ...], list[LinearView]] = {}
    # Kept alive until the end: a freed tensor's memory would be taken for the same tensor.
    tensors: list[Tensor] = []
    read_already: set[str] = set()

    def read(linear: LinearView, tensor: Tensor) -> None:
        if linear.name in read_already:
            raise InputError(f"{linear.name} is called twice in one pass; ignore it by name")
        read_already.add(linear.name)
        tensors.append(tensor)
        readers.setdefault((*_identity(tensor), linear.expert), []).append(linear)

    with watch(linears, read):
        _, hidden, call = next(stream.batches())
        call.replay(module, hidden)
    # A stage is the parameters whose linears, or whose slices for one expert, read one tensor.
    parameters: dict[tuple[nn.Module, str], list[LinearView]] = {}
    for linear in linears:
        parameters.setdefault((linear.module, linear.key), []).append(linear)
    stages: dict[tuple[tuple[nn.Module, str], ...], list[LinearView]] = {}
    for group in readers.values():
        stages.setdefault(tuple((linear.module, linear.key) for linear in group), group)
    staged = list(itertools.chain(*stages))
    if idle := [views[0].parameter_name for key, views in parameters.items() if key not in staged]:
        raise InputError(
            f"{', '.join(idle)} not called when the block runs (no matrix product uses it); "
            "ignore it by name"
        )
    if len(staged) > len(parameters):
        twice = next(key for key in staged if staged.count(key) > 1)
        raise InputError(
            f"the experts of {parameters[twice][0].parameter_name} read their inputs in "
            "different company; ignore it by name"
        )
    return tuple(
        Site(_join_names(name, views), views[0].columns, views, stage)
        for stage, (keys, seen) in enumerate(stages.items())
        for views in zip(
            *(
                [linear.stored_as(example.transposed) for linear in parameters[key]]
                for key, example in zip(keys, seen, strict=True)
            ),
            strict=True,
        )
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
