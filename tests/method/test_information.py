"""Information equals its closed forms in nats, and its floor is what independence looks like."""

import itertools
import math
from dataclasses import asdict

import pytest
import torch

from mi_experiments.method.hessian import HessianAccumulator, factorize
from mi_experiments.method.information import (
    INFORMATION_CAP,
    Estimator,
    binned_information,
    copula_information,
    gaussian_information,
    measure_information,
    redundancy,
    some_channels,
    total_correlation,
)
from mi_experiments.method.information_summary import summarize
from mi_experiments.method.noise_floor import noise_floor, shuffled_floor

DOUBLE = torch.float64
TOKENS = 20000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(rho, tokens=TOKENS, seed=0):
    pair = torch.randn(tokens, 2, generator=generator(seed), dtype=DOUBLE)
    pair[:, 1] = rho * pair[:, 0] + math.sqrt(1 - rho**2) * pair[:, 1]
    return pair


def closed_form(rho):
    return -0.5 * math.log(1 - rho**2)


def sampling_error(rho, tokens=TOKENS):
    """Five standard errors of −½ ln(1 − ρ̂²): |ρ|/√n to first order, and 1/n for what follows."""
    return 5 * abs(rho) / math.sqrt(tokens) + 5 / tokens


def hessian_of(inputs):
    accumulator = HessianAccumulator(inputs.shape[1], sample_tokens=len(inputs), dtype=inputs.dtype)
    accumulator.update(inputs)
    return accumulator.finish()


def random_covariance(columns, seed=0):
    root = torch.randn(columns, columns, generator=generator(seed), dtype=DOUBLE)
    return root @ root.T / columns + 0.1 * torch.eye(columns, dtype=DOUBLE)


def test_gaussian_information_of_a_known_covariance():
    covariance = torch.tensor([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    information = gaussian_information(covariance)
    expected = torch.zeros(3, 3, dtype=DOUBLE)
    expected[0, 1] = expected[1, 0] = closed_form(0.5)
    torch.testing.assert_close(information, expected)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.6, 0.95])
@pytest.mark.parametrize("estimator", [Estimator.gaussian, Estimator.copula])
def test_estimates_meet_the_closed_form_on_gaussian_tokens(rho, estimator):
    information = measure_information(hessian_of(correlated(rho)), estimator)
    assert abs(information[0, 1].item() - closed_form(rho)) < sampling_error(rho)
    assert information[0, 0] == 0
    assert torch.equal(information, information.T)


def test_bias_correction_is_the_difference_of_digammas():
    covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)
    corrected = gaussian_information(covariance, tokens=12)[0, 1].item()
    # ψ(5.5) and ψ(5) by the recurrence ψ(x + 1) = ψ(x) + 1/x.
    euler = 0.5772156649015329
    five = -euler + 1 + 1 / 2 + 1 / 3 + 1 / 4
    five_and_half = -euler - 2 * math.log(2) + 2 * (1 + 1 / 3 + 1 / 5 + 1 / 7 + 1 / 9)
    assert corrected == pytest.approx(closed_form(0.5) - (five_and_half - five) / 2)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        gaussian_information(covariance, tokens=3)


@pytest.mark.parametrize("estimator", [Estimator.gaussian, Estimator.copula])
def test_correction_makes_small_samples_unbiased(estimator):
    """400 independent pairs of 20 tokens: 1/(2n) = 0.025 would stand out of the standard error."""
    inputs = torch.randn(20, 400, generator=generator(), dtype=DOUBLE)
    information = measure_information(hessian_of(inputs), estimator)
    mean = information.sum().item() / (400 * 399)
    assert abs(mean) < 0.003


def test_copula_is_bit_equal_under_strictly_monotone_maps():
    inputs = correlated(0.6, tokens=501)
    inputs = torch.cat((inputs, inputs[:, :1].abs().floor(), torch.ones_like(inputs[:, :1])), 1)
    mapped = inputs.clone()
    mapped[:, 0] = inputs[:, 0].exp()
    mapped[:, 1] = -(inputs[:, 1] ** 3)
    mapped[:, 2] = 5 - 2 * inputs[:, 2]
    information = copula_information(inputs)
    assert torch.equal(copula_information(mapped), information)
    assert information[0, 1] > 0.1


def test_copula_is_right_on_heavy_tails_where_gaussian_is_wrong():
    heavy = correlated(0.6) ** 7
    truth = closed_form(0.6)
    hessian = hessian_of(heavy)
    copula = measure_information(hessian, Estimator.copula)[0, 1].item()
    gaussian = measure_information(hessian, Estimator.gaussian)[0, 1].item()
    assert abs(copula - truth) < sampling_error(0.6)
    assert abs(gaussian - truth) > 5 * sampling_error(0.6)


