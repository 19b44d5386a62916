import pytest
import torch

from mi_experiments.errors import NumericalError
from mi_experiments.method.grid import SHRINK_FACTORS, Grid, fit_grid, scale_groups
from mi_experiments.method.number_formats import Uniform


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def widths(*bits):
    return torch.tensor(bits, dtype=torch.uint8)


MIXED_GROUPS = scale_groups(torch.tensor([4, 1, 4, 9, 1, 4, 1, 4, 4, 9, 1, 4]), 3)
MIXED_BITS = widths(3, 2, 3, 16, 2, 3, 2, 3, 3, 16, 2, 3)


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (2, [2, 0, 2, 4, 0, 3, 1, 3]),
        (1, [3, 0, 4, 7, 1, 5, 2, 6]),
        (None, [1, 0, 1, 2, 0, 1, 0, 1]),
        (100, [1, 0, 1, 2, 0, 1, 0, 1]),
    ],
)
def test_scale_groups_by_hand(group_size, expected):
    channel_group = torch.tensor([4, 1, 4, 9, 1, 4, 1, 4])
    assert scale_groups(channel_group, group_size).tolist() == expected


def test_scale_groups_equal_the_plain_definition():
    channel_group = torch.randint(7, (531,), generator=torch.Generator().manual_seed(1))
    found = scale_groups(channel_group, 32).tolist()
    expected, label = [None] * 531, -1
    for group in range(7):
        for rank, channel in enumerate((channel_group == group).nonzero()[:, 0].tolist()):
            label += rank % 32 == 0
            expected[channel] = label
    assert found == expected


