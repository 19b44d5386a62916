"""What is promised holds at every ratio and shape, and the audit sees each breach."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_models import (
    BLIND,
    bits_of,
    changed,
    compress,
    config_of,
    draw,
    solve_here,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_byte_tokenizer, build_tiny_model

from mi_experiments.compression import compress_linear, pipeline
from mi_experiments.compression.pipeline import compress_model
from mi_experiments.errors import AuditError, NumericalError
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.loading import open_model
from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import plan_compression

RATIOS = [0.0, 0.25, 0.5, 0.99, 1.0]


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    return tiny_tokens(8, 16)


# --- exact sparsity -----------------------------------------------------------------------------


@given(
    st.integers(1, 7),
    st.sampled_from([1, 3, 8, 44]),
    st.sampled_from(RATIOS),
    st.sampled_from([2, 3, 8, 16]),
    st.sampled_from(["default", "textbook"]),
    st.sampled_from([4, 128, "null"]),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_any_ratio_prunes_exactly_and_zero_and_one_are_ratios(
    rows: int,
    columns: int,
    ratio: float,
    bits: int,
    recipe: str,
    block: int | str,
    seed: int,
) -> None:
    config = config_of(f"recipe={recipe}", f"sparsity.mask_block={block}")
    weight, inputs = draw(rows, columns, seed=seed), draw(90, columns, seed=seed + 1)
    swept = solve_here(weight, inputs, bits, ratio, config)
    assert (swept.weight[swept.pruned] == 0).all()
    if ratio == 0 and bits == 16:
        assert torch.equal(swept.weight, weight)
    if ratio == 1:
        assert not swept.weight.any()
        assert swept.pruned.all()


@pytest.mark.parametrize(
    ("width", "ratio"), [(1, 0.5), (1, 0.99), (1, 1.0), (3, 0.25), (3, 0.99), (44, 0.0)]
)
def test_odd_widths_and_all_ratios_go_through_the_pipeline(
    width: int, ratio: float, tokens: torch.Tensor
) -> None:
    """With a width of 1 there is a linear of one row and one of one column."""
    model = build_tiny_model("llama", intermediate_size=width)
    before = bits_of(model)
    settings = ["n_groups.count=1", "wbits.cost=relative", "wbits.group_size=32"]
    alike = ["sparsity.scope=linear", "wbits.scope=linear"]
    overrides = [f"sparsity.ratio={ratio}", "recipe.on_singular=skip", *alike, *settings]
    linears = compress(model, tokens, overrides)
    assert {linear.linear.columns for linear in linears.values()} == {32, width}
    for name, linear in linears.items():
        report, weight, pruned = linear.report, linear.linear.read_weight(), linear.grids["pruned"]
        assert weight.isfinite().all()
        if report.status == "skipped":
            # So little is left of the linears before it that it reads nothing but zeros.
            assert (ratio, report.dead_channels) == (0.99, width)
            left = before[f"{name}.weight"].view(torch.float32).view_as(weight)
            assert torch.equal(weight, left.half().float())
            continue
        assert int(pruned.sum()) == round(ratio * report.weights), name
        assert (weight[pruned] == 0).all()
        assert report.average_bits == 4
        if ratio == 1:
            assert report.output_error == float(report.dead_channels < report.columns)


# --- the audit on every run ---------------------------------------------------------------------


def first(condition: torch.Tensor) -> tuple[int, ...]:
    return tuple(condition.nonzero()[0].tolist())


def set_weight(solution: Any, at: tuple[int, ...], value: float) -> None:
    solution.swept.weight[at] = value


MUTATIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a pruned weight is not zero": (
        lambda s: set_weight(s, first(s.swept.pruned), 1e-3),
        r"1 of \d+ pruned weights are not zero",
    ),
    "a weight is NaN": (lambda s: set_weight(s, (2, 3), float("nan")), r"1 of \d+ weights are not"),
    "a weight is infinite": (
        lambda s: set_weight(s, (2, 3), float("inf")),
        r"1 of \d+ weights are",
    ),
    "a weight is off its grid": (
        lambda s: s.swept.weight[first(~s.swept.pruned)].mul_(1.01).add_(1e-3),
        "1 quantized weights are not on their grid",
    ),
    "a weight is kept that should be pruned": (
        lambda s: s.swept.pruned.__setitem__(first(s.swept.pruned), False),
        r"\d+ weights are pruned at sweep positions .* asks for",
    ),
    "a code is another one": (
        lambda s: (
            s.swept.codes.__setitem__(first(~s.swept.pruned), 0)
            if s.swept.codes[first(~s.swept.pruned)]
            else s.swept.codes.__setitem__(first(~s.swept.pruned), 1)
        ),
        "not on their grid",
    ),
    "a code does not fit": (
        lambda s: s.swept.codes.__setitem__(first(~s.swept.pruned), 16),
        "codes of 1 quantized weights do not fit",
    ),
    "a scale is no float16": (
        lambda s: s.grid.scale.__setitem__((0, 0), 1 / 3),
        r"1 of \d+ scales are not positive float16",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_audit_catches_each_broken_promise_and_names_the_linear(
    mutation: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, line = MUTATIONS[mutation]
    solve = pipeline.solve_linear

    def broken(*args: Any) -> Any:
        solution = solve(*args)
        mutate(solution)
        return solution

    monkeypatch.setattr(pipeline, "solve_linear", broken)
    where = r"^block 0, self_attn.q_proj\+k_proj\+v_proj \(model.layers.0.self_attn.q_proj\): "
    with pytest.raises(AuditError, match=where + ".*" + line):
        compress(build_tiny_model("llama"), tokens, BLIND)


def test_the_audit_catches_a_budget_that_is_exceeded(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = pipeline.solve_linear

    def wider(original: Any, statistics: Any, linear_plan: Any, *rest: Any) -> Any:
        bits = torch.full_like(linear_plan.bits, 5)
        return solve(original, statistics, dataclasses.replace(linear_plan, bits=bits), *rest)

    monkeypatch.setattr(pipeline, "solve_linear", wider)
    with pytest.raises(AuditError, match=r"q_proj\): 5.0 bits on average where 4.0 were allowed"):
        compress(build_tiny_model("llama"), tokens, BLIND)


def test_the_audit_reads_what_was_written(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LinearView.write_weight
    monkeypatch.setattr(LinearView, "write_weight", lambda view, w: write(view, w * 1.5))
    with pytest.raises(AuditError, match=r"q_proj\): \d+ of 1024 stored weights are not those"):
        compress(build_tiny_model("llama"), tokens, BLIND)


def test_the_audit_catches_a_change_where_none_was_asked(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = compress_linear.leave
    monkeypatch.setattr(compress_linear, "leave", lambda weight: leave(weight + 1e-3))
    with pytest.raises(AuditError, match=r"q_proj\): 1024 "):
        compress(build_tiny_model("llama"), tokens, ["wbits=unquantized", "sparsity=dense"])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"])
def test_weights_that_are_not_finite_are_refused_before_any_sweep(
    name: str, value: float, tokens: torch.Tensor
) -> None:
    model = build_tiny_model("llama")
    made = plan_compression(Walker(model), tokens, config_of(*BLIND))
    model.get_submodule(name).weight[2, 3] = value
    before = bits_of(model)
    with pytest.raises(NumericalError, match=f"^1 of \\d+ weights of {name} are not finite"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()
    with pytest.raises(NumericalError, match=f"^1 of \\d+ weights of {name} are not finite"):
        plan_compression(Walker(model), tokens, config_of())


def test_a_streamed_block_is_looked_at_before_its_first_sweep(
    tokens: torch.Tensor, tmp_path: Path
) -> None:
    """No block holds weights when the run begins, so each is looked at when its turn comes."""
    model = build_tiny_model("llama", vocab_size=260)
    config = config_of(*BLIND)
    made = plan_compression(Walker(model), tokens, config)
    model.get_submodule("model.layers.1.self_attn.v_proj").weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), revision=None, dtype="auto", device="cpu", offline=True)
    swept: list[int] = []
    blocks = compress_model(
        Walker(opened.model, weights=opened.weights),
        tokens,
        made,
        config,
        lambda report: swept.append(report.block),
    )
    line = "^1 of 512 weights of model.layers.1.self_attn.v_proj are not finite"
    with pytest.raises(NumericalError, match=line):
        list(blocks)
    assert swept == [0] * 7
