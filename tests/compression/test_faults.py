"""Numbers that are not numbers: every oddity is handled as the config says and is in the report, or
ends the run in one line that names it."""

import dataclasses
import re
from collections.abc import Callable
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
    draw,
    solve_here,
)
from seldom import seldom
from tiny_models import build_tiny_model

from mi_experiments.compression import compress_linear
from mi_experiments.compression.totals import check_budget, check_fallbacks
from mi_experiments.errors import AuditError, InputError, NumericalError, SingularError
from mi_experiments.llm.nonfinite import FiniteCheck
from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import plan_compression
from mi_experiments.records.result import Bits

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
    solve = compress_linear.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_linear, "solve", lambda *args: seen.append(args) or solve(*args))
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
    # As it is, in the 16 bits that it counts.
    left = before[f"{SINGULAR}.weight"].view(torch.float32)
    assert torch.equal(model.get_submodule(SINGULAR).weight.flatten(), left.half().float())
    report = linears.pop(SINGULAR).report
    assert report.unquantized_dtype == "float16"
    assert report.status == "skipped"
    assert (report.average_bits, report.effective_bits, report.bits) == (16, 16, {16: 48})
    assert (report.sparsity, report.levels) == (0, 0)
    assert report.output_error < 1e-6
    assert (report.damping, report.damping_attempts) == (None, (0.0,))
    assert report.total_correlation is None
    assert {linear.report.status for linear in linears.values()} == {"compressed"}


@pytest.mark.parametrize("scope", seldom(["model", "linear", "site"], always=1))
def test_a_skipped_linear_counts_what_it_is_and_the_others_keep_their_budget(
    scope: str, tokens: torch.Tensor
) -> None:
    model = build_singular()
    overrides = [*PRICED, f"wbits.scope={scope}", "recipe.on_singular=skip"]
    made = plan_compression(Walker(model), tokens, config_of(*overrides))
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
        plan_compression(Walker(model), tokens, config_of(*PRICED, "recipe.on_singular=error"))
    for policy in ("escalate", "skip"):
        made = plan_compression(
            Walker(model), tokens, config_of(*PRICED, f"recipe.on_singular={policy}")
        )
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
        (dict.fromkeys(range(8), "kept") | {0: "dead"}, 0.0, None),
        ({2: "vanished"}, 0.1, r"^1 of 8 .*weights of them are too small for the scales .*: 1 van"),
        (
            {1: "vanished", 4: "skipped"},
            0.2,
            r"because their Hessian .* or weights .*: 1 skipped, 1 van.*set recipe.scale_bits=32",
        ),
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


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (
            "kept",
            r"2 of 8 linears \(25%\) were kept at 16 bits a weight, .*, first layer.3; average",
        ),
        (
            "dead",
            r"2 of 8 linears \(25%\) read nothing but zeros from calibration, .*, first layer.3",
        ),
    ],
)
def test_linears_that_are_not_what_was_expected_are_named(
    status: str, line: str, caplog: pytest.LogCaptureFixture, tokens: torch.Tensor
) -> None:
    example = compress(build_tiny_model("llama"), tokens[:, :8], ["recipe=textbook", *BLIND])
    report = next(iter(example.values())).report
    reports = [
        dataclasses.replace(
            report, name=f"layer.{i}", status=status if i in (3, 5) else "compressed"
        )
        for i in range(8)
    ]
    check_fallbacks(reports, Bits(requested=4.0, average=7.0, effective=7.5), 0.0)
    (record,) = caplog.records
    assert re.search(line, record.getMessage())
    assert record.getMessage().endswith("average bits 7.0000 where 4 were requested")


# --- weights that are too small or too large ---------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [
        ("default", slice(None)),
        ("textbook", slice(None)),
        ("textbook", slice(3, 4)),
        ("gptq", slice(3, 4)),
    ],
)
def test_weights_below_the_scales_are_not_compressed_as_asked(
    recipe: str, rows: slice, tokens: torch.Tensor
) -> None:
    """A whole matrix, or one row of it."""
    model, name = build_tiny_model("llama"), "model.layers.1.self_attn.o_proj"
    model.get_submodule(name).weight[rows] *= 1e-30
    asked = [f"recipe={recipe}", "recipe.scale_bits=16", *BLIND]
    linears = compress(model, tokens, asked)
    assert {x.report.name for x in linears.values() if x.report.status == "vanished"} == {name}
    assert not model.get_submodule(name).weight[rows].any()
    if rows == slice(None):
        assert linears[name].report.output_error == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-22])
