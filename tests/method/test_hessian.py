"""The Hessian is 2/n XᵀX however the tokens arrive; the factor reproduces it, damped, in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.errors import NumericalError, SingularError
from mi_experiments.method.hessian import HessianAccumulator, SweepOrder, factorize, sweep_order

DOUBLE = torch.float64


def activations(tokens, columns, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=DOUBLE)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mixing
    return (inputs + torch.arange(columns)).to(dtype)


def accumulate(inputs, cuts=(), **options):
    options.setdefault("dtype", DOUBLE)
    accumulator = HessianAccumulator(inputs.shape[1], **options)
    for part in torch.tensor_split(inputs, sorted(cuts)):
        accumulator.update(part)
    return accumulator.finish()


@pytest.mark.parametrize("columns", [1, 5, 256, 700])
def test_hessian_is_twice_the_mean_outer_product(columns):
    inputs = activations(40, columns)
    hessian = accumulate(inputs, cuts=(7, 7, 30))
    expected = 2 / 40 * inputs.T @ inputs
    torch.testing.assert_close(hessian.matrix, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    torch.testing.assert_close(hessian.mean, inputs.mean(0), rtol=1e-12, atol=1e-12)
    assert hessian.tokens == 40


def test_float32_sums_agree_with_float64():
    inputs = activations(3000, 300, dtype=torch.float32)
    single = accumulate(inputs, cuts=range(0, 3000, 500), dtype=torch.float32).matrix
    double = accumulate(inputs).matrix
    scale = double.diagonal().sqrt()
    assert ((single - double) / scale / scale[:, None]).abs().max() < 1e-5


def test_covariance_is_the_centred_second_moment():
    inputs = activations(50, 6)
    covariance = accumulate(inputs).covariance()
    torch.testing.assert_close(covariance, torch.cov(inputs.T, correction=0), rtol=1e-9, atol=1e-9)
    assert torch.equal(covariance, covariance.T)


def test_constant_channels_have_no_variance_and_dead_channels_are_marked():
    inputs = activations(4096, 40, dtype=torch.float32)
    inputs[:, 3] = 0
    inputs[:, 5] = 7.3
    hessian = accumulate(inputs, cuts=range(0, 4096, 64), dtype=torch.float32)
    covariance = hessian.covariance()
    assert hessian.dead.nonzero().flatten().tolist() == [3]
    assert (covariance.diagonal() == 0).nonzero().flatten().tolist() == [3, 5]
    assert not covariance[5].any()
    assert not covariance[:, 5].any()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 200),
    kept=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_sample_does_not_depend_on_the_cuts(tokens, kept, cuts):
    inputs = torch.arange(tokens, dtype=DOUBLE)[:, None]
    cuts = [min(cut, tokens) for cut in cuts]
    whole = accumulate(inputs, sample_tokens=kept).sample
    parts = accumulate(inputs, cuts=cuts, sample_tokens=kept).sample
    assert torch.equal(whole, parts)
    assert len(whole) == min(tokens, kept)
    assert (whole[1:] > whole[:-1]).all()


@pytest.mark.parametrize("seqlen", [128, 1000, 2048])
def test_sample_is_even_and_blind_to_the_sequence_length(seqlen):
    tokens, kept = 64 * seqlen, 1024
    indices = torch.arange(tokens, dtype=DOUBLE)
    sample = accumulate(indices[:, None], sample_tokens=kept).sample.flatten()
    gaps = torch.cat((sample, torch.tensor([tokens], dtype=DOUBLE))).diff()
    assert gaps.max() <= 3 * tokens / kept
    first_of_sequence = (sample % seqlen == 0).sum().item()
    assert first_of_sequence <= 2 * kept / seqlen + 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_refused_and_located(value):
    accumulator = HessianAccumulator(4)
    accumulator.update(torch.ones(10, 4))
    bad = torch.ones(5, 4)
    bad[2, 3] = bad[4, 0] = value
    with pytest.raises(NumericalError, match=r"2 activations .* token 12, channel 3"):
        accumulator.update(bad)
    torch.testing.assert_close(accumulator.finish().matrix, torch.full((4, 4), 2.0))


def test_overflow_of_the_squares_is_an_error():
    accumulator = HessianAccumulator(2)
    accumulator.update(torch.full((3, 2), 1e20))
    accumulator.update(torch.tensor([[-3e20, 1.0]]))
    with pytest.raises(NumericalError, match=r"overflow torch.float32: largest activation 3e\+20"):
        accumulator.finish()


def test_messages_call_a_token_what_they_are_told():
    accumulator = HessianAccumulator(1, name_token=lambda token: f"sample {token // 4}")
    accumulator.update(torch.ones(6, 1))
    with pytest.raises(NumericalError, match="the first at sample 2, channel 0"):
        accumulator.update(torch.tensor([[1.0], [1.0], [float("nan")], [1.0]]))


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="got 3 channels, expected 4"):
        HessianAccumulator(4).update(torch.ones(2, 3))


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_factor_reproduces_the_damped_hessian_in_order(damping):
    hessian = accumulate(activations(200, 30))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    factor = factorize(hessian, damping=damping, order=order)
    ridge = damping * hessian.diagonal.mean() * torch.eye(30, dtype=DOUBLE)
    expected = hessian.matrix[order][:, order] + ridge
    torch.testing.assert_close(factor.upper @ factor.upper.T, expected, rtol=1e-11, atol=1e-9)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    assert factor.attempts == (damping,)
    assert factor.damping == damping


@pytest.mark.parametrize("columns", [1, 40, 1100])
def test_diagonals_of_the_factor_are_by_channel(columns):
    hessian = accumulate(activations(2 * columns, columns))
    order = sweep_order(hessian.diagonal, SweepOrder.activation)
    factor = factorize(hessian, order=order)
    damped = hessian.matrix + 0.01 * hessian.diagonal.mean() * torch.eye(columns, dtype=DOUBLE)
    torch.testing.assert_close(factor.diagonal(), damped.diagonal(), rtol=1e-10, atol=0)
    inverse = torch.linalg.inv(damped).diagonal()
    torch.testing.assert_close(factor.inverse_diagonal(), inverse, rtol=1e-7, atol=0)


def test_pivots_are_conditional_variances_given_later_channels():
    matrix = accumulate(activations(100, 8)).matrix
    factor = factorize(matrix, damping=0.0)
    for j in range(8):
        later = matrix[j + 1 :, j + 1 :]
        known = matrix[j, j + 1 :] @ torch.linalg.solve(later, matrix[j + 1 :, j])
        assert factor.upper[j, j].item() ** 2 == pytest.approx((matrix[j, j] - known).item())


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_rank_deficient_hessian_escalates_and_records_it(dtype):
    hessian = accumulate(activations(4, 32, dtype=dtype), dtype=dtype)
    factor = factorize(hessian, damping=0.0)
    assert factor.attempts == (0.0, 1e-4)
    assert factor.damping == 1e-4


def test_indefinite_matrix_climbs_the_ladder_as_far_as_it_must():
    matrix = torch.diag(torch.tensor([4.0, 4.0, -0.5], dtype=DOUBLE))
    factor = factorize(matrix, damping=0.01)
    assert factor.attempts == (0.01, 0.1, 1.0)
    expected = matrix + 2.5 * torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(factor.upper @ factor.upper.T, expected)


def test_ladder_ends_at_one_and_fails_with_its_history():
    matrix = torch.diag(torch.tensor([4.0, -3.0], dtype=DOUBLE))
    with pytest.raises(NumericalError, match=r"damping 0.03, 0.3, 1.0: smallest diagonal -3"):
        factorize(matrix, damping=0.03)
    with pytest.raises(NumericalError, match=r"damping 0.0, 0.0001, 0.001, 0.01, 0.1, 1.0:"):
        factorize(-torch.eye(3), damping=0.0)


@pytest.mark.parametrize("kind", ["rank deficient", "semidefinite", "indefinite", "zero"])
def test_without_escalation_the_first_failure_is_the_last(kind):
    inputs = activations(4, 8)
    duplicated = activations(50, 8)
    duplicated[:, 5] = duplicated[:, 2]
    hessian = {
        "rank deficient": accumulate(inputs),
        "semidefinite": accumulate(duplicated),
        "indefinite": -torch.eye(8, dtype=DOUBLE),
        "zero": accumulate(torch.zeros(5, 8, dtype=DOUBLE)),
    }[kind]
    message = (
        "is zero" if kind == "zero" else r"positive definite at damping 0.0: smallest diagonal"
    )
    with pytest.raises(SingularError, match=message):
        factorize(hessian, damping=0.0, escalate=False)
    if kind in {"rank deficient", "semidefinite"}:
        assert factorize(hessian, damping=1e-4, escalate=False).attempts == (1e-4,)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_pivot_of_rounding_noise_is_not_positive(scale):
    inputs = activations(100, 6, dtype=torch.float32) * scale
    inputs[:, 4] = inputs[:, 1]
    factor = factorize(accumulate(inputs, dtype=torch.float32), damping=0.0)
    assert len(factor.attempts) > 1


def test_nothing_to_factorise_is_an_error():
    with pytest.raises(NumericalError, match="no token"):
        factorize(HessianAccumulator(3).finish())
    with pytest.raises(NumericalError, match="zero"):
        factorize(accumulate(torch.zeros(5, 3, dtype=DOUBLE)))
    with pytest.raises(NumericalError, match="not finite"):
        factorize(torch.full((2, 2), float("nan")))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="permutation"):
        factorize(torch.eye(3), order=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="damping"):
        factorize(torch.eye(3), damping=-0.1)


def test_ties_keep_the_natural_order():
    order = sweep_order(torch.ones(5000), SweepOrder.activation)
    assert torch.equal(order, torch.arange(5000))


def test_sweep_orders():
    diagonal = torch.tensor([1.0, 4.0, 2.0, 4.0, 9.0, 0.0])
    natural = sweep_order(diagonal, SweepOrder.natural)
    assert natural.tolist() == [0, 1, 2, 3, 4, 5]
    assert sweep_order(diagonal, SweepOrder.activation).tolist() == [4, 1, 3, 2, 0, 5]
    windows = sweep_order(diagonal, SweepOrder.activation, window=2)
    assert windows.tolist() == [4, 5, 2, 3, 0, 1]
    with pytest.raises(ValueError, match="windows of 4"):
        sweep_order(diagonal, SweepOrder.natural, window=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_are_exact_in_float32_on_cuda(dtype):
    inputs = activations(2000, 300).to("cuda", dtype)
    half = accumulate(inputs, cuts=(900,), device="cuda", dtype=torch.float32)
    double = accumulate(inputs.to(DOUBLE), device="cuda")
    scale = double.diagonal.sqrt()
    assert ((half.matrix - double.matrix) / scale / scale[:, None]).abs().max() < 1e-5
    assert torch.equal(half.sample, inputs.to(torch.float32))
