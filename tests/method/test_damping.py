import pytest
import torch

from mi_experiments.method.damping import LEAST_SHARE, damp, ladder
from mi_experiments.method.hessian import factorize

DOUBLE = torch.float64


def energies() -> torch.Tensor:
    return torch.tensor([4.0, 1.0, 0.25, 6.75], dtype=DOUBLE)


def test_power_zero_adds_the_same_to_every_channel_as_published() -> None:
    diagonal = energies()
    assert torch.equal(damp(diagonal, 0.1, 0.0), diagonal + 0.1 * diagonal.mean())


def test_power_one_adds_a_share_of_each_channels_own_energy() -> None:
    diagonal = energies()
    torch.testing.assert_close(damp(diagonal, 0.1, 1.0), 1.1 * diagonal)


def test_power_one_half_is_the_geometric_mean_of_both() -> None:
    diagonal = energies()
    same, own = (damp(diagonal, 0.1, power) - diagonal for power in (0.0, 1.0))
    torch.testing.assert_close(damp(diagonal, 0.1, 0.5) - diagonal, (same * own).sqrt())


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_dead_channel_gets_the_least_share(power: float) -> None:
    diagonal = torch.tensor([0.0, 2.0, 4.0], dtype=DOUBLE)
    assert damp(diagonal, 0.3, power)[0] == pytest.approx(LEAST_SHARE * 0.3 * 2)
    assert len(factorize(torch.diag(diagonal), damping=0.3, power=power).attempts) == 1


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_factor_is_that_of_the_damped_matrix(power: float) -> None:
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    matrix = 2 / 50 * inputs.T @ inputs
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    factor = factorize(matrix, damping=0.2, power=power, order=order)
    damped = matrix.clone()
    damped.diagonal().copy_(damp(matrix.diagonal(), 0.2, power))
    torch.testing.assert_close(factor.upper @ factor.upper.T, damped[order][:, order])


def test_only_power_one_does_not_depend_on_the_scale_of_a_channel() -> None:
    """x_j · s and W_ij / s are the same layer: W_ij² / [H′⁻¹]_jj ought to be the same."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(80, 8, generator=generator, dtype=DOUBLE)
    inputs @= torch.randn(8, 8, generator=generator, dtype=DOUBLE)
    scale = torch.tensor([0.5, 4.0, 1.0, 0.25, 2.0, 1.0, 8.0, 0.25], dtype=DOUBLE)

    def inverse_diagonal(inputs: torch.Tensor, power: float) -> torch.Tensor:
        return factorize(inputs.T @ inputs, damping=0.3, power=power).inverse_diagonal()

    for power in (0.0, 0.5, 1.0):
        plain = inverse_diagonal(inputs, power)
        scaled = inverse_diagonal(inputs * scale, power) * scale.square()
        assert torch.allclose(plain, scaled, rtol=1e-9) == (power == 1.0)


def test_the_ladder_climbs_by_ten_up_to_one() -> None:
    assert ladder(0.03) == [0.03, 0.3, 1.0]
    assert ladder(0.0) == [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    with pytest.raises(ValueError, match="must be finite and not negative"):
        ladder(-0.1)
