"""One pass through a block that is halted at its sites gives, bit for bit, what replays give."""

import itertools
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import pytest
import torch
from faulty_models import bits_of, config_of
from tiny_models import TINY_CONFIGS, build_tiny_model
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mi_experiments.compression.pipeline import compress_model
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.pieces import _Batch
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import Plan, plan_compression

SEQLEN = 16


@pytest.fixture
def tokens(tiny_tokens: Callable[..., Tensor]) -> Tensor:
    return tiny_tokens(5, SEQLEN)


def compressed(
    model: Any, tokens: Tensor, *overrides: str, piecewise: bool = True, plan: Plan | None = None
) -> dict[str, Tensor]:
    """Every bit of a model that was compressed."""
    config = config_of(*overrides)
    walker = Walker(model, batch_size=2, piecewise=piecewise)
    plan = plan or plan_compression(walker, tokens, config)
    for _ in compress_model(walker, tokens, plan, config):
        pass
    return bits_of(model)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_pieces_are_replays_in_every_architecture(name: str, tokens: Tensor) -> None:
    overrides = ["wbits.average=3", "wbits.cost=distortion", "recipe.scarce_tokens=keep"]
    plan = plan_compression(Walker(build_tiny_model(name)), tokens, config_of(*overrides))
    assert_equal(
        compressed(build_tiny_model(name), tokens, *overrides, plan=plan),
        compressed(build_tiny_model(name), tokens, *overrides, plan=plan, piecewise=False),
    )


@pytest.mark.parametrize("recipe", ["own_targets", "gptq", "one_pass"])
def test_pieces_are_replays_without_a_dense_twin(recipe: str, tokens: Tensor) -> None:
    overrides = [f"recipe={recipe}", "recipe.on_singular=escalate"]
    assert_equal(
        compressed(build_tiny_model("llama"), tokens, *overrides),
        compressed(build_tiny_model("llama"), tokens, *overrides, piecewise=False),
    )


def with_mlp(forward: Callable[..., Tensor]) -> Any:
    """Build a model whose blocks have another forward of the MLP."""
    model = build_tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)
    return model


def early(mlp: Any, x: Tensor) -> Tensor:
    """Copy all weights to another format before the first of them is used."""
    gate, up, down = (p.weight.double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    x = x.double()
    inner = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
    return functional.linear(inner, down).float()


def stateful(mlp: Any, x: Tensor) -> Tensor:
    """Leave in the module what is read again after the first multiplication."""
    mlp.seen = x
    inner = functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(inner) + mlp.seen


def test_a_copy_of_a_weight_is_made_again_when_the_weight_is_compressed(tokens: Tensor) -> None:
    assert_equal(
        compressed(with_mlp(early), tokens), compressed(with_mlp(early), tokens, piecewise=False)
    )


def test_batches_do_not_take_turns_in_a_module_that_keeps_something(tokens: Tensor) -> None:
    model = with_mlp(stateful)
    for block in Walker(model, batch_size=2).walk(tokens):
        assert not block.piecewise
    assert_equal(
        compressed(with_mlp(stateful), tokens),
        compressed(with_mlp(stateful), tokens, piecewise=False),
    )


# Of 3 batches in each of two models: before the first site, between two batches of a later one, and
# on the way to the end, of the compressed and of the dense model.
@pytest.mark.parametrize("at", [0, 8, 15, 25, 28])
def test_what_has_no_memory_in_pieces_is_replayed(
    at: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compressed(build_tiny_model("llama"), tokens, piecewise=False)
    plan = plan_compression(Walker(build_tiny_model("llama"), batch_size=2), tokens, config_of())
    real, number = _Batch._go_on, iter(range(100))

    def go_on(self: _Batch) -> Any:
        if next(number) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self)

    monkeypatch.setattr(_Batch, "_go_on", go_on)
    assert_equal(expected, compressed(build_tiny_model("llama"), tokens, plan=plan))
    assert next(number) > at


def test_what_halted_samples_hold_is_seven_hidden_states_of_a_llama() -> None:
    """At o_proj: the residual stream, its norm, q, k, v, what attention gives; and a sum.

    The widths of `llama` differ: 4 heads of 8 for q, 2 for k and v, so 6 and a few angles.
    """
    model = build_tiny_model("llama", device="meta")
    hidden = SEQLEN * model.config.hidden_size * 4
    for block in Walker(model).describe_blocks(SEQLEN):
        assert 6 * hidden <= block.halted <= 7 * hidden


class Multiplied(TorchDispatchMode):
    """Counts the floating-point operations of products with weights that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] = set()
        self.total = 0

    def know(self, linears: Iterable[LinearView]) -> None:
        self.weights |= {linear.parameter.untyped_storage()._cdata for linear in linears}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Forward x Wᵀ, backward g W: the weight is always on the right.
        multiplies = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        if multiplies and args[-1].untyped_storage()._cdata in self.weights:
            self.total += flop_registry[func.overloadpacket](*args, out_val=result)
        return result


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        # Forward, and again with the way back; then the dense and the compressed model.
        ([], 5),
        # Without a way back: forward up to the last site and to the end; and the compressed model.
        (["recipe=own_targets", "wbits.cost=distortion", "sparsity.scope=linear"], 3),
        (["experiment=textbook"], 2),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_how_often_all_tokens_are_multiplied_by_all_weights(
    name: str,
    overrides: list[str],
    most: int,
    tiny_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And half as often, at most, to find sites, writers and how blocks are called."""
    model, tokens = build_tiny_model(name), tiny_tokens(16, SEQLEN)
    config = config_of(*overrides, "wbits.fisher_samples=16")
    walker = Walker(model, batch_size=4)
    real = Block.copy
    with Multiplied() as multiplied:
        multiplied.know(itertools.chain(*walker.inventory.linears))

        def copy(block: Block, stream: Stream) -> Block:
            twin = real(block, stream)
            multiplied.know(twin.linears)
            return twin

        monkeypatch.setattr(Block, "copy", copy)
        plan = plan_compression(walker, tokens, config)
        for _ in compress_model(walker, tokens, plan, config):
            pass
    once = 2 * walker.inventory.compressed * tokens.numel()
    assert multiplied.total <= (most + 0.5) * once
