"""How a model calls its blocks, seen in a real forward pass.

The arguments differ between blocks (arXiv:2503.19786 alternates sliding and full attention), so one
block's arguments do not serve another. Whatever a replay relies on is checked while recording, and
a model for which it does not hold is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mi_experiments.errors import InputError


class Stop(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


@dataclass(frozen=True, eq=False)
class Call:
    """How the model calls one block: everything but the hidden state.

    Attributes:
        args: Positional arguments after the hidden state.
        kwargs: Keyword arguments: position embeddings, attention mask, whatever the model passes.
        keyword: The hidden state is passed as ``hidden_states=`` and not as the first argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def values(self) -> tuple[Any, ...]:
        """Return all arguments."""
        return *self.args, *self.kwargs.values()

    def replay(
        self, block: nn.Module, hidden: Float[Tensor, "batch seqlen hidden"]
    ) -> Float[Tensor, "batch seqlen hidden"]:
        """Run the block on a hidden state, as the model would."""
        # Some blocks add to their input in place; the stream must not see that.
        hidden = hidden.clone()
        if self.keyword:
            return _hidden_state(block(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden_state(block(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """What a block returns: a hidden state alone, or first in a tuple.

    Attributes:
        rest: What follows it in the tuple; None where there is no tuple.
    """

    rest: tuple[Any, ...] | None

    def tensors(self) -> list[Tensor]:
        """Return what a block hands on beside the hidden state."""
        return [part for part in self.rest or () if isinstance(part, Tensor)]

    def wrap(self, hidden: Tensor) -> Any:
        """Return a hidden state as a block would."""
        return hidden if self.rest is None else (hidden, *self.rest)


@contextmanager
def replaced_blocks(
    modules: nn.ModuleList, form: BlockOutput, respond: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let blocks return what ``respond`` makes of their hidden state, instead of running.

    Blocks then need no weights, while whatever the model does around them is really done.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _ = _split_call(args, kwargs)
        return form.wrap(respond(hidden))

    # An instance may already carry a forward of its own, as with accelerate's hooks.
    own = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, previous in zip(modules, own, strict=True):
            del vars(module)["forward"]
            if previous is not None:
                vars(module)["forward"] = previous


@torch.no_grad()
def observe_output(
    model: PreTrainedModel, modules: nn.ModuleList, tokens: Int[Tensor, "batch seqlen"]
) -> BlockOutput:
    """Run the model through its first block, and see what a block returns."""
    seen: list[BlockOutput] = []

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(BlockOutput(None if isinstance(output, Tensor) else tuple(output[1:])))
        raise Stop

    with hooks([modules[0].register_forward_hook(after)]), suppress(Stop):
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return seen[0]


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    path: str,
    modules: nn.ModuleList,
    tokens: Int[Tensor, "batch seqlen"],
    form: BlockOutput,
) -> list[Call]:
    """Run the model once, without running its blocks, and record the arguments of every block.

    Args:
        model: A causal language model.
        path: Path of its blocks, for messages.
        modules: Its blocks.
        tokens: Token ids of one batch; the arguments belong to its shape.
        form: What a block returns.

    Returns:
        One call per block.

    Raises:
        InputError: If the blocks do not form a chain: each called once, in order, and reading
            exactly what the one before it returned.
    """
    order = {block: index for index, block in enumerate(modules)}
    calls: list[Call] = []
    previous: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        if order[block] != len(calls):
            raise InputError(f"{path}.{order[block]} is called twice or out of order")
        if any(value is part for value in call.values() for part in form.tensors()):
            raise InputError(
                f"{path}.{order[block]} reads more than a hidden state of the block before it; "
                "it cannot be replayed alone"
            )
        if previous and not _same(hidden, previous[-1]):
            raise InputError(
                f"{path}.{order[block]} does not read what the block before it returned"
            )
        calls.append(call)

    def respond(hidden: Tensor) -> Tensor:
        # Something else every time, so that a block that reads another one's answer is found out.
        previous[:] = [hidden.roll(1, -1)]
        return previous[0]

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in modules]
    with hooks(handles), replaced_blocks(modules, form, respond):
        # Without the head, whose logits would be the largest tensor of the whole run.
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    if len(calls) != len(modules):
        raise InputError(f"{path}.{len(calls)} is not called by {type(model).__name__}")
    return calls


@torch.no_grad()
def run_to_first_block(
    model: PreTrainedModel, modules: nn.ModuleList, tokens: Int[Tensor, "batch seqlen"]
) -> tuple[Float[Tensor, "batch seqlen hidden"], Call]:
    """Run the model up to its first block."""
    entered: list[tuple[Tensor, Call]] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(_split_call(args, kwargs))
        raise Stop

    handle = modules[0].register_forward_pre_hook(before, with_kwargs=True)
    with hooks([handle]), suppress(Stop):
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return entered[0]


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for the length of a with statement, however it ends."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def _split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """Separate the hidden state from the other arguments of a block."""
    others = dict(kwargs)
    keyword = "hidden_states" in others
    hidden = others.pop("hidden_states") if keyword else next(iter(args), None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise InputError("a block must read one hidden state [batch, seqlen, hidden]; it does not")
    return hidden, Call(args if keyword else args[1:], others, keyword)


def _hidden_state(output: Any) -> Tensor:
    """Return the hidden state from what a block returns: it alone, or first in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def check_replayable(path: str, calls: Sequence[Call], others: Sequence[Call]) -> None:
    """Raise unless two sets of tokens led to the same arguments."""
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        keys = sorted(call.kwargs.keys() | other.kwargs.keys())
        changed = [key for key in keys if not _same(call.kwargs.get(key), other.kwargs.get(key))]
        if changed or not _same(call.args, other.args):
            raise InputError(
                f"{path}.{index} reads more than its hidden state: arguments that depend on the "
                f"tokens ({', '.join(changed) or 'positional'}); it cannot be replayed alone"
            )


def _same(a: Any, b: Any) -> bool:
    """Compare arguments of a block exactly; on the meta device, their shapes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b or a.shape != b.shape or a.dtype != b.dtype:
            return a is b
        return a.is_meta or torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
