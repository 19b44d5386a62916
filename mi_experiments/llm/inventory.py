"""What a model's blocks are made of: where they are, their linears, and every other matrix.

Nothing here knows an architecture. The block list is found by its length, a linear by its type; a
matrix of any other kind must be ignored by name, so that nothing stays dense unnoticed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mi_experiments.errors import InputError


@dataclass(frozen=True, eq=False)
class LinearView:
    """One weight matrix of a block, always seen as [rows, columns] = [outputs, inputs].

    Attributes:
        name: Path of the module in the model, such as ``model.layers.0.self_attn.q_proj``.
        module: The ``nn.Linear``, or the ``Conv1D`` of GPT-2, which stores its weight transposed.
    """

    name: str
    module: nn.Module

    @property
    def _weight(self) -> Tensor:
        # Looked up at every use: whoever streams weights from disk replaces the parameter.
        weight = self.module.weight
        return weight.T if isinstance(self.module, Conv1D) else weight  # type: ignore[return-value]

    @property
    def rows(self) -> int:
        """Output dimension."""
        return self._weight.shape[0]

    @property
    def columns(self) -> int:
        """Input dimension: the number of channels."""
        return self._weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Number format that the model holds the weight in."""
        return self._weight.dtype

    def read_weight(self) -> Float[Tensor, "rows columns"]:
        """Copy the weight to float32."""
        return self._weight.detach().to(torch.float32, copy=True).contiguous()

    @torch.no_grad()
    def write_weight(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Overwrite the weight in place, rounding to the dtype of the module.

        Args:
            weight: The new weight.

        Raises:
            ValueError: If the shape is not [rows, columns].
        """
        if weight.shape != self._weight.shape:
            raise ValueError(f"{self.name} is {[*self._weight.shape]}, not {[*weight.shape]}")
        self._weight.copy_(weight)


@dataclass(frozen=True, eq=False)
class Inventory:
    """What becomes of every weight of two or more dimensions inside the blocks.

    Attributes:
        path: Path of the block list in the model.
        modules: The blocks.
        linears: The linears to compress, for each block.
        ignored: Number of weights left as they are on request, by parameter name.
    """

    path: str
    modules: nn.ModuleList
    linears: tuple[tuple[LinearView, ...], ...]
    ignored: dict[str, int]

    @property
    def compressed(self) -> int:
        """Number of weights in the linears to compress."""
        return sum(linear.rows * linear.columns for linear in itertools.chain(*self.linears))

    @property
    def coverage(self) -> float:
        """Share of the blocks' matrix weights that is compressed, in [0, 1]."""
        return self.compressed / max(1, self.compressed + sum(self.ignored.values()))


def block_list(model: PreTrainedModel, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks: the one list inside the base model that is as long as it is deep.

    Args:
        model: A causal language model.
        path: Where the list is, if that rule does not find it.

    Returns:
        The path of the list in the model, and the list.

    Raises:
        InputError: If ``path`` is no module list, or not exactly one list has the right length.
    """
    kind = type(model).__name__
    modules = dict(model.named_modules())
    if path is not None:
        if isinstance(found := modules.get(path), nn.ModuleList):
            return path, found
        raise InputError(f"model.blocks={path} is not a list of modules in {kind}")
    base = next(name for name, module in modules.items() if module is model.base_model)
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.base_model.named_modules(prefix=base)
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    # A list inside a block, of experts for example, may happen to have the same length.
    outermost = [n for n in lists if not any(n.startswith(f"{outer}.") for outer in lists)]
    if len(outermost) != 1:
        raise InputError(
            f"{kind} has {len(outermost)} lists of {depth} blocks {outermost}; "
            "name the one to compress with model.blocks=PATH"
        )
    return outermost[0], lists[outermost[0]]


def take_inventory(
    model: PreTrainedModel, *, ignore: Sequence[str] = (), path: str | None = None
) -> Inventory:
    """Decide for every weight of two or more dimensions in the blocks: compress, or ignore.

    Vectors (norms, biases) are never touched.

    Args:
        model: A causal language model; its weights may be on the meta device.
        ignore: Shell patterns for parameters or modules (``*.mlp.experts.*``) to leave as they are.
        path: Path of the block list, see ``block_list``.

    Raises:
        InputError: If a weight is neither of a linear nor ignored, is used under two names, or if
            a pattern matches nothing.
    """
    path, blocks = block_list(model, path)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    linears: list[list[LinearView]] = [[] for _ in blocks]
    ignored: dict[str, int] = {}
    unknown: list[str] = []
    matched: set[str] = set()
    for index, block in enumerate(blocks):
        for owner, module in block.named_modules(prefix=f"{path}.{index}"):
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{owner}.{key}"
                if parameter.ndim < 2:
                    continue
                hits = {p for p in ignore if fnmatchcase(name, p) or fnmatchcase(owner, p)}
                matched |= hits
                if hits:
                    ignored[name] = parameter.numel()
                elif key != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
                    unknown.append(f"{name} {[*parameter.shape]}")
                elif len(shared := names[id(parameter)]) > 1:
                    raise InputError(f"{' and '.join(shared)} are one weight; ignore it by name")
                else:
                    linears[index].append(LinearView(owner, module))
    if unknown:
        raise InputError(
            f"{len(unknown)} weights are of no kind that can be compressed, so each must be "
            f"matched by a pattern of model.ignore: {', '.join(unknown[:4])}"
            + (", …" if len(unknown) > 4 else "")
        )
    if idle := [pattern for pattern in ignore if pattern not in matched]:
        raise InputError(f"model.ignore={idle} matches no weight in {path}")
    return Inventory(path, blocks, tuple(map(tuple, linears)), ignored)
