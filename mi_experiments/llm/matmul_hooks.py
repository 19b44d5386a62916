"""Hook linears by their weights: wherever a forward pass multiplies by one.

Modules are not enough. Mixtures of experts hold all experts in one 3-D parameter and multiply by a
slice of it, routers by a bare matrix, and some by a copy of it in another dtype. So every
multiplication is looked at, and a weight is known by its place in memory, whatever view of it is
used. This works on the meta device too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView

Read = Callable[[LinearView, Tensor], None]
Change = Callable[[LinearView, Tensor, Tensor], Tensor]
Answer = Callable[[LinearView], Tensor | None]
Layout = tuple[Any, ...]


@contextmanager
def on_input(linears: Iterable[LinearView], read: Read) -> Iterator[None]:
    """Call ``read`` with a linear and its input just before each multiplication by its weight.

    Args:
        linears: What to hook; while it is watched, a weight must stay where it is in memory.
        read: May raise, to end the pass, or write another weight, which is then multiplied by. If
            the model multiplies the other way round than a view says, it gets the view that is
            right.
    """
    with _MatmulHooks(linears, read=read):
        yield


@contextmanager
def replace_output(linears: Iterable[LinearView], change: Change) -> Iterator[None]:
    """Put what ``change`` makes of a linear, its input and its output in the place of the output.

    The output is what one call of the model gives, with the bias if that is part of the call.

    Args:
        linears: What to hook, as in ``on_input``.
        change: May return the output itself.
    """
    with _MatmulHooks(linears, change=change):
        yield


@contextmanager
def read_and_change(linears: Iterable[LinearView], read: Read, change: Change) -> Iterator[None]:
    """Do as `on_input` and as `replace_output` in one pass."""
    with _MatmulHooks(linears, read=read, change=change):
        yield


@contextmanager
def replace_product(linears: Iterable[LinearView], answer: Answer) -> Iterator[None]:
    """Let linears answer without being multiplied by: with what was remembered, or with zeros.

    Args:
        linears: What to hook, as in `on_input`. Experts must be multiplied by: of them only the
            output is replaced.
        answer: Returns the output of a linear; None for zeros.
    """
    with _MatmulHooks(linears, answer=answer):
        yield


@dataclass(frozen=True)
class _Product:
    """The two operands of a function that multiplies, each by position and name.

    Attributes:
        left: The input, in x W; the weight, in W x.
        right: The weight, in x W; the input, in W x.
        turned: The right operand is transposed first.
    """

    left: tuple[int, str]
    right: tuple[int, str]
    turned: bool = False


@dataclass(frozen=True)
class _Match:
    """A tensor that holds a watched weight.

    Attributes:
        linears: One linear, or all watched slices of the 3-D parameter that the tensor is.
        turned: The tensor is the transpose of what is stored.
        gathered: The tensor holds a slice for each token.
    """

    linears: Sequence[LinearView]
    turned: bool
    gathered: bool = False


_PRODUCTS: dict[Any, _Product] = {
    functional.linear: _Product((0, "input"), (1, "weight"), turned=True),
    **dict.fromkeys((torch.matmul, Tensor.matmul), _Product((0, "input"), (1, "other"))),
    **dict.fromkeys((torch.mm, Tensor.mm), _Product((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _Product((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _Product((1, "mat1"), (2, "mat2"))),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _Product((1, "batch1"), (2, "batch2"))),
    torch._grouped_mm: _Product((0, "self"), (1, "mat2")),
}
_CASTS = {
    *(Tensor.to, Tensor.type, Tensor.type_as),
    *(Tensor.double, Tensor.float, Tensor.bfloat16, Tensor.half),
}
_WATCHED = {*_PRODUCTS, *_CASTS, Tensor.__getitem__}


class _MatmulHooks(TorchFunctionMode):
    """Recognizes multiplications by watched weights, and calls back."""

    def __init__(
        self,
        linears: Iterable[LinearView],
        *,
        read: Read | None = None,
        change: Change | None = None,
        answer: Answer | None = None,
    ) -> None:
        super().__init__()
        self.read = read
        self.change = change
        self.answer = answer
        self.places: dict[Layout, _Match] = {}
        # Where the numbers of a watched weight are elsewhere in memory, and those of any tensor in
        # a wider dtype, which reads as the tensor itself: sites do not depend on the model's dtype.
        self.copies: Any = WeakIdKeyDictionary()
        self.widened: Any = WeakIdKeyDictionary()
        # How to make a copy of a weight again, if `read` has written another one meanwhile.
        self.made: Any = WeakIdKeyDictionary()
        fused: dict[Layout, list[LinearView]] = {}
        for linear in linears:
            self._place(linear.stored, [linear])
            if linear.expert is not None:
                fused.setdefault(_layout(linear.parameter), []).append(linear)
        for experts in fused.values():
            self._place(experts[0].parameter, experts)

    @no_type_check  # of every operation there is, with whatever arguments it takes
    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a function, with the callbacks if it multiplies by a watched weight."""
        if func in _WATCHED:
            return self._watch(func, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _watch(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run a function that may multiply, or hand a weight on to one that does."""
        if (product := _PRODUCTS.get(func)) is not None:
            return self._multiply(func, product, args, named)
        result = func(*args, **named)
        if func in _CASTS and result is not args[0]:
            if (match := self._find(args[0])) is not None:
                self.copies[result] = match
                self.made[result] = (func, args, named, args[0]._version)
            elif torch.promote_types(args[0].dtype, result.dtype) == result.dtype:
                self.widened[result] = (args[0], args[0]._version)
        elif func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].ndim:
            match = self._find(args[0])
            if match is not None and match.linears[0].expert is not None:
                self.copies[result] = _Match(match.linears, match.turned, gathered=True)
                self.made[result] = (func, args, named, args[0]._version)
        return result

    def _multiply(
        self, func: Any, product: _Product, args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """Run a product, with the callbacks if one of its operands is a watched weight."""
        left: Any
        right: Any
        left, right = (
            args[at] if at < len(args) else named[name]
            for at, name in (product.left, product.right)
        )
        inputs, weight, turned, swapped = left, right, product.turned, False
        match = self._find(weight)
        if match is None and not turned and (match := self._find(left)) is not None:
            # W x is the transpose of xᵀ Wᵀ.
            inputs, weight, turned, swapped = right.mT, left, True, True
        if match is None:
            return func(*args, **named)
        narrow, version = self.widened.get(inputs, (inputs, None))
        if version is not None and narrow._version == version:
            inputs = narrow
        linears = [linear.stored_as(match.turned == turned) for linear in match.linears]
        if func is torch._grouped_mm or (match.gathered and not weight.is_meta):
            raise InputError(
                f"{linears[0].name} runs together with other experts and cannot be told apart from "
                "them; load the model with experts_implementation='eager'"
            )
        fused = weight.ndim == 3 and not match.gathered
        apart = fused and inputs.ndim == 3 and len(inputs) == len(weight)
        parts = [inputs[linear.expert] if apart else inputs for linear in linears]
        if self.answer is not None and not fused and linears[0].expert is None:
            output = self._respond(linears[0], right.mT if swapped else left)
            return output.mT if swapped else output
        if self.read is not None:
            for linear, part in zip(linears, parts, strict=True):
                self.read(linear, part)
            if (present := self._remake(weight)) is not weight:
                args, named = _substitute(args, named, weight, present)
        result = func(*args, **named)
        if self.change is None and self.answer is None:
            return result
        output = result.mT if swapped else result
        if fused:
            slices = list(output)
            for linear, part in zip(linears, parts, strict=True):
                if linear.expert is not None:
                    slices[linear.expert] = self._change(linear, part, slices[linear.expert])
            output = torch.stack(slices)
        else:
            output = self._change(linears[0], inputs, output)
        return output.mT if swapped else output

    def _change(self, linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        """Return what goes on in the place of an output that was computed."""
        if self.change is not None:
            return self.change(linear, inputs, output)
        assert self.answer is not None
        answer = self.answer(linear)
        return torch.zeros_like(output) if answer is None else answer.clone()

    def _respond(self, linear: LinearView, inputs: Tensor) -> Tensor:
        """Return what goes on in the place of an output that is not computed."""
        assert self.answer is not None
        shape = (*inputs.shape[:-1], linear.rows)
        answer = self.answer(linear)
        # A copy, because some blocks go on in place.
        return inputs.new_zeros(shape) if answer is None else answer.reshape(shape).clone()

    def _remake(self, weight: Tensor) -> Tensor:
        """Return the copy of a weight as it would be made now, itself if that has not changed."""
        if (made := self.made.get(weight)) is None:
            return weight
        func, args, named, version = made
        source = self._remake(args[0])
        if source is args[0] and source._version == version:
            return weight
        return func(source, *args[1:], **named)  # type: ignore[no-any-return]

    def _place(self, weight: Tensor, linears: Sequence[LinearView]) -> None:
        """Remember where a weight is, as stored and transposed."""
        self.places[_layout(weight)] = _Match(linears, turned=False)
        self.places.setdefault(_layout(weight.mT), _Match(linears, turned=True))

    def _find(self, tensor: Any) -> _Match | None:
        """Return the watched weight that a tensor holds."""
        if not isinstance(tensor, Tensor):
            return None
        match: _Match | None = self.copies.get(tensor) or self.places.get(_layout(tensor))
        return match


def _substitute(
    args: tuple[Any, ...], named: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with another tensor in the place of one of them."""
    positional = tuple(new if value is old else value for value in args)
    return positional, {key: new if value is old else value for key, value in named.items()}


def _layout(tensor: Tensor) -> Layout:
    """Return where in memory a tensor is; the storage is distinct on the meta device too."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()
