"""The corrected target is the least-squares restoration of the dense model's result."""

import pytest
import torch

from mi_experiments.errors import NumericalError
from mi_experiments.method.hessian import HessianAccumulator, factorize
from mi_experiments.method.targets import DriftAccumulator, choose_input_correction, correct_target

TOKENS, COLUMNS, ROWS = 400, 6, 4


def measured(noise: float, damping: float = 0.0) -> tuple:
    """Draw a site that reads x in the dense and x̂ in the compressed model, and a drift r."""
    torch.manual_seed(0)
    dense = torch.randn(TOKENS, COLUMNS)
    dense[:, 1:] += 0.5 * dense[:, :-1]
    compressed = dense + noise * torch.randn(TOKENS, COLUMNS)
    drift = noise * torch.randn(TOKENS, ROWS)
    hessian = HessianAccumulator(COLUMNS)
    moments = DriftAccumulator(COLUMNS, torch.device("cpu"))
    for part in range(0, TOKENS, 100):
        rows = slice(part, part + 100)
        hessian.update(compressed[rows])
        moments.update(compressed[rows], dense[rows], drift[rows])
    factor = factorize(hessian.finish(), damping=damping)
    return dense, compressed, drift, factor, moments.finish(), torch.randn(ROWS, COLUMNS)


def test_without_damping_it_is_least_squares() -> None:
    dense, compressed, drift, factor, moments, weight = measured(0.3)
    target = correct_target(weight, factor, moments, input_correction=1.0, residual_correction=1.0)
    wanted = dense @ weight.T + drift
    oracle = torch.linalg.lstsq(compressed.double(), wanted.double()).solution.T
    assert torch.allclose(target.double(), oracle, atol=1e-5)


def test_with_damping_it_is_ridge_regression_towards_the_weight() -> None:
    dense, compressed, drift, factor, moments, weight = measured(0.3, damping=0.1)
    target = correct_target(
        weight, factor, moments, input_correction=1.0, residual_correction=1.0
    ).double()
    x, w = compressed.double(), weight.double()
    hessian = 2 / TOKENS * x.T @ x
    ridge = 0.1 * hessian.diagonal().mean()
    wanted = dense.double() @ w.T + drift.double() - x @ w.T
    change = torch.linalg.solve(
        hessian + ridge * torch.eye(COLUMNS, dtype=torch.float64), 2 / TOKENS * x.T @ wanted
    ).T
    assert torch.allclose(target, w + change, atol=1e-5)


def test_nothing_changed_means_nothing_corrected() -> None:
    *_, factor, moments, weight = measured(0.0)
    target = correct_target(weight, factor, moments, input_correction=1.0, residual_correction=1.0)
    assert torch.equal(target, weight)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shares_scale_each_correction_alone(share: float) -> None:
    *_, factor, moments, weight = measured(0.3)

    def change(inputs: float, residual: float) -> torch.Tensor:
        target = correct_target(
            weight, factor, moments, input_correction=inputs, residual_correction=residual
        )
        return target - weight

    both = change(share, 1.0)
    assert torch.allclose(both, share * change(1.0, 0.0) + change(0.0, 1.0), atol=1e-5)


def test_moments_do_not_depend_on_the_batches() -> None:
    dense, compressed, drift, _, moments, _ = measured(0.3)
    whole = DriftAccumulator(COLUMNS, torch.device("cpu"))
    whole.update(compressed, dense, drift)
    again = whole.finish()
    assert torch.allclose(moments.inputs, again.inputs, atol=1e-5)
    assert moments.residual is not None
    assert again.residual is not None
    assert torch.allclose(moments.residual, again.residual, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("where", ["input", "residual stream"])
def test_a_dense_model_that_is_not_finite_is_refused(value: float, where: str) -> None:
    moments = DriftAccumulator(COLUMNS, torch.device("cpu"))
    dense, drift = torch.ones(5, COLUMNS), torch.ones(5, ROWS)
    (dense if where == "input" else drift)[3, 1] = value
    moments.update(torch.full((5, COLUMNS), 10.0), dense, drift)
    with pytest.raises(NumericalError, match=f"the change of the {where} .* is not finite"):
        moments.finish()


def test_sums_in_float64_do_not_overflow_where_float32_would() -> None:
    moments = DriftAccumulator(COLUMNS, torch.device("cpu"), torch.float64)
    moments.update(torch.full((5, COLUMNS), 1e30), torch.full((5, COLUMNS), 2e30))
    assert torch.allclose(moments.finish().inputs, torch.full((1,), 2e60, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tokens", "share"), [(1, 0.5), (16 * 64, 0.5), (16 * 64 + 1, 1.0), (10**6, 1.0)]
)
def test_few_tokens_a_channel_correct_by_half(tokens: int, share: float) -> None:
    assert choose_input_correction(tokens, 64) == share