def test_a_group_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="group_size 0"):
        scale_groups(torch.zeros(4, dtype=torch.int64), 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tails", [False, True])
def test_a_coarse_search_is_close_to_all_of_it(bits: int, tails: bool) -> None:
    """In squared error, for weights with and without outliers; and never above the full range's."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    if tails:
        weight = weight * weight.square()
    width, group = torch.full((96,), bits, dtype=torch.uint8), torch.zeros(96, dtype=torch.int32)

    def error(**search: bool) -> torch.Tensor:
        grid = fit_grid(weight, width, group, **search)
        return (grid.quantize(weight) - weight).square().sum(1)

    every, some = error(clip_search=True), error(clip_search=True, coarse=True)
    assert every.sum() <= some.sum() <= 1.03 * every.sum()
    assert (some <= error(clip_search=False)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_equals_a_plain_search_of_every_row_and_group(symmetric, clip_search, dtype):
    weight = normal(5, 12, seed=2, dtype=dtype)
    pruned = normal(5, 12, seed=3) > 0.8
    grid = fit_grid(
        weight,
        MIXED_BITS,
        MIXED_GROUPS,
        number_format=Uniform(symmetric),
        clip_search=clip_search,
        pruned=pruned,
    )
    for row in range(5):
        for group in range(grid.scale.shape[1]):
            inside = group == MIXED_GROUPS
            bits = int(MIXED_BITS[inside][0])
            found = grid.scale[row, group].item(), grid.zero_point[row, group].item()
            if bits == 16:
                assert found == (1, 0)
                continue
            kept = weight[row, inside & ~pruned[row]]
            low, high = min(0, *kept.tolist(), 0), max(0, *kept.tolist(), 0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            best = None
            for shrink in SHRINK_FACTORS if clip_search else [1.0]:
                scale = torch.tensor(shrink * (high - low) / (2**bits - 1)).half().item() or 1.0
                zero = 2 ** (bits - 1) if symmetric else round(-low * shrink / scale)
                zero = max(0, min(2**bits - 1, zero))
                codes = ((kept / scale).round() + zero).clamp(0, 2**bits - 1)
                error = (scale * (codes - zero) - kept).square().sum().item()
                if best is None or error < best[0] * (1 - 1e-5):
                    best = error, scale, zero
            assert found[1] == best[2]
            assert found[0] == pytest.approx(best[1], rel=1e-3)  # a tie of one float16 step


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_clip_search_is_never_worse_in_any_row_and_group(symmetric, bits):
    weight = normal(40, 96) ** 3
    width, group = (
        torch.full((96,), bits, dtype=torch.uint8),
        scale_groups(torch.arange(96) % 2, 24),
    )
    error = [
        torch.zeros(40, 4).index_add_(
            1,
            group,
            (
                fit_grid(
                    weight, width, group, number_format=Uniform(symmetric), clip_search=clip
                ).quantize(weight)
                - weight
            ).square(),
        )
        for clip in (False, True)
    ]
    assert (error[1] <= error[0] * (1 + 1e-5)).all()
    if bits in {2, 3, 4}:
        assert error[1].sum() < 0.98 * error[0].sum()


def test_full_range_asymmetric_error_is_at_most_half_a_step():
    weight = normal(30, 64)
    grid = fit_grid(
        weight,
        torch.full((64,), 4, dtype=torch.uint8),
        scale_groups(torch.zeros(64, dtype=torch.int64), 32),
        clip_search=False,
    )
    step = grid.scale[:, grid.scale_group]
    # Rounding the zero point moves the range by half a step, rounding the scale by 15 · 2⁻¹¹ steps.
    assert ((grid.quantize(weight) - weight).abs() <= (1 + 15 * 2**-11) * step).all()
    assert ((grid.quantize(weight) - weight).abs() <= 0.5001 * step).float().mean() > 0.95


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_picks_the_nearest_of_at_most_two_to_the_bits_levels(symmetric):
    weight = normal(6, 12)
    grid = fit_grid(
        weight, MIXED_BITS, MIXED_GROUPS, number_format=Uniform(symmetric), clip_search=True
    )
    level = grid.quantize(weight)
    for channel, bits in enumerate(MIXED_BITS.tolist()):
        if bits == 16:
            assert torch.equal(level[:, channel], weight[:, channel])
            continue
        codes = torch.arange(2**bits).expand(6, -1)
        levels = grid.decode(codes, torch.full((2**bits,), channel))
        nearest = (levels - weight[:, channel, None]).abs().amin(1)
        torch.testing.assert_close((level[:, channel] - weight[:, channel]).abs(), nearest)
        assert (level[:, channel, None] == levels).any(1).all()


def test_codes_survive_a_round_trip_and_zero_is_the_zero_point():
    weight = normal(6, 12)
    grid = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, clip_search=True)
    columns = grid.quantized.nonzero()[:, 0]
    codes = grid.encode(weight[:, columns], columns)
    assert torch.equal(grid.encode(grid.decode(codes, columns), columns), codes)
    zero = grid.zero_point[:, grid.scale_group[columns]]
    assert torch.equal(grid.encode(torch.zeros(6, 10), columns).int(), zero)
    assert not grid.decode(zero, columns).any()


def test_every_scale_is_a_float16_whatever_the_magnitude():
    weight = normal(8, 12) * 10.0 ** torch.arange(-9, 7, 2)[:, None]
    weight = weight.clamp(-60000, 60000)
    grid = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, clip_search=True)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert (grid.scale > 0).all()


def test_a_float32_scale_is_that_of_the_range_rounded_once():
    weight = normal(8, 12, dtype=torch.float64)
    bits, one = widths(*[3] * 12), torch.zeros(12, dtype=torch.int32)
    grid = fit_grid(weight, bits, one, clip_search=False, scale_bits=32)
    span = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    assert torch.equal(grid.scale[:, 0], (span / 7).float().double())
    assert (grid.scale != grid.scale.half()).any()


def test_all_zero_rows_get_a_harmless_scale():
    weight = normal(3, 12)
    weight[1] = 0
    for symmetric in (False, True):
        grid = fit_grid(
            weight, MIXED_BITS, MIXED_GROUPS, number_format=Uniform(symmetric), clip_search=True
        )
        assert (grid.scale[1] == 1).all()
        assert not grid.quantize(weight)[1].any()


def test_pruned_weights_do_not_widen_the_grid():
    weight = normal(3, 12)
    weight[:, 0] = 1000
    pruned = torch.zeros(3, 12, dtype=torch.bool)
    pruned[:, 0] = True
    arguments = {"clip_search": True}
    grid = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, pruned=pruned, **arguments)
    without = fit_grid(weight.masked_fill(pruned, 0), MIXED_BITS, MIXED_GROUPS, **arguments)
    assert torch.equal(grid.scale, without.scale)
    assert grid.scale[:, MIXED_GROUPS[0]].max() < 5


def test_the_result_does_not_depend_on_the_chunks(monkeypatch):
    weight = normal(50, 12)
    arguments = {"clip_search": True}
    whole = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, **arguments)
    monkeypatch.setattr("mi_experiments.method.grid.CHUNK_ELEMENTS", 700)
    parts = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, **arguments)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


def test_memory_of_the_search_is_bounded():
    """The largest tensor of the search does not grow with rows · factors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    weight, width = normal(4096, 64), torch.full((64,), 4, dtype=torch.uint8)
    group = scale_groups(torch.zeros(64, dtype=torch.int64), 32)
    with Largest() as largest:
        fit_grid(weight, width, group, clip_search=True)
    assert largest.elements <= 2**20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_counted(value):
    weight = normal(3, 12)
    weight[1, 2] = weight[2, 2] = value
    with pytest.raises(NumericalError, match="2 of 36 weights are not finite"):
        fit_grid(weight, MIXED_BITS, MIXED_GROUPS, clip_search=False)


def test_scales_beyond_float16_are_refused():
    with pytest.raises(NumericalError, match="beyond float16"):
        fit_grid(normal(3, 12) * 1e7, MIXED_BITS, MIXED_GROUPS, clip_search=True)


def test_bfloat16_weights_are_fitted_in_float32():
    weight = normal(4, 12).bfloat16()
    half = fit_grid(weight, MIXED_BITS, MIXED_GROUPS, clip_search=True)
    full = fit_grid(weight.float(), MIXED_BITS, MIXED_GROUPS, clip_search=True)
    assert torch.equal(half.scale, full.scale)


def test_mixed_widths_in_a_scale_group_are_refused():
    group = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="different bits"):
        fit_grid(normal(2, 4), widths(2, 2, 3, 2), group, clip_search=False)
    with pytest.raises(ValueError, match="different bits"):
        Grid(widths(2, 3, 2, 2), group, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.parametrize("bits", [0, 9, 15, 32])
def test_impossible_widths_are_refused(bits):
    group = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"not \\[{bits}\\]"):
        fit_grid(normal(2, 2), widths(bits, bits), group, clip_search=False)


def test_a_label_without_channels_is_refused():
    group = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="1 of 3 scale groups have no channel"):
        fit_grid(normal(2, 4), widths(2, 2, 2, 2), group, clip_search=False)


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [(0.0, 0, "positive"), (-1.0, 0, "positive"), (0.1, 0, "float16"), (1.0, 4, "code"),
     (1.0, -1, "code"), (float("nan"), 0, "positive")],
)  # fmt: skip
def test_a_grid_that_breaks_its_promises_cannot_be_made(scale, zero, message):
    with pytest.raises(ValueError, match=message):
        Grid(
            widths(2, 2),
            torch.zeros(2, dtype=torch.int32),
            torch.full((1, 1), scale),
            torch.full((1, 1), zero, dtype=torch.int32),
        )


@pytest.mark.parametrize(("scale", "zero"), [(0.5, 0), (1.0, 3)])
def test_an_unquantized_channel_has_no_grid(scale, zero):
    with pytest.raises(ValueError, match="scale 1 and zero point 0"):
        Grid(
            widths(16),
            torch.zeros(1, dtype=torch.int32),
            torch.full((1, 1), scale),
            torch.full((1, 1), zero, dtype=torch.int32),
        )
