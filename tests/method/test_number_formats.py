"""A number format has the levels that are published, and everything else asks it for them."""

import pytest
import torch

from mi_experiments.errors import AuditError
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.bit_count import count_storage, find_layout
from mi_experiments.method.bit_packing import pack, unpack
from mi_experiments.method.gptq_groups import sweep_and_fit
from mi_experiments.method.grid import SHRINK_FACTORS, Grid, fit_grid, scale_groups
from mi_experiments.method.hessian import Factor
from mi_experiments.method.number_formats import (
    NUMBER_FORMATS,
    SYMMETRIC,
    UNIFORM,
    Codebook,
    NormalFloat,
    find_format,
)
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.refine import refine
from mi_experiments.method.sparsegpt import sweep

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""NF4 as in appendix E of arXiv:2305.14314, each the double of a float32."""

ROWS, COLUMNS = 6, 24
NORMAL_FLOAT = NormalFloat()


class Powers(Codebook):
    """Plus and minus powers of two, and zero: a format that the project does not have."""

    name = "powers"
    widths = (2, 3, 4)

    def levels(self, bits):
        powers = 2.0 ** -torch.arange(2 ** (bits - 1) - 1)
        return torch.cat([-powers, torch.zeros(1), powers.flip(0)])


@pytest.fixture
def powers(monkeypatch):
    """Register a format, as one more row of the table would."""
    monkeypatch.setitem(NUMBER_FORMATS, "powers", Powers())
    return find_format("powers")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(dtype=torch.float32):
    """A weight, a damped Hessian and its factor, widths in turn, and scale groups of 4."""
    tokens = normal(96, COLUMNS, seed=1, dtype=dtype)
    hessian = tokens.T @ tokens / 96 + 0.1 * torch.eye(COLUMNS, dtype=dtype)
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    group = torch.arange(COLUMNS) % 3
    bits = torch.tensor([4, 2, 16], dtype=torch.uint8)[group]
    order = torch.arange(COLUMNS)
    return normal(ROWS, COLUMNS), hessian, Factor(upper, order, 0.0, (0.0,)), bits, group


def fit(number_format, *, clip_search=True, weight=None, scale_bits=16):
    base, _, _, bits, group = problem()
    weight = base if weight is None else weight
    return fit_grid(
        weight, bits, scale_groups(group, 4),
        clip_search=clip_search, number_format=number_format, scale_bits=scale_bits,
    )  # fmt: skip


def test_four_bits_are_the_published_nf4():
    assert NORMAL_FLOAT.levels(4).tolist() == PUBLISHED


@pytest.mark.parametrize("bits", NORMAL_FLOAT.widths)
def test_normal_float_has_every_level_once_and_zero_among_them(bits):
    levels = NORMAL_FLOAT.levels(bits)
    assert len(levels) == 2**bits
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert (levels > 0).sum() == (levels < 0).sum() + 1
    zero = NORMAL_FLOAT.implied_zero(torch.tensor(bits))
    assert levels[zero] == 0


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_levels_are_equally_likely_under_a_normal_distribution(bits):
    """The chances between neighbours on one side of zero are all alike."""
    levels = NORMAL_FLOAT.levels(bits).double()
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    largest = torch.special.ndtri(torch.tensor(1 - tail, dtype=torch.float64))
    chance = torch.special.ndtr(levels * largest).diff()
    below = int((levels < 0).sum())
    for side in (chance[:below], chance[below:]):
        torch.testing.assert_close(side, side.mean().expand_as(side), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("number_format", [NORMAL_FLOAT, Powers(), UNIFORM, SYMMETRIC])
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_quantizing_takes_the_nearest_level_of_all(number_format, scale_bits):
    weight = normal(ROWS, COLUMNS, seed=3) * 2
    grid = fit(number_format, clip_search=False, scale_bits=scale_bits)
    found = grid.quantize(weight)
    for channel, bits in enumerate(grid.bits.tolist()):
        if bits == 16:
            assert torch.equal(found[:, channel], weight[:, channel])
            continue
        codes = torch.arange(2**bits).expand(ROWS, -1)
        levels = grid.decode(codes, torch.full((2**bits,), channel))
        distance = (levels - weight[:, channel, None]).abs()
        torch.testing.assert_close((found[:, channel] - weight[:, channel]).abs(), distance.amin(1))
        assert (found[:, channel, None] == levels).any(1).all()


@pytest.mark.parametrize("number_format", [NORMAL_FLOAT, Powers()])
def test_the_fit_is_the_best_of_the_shrunk_ranges(number_format):
    weight = normal(ROWS, COLUMNS)
    grid = fit(number_format, weight=weight)
    for row in range(ROWS):
        for group in grid.scale_group[grid.quantized].unique().tolist():
            inside = grid.scale_group == group
            values, bits = weight[row, inside], int(grid.bits[inside][0])
            levels = number_format.levels(bits)
            full = max(float(values.max() / levels[-1]), float(values.min() / levels[0]))
            errors = []
            for shrink in SHRINK_FACTORS:
                scale = torch.tensor(shrink * full).half().float()
                gap = (levels * scale - values[:, None]).abs().amin(1)
                errors.append((float(gap.square().sum()), float(scale)))
            assert float(grid.scale[row, group]) in [
                scale for error, scale in errors if error <= min(errors)[0] * (1 + 1e-5)
            ]


@pytest.mark.parametrize("number_format", [NORMAL_FLOAT, Powers()])
def test_zero_is_exact_and_its_zero_point_costs_nothing(number_format):
    grid = fit(number_format)
    columns = grid.quantized.nonzero()[:, 0]
    zero = grid.zero_point[:, grid.scale_group[columns]]
    assert torch.equal(grid.encode(torch.zeros(ROWS, len(columns)), columns).int(), zero)
    assert not grid.decode(zero, columns).any()
    pruned = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    group = torch.arange(COLUMNS) % 3
    assert count_storage(grid, pruned, Sparsity(0.0), group).zero_points == 0
    moved = Grid(
        grid.bits, grid.scale_group, grid.scale, grid.zero_point.clamp(max=0), 16, number_format
    )
    with pytest.raises(ValueError, match="zero point that is not stored"):
        find_layout(moved, pruned, Sparsity(0.0), group)


def check_and_store(swept, grid, sparsity, group):
    """Audit a linear, count its bits, pack it into as many, and read it back bit for bit."""
    audit_linear(
        swept, grid, sparsity, original=None, order=torch.arange(COLUMNS), mask_block=8,
        max_average_bits=None, stored=None,
    )  # fmt: skip
    assert not swept.weight[swept.pruned].any()
    half = swept.weight[:, ~grid.quantized].half().float()
    weight = swept.weight.float().index_copy(1, (~grid.quantized).nonzero()[:, 0], half)
    layout = find_layout(grid, swept.pruned, sparsity, group)
    streams = pack(weight, swept.codes, swept.pruned, grid, group, layout)
    counted = count_storage(grid, swept.pruned, sparsity, group)
    for name, stream in streams.items():
        assert len(stream) == -(-getattr(counted, name) // 8)
    read = unpack(streams, layout)
    assert torch.equal(read.weight, weight)
    assert torch.equal(read.pruned, swept.pruned)
    assert torch.equal(read.grid.scale, grid.scale)
    assert torch.equal(read.grid.zero_point, grid.zero_point)


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity.structured(2, 4), Sparsity(0.0)])
@pytest.mark.parametrize("name", ["normal_float", "powers"])
def test_a_codebook_goes_from_the_sweep_to_the_packed_bits(name, sparsity, powers):
    """`powers` is registered at run time, and nothing but its levels is written for it."""
    weight, hessian, factor, _, group = problem()
    grid = fit(find_format(name), scale_bits=32)
    swept = sweep(weight, factor, grid=grid, sparsity=sparsity, mask_block=8)
    check_and_store(swept, grid, sparsity, group)
    refined, finer = refine(swept, grid, weight, hessian)
    check_and_store(refined, finer, sparsity, group)
    before, after = swept.quadratic_error, refined.quadratic_error
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.98 * before.sum()


def test_grids_are_fitted_where_the_sweep_arrives(powers):
    weight, _, factor, bits, group = problem()
    swept, grid = sweep_and_fit(
        weight, factor, bits, scale_groups(group, 4),
        clip_search=True, number_format=powers, sparsity=Sparsity(0.5), block=8,
    )  # fmt: skip
    check_and_store(swept, grid, Sparsity(0.5), group)


def test_a_sweep_rounds_each_channel_to_the_level_nearest_to_its_target():
    """With an identity for the Hessian nothing is compensated: rounding to nearest is all."""
    weight, _, _, _, _ = problem()
    grid = fit(NORMAL_FLOAT)
    factor = Factor(torch.eye(COLUMNS), torch.arange(COLUMNS), 0.0, (0.0,))
    assert torch.equal(sweep(weight, factor, grid=grid).weight, grid.quantize(weight))


def test_a_descent_on_levels_that_are_not_equally_spaced_finds_the_best_of_each_channel():
    """Where channels do not interact, the best level of each is the nearest to its weight."""
    weight, _, _, _, _ = problem()
    grid = fit(NORMAL_FLOAT)
    factor = Factor(torch.eye(COLUMNS), torch.arange(COLUMNS), 0.0, (0.0,))
    far = sweep(-weight, factor, grid=grid)
    refined, _ = refine(far, grid, weight, torch.eye(COLUMNS), rounds=1)
    best = grid.quantize(weight)
    quantized = grid.quantized.nonzero()[:, 0]
    assert torch.equal(refined.codes[:, quantized], grid.encode(best[:, quantized], quantized))


def test_a_code_of_another_level_fails_the_audit():
    weight, _, factor, _, _ = problem()
    grid = fit(NORMAL_FLOAT)
    swept = sweep(weight, factor, grid=grid)
    swept.codes[0, 0] += 1 if swept.codes[0, 0] < 15 else -1
    with pytest.raises(AuditError, match="not on their grid"):
        check_and_store(swept, grid, Sparsity(0.0), torch.arange(COLUMNS) % 3)


def test_a_width_that_a_format_does_not_have_is_refused(powers):
    bits = torch.full((4,), 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="powers levels of 5 bits do not exist"):
        fit_grid(
            normal(2, 4), bits, torch.zeros(4, dtype=torch.int32),
            clip_search=False, number_format=powers,
        )  # fmt: skip


def test_all_zero_rows_get_a_harmless_scale():
    weight = normal(ROWS, COLUMNS)
    weight[1] = 0
    grid = fit(NORMAL_FLOAT, weight=weight)
    assert (grid.scale[1] == 1).all()
    assert not grid.quantize(weight)[1].any()
