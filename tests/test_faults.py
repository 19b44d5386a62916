"""Numbers that are not numbers: every oddity is handled as the config says and is in the report, or
ends the run in one line that names it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_models import (
    BLIND,
    LOUD,
    SINGULAR,
    UNDAMPED,
    bits_of,
    build_overflowing,
    build_singular,
    changed,
    compress,
    config_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_byte_tokenizer, build_tiny_model

from mi_experiments import measure as measures
from mi_experiments import pipeline, solving
from mi_experiments.errors import (
    AuditError,
    InputError,
    MemoryShortage,
    NumericalError,
    SingularError,
)
from mi_experiments.llm.blocks import walk_blocks
from mi_experiments.llm.finite import Screen
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.loading import open_model
from mi_experiments.llm.replay import Call
from mi_experiments.llm.twins import Twins
from mi_experiments.method import gram, refine, sparsegpt
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.pruning import Sparsity
from mi_experiments.pipeline import compress_model
from mi_experiments.plan import LinearPlan, plan_compression
from mi_experiments.record import Bits
from mi_experiments.solving import Measured, factorize_site, solve_linear
from mi_experiments.verdict import check_budget, check_fallbacks

RATIOS = [0.0, 0.25, 0.5, 0.99, 1.0]
PRICED = [*UNDAMPED, "wbits.cost=relative"]


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    return tiny_tokens(8, 16)


# --- Hessians that are not positive definite ---------------------------------------------------


def test_a_singular_hessian_ends_the_run_if_asked(tokens: torch.Tensor) -> None:
    model = build_singular()
    before = bits_of(model)
    line = r"^block 1, mlp.down_proj: .*positive definite at damping 0.0: smallest diagonal \d"
    with pytest.raises(SingularError, match=line):
        compress(model, tokens, [*UNDAMPED, *BLIND, "recipe.on_singular=error"])
    assert f"{SINGULAR}.weight" not in changed(before, model)


def test_a_singular_hessian_is_damped_more_by_default_and_never_the_identity(
    tokens: torch.Tensor,
) -> None:
    seen: list[Any] = []
    solve = solving.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "solve", lambda *args: seen.append(args) or solve(*args))
        linears = compress(build_singular(), tokens, [*UNDAMPED, *BLIND])
    report = linears.pop(SINGULAR).report
    assert report.status == "escalated"
    assert (report.damping, report.damping_attempts) == (1e-4, (0.0, 1e-4))
    _, hessian, factor, *_ = seen[-1]
    ridge = 1e-4 * hessian.diagonal.mean() * torch.eye(48)
    assert torch.allclose(factor.upper @ factor.upper.T, hessian.matrix + ridge, atol=1e-5)
    for linear in linears.values():
        assert (linear.report.status, linear.report.damping_attempts) == ("compressed", (0.0,))


def test_a_linear_with_a_singular_hessian_is_left_as_it_is_if_asked(tokens: torch.Tensor) -> None:
    model = build_singular()
    before = bits_of(model)
    linears = compress(model, tokens, [*UNDAMPED, *BLIND, "recipe.on_singular=skip"])
    assert changed(before, model) == {f"{name}.weight" for name in linears if name != SINGULAR}
    report = linears.pop(SINGULAR).report
    assert report.status == "skipped"
    assert (report.average_bits, report.effective_bits, report.bits) == (16, 16, {16: 48})
    assert (report.sparsity, report.output_error, report.levels) == (0, 0, 0)
    assert (report.damping, report.damping_attempts) == (None, (0.0,))
    assert report.total_correlation is None
    assert {linear.report.status for linear in linears.values()} == {"compressed"}


@pytest.mark.parametrize("scope", ["linear", "site", "model"])
def test_a_skipped_linear_counts_what_it_is_and_the_others_keep_their_budget(
    scope: str, tokens: torch.Tensor
) -> None:
    model = build_singular()
    overrides = [*PRICED, f"wbits.scope={scope}", "recipe.on_singular=skip"]
    made = plan_compression(model, tokens, config_of(*overrides))
    reports = [linear.report for linear in compress(model, tokens, overrides, made).values()]
    bits = check_budget(reports, made)
    by_hand = sum(
        linear.rows * (16 * 48 if name == SINGULAR else int(linear.bits.sum()))
        for name, linear in made.linears.items()
    )
    assert bits.average == pytest.approx(by_hand / sum(report.weights for report in reports))
    assert bits.average > bits.requested == 4
    wider = dataclasses.replace(reports[0], average_bits=8.0)
    with pytest.raises(AuditError, match="above the requested 4"):
        check_budget([wider, *reports[1:]], made)


def test_what_the_plan_is_made_from_is_damped_as_the_recipe_says(tokens: torch.Tensor) -> None:
    model = build_singular()
    with pytest.raises(SingularError, match=r"block 1, mlp.down_proj: .* damping 0.0: smallest"):
        plan_compression(model, tokens, config_of(*PRICED, "recipe.on_singular=error"))
    for policy in ("escalate", "skip"):
        made = plan_compression(model, tokens, config_of(*PRICED, f"recipe.on_singular={policy}"))
        damping = {site: item.damping for site, item in made.information.items()}
        assert damping.pop(SINGULAR) == 1e-4
        assert set(damping.values()) == {0.0}
    assert compress(model, tokens, PRICED, made)[SINGULAR].report.plan_damping == 1e-4


@pytest.mark.parametrize(
    ("statuses", "limit", "line"),
    [
        ({}, 0.0, None),
        ({0: "untouched", 1: "untouched"}, 0.0, None),
        ({2: "escalated"}, 0.125, None),
        ({2: "escalated"}, 0.124, r"^1 of 8 linears \(12%\) .*: 1 escalated, first layer.2; "),
        ({3: "skipped", 2: "escalated"}, 0.2, r"^2 of 8 .*: 1 escalated, 1 skipped, first layer.2"),
        (dict.fromkeys(range(8), "escalated"), 0.99, r"^8 of 8 linears \(100%\)"),
        (dict.fromkeys(range(8), "skipped"), 1.0, None),
    ],
)
def test_a_run_in_which_many_linears_fell_back_fails(
    statuses: dict[int, str], limit: float, line: str | None, tokens: torch.Tensor
) -> None:
    example = compress(build_tiny_model("llama"), tokens[:, :8], ["recipe=textbook", *BLIND])
    report = next(iter(example.values())).report
    reports = [
        dataclasses.replace(report, name=f"layer.{i}", status=statuses.get(i, "compressed"))
        for i in range(8)
    ]
    bits = Bits(requested=4.0, average=4.75, effective=5.0)
    if line is None:
        check_fallbacks(reports, bits, limit)
        return
    with pytest.raises(NumericalError, match=line) as caught:
        check_fallbacks(reports, bits, limit)
    assert "average bits 4.7500 where 4 were requested" in str(caught.value)
    assert f"recipe.max_escalated={limit:g}" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- activations that are not finite -----------------------------------------------------------


@pytest.mark.parametrize("recipe", ["default", "textbook"])
def test_an_overflow_inside_a_block_names_block_site_sample_and_channel(
    recipe: str, tokens: torch.Tensor
) -> None:
    model = build_overflowing()
    before = bits_of(model)
    tokens[tokens == LOUD] = 2
    tokens[3, 9] = LOUD
    line = r"^block 0, mlp.down_proj: .* not finite, the first at sample 3, token 9, channel \d+$"
    with pytest.raises(NumericalError, match=line):
        compress(model, tokens, [f"recipe={recipe}", *BLIND])
    if recipe == "textbook":  # measures a whole block before it compresses the first linear
        assert changed(before, model) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hidden_state_that_is_not_finite_names_its_sample(
    value: float, tokens: torch.Tensor
) -> None:
    model = build_tiny_model("llama")
    tokens[tokens == LOUD] = 2
    tokens[5, 0] = LOUD
    model.get_input_embeddings().weight[LOUD, 4] = value
    with pytest.raises(
        NumericalError, match=r"sample 5 is not finite in the input of model.layers.0"
    ):
        compress(model, tokens, BLIND)


@pytest.mark.parametrize(
    ("scale", "line"),
    [
        (1e3, None),
        (1e4, None),
        (1e6, r"sample 0 is not finite in the input of model.layers.0 \(torch.float16"),
    ],
)
def test_large_embeddings_in_float16_give_finite_numbers_or_a_named_error(
    scale: float, line: str | None, tokens: torch.Tensor
) -> None:
    model = build_tiny_model("llama")
    model.get_input_embeddings().weight.mul_(scale)
    model.half()
    if line is not None:
        with pytest.raises(NumericalError, match=line):
            compress(model, tokens)
        return
    for linear in compress(model, tokens).values():
        assert linear.linear.read_weight().isfinite().all()
        assert linear.report.output_error < 1


def test_second_moments_beyond_float32_name_block_site_and_activation(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    model.get_submodule("model.layers.1.post_attention_layernorm").weight.mul_(1e20)
    model.get_submodule("model.layers.1.mlp.gate_proj").weight.mul_(1e-25)
    uncorrected = ["recipe.input_share=0", "recipe.residual_share=0"]
    line = (
        r"^block 1, mlp.gate_proj\+up_proj: the second moments overflow torch.float32: "
        r"largest activation \d\.\d+e\+20$"
    )
    for overrides in ([], uncorrected):
        with pytest.raises(NumericalError, match=line):
            compress(model, tokens, [*overrides, *BLIND])


def test_a_float64_model_is_measured_and_solved_in_float64(tokens: torch.Tensor) -> None:
    """There the second moments of activations of 1e20 are ordinary numbers."""
    single, double = build_tiny_model("llama"), build_tiny_model("llama").double()
    for name, linear in compress(double, tokens, ["wbits=unquantized", *BLIND[1:]]).items():
        assert linear.linear.read_weight().dtype == torch.float64
        assert (linear.linear.read_weight() == 0).double().mean() == 0.5, name
    compress(single, tokens, ["wbits=unquantized", *BLIND[1:]])
    for key, value in single.state_dict().items():
        torch.testing.assert_close(value.double(), double.state_dict()[key], rtol=1e-3, atol=1e-3)
    loud = build_tiny_model("llama").double()
    loud.get_submodule("model.layers.1.post_attention_layernorm").weight.mul_(1e20)
    loud.get_submodule("model.layers.1.mlp.gate_proj").weight.mul_(1e-25)
    for linear in compress(loud, tokens, ["wbits=unquantized", *BLIND[1:]]).values():
        assert linear.report.status == "compressed"
        assert linear.report.output_error < 1


# --- dead channels ------------------------------------------------------------------------------

DEAD = "model.layers.0.self_attn.q_proj"


def build_dead() -> Any:
    """Build a model whose first site never sees channel 5."""
    model = build_tiny_model("llama")
    model.get_submodule("model.layers.0.input_layernorm").weight[5] = 0
    return model


@pytest.mark.parametrize("recipe", ["default", "textbook"])
def test_weights_of_a_dead_channel_are_rounded_like_any_other(
    recipe: str, tokens: torch.Tensor
) -> None:
    """Nothing is carried into the channel or out of it, so rounding to nearest is the optimum."""
    model = build_dead()
    original = model.get_parameter(f"{DEAD}.weight").clone()
    settings = [f"recipe={recipe}", "recipe.dead_channels=keep", "sparsity=dense", *BLIND]
    linears = compress(model, tokens, settings)
    grids = linears[DEAD].grids
    group = int(grids["scale_group"][5])
    scale, zero = grids["scale"][:, group], grids["zero_point"][:, group]
    code = (original[:, 5] / scale).round().clamp(-zero, 15 - zero)
    assert torch.equal(model.get_parameter(f"{DEAD}.weight")[:, 5], code * scale)
    assert (code != 0).any()
    dead = {name: linear.report.dead_channels for name, linear in linears.items()}
    assert {name for name, count in dead.items() if count} == {
        f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"
    }
    assert dead[DEAD] == 1


@pytest.mark.parametrize("recipe", ["default", "textbook"])
def test_weights_of_a_dead_channel_are_zero_if_asked(recipe: str, tokens: torch.Tensor) -> None:
    model = build_dead()
    settings = [f"recipe={recipe}", "recipe.dead_channels=zero", "sparsity=dense"]
    linears = compress(model, tokens, [*settings, "wbits.cost=relative"])
    assert linears[DEAD].report.dead_channels == 1
    for kind in "qkv":
        weight = model.get_parameter(f"model.layers.0.self_attn.{kind}_proj.weight")
        assert (weight[:, 5] == 0).all()
        assert (weight != 0).any(dim=0).sum() == 31


@pytest.mark.parametrize("recipe", ["default", "textbook"])
def test_a_zeroed_channel_is_as_good_as_none(recipe: str) -> None:
    """The other weights are those of the problem without the channel."""
    weight, inputs = draw(6, 20), draw(200, 20, seed=1)
    inputs[:, 5] = 0
    config = config_of(f"recipe={recipe}", "recipe.dead_channels=zero")
    whole = solve_here(weight, inputs, 4, 0.0, config)
    assert (whole.weight[:, 5] == 0).all()
    others = torch.arange(20) != 5
    # The same ridge, as a share of a mean over one channel fewer.
    fewer = dataclasses.replace(config.recipe, damping=config.recipe.damping * 19 / 20)
    config = dataclasses.replace(config, recipe=fewer)
    without = solve_here(weight[:, others], inputs[:, others], 4, 0.0, config)
    torch.testing.assert_close(whole.weight[:, others], without.weight, rtol=1e-12, atol=1e-12)


def test_a_dead_channel_of_an_untouched_linear_stays(tokens: torch.Tensor) -> None:
    model = build_dead()
    before = bits_of(model)
    compress(model, tokens, ["wbits=unquantized", "sparsity=dense", "recipe.dead_channels=zero"])
    assert changed(before, model) == set()


# --- modules and weights that are used twice ----------------------------------------------------


def test_one_weight_under_two_names_is_refused_with_both(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    made = plan_compression(model, tokens, config_of(*BLIND))
    first, second = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    model.get_submodule(second).weight = model.get_submodule(first).weight
    before = bits_of(model)
    with pytest.raises(InputError, match=f"^{first}.weight and {second}.weight are one weight"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()


def test_a_module_that_runs_twice_in_one_pass_is_refused_by_name(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    made = plan_compression(model, tokens, config_of(*BLIND))
    mlp = model.get_submodule("model.layers.0.mlp")
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + forward(hidden)
    before = bits_of(model)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.gate_proj is called twice"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()


# --- what compression must not touch ------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gpt2", "opt"])
def test_tied_embeddings_and_head_keep_every_bit_and_stay_tied(
    name: str, tokens: torch.Tensor
) -> None:
    model = build_tiny_model(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    before = bits_of(model)
    linears = compress(model, tokens)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert changed(before, model) == {f"{linear}.weight" for linear in linears}


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2", "phi", "gpt_neox"])
def test_nothing_asked_is_the_same_function_bit_for_bit(name: str, tokens: torch.Tensor) -> None:
    model = build_tiny_model(name)
    before, logits = bits_of(model), model(input_ids=tokens).logits
    linears = compress(model, tokens, ["wbits=unquantized", "sparsity=dense"])
    assert changed(before, model) == set()
    assert torch.equal(model(input_ids=tokens).logits, logits)
    assert {linear.report.status for linear in linears.values()} == {"untouched"}
    assert {linear.report.effective_bits for linear in linears.values()} == {16}


@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt2", "phi"])
def test_biases_norms_and_embeddings_keep_every_bit(name: str, tokens: torch.Tensor) -> None:
    model = build_tiny_model(name)
    biases = {
        key for key in model.state_dict() if key.endswith("_proj.bias") or "c_attn.bias" in key
    }
    assert biases
    before = bits_of(model)
    linears = compress(model, tokens)
    assert changed(before, model) == {f"{linear}.weight" for linear in linears}


# --- exact sparsity -----------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def measure(inputs: torch.Tensor) -> Hessian:
    accumulator = HessianAccumulator(inputs.shape[1], dtype=torch.float64)
    accumulator.update(inputs)
    return accumulator.finish()


def solve_here(
    weight: torch.Tensor, inputs: torch.Tensor, bits: int, ratio: float, config: Any
) -> Any:
    """Solve one linear with one scale group a row, audit it, and return what the sweep returned."""
    rows, columns = weight.shape
    one = torch.zeros(columns, dtype=torch.int32)
    widths = torch.full((columns,), bits, dtype=torch.uint8)
    linear_plan = LinearPlan(0, "site", rows, columns, one, widths, one)
    sparsity = Sparsity(ratio)
    hessian = measure(inputs)
    statistics = factorize_site(Measured(hessian, None, hessian.tokens), sparsity, config)
    solution = solve_linear(weight, statistics, linear_plan, sparsity, config)
    audit_linear(
        solution.swept,
        solution.grid,
        sparsity,
        original=weight,
        order=statistics.order(),
        mask_block=config.sparsity.mask_block,
        max_average_bits=float(bits),
        stored=solution.swept.weight,
    )
    start = 0
    for positions in torch.split(statistics.order(), config.sparsity.mask_block):
        count = int(solution.swept.pruned[:, positions].sum())
        assert count == round(ratio * (rows * len(positions))), start
        start += len(positions)
    return solution.swept


CONFIGS = {
    (recipe, block): config_of(f"recipe={recipe}", f"sparsity.mask_block={block}")
    for recipe in ("default", "textbook")
    for block in (4, 128)
}


@given(
    st.integers(1, 7),
    st.sampled_from([1, 3, 8, 44]),
    st.sampled_from(RATIOS),
    st.sampled_from([2, 3, 8, 16]),
    st.sampled_from(sorted(CONFIGS)),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_any_ratio_prunes_exactly_and_zero_and_one_are_ratios(
    rows: int, columns: int, ratio: float, bits: int, recipe: tuple[str, int], seed: int
) -> None:
    weight, inputs = draw(rows, columns, seed=seed), draw(90, columns, seed=seed + 1)
    swept = solve_here(weight, inputs, bits, ratio, CONFIGS[recipe])
    assert (swept.weight[swept.pruned] == 0).all()
    if ratio == 0 and bits == 16:
        assert torch.equal(swept.weight, weight)
    if ratio == 1:
        assert not swept.weight.any()
        assert swept.pruned.all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("width", [1, 3, 44])
def test_odd_widths_and_all_ratios_go_through_the_pipeline(
    width: int, ratio: float, tokens: torch.Tensor
) -> None:
    """With a width of 1 there is a linear of one row and one of one column."""
    model = build_tiny_model("llama", intermediate_size=width)
    before = bits_of(model)
    settings = ["n_groups.count=1", "wbits.cost=relative", "wbits.group_size=32"]
    overrides = [f"sparsity.ratio={ratio}", "recipe.on_singular=skip", *settings]
    linears = compress(model, tokens, overrides)
    assert {linear.linear.columns for linear in linears.values()} == {32, width}
    for name, linear in linears.items():
        report, weight, pruned = linear.report, linear.linear.read_weight(), linear.grids["pruned"]
        assert weight.isfinite().all()
        if report.status == "skipped":
            # So little is left of the linears before it that it reads nothing but zeros.
            assert (ratio, report.dead_channels) == (0.99, width)
            assert f"{name}.weight" not in changed(before, model)
            continue
        assert int(pruned.sum()) == round(ratio * report.weights), name
        assert (weight[pruned] == 0).all()
        assert report.average_bits == 4
        if ratio == 1:
            assert report.output_error == float(report.dead_channels < report.columns)


def test_a_linear_that_reads_only_zeros_ends_the_run_unless_it_may_be_skipped(
    tokens: torch.Tensor,
) -> None:
    """The published code would erase it and report no error."""
    model = build_tiny_model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    before = bits_of(model)[f"{SINGULAR}.weight"]
    line = r"block 1, mlp.down_proj: the Hessian is zero: every .*; recipe.on_singular=skip leaves"
    for policy in ("error", "escalate"):
        with pytest.raises(SingularError, match=line):
            compress(model, tokens, [*BLIND, f"recipe.on_singular={policy}"])
    report = compress(model, tokens, [*BLIND, "recipe.on_singular=skip"])[SINGULAR].report
    assert (report.status, report.dead_channels) == ("skipped", 48)
    assert torch.equal(bits_of(model)[f"{SINGULAR}.weight"], before)


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
    leave = solving.leave
    monkeypatch.setattr(solving, "leave", lambda weight: leave(weight + 1e-3))
    with pytest.raises(AuditError, match=r"q_proj\): 1024 "):
        compress(build_tiny_model("llama"), tokens, ["wbits=unquantized", "sparsity=dense"])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"])
def test_weights_that_are_not_finite_are_refused_before_any_sweep(
    name: str, value: float, tokens: torch.Tensor
) -> None:
    model = build_tiny_model("llama")
    made = plan_compression(model, tokens, config_of(*BLIND))
    model.get_submodule(name).weight[2, 3] = value
    before = bits_of(model)
    with pytest.raises(NumericalError, match=f"^1 of \\d+ weights of {name} are not finite"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()
    with pytest.raises(NumericalError, match=f"^1 of \\d+ weights of {name} are not finite"):
        plan_compression(model, tokens, config_of())


# --- short memory -------------------------------------------------------------------------------


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
    "sweep": (sparsegpt._Sweep, "__init__", 1, "self_attn.k_proj"),
    "refinement": (refine, "_descend", 3, "self_attn.k_proj"),
}


@pytest.mark.parametrize("place", PLACES)
def test_short_memory_is_in_the_report_of_its_linears_and_moves_no_code(
    place: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*BLIND, "sparsity=dense", "recipe.input_share=0", "recipe.residual_share=0"]
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
    fail_once(monkeypatch, sparsegpt._Sweep, "__init__", 0)
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
    fail_once(monkeypatch, measures, "feed_all_tokens", 1)
    found = compress(build_tiny_model("qwen3_moe"), tokens, overrides)
    assert sum(linear.report.retries for linear in found.values()) > 0
    for name, linear in found.items():
        report, wanted = linear.report, expected[name].report
        assert (report.tokens, report.all_tokens) == (wanted.tokens, wanted.all_tokens)
        assert report.output_error == pytest.approx(wanted.output_error, rel=1e-3)


def test_a_streamed_block_is_looked_at_before_its_first_sweep(
    tokens: torch.Tensor, tmp_path: Path
) -> None:
    """No block holds weights when the run begins, so each is looked at when its turn comes."""
    model = build_tiny_model("llama", vocab_size=260)
    config = config_of(*BLIND)
    made = plan_compression(model, tokens, config)
    model.get_submodule("model.layers.1.self_attn.v_proj").weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), revision=None, dtype="auto", device="cpu", offline=True)
    swept: list[int] = []
    blocks = compress_model(
        opened.model,
        tokens,
        made,
        config,
        lambda report: swept.append(report.block),
        weights=opened.weights,
    )
    line = "^1 of 512 weights of model.layers.1.self_attn.v_proj are not finite"
    with pytest.raises(NumericalError, match=line):
        list(blocks)
    assert swept == [0] * 7


def test_samples_that_are_set_aside_go_on_as_zeros() -> None:
    """What is not finite must reach no router and no kernel of a later block."""
    rejected = {1: "before"}
    hidden = torch.ones(4, 2, 3)
    hidden[2, 1, 0], hidden[3, 0, 1] = float("inf"), float("nan")
    Screen(list("abcdefgh"), rejected).admit_(hidden, 4, "here")
    assert rejected == {1: "before", 6: "here", 7: "here"}
    assert torch.equal(hidden[:2], torch.ones(2, 2, 3))
    assert torch.equal(hidden[2:], torch.zeros(2, 2, 3))


def test_twins_run_in_batches_of_one_size_whichever_was_short(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    block = next(walk_blocks(model, tokens, batch_size=4))
    for short in ("block", "dense"):
        dense = block.stream.fork()
        block.stream.batch_size = dense.batch_size = 4
        (block.stream if short == "block" else dense).shrink("reason")
        twins = Twins.open(block, dense)
        assert [len(seen.dense) for seen in twins.observe(block.sites[-1])] == [2 * 16] * 4