def test_copula_is_the_correlation_of_normal_scores_of_average_ranks():
    inputs = torch.tensor([[0, 0, 0, 0, 3, 5, 4, 4], [1, 7, 0, 3, 4, 9, 8, 5]], dtype=DOUBLE).T
    ranks = torch.tensor([[2.5] * 4 + [5, 8, 6.5, 6.5], [2, 6, 1, 3, 4, 8, 7, 5]], dtype=DOUBLE)
    correlation = torch.corrcoef(torch.special.ndtri(ranks / 9))
    expected = gaussian_information(correlation, tokens=8)
    torch.testing.assert_close(copula_information(inputs), expected)


def test_channels_that_are_mostly_tied_at_zero_do_not_look_dependent():
    inputs = (torch.randn(4000, 30, generator=generator(), dtype=DOUBLE) - 1.5).clamp(min=0)
    information = copula_information(inputs)
    assert information.max() < 0.01
    assert binned_information(inputs).max() < 0.01


def test_binned_sees_a_parabola_where_gaussian_does_not():
    x = torch.randn(TOKENS, 1, generator=generator(), dtype=DOUBLE)
    x = torch.cat((x, -x))
    hessian = hessian_of(torch.cat((x, x.square()), 1))
    binned = measure_information(hessian, Estimator.binned, bins=8)[0, 1].item()
    # Each of the 8 bins of x leaves two of the 8 bins of its square.
    assert binned == pytest.approx(math.log(4), abs=1e-3)
    assert measure_information(hessian, Estimator.gaussian)[0, 1].item() < 0.01


def test_only_bins_see_a_noisy_parabola_above_the_floor():
    """y = x² + noise is uncorrelated with x, in values and in ranks."""
    noise = torch.randn(TOKENS, 2, generator=generator(), dtype=DOUBLE)
    x, y = noise[:, 0], noise[:, 0].square() + noise[:, 1]
    hessian = hessian_of(torch.stack((torch.cat((x, -x)), torch.cat((y, y))), 1))
    for estimator in Estimator:
        found = measure_information(hessian, estimator)[0, 1].item()
        floor = max(
            shuffled_floor(hessian.sample, estimator, generator(seed)).p95 for seed in range(20)
        )
        assert (found > 10 * floor) == (estimator is Estimator.binned), estimator


def test_binned_equals_a_histogram_counted_by_hand():
    inputs = torch.tensor([[0, 0], [1, 1], [2, 3], [3, 2], [4, 4], [5, 5.0]], dtype=DOUBLE)
    # Halves {0, 1, 2} and {3, 4, 5}: two marginal entropies of ln 2, joint counts 2, 1, 1, 2 of 6.
    plug_in = 2 * math.log(2) - (math.log(6) - 4 * math.log(2) / 6)
    correction = (1 + 1 - 3) / 12
    assert binned_information(inputs, bins=2)[0, 1].item() == pytest.approx(plug_in + correction)


def test_binned_tiles_do_not_show(monkeypatch):
    inputs = torch.randn(300, 11, generator=generator(), dtype=DOUBLE)
    whole = binned_information(inputs, bins=4)
    monkeypatch.setattr("mi_experiments.method.information._CELLS_TOGETHER", 12)
    torch.testing.assert_close(binned_information(inputs, bins=4), whole)
    assert torch.equal(whole, whole.T)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("estimator", [Estimator.gaussian, Estimator.copula])
def test_duplicates_saturate_at_the_cap_and_constants_at_zero(dtype, estimator):
    x = torch.randn(4000, 2, generator=generator()).to(dtype)
    inputs = torch.stack((x[:, 0], 3 - 2 * x[:, 0], x[:, 1], torch.full_like(x[:, 0], 5)), 1)
    information = measure_information(hessian_of(inputs), estimator)
    assert information[0, 1] == INFORMATION_CAP
    assert information.max() == INFORMATION_CAP
    assert not information[3].any()
    assert not information[:, 3].any()


@pytest.mark.parametrize("estimator", list(Estimator))
def test_independence_is_at_the_noise_floor(estimator):
    inputs = torch.randn(1000, 64, generator=generator(3), dtype=DOUBLE)
    information = measure_information(hessian_of(inputs), estimator)
    pairs = information[torch.ones(64, 64).triu(1) > 0]
    floor = noise_floor(hessian_of(inputs), estimator, generator(4))
    # Before correction: 1/(2n) = 0.0005, or 49/(2n) = 0.0245 for the 8 × 8 bins.
    assert abs(floor.mean) < (7e-4 if estimator is Estimator.binned else 1e-4)
    assert pairs.mean().item() == pytest.approx(floor.mean, abs=4e-4)
    assert pairs.quantile(0.95).item() == pytest.approx(floor.p95, rel=0.15)


@pytest.mark.parametrize("estimator", [Estimator.gaussian, Estimator.copula])
@pytest.mark.parametrize("tokens", [64, 2000])
def test_noise_floor_is_what_shuffled_tokens_give(tokens, estimator):
    """Of channels that depend on each other, are skewed, and are half zeros."""
    shared = torch.randn(tokens, 1, generator=generator(), dtype=DOUBLE)
    inputs = shared + 0.1 * torch.randn(tokens, 200, generator=generator(1), dtype=DOUBLE)
    inputs[:, 60:120] = inputs[:, 60:120].exp()
    inputs[:, 120:].clamp_(min=0)
    floor = noise_floor(hessian_of(inputs), estimator, generator())
    shuffled = shuffled_floor(inputs, estimator, generator(2))
    assert floor.mean == 0
    assert shuffled.mean == pytest.approx(0, abs=0.1 / tokens)
    assert shuffled.p95 == pytest.approx(floor.p95, rel=0.06)


