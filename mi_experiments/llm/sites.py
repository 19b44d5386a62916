"""Sites: the linears of a block by the tensor that they read, seen by running the block."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView, suggest_patterns
from mi_experiments.llm.matmul_hooks import on_input
from mi_experiments.llm.replay import Stream


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


@torch.no_grad()
def find_sites(
    name: str, module: nn.Module, linears: Sequence[LinearView], stream: Stream
) -> tuple[Site, ...]:
    """Group linears by the tensor that they read in the first sample.

    An expert that no token of that sample reaches is grouped as those that are reached.
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

    with on_input(linears, read):
        hidden, call = stream.probe()
        call.replay(module, hidden)
    # A stage is the parameters whose linears, or whose slices for one expert, read one tensor.
    parameters: dict[tuple[nn.Module, str], list[LinearView]] = {}
    for linear in linears:
        parameters.setdefault((linear.module, linear.key), []).append(linear)
    stages: dict[tuple[tuple[nn.Module, str], ...], list[LinearView]] = {}
    for group in readers.values():
        stages.setdefault(tuple((linear.module, linear.key) for linear in group), group)
    staged = list(itertools.chain(*stages))
    path = name.rpartition(".")[0]
    if idle := [views[0].parameter_name for key, views in parameters.items() if key not in staged]:
        raise InputError(
            f"{', '.join(idle)} not called when the block runs: no input is multiplied by all of "
            f"it; to leave it as it is, add {suggest_patterns(path, idle)}"
        )
    if len(staged) > len(parameters):
        mixed = next(key for key in staged if staged.count(key) > 1)
        parameter = parameters[mixed][0].parameter_name
        raise InputError(
            f"the experts of {parameter} share their inputs with different linears; "
            f"to leave them as they are, add {suggest_patterns(path, [parameter])}"
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
