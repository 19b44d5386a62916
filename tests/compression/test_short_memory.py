"""Short memory inside a model: where it is met, what is recorded, and that no code moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_models import (
    BLIND,
    bits_of,
    changed,
    compress,
)
from tiny_models import build_tiny_model

from mi_experiments.calibration import hessians
from mi_experiments.calibration.drift import DensePair
from mi_experiments.errors import MemoryShortage
from mi_experiments.llm.replay import Call
from mi_experiments.llm.walker import Walker
from mi_experiments.method import gram, refine, sparsegpt


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    return tiny_tokens(8, 16)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Let one call of a function run out of memory: the one with this number."""
    function, number = getattr(owner, name), iter(range(10**6))

    def attempt(*args: Any, **kwargs: Any) -> Any:
        if next(number) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, attempt)


PLACES = {
    "Hessian": (gram, "_add_panel_", 2, "self_attn.q_proj k_proj v_proj"),
    "Hessian of a later site": (gram, "_add_panel_", 9, "mlp.gate_proj up_proj"),
    "forward": (Call, "replay", 6, "self_attn.q_proj k_proj v_proj"),
    "sweep": (sparsegpt.SweepState, "__init__", 1, "self_attn.k_proj"),
    "refinement": (refine, "_descend", 3, "self_attn.k_proj"),
}


@pytest.mark.parametrize("place", PLACES)
def test_short_memory_is_in_the_report_of_its_linears_and_moves_no_code(
    place: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        *BLIND,
        "sparsity=dense",
        "recipe.input_correction=0",
        "recipe.residual_correction=0",
    ]
    expected = compress(build_tiny_model("llama"), tokens, overrides)
    owner, name, at, where = PLACES[place]
    fail_once(monkeypatch, owner, name, at)
    found = compress(build_tiny_model("llama"), tokens, overrides)
    retried = {name: linear.report.retries for name, linear in found.items()}
    parent, _, leaves = where.partition(".")
    names = {f"model.layers.0.{parent}.{leaf}" for leaf in leaves.split()}
    assert retried == {name: int(name in names) for name in found}
    for name, linear in found.items():
        assert torch.equal(linear.linear.read_weight(), expected[name].linear.read_weight()), name
        assert linear.report.tokens == 128


def test_a_pattern_that_needs_all_rows_at_once_ends_in_one_line_that_names_the_linear(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model("llama")
    before = bits_of(model)
    fail_once(monkeypatch, sparsegpt.SweepState, "__init__", 0)
    line = (
        r"^block 0, self_attn.q_proj\+.* \(model.layers.0.self_attn.q_proj\): no memory for 32 rows"
    )
    with pytest.raises(MemoryShortage, match=line):
        compress(model, tokens, BLIND)
    assert changed(before, model) == set()


def test_experts_with_few_tokens_are_measured_again_where_memory_is_short(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*BLIND, "recipe=textbook", "recipe.min_tokens=1000", "n_groups.count=1"]
    overrides += ["recipe.scarce_tokens=all_tokens", "sparsity=dense"]
    expected = compress(build_tiny_model("qwen3_moe"), tokens, overrides)
    fail_once(monkeypatch, hessians, "feed_all_tokens", 1)
    found = compress(build_tiny_model("qwen3_moe"), tokens, overrides)
    assert sum(linear.report.retries for linear in found.values()) > 0
    for name, linear in found.items():
        report, wanted = linear.report, expected[name].report
        assert (report.tokens, report.all_tokens) == (wanted.tokens, wanted.all_tokens)
        assert report.output_error == pytest.approx(wanted.output_error, rel=1e-3)


def test_twins_run_in_batches_of_one_size_whichever_was_short(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    block = next(Walker(model, batch_size=4).walk(tokens))
    for short in ("block", "dense"):
        dense = block.stream.fork()
        block.stream.batch_size = dense.batch_size = 4
        (block.stream if short == "block" else dense).shrink("reason")
        pair = DensePair.open(block, dense)
        assert [len(seen.dense) for seen in pair.observe(block.sites[-1])] == [2 * 16] * 4
