"""Groups that two halves of the tokens agree on are the model's; others are the sample's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from mi_experiments.method.grouping import Grouping, adjusted_rand_index, group_channels
from mi_experiments.method.hessian import HessianAccumulator
from mi_experiments.method.information import Estimator
from mi_experiments.method.stability import split_half_stability

FROM_TOKENS = [
    Grouping.mutual_information, Grouping.redundancy, Grouping.energy, Grouping.sensitivity
]  # fmt: skip
OPTIONS = {"estimator": Estimator.copula, "damping": 0.1, "multiple": 8}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def independent(tokens, columns=64):
    return torch.randn(tokens, columns, generator=generator())


def stability(grouping, sample, **options):
    energy = torch.ones(sample.shape[1])
    return split_half_stability(grouping, 4, sample, weights_energy=energy, **(OPTIONS | options))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=60))
def test_the_index_is_that_of_scikit_learn(pairs):
    a, b = torch.tensor(pairs, dtype=torch.int32).T
    expected = adjusted_rand_score(a.numpy(), b.numpy())
    assert adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-12)
    renamed = (a + 3) % 5
    assert adjusted_rand_index(renamed, b) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand_index(renamed, a) == 1.0


@pytest.mark.parametrize("grouping", FROM_TOKENS)
def test_equal_halves_agree_wholly(grouping):
    half = independent(100)
    assert stability(grouping, torch.cat((half, half))) == 1.0


@pytest.mark.parametrize("estimator", list(Estimator))
def test_planted_groups_are_stable_and_independent_channels_are_not(estimator):
    factors = torch.randn(2000, 4, generator=generator(1))
    truth = torch.arange(64) % 4
    planted = factors[:, truth] + 0.5 * independent(2000)
    assert stability(Grouping.mutual_information, planted, estimator=estimator) == 1.0
    nothing = stability(Grouping.mutual_information, independent(2000), estimator=estimator)
    # Chance: the index of random groups of 16 has a standard deviation of about 0.015.
    assert abs(nothing) < 0.06


@pytest.mark.parametrize("grouping", [Grouping.redundancy, Grouping.energy, Grouping.sensitivity])
def test_quantiles_of_unequal_channels_are_stable(grouping):
    """Shares of a common signal order redundancy; scales order energy and sensitivity."""
    strength = torch.linspace(0, 1, 64) ** 2
    shared = torch.randn(20000, 1, generator=generator(1))
    inputs = (independent(20000) + 4 * strength * shared) * torch.linspace(1, 3, 64)
    assert stability(grouping, inputs) > 0.8


def test_it_is_the_agreement_of_the_groups_that_halves_would_be_given():
    inputs = independent(500) * torch.linspace(1, 1.5, 64)
    first, second = (
        group_channels(Grouping.energy, 4, 64, hessian=hessian_of(half), multiple=8)
        for half in (inputs[:250], inputs[250:])
    )
    expected = adjusted_rand_index(first, second)
    assert 0 < expected < 1
    assert stability(Grouping.energy, inputs) == expected


def hessian_of(inputs):
    accumulator = HessianAccumulator(inputs.shape[1])
    accumulator.update(inputs)
    return accumulator.finish()


def test_where_there_is_nothing_to_compare():
    inputs = independent(100)
    assert stability(Grouping.random, inputs) is None
    assert stability(Grouping.contiguous, inputs) is None
    assert stability(Grouping.energy, inputs[:7]) is None
    assert split_half_stability(Grouping.energy, 1, inputs, **OPTIONS) is None
    half_dead = torch.cat((inputs, torch.zeros_like(inputs)))
    assert stability(Grouping.redundancy, half_dead) is None
