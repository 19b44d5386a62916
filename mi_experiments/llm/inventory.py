"""What a model's blocks are made of: where they are, their linears, and every other matrix.

Nothing here knows an architecture. The block list is found by its length; every matrix in it, and
every slice of a 3-D parameter, is a linear. What is none must be ignored by name, so that nothing
stays dense unnoticed.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mi_experiments.errors import InputError

NOT_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight is never multiplied by as a matrix."""


@dataclass(frozen=True, eq=False)
class LinearView:
    """One weight matrix of a block, always seen as [rows, columns] = [outputs, inputs].

    Attributes:
        name: Path in the model: of the module for a ``weight``, such as
            ``model.layers.0.self_attn.q_proj``, else of the parameter; and the expert, such as
            ``model.layers.0.mlp.experts.down_proj.3``.
        module: The module that owns the parameter.
        key: Name of the parameter in the module.
        expert: Index of the slice of a 3-D parameter; None for a matrix.
        transposed: Stored as [columns, rows].
    """

    name: str
    module: nn.Module
    key: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def parameter(self) -> Tensor:
        """What the model holds: this matrix, or the 3-D parameter that it is a slice of."""
        # Looked up at every use: whoever streams weights from disk replaces the parameter.
        parameter: Tensor = getattr(self.module, self.key)
        return parameter

    @property
    def parameter_name(self) -> str:
        """The name without the expert."""
        return self.name if self.expert is None else self.name.removesuffix(f".{self.expert}")

    @property
    def stored(self) -> Tensor:
        """The matrix as it is stored, in place."""
        return self.parameter if self.expert is None else self.parameter[self.expert]

    @property
    def _weight(self) -> Tensor:
        return self.stored.T if self.transposed else self.stored

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

    def stored_as(self, transposed: bool) -> "LinearView":
        """Return the view of the same weight for a given orientation, itself if it is that."""
        return self if transposed is self.transposed else replace(self, transposed=transposed)

    def read_weight(self) -> Float[Tensor, "rows columns"]:
        """Copy the weight to float32, or float64 as it is."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self._weight.detach().to(dtype, copy=True).contiguous()

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


def _view_linears(owner: str, module: nn.Module, key: str) -> list[LinearView]:
    """View a parameter as linears: one for a matrix, one for each expert of a 3-D parameter.

    Args:
        owner: Path of the module in the model.
        module: What owns the parameter.
        key: Name of the parameter in the module.

    Returns:
        None of them, if the parameter is nothing to multiply by: a kernel or a table.
    """
    dimensions = getattr(module, key).ndim
    if dimensions not in {2, 3} or isinstance(module, NOT_LINEAR):
        return []
    name = owner if key == "weight" else f"{owner}.{key}"
    # What transformers says of its experts; running the block corrects what is wrong.
    transposed = isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
    if dimensions == 2:
        return [LinearView(name, module, key, None, transposed)]
    experts = range(len(getattr(module, key)))
    return [LinearView(f"{name}.{e}", module, key, e, transposed) for e in experts]


def suggest_patterns(path: str, names: Iterable[str]) -> str:
    """Write the setting that ignores linears or parameters, in whatever block.

    Args:
        path: Of the block list.
        names: Of linears or parameters.
    """
    inside = {re.sub(rf"^{re.escape(path)}\.\d+\.", "*.", name): None for name in names}
    return f"model.ignore=[{','.join(map(repr, inside))}]"


def _is_vector(module: nn.Module, key: str) -> bool:
    """Say whether a parameter is a vector, in whatever shape, or the biases of fused experts."""
    parameters = dict(module.named_parameters(recurse=False))
    parameter = parameters[key]
    experts = {len(other) for other in parameters.values() if other.ndim == 3}
    if key.endswith("bias") and parameter.ndim == 2 and len(parameter) in experts:
        return True
    # A linear layer may have one row or one column, and is a matrix all the same.
    linear = isinstance(module, (nn.Linear, Conv1D))
    return parameter.ndim < 2 or (not linear and sum(size > 1 for size in parameter.shape) < 2)


def take_inventory(
    model: PreTrainedModel, *, ignore: Sequence[str] = (), path: str | None = None
) -> Inventory:
    """Decide for every weight of two or more dimensions in the blocks: compress, or ignore.

    A matrix is one linear, and a 3-D parameter one for each expert; whether the model multiplies by
    them shows when a block runs. Vectors (norms, biases, one for each expert too) are never
    touched.

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
    unknown: list[tuple[str, list[int]]] = []
    matched: set[str] = set()
    for index, block in enumerate(blocks):
        for owner, module in block.named_modules(prefix=f"{path}.{index}"):
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{owner}.{key}"
                if _is_vector(module, key):
                    continue
                hits = {p for p in ignore if fnmatchcase(name, p) or fnmatchcase(owner, p)}
                matched |= hits
                if hits:
                    ignored[name] = parameter.numel()
                elif len(shared := names[id(parameter)]) > 1:
                    raise InputError(f"{' and '.join(shared)} are one weight; ignore it by name")
                elif views := _view_linears(owner, module, key):
                    linears[index] += views
                else:
                    unknown.append((owner if key == "weight" else name, [*parameter.shape]))
    if unknown:
        first, shape = unknown[0]
        raise InputError(
            f"{len(unknown)} weights cannot be compressed, {first} {shape} first; "
            f"to leave them as they are, add {suggest_patterns(path, [n for n, _ in unknown])}"
        )
    if idle := [pattern for pattern in ignore if pattern not in matched]:
        raise InputError(f"model.ignore={idle} matches no weight in {path}")
    return Inventory(path, blocks, tuple(map(tuple, linears)), ignored)