def test_noise_floor_follows_the_null_distribution_and_ignores_constant_channels():
    """2n·I is chi-squared with one degree of freedom, whose 95 % point is 3.841."""
    inputs = torch.randn(2000, 60, generator=generator(1), dtype=DOUBLE)
    for floor in (
        noise_floor(hessian_of(inputs), Estimator.copula, generator(2)),
        shuffled_floor(inputs, Estimator.copula, generator(2)),
    ):
        assert floor.p95 == pytest.approx((3.841 - 1) / (2 * 2000), rel=0.05)
    padded = torch.cat((torch.ones_like(inputs), inputs), 1)
    shuffled = shuffled_floor(inputs, Estimator.copula, generator(2))
    assert shuffled_floor(padded, Estimator.copula, generator(2)) == shuffled
    for estimator in Estimator:
        assert noise_floor(hessian_of(torch.ones(10, 3)), estimator, generator()).p95 == 0


def test_a_summary_is_of_evenly_spaced_channels():
    hessian = hessian_of(torch.randn(300, 7, generator=generator(), dtype=DOUBLE))
    chosen = some_channels(hessian, 3)
    information = measure_information(hessian, Estimator.copula)
    expected = information[[0, 2, 4]][:, [0, 2, 4]]
    torch.testing.assert_close(measure_information(chosen, Estimator.copula), expected)
    assert some_channels(hessian, 7) is hessian


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_redundancy_is_the_identity_that_links_information_and_obs(damping):
    covariance = random_covariance(12)
    factor = factorize(covariance, damping=damping, order=torch.randperm(12, generator=generator()))
    damped = covariance + damping * covariance.diagonal().mean() * torch.eye(12, dtype=DOUBLE)
    inverse = torch.linalg.inv(damped).diagonal()
    information = redundancy(factor)
    torch.testing.assert_close(information, (damped.diagonal() * inverse).log() / 2)
    assert (information >= 0).all()
    weight = torch.randn(12, generator=generator(1), dtype=DOUBLE)
    energy = weight.square() * damped.diagonal() * torch.exp(-2 * information)
    torch.testing.assert_close(weight.square() / inverse, energy)


def test_redundancy_of_a_pair_is_its_pairwise_information():
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=DOUBLE)
    expected = gaussian_information(covariance)[0, 1].expand(2)
    torch.testing.assert_close(redundancy(factorize(covariance, damping=0.0)), expected)


def test_redundancy_of_independent_and_of_dead_channels_is_zero():
    information = redundancy(factorize(torch.diag(torch.tensor([4.0, 1.0, 0.0]))))
    torch.testing.assert_close(information, torch.zeros(3), rtol=0, atol=1e-6)


def test_damping_only_lowers_redundancy():
    covariance = random_covariance(20)
    steps = [redundancy(factorize(covariance, damping=d)) for d in (0.0, 0.01, 0.1, 1.0)]
    for less, more in itertools.pairwise(steps):
        assert (more < less).all()


def test_total_correlation_is_the_sum_over_any_sweep():
    covariance = random_covariance(15)
    expected = (covariance.diagonal().log().sum() - covariance.logdet()).item() / 2
    for seed in range(3):
        order = torch.randperm(15, generator=generator(seed))
        factor = factorize(covariance, damping=0.0, order=order)
        later = (factor.diagonal()[order] / factor.upper.diagonal().square()).log() / 2
        assert (later >= -1e-12).all()
        assert total_correlation(factor) == pytest.approx(expected)
        assert later.sum().item() == pytest.approx(expected)


def test_summary_gathers_plain_numbers():
    inputs = torch.randn(500, 6, generator=generator(), dtype=DOUBLE)
    inputs[:, 1] = inputs[:, 0]
    hessian = hessian_of(inputs)
    information = measure_information(hessian, Estimator.copula)
    floor = noise_floor(hessian, Estimator.copula, generator())
    factor = factorize(hessian)
    summary = asdict(summarize(information, floor, factor, Estimator.copula))
    assert summary.pop("stability") is None  # it needs two halves of the tokens
    assert {type(value) for value in summary.values()} == {float, str}
    assert summary["max_pairwise"] == INFORMATION_CAP
    without = asdict(summarize(None, None, factor, Estimator.copula))
    assert {name for name, value in without.items() if value is not None} == {
        "total_correlation",
        "mean_redundancy",
        "damping",
    }
    assert summary["mean_pairwise"] == pytest.approx(information.sum().item() / 30)
    assert summary["mean_redundancy"] == pytest.approx(redundancy(factor).mean().item())
    assert summary["total_correlation"] == total_correlation(factor)
    assert summary["noise_p95"] == floor.p95
    assert summary["estimator"] == "copula"
