"""Replay decoder blocks one at a time, exactly as the model runs them.

Each block is called with the arguments that the model itself passed to it, recorded in a real
forward pass: they differ between blocks (arXiv:2503.19786 alternates sliding and full attention),
so one block's arguments do not serve another. Whatever the replay relies on is checked while
recording, and a model for which it does not hold is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mi_experiments.errors import InputError, MemoryShortage
from mi_experiments.llm.finite import Screen
from mi_experiments.shortage import REMEDY, note_retry, until_it_fits

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes room for hidden states of a shape and dtype, wherever they are to live."""


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

    def replay(
        self, block: nn.Module, hidden: Float[Tensor, "batch seqlen hidden"]
    ) -> Float[Tensor, "batch seqlen hidden"]:
        """Run the block on a hidden state, as the model would."""
        # Some blocks add to their input in place; the stream must not see that.
        hidden = hidden.clone()
        if self.keyword:
            return _hidden_state(block(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden_state(block(hidden, *self.args, **self.kwargs))


@dataclass(eq=False)
class Stream:
    """The hidden states of all samples between two blocks, held once and overwritten in place.

    Attributes:
        hidden: What block ``position`` reads, in the dtype of the model; in `place`.
        batch_size: Samples per forward pass; halved where memory is short.
        calls: For each batch size that occurs, how the model calls each block.
        record: Finds that out for a batch size, in a pass without blocks.
        form: What a block returns beside the hidden state.
        device: Where blocks run.
        allocate: Makes room for hidden states.
        screen: What happens to samples that are not finite.
        position: Index of the block that reads ``hidden``.
    """

    hidden: Float[Tensor, "nsamples seqlen hidden"]
    batch_size: int
    calls: dict[int, list[Call]]
    record: Callable[[int], list[Call]]
    form: "Form"
    device: torch.device
    allocate: Allocate
    screen: Screen
    position: int = 0

    def fork(self) -> "Stream":
        """Copy the hidden states, for another model with the same blocks."""
        hidden = self.allocate(self.hidden.shape, self.hidden.dtype)
        return replace(self, hidden=hidden.copy_(self.hidden))

    def batches(self) -> Iterator[tuple[int, Float[Tensor, "batch seqlen hidden"], Call]]:
        """Yield the first sample, the hidden states and the call of every batch, in order."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield start, *self._batch(start)

    def _batch(self, start: int) -> tuple[Float[Tensor, "batch seqlen hidden"], Call]:
        """Return a batch of hidden states where blocks run, and how the model calls the block."""
        hidden = self.hidden[start : start + self.batch_size].to(self.device)
        if len(hidden) not in self.calls:
            self.calls[len(hidden)] = self.record(len(hidden))
        return hidden, self.calls[len(hidden)][self.position]

    def shrink(self, reason: str) -> None:
        """Halve the samples per forward pass, because memory is short.

        Raises:
            MemoryShortage: It is one sample already.
        """
        size = min(self.batch_size, len(self.hidden))
        if size == 1:
            raise MemoryShortage(f"no memory for one sample at a time ({reason}): {REMEDY}")
        self.batch_size = size // 2
        note_retry(f"batches of {self.batch_size} samples", reason)

    def samples(self) -> Iterator[Float[Tensor, "seqlen hidden"]]:
        """Yield the hidden states of every sample, in order, where blocks run."""
        for hidden in self.hidden:
            yield hidden.to(self.device)

    @torch.no_grad()
    def advance(self, name: str, module: nn.Module) -> None:
        """Replace the hidden states by what the block makes of them, with its present weights.

        Args:
            name: Path of the block, for messages.
            module: The block at ``position``.

        Raises:
            InputError: If the output is no hidden state of the same shape and dtype.
            MemoryShortage: If there is no room for a single sample.
            NumericalError: If a sample is not finite in it.
        """
        start = 0
        while start < len(self.hidden):
            start += until_it_fits(partial(self._advance_batch, name, module, start), self.shrink)
        self.position += 1

    def _advance_batch(self, name: str, module: nn.Module, start: int) -> int:
        """Do as `advance` on the batch that begins with a sample, and return its size."""
        hidden, call = self._batch(start)
        output = call.replay(module, hidden)
        if output.shape != hidden.shape or output.dtype != hidden.dtype:
            raise InputError(
                f"{name} turns {hidden.dtype} {[*hidden.shape]} into {output.dtype} "
                f"{[*output.shape]}; only blocks that keep shape and dtype can be chained"
            )
        self.screen.admit_(output, start, f"the output of {name}", (name, module))
        self.hidden[start : start + len(output)].copy_(output)
        return len(output)


@dataclass(frozen=True, eq=False)
class Form:
    """What a block returns: a hidden state alone, or first in a tuple.

    Attributes:
        rest: What follows it in the tuple; None where there is no tuple.
    """

    rest: tuple[Any, ...] | None

    def wrap(self, hidden: Tensor) -> Any:
        """Return a hidden state as a block would."""
        return hidden if self.rest is None else (hidden, *self.rest)


@contextmanager
def answer(
    modules: nn.ModuleList, form: Form, respond: Callable[[Tensor], Tensor]
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


def open_stream(
    model: PreTrainedModel,
    path: str,
    modules: nn.ModuleList,
    tokens: Int[Tensor, "nsamples seqlen"],
    batch_size: int,
    allocate: Allocate | None = None,
    names: Sequence[str] | None = None,
    rejected: dict[int, str] | None = None,
) -> Stream:
    """Compute what the first block reads for all samples, and how the model calls each block.

    Only the first block must hold its weights.

    Args:
        model: A causal language model.
        path: Path of its blocks, for messages.
        modules: Its blocks.
        tokens: Token ids.
        batch_size: Samples per forward pass.
        allocate: Makes room for hidden states; by default where blocks run.
        names: What messages call the samples; ``sample 0`` and so on by default.
        rejected: Takes, here and later, the samples that are not finite and where they were found;
            zeros go on in their place. None: such a sample is an error.

    Raises:
        InputError: If a sample is longer or a token larger than the model allows, or an argument of
            a block depends on the tokens: then a block cannot be replayed alone.
        NumericalError: If a sample is not finite.
    """
    check_tokens(model, tokens)
    screen = Screen(names or [f"sample {index}" for index in range(len(tokens))], rejected)
    form = see_form(model, modules, tokens[:1])
    calls: dict[int, list[Call]] = {}
    hidden: Tensor | None = None

    def record(size: int) -> list[Call]:
        batch = tokens[:size]
        found = record_calls(model, path, modules, batch, form)
        # The same tokens in another order must lead to the same arguments in every block.
        others = record_calls(model, path, modules, batch.flip(-1), form)
        _check_replayable(path, found, others)
        return found

    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        if len(batch) not in calls:
            calls[len(batch)] = record(len(batch))
        entering, call = _enter(model, modules, batch)
        _check_replayable(path, calls[len(batch)][:1], [call])
        screen.admit_(entering, start, f"the input of {path}.0")
        if hidden is None:
            allocate = allocate or partial(_allocate_beside, entering)
            hidden = allocate((len(tokens), *entering.shape[1:]), entering.dtype)
        hidden[start : start + len(batch)] = entering
    if hidden is None or allocate is None:
        raise ValueError("there is no sample")
    return Stream(hidden, batch_size, calls, record, form, entering.device, allocate, screen)


def _allocate_beside(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make room for hidden states where a tensor is."""
    return tensor.new_empty(*shape, dtype=dtype)


def check_tokens(model: PreTrainedModel, tokens: Int[Tensor, "nsamples seqlen"]) -> None:
    """Raise if a sample is longer, or a token id larger, than the model allows.

    Raises:
        InputError: If so.
    """
    limit = context_limit(model)
    if limit is not None and tokens.shape[1] > limit:
        raise InputError(f"dataset.seqlen={tokens.shape[1]} exceeds the {limit} of the model")
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if not tokens.is_meta and int(tokens.max()) >= vocabulary:
        raise InputError(
            f"token {int(tokens.max())} is beyond the {vocabulary} embeddings of the model; "
            "are the tokens from another tokenizer?"
        )


def context_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model reads, if its config says so."""
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


@torch.no_grad()
def see_form(
    model: PreTrainedModel, modules: nn.ModuleList, tokens: Int[Tensor, "batch seqlen"]
) -> Form:
    """Run the model through its first block, and see what a block returns."""
    seen: list[Form] = []

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(Form(None if isinstance(output, Tensor) else tuple(output[1:])))
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
    form: Form,
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
    with hooks(handles), answer(modules, form, respond):
        # Without the head, whose logits would be the largest tensor of the whole run.
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    if len(calls) != len(modules):
        raise InputError(f"{path}.{len(calls)} is not called by {type(model).__name__}")
    return calls


@torch.no_grad()
def _enter(
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


def _check_replayable(path: str, calls: Sequence[Call], others: Sequence[Call]) -> None:
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