@pytest.mark.parametrize("overrides", [["recipe.scale_bits=32"], ["wbits=unquantized"]])
def test_weights_of_any_size_are_compressed_where_they_can_be_stored(
    scale: float, overrides: list[str], tokens: torch.Tensor
) -> None:
    """No square of a weight decides: what is pruned and how well does not depend on the unit."""
    name = "model.layers.1.mlp.down_proj"
    found = []
    for unit in (1.0, scale):
        model = build_tiny_model("llama")
        model.get_submodule(name).weight *= unit
        plain = ["recipe=textbook", "n_groups=contiguous", "sparsity.scope=linear"]
        uniform = [] if "wbits=unquantized" in overrides else ["wbits=uniform"]
        found.append(compress(model, tokens, [*plain, *uniform, *overrides])[name])
    ordinary, small = found
    assert small.report.status == "compressed"
    assert small.report.output_error == pytest.approx(ordinary.report.output_error, rel=0.05)
    differ = small.grids["pruned"] != ordinary.grids["pruned"]
    assert differ.float().mean() < 0.02


def test_activations_whose_squares_are_zero_are_not_called_dead(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    model.get_submodule("model.layers.1.post_attention_layernorm").weight.mul_(1e-26)
    line = r"^block 1, mlp.gate_proj\+up_proj: the second moments underflow torch.float32: largest"
    with pytest.raises(NumericalError, match=line):
        compress(model, tokens, BLIND)


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
    uncorrected = ["recipe.input_correction=0", "recipe.residual_correction=0"]
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


def test_samples_that_are_set_aside_go_on_as_zeros() -> None:
    """What is not finite must reach no router and no kernel of a later block."""
    dropped = {1: "before"}
    hidden = torch.ones(4, 2, 3)
    hidden[2, 1, 0], hidden[3, 0, 1] = float("inf"), float("nan")
    FiniteCheck(list("abcdefgh"), dropped).check_(hidden, 4, "here")
    assert dropped == {1: "before", 6: "here", 7: "here"}
    assert torch.equal(hidden[:2], torch.ones(2, 2, 3))
    assert torch.equal(hidden[2:], torch.zeros(2, 2, 3))


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
    made = plan_compression(Walker(model), tokens, config_of(*BLIND))
    first, second = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    model.get_submodule(second).weight = model.get_submodule(first).weight
    before = bits_of(model)
    with pytest.raises(InputError, match=f"^{first}.weight and {second}.weight are one weight"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()


def test_a_module_that_runs_twice_in_one_pass_is_refused_by_name(tokens: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    made = plan_compression(Walker(model), tokens, config_of(*BLIND))
    mlp = model.get_submodule("model.layers.0.mlp")
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + forward(hidden)
    before = bits_of(model)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.gate_proj is called twice"):
        compress(model, tokens, BLIND, made)
    assert changed(before, model) == set()


# --- what compression must not touch ------------------------------------------------------------


@pytest.mark.parametrize("name", seldom(["opt", "gpt2", "llama3"], always=2))
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


@pytest.mark.parametrize(
    "name", seldom(["llama", "gpt2", "qwen2", "opt", "phi", "gpt_neox"], always=2)
)
def test_nothing_asked_is_the_same_function_bit_for_bit(name: str, tokens: torch.Tensor) -> None:
    model = build_tiny_model(name)
    before, logits = bits_of(model), model(input_ids=tokens).logits
    linears = compress(model, tokens, ["wbits=unquantized", "sparsity=dense"])
    assert changed(before, model) == set()
    assert torch.equal(model(input_ids=tokens).logits, logits)
    assert {linear.report.status for linear in linears.values()} == {"untouched"}
    # Which is more than 16 bits, where the weights have more.
    assert {linear.report.effective_bits for linear in linears.values()} == {32}
    halved = build_tiny_model(name).half().float()
    linears = compress(halved, tokens, ["wbits=unquantized", "sparsity=dense"])
    assert {linear.report.effective_bits for linear in linears.values()} == {16}


@pytest.mark.parametrize("name", seldom(["qwen2", "gpt2", "opt", "phi"], always=2))
def test_biases_norms_and_embeddings_keep_every_bit(name: str, tokens: torch.Tensor) -> None:
    model = build_tiny_model(name)
    biases = {
        key for key in model.state_dict() if key.endswith("_proj.bias") or "c_attn.bias" in key
    }
    assert biases
    before = bits_of(model)
    linears = compress(model, tokens)
    assert changed(before, model) == {f"{linear}.weight" for linear in linears}
