"""Errors relative to the output have no smallest and no largest weight."""

import math

import pytest
import torch

from mi_experiments.method.relative_error import relative_error

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 8, generator=GENERATOR)
CHANGE = 0.1 * torch.randn(6, 8, generator=GENERATOR)
INPUTS = torch.randn(40, 8, generator=GENERATOR)
HESSIAN = INPUTS.T @ INPUTS / 20

SCALES = [1.0, 1e-12, 1e-19, 1e-30, 1e-38, 1e12, 1e19, 1e30]


@pytest.mark.parametrize("scale", SCALES)
def test_a_weight_that_became_zero_has_lost_all(scale: float) -> None:
    weight = WEIGHT * scale
    assert relative_error(-weight, weight, HESSIAN) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_the_error_does_not_depend_on_the_unit_of_the_weights(scale: float) -> None:
    expected = ((CHANGE @ INPUTS.T).norm() / (WEIGHT @ INPUTS.T).norm()) ** 2
    assert relative_error(CHANGE * scale, WEIGHT * scale, HESSIAN) == pytest.approx(
        float(expected), rel=1e-4
    )


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e35])
def test_nor_on_that_of_the_activations(scale: float) -> None:
    expected = relative_error(CHANGE, WEIGHT, HESSIAN)
    assert relative_error(CHANGE, WEIGHT, HESSIAN * scale) == pytest.approx(expected, rel=1e-3)


def test_a_loss_beside_large_weights_on_dead_channels_is_seen() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1e-25]])
    change = torch.tensor([[0.0, 0.0], [0.0, -1e-25]])
    hessian = torch.diag(torch.tensor([0.0, 1.0]))
    assert relative_error(change, weight, hessian) == pytest.approx(1.0)


def test_a_small_error_is_not_none() -> None:
    assert 0 < relative_error(CHANGE * 1e-25, WEIGHT, HESSIAN) < 1e-45
    assert relative_error(CHANGE * 0, WEIGHT, HESSIAN) == 0.0


def test_what_gives_nothing_loses_nothing_or_more_than_all() -> None:
    zero, dead = torch.zeros_like(WEIGHT), torch.zeros_like(HESSIAN)
    assert relative_error(zero, zero, HESSIAN) == 0.0
    assert relative_error(CHANGE, WEIGHT, dead) == 0.0
    assert math.isinf(relative_error(CHANGE, zero, HESSIAN))
