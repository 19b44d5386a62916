"""A correct linear passes; the smallest violation of each promise does not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.errors import AuditError
from mi_experiments.method import audit
from mi_experiments.method.audit import AuditReport, audit_linear
from mi_experiments.method.grid import Grid, fit_grid, scale_groups
from mi_experiments.method.hessian import Factor
from mi_experiments.method.pruning import Selection, Sparsity
from mi_experiments.method.sparsegpt import Swept, sweep

ROWS, COLUMNS, MASK_BLOCK = 6, 32, 12
HALF, TWO_OF_FOUR, DENSE = Sparsity(0.5), Sparsity.structured(2, 4), Sparsity(0.0)
ORDER = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(7))


def mixed_bits():
    """Four channel groups of 2, 3, 16 and 4 bits, interleaved."""
    group = torch.arange(COLUMNS) % 4
    return torch.tensor([2, 3, 16, 4], dtype=torch.uint8)[group], group


def swept_linear(sparsity=HALF, seed=0, dtype=torch.float32, group_size=4):
    """Sweep a random weight with a random factor."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    bits, group = mixed_bits()
    grid = fit_grid(weight, bits, scale_groups(group, group_size), clip_search=False)
    upper = (torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.1).triu(1) + torch.eye(COLUMNS)
    order = torch.arange(COLUMNS) if sparsity.m else ORDER
    factor = Factor(upper.to(dtype), order, 0.01, (0.01,))
    return sweep(weight, factor, grid=grid, sparsity=sparsity, mask_block=MASK_BLOCK), grid


def check(swept, grid, sparsity=HALF, **changes):
    promises = {
        "original": None,
        "order": torch.arange(COLUMNS) if sparsity.m else ORDER,
        "mask_block": MASK_BLOCK,
        "max_average_bits": None,
        "stored": None,
    }
    return audit_linear(swept, grid, sparsity, **(promises | changes))


def edited(swept, name, at, value):
    tensor = getattr(swept, name).clone()
    tensor[at] = value
    return replace(swept, **{name: tensor})


def first(condition):
    return tuple(condition.nonzero()[0].tolist())


def kept_of(swept, grid, width):
    return ~swept.pruned & (grid.bits == width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, DENSE, Sparsity(0.3)])
def test_what_the_sweep_returns_passes(sparsity, dtype):
    swept, grid = swept_linear(sparsity, dtype=dtype)
    stored = swept.weight.to(torch.bfloat16)
    report = check(swept, grid, sparsity, max_average_bits=6.25, stored=stored)
    assert report.average_bits == 6.25
    assert report.sparsity == float(swept.pruned.double().mean())
    assert 1 < report.levels_max <= 16


def test_nothing_to_do_passes_untouched_and_fails_touched():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    pruned = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    swept = Swept(weight, None, pruned, torch.zeros(ROWS))
    report = check(swept, None, DENSE, original=weight.clone(), max_average_bits=16.0)
    assert report == AuditReport(levels_max=0, average_bits=16.0, sparsity=0.0)
    touched = edited(swept, "weight", (0, 0), weight[0, 0].nextafter(torch.tensor(9.0)))
    with pytest.raises(AuditError, match="1 weights changed"):
        check(touched, None, DENSE, original=weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_fails(value):
    swept, grid = swept_linear()
    with pytest.raises(AuditError, match="1 of 192 weights are not finite"):
        check(edited(swept, "weight", (3, 2), value), grid)


def test_a_pruned_weight_that_is_not_zero_fails():
    swept, grid = swept_linear()
    with pytest.raises(AuditError, match="1 of 96 pruned weights are not zero"):
        check(edited(swept, "weight", first(swept.pruned), 1e-30), grid)


def test_one_weight_pruned_too_many_fails():
    swept, grid = swept_linear()
    at = first(~swept.pruned)
    more = edited(edited(swept, "pruned", at, True), "weight", at, 0.0)
    with pytest.raises(AuditError, match=r"weights are pruned at sweep positions \d+ to \d+ where"):
        check(more, grid)


def test_a_threshold_may_prune_more_than_asked_and_not_as_few():
    swept, grid = swept_linear()
    with pytest.raises(AuditError, match=r"36 weights are pruned at sweep positions 0 to 11"):
        check(swept, grid, selection=Selection.threshold)
    for block in ORDER.split(MASK_BLOCK):
        row, at = first(~swept.pruned[:, block])
        swept = edited(swept, "pruned", (row, block[at]), True)
        swept = edited(swept, "weight", (row, block[at]), 0.0)
    assert check(swept, grid, selection=Selection.threshold).sparsity > 0.5
    with pytest.raises(AuditError, match="37 weights are pruned at sweep positions 0 to 11"):
        check(swept, grid)


def test_a_scale_with_more_digits_than_are_counted_fails():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    bits, group = mixed_bits()
    fine = fit_grid(weight, bits, scale_groups(group, 4), clip_search=False, scale_bits=32)
    factor = Factor(torch.eye(COLUMNS), ORDER, 0.01, (0.01,))
    swept = sweep(weight, factor, grid=fine)
    assert check(swept, fine, DENSE).levels_max == 4
    with pytest.raises(ValueError, match="exactly a float16"):
        replace(fine, scale_bits=16)
    object.__setattr__(fine, "scale_bits", 16)
    with pytest.raises(AuditError, match="scales are not positive float16 numbers"):
        check(swept, fine, DENSE)


def test_one_pruned_weight_moved_to_another_mask_block_fails():
    swept, grid = swept_linear()
    here, there = ORDER[:MASK_BLOCK], ORDER[-1]
    row = int(first(swept.pruned[:, here])[0])
    kept_row = int(first(~swept.pruned[:, there, None])[0])
    moved = edited(swept, "pruned", (row, here[swept.pruned[row, here]][0]), False)
    moved = edited(moved, "pruned", (kept_row, there), True)
    moved = edited(moved, "weight", (kept_row, there), 0.0)
    assert moved.pruned.sum() == swept.pruned.sum()
    with pytest.raises(AuditError, match=r"35 weights are pruned at sweep positions 0 to 11 .* 36"):
        check(moved, grid)


def test_one_window_that_keeps_another_number_fails():
    swept, grid = swept_linear(TWO_OF_FOUR)
    at = first(~swept.pruned)
    more = edited(edited(swept, "pruned", at, True), "weight", at, 0.0)
    with pytest.raises(AuditError, match=r"1 of 48 windows do not keep 2 of 4 .* keeps 1"):
        check(more, grid, TWO_OF_FOUR)


def test_an_order_that_repeats_a_channel_fails():
    swept, grid = swept_linear()
    order = ORDER.clone()
    order[0] = order[1]
    with pytest.raises(AuditError, match="no permutation of 32"):
        check(swept, grid, order=order)


def test_one_weight_a_thousandth_off_its_level_fails():
    swept, grid = swept_linear()
    row, column = first(kept_of(swept, grid, 4))
    off = edited(swept, "weight", (row, column), swept.weight[row, column] + 1e-3)
    with pytest.raises(AuditError, match=f"1 quantized .* row {row}, channel {column} is"):
        check(off, grid)


def test_one_weight_a_rounding_off_its_level_fails():
    swept, grid = swept_linear()
    at = first(kept_of(swept, grid, 4) & (swept.weight > 0))
    off = edited(swept, "weight", at, swept.weight[at].nextafter(torch.tensor(9.0)))
    with pytest.raises(AuditError, match="not on their grid"):
        check(off, grid)


def test_a_code_that_does_not_mean_its_weight_fails():
    swept, grid = swept_linear()
    at = first(kept_of(swept, grid, 4))
    with pytest.raises(AuditError, match="not on their grid"):
        check(edited(swept, "codes", at, (swept.codes[at] + 1) % 16), grid)


@pytest.mark.parametrize("code", [16, -1])
def test_a_code_out_of_range_fails_although_its_weight_is_a_multiple_of_the_scale(code):
    swept, grid = swept_linear()
    row, column = at = first(kept_of(swept, grid, 4))
    group = int(grid.scale_group[column])
    weight = grid.scale[row, group] * (code - grid.zero_point[row, group])
    swept = edited(edited(swept, "codes", at, code), "weight", at, weight)
    with pytest.raises(AuditError, match="codes of 1 quantized weights do not fit"):
        check(swept, grid)


def test_a_zero_point_out_of_range_fails():
    swept, grid = swept_linear()
    group = int(grid.scale_group[grid.bits == 4][0])
    members = int((grid.scale_group == group).sum())
    grid.zero_point[2, group] = 16
    with pytest.raises(AuditError, match=f"zero points of {members} quantized"):
        check(swept, grid)


@pytest.mark.parametrize("scale", [1 / 3, 0.0, -0.5, float("inf")])
def test_a_scale_that_is_no_positive_float16_fails(scale):
    swept, grid = swept_linear()
    grid.scale[0, 0] = scale
    with pytest.raises(AuditError, match=r"1 of \d+ scales are not positive float16"):
        check(swept, grid)


def test_quantized_channels_without_codes_fail():
    swept, grid = swept_linear()
    with pytest.raises(AuditError, match="24 channels are quantized but have no codes"):
        check(replace(swept, codes=None), grid)


def test_a_scale_for_every_column_has_too_many_levels():
    # The public ancestor refitted the quantizer to every column: codes of 2 bits, but each
    # column has its own two levels, so that the weights of a row are as good as unquantized.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    bits = torch.full((COLUMNS,), 2, dtype=torch.uint8)
    shared = torch.zeros(COLUMNS, dtype=torch.int32)
    declared = fit_grid(weight, bits, shared, clip_search=False)
    each = torch.arange(COLUMNS, dtype=torch.int32)
    refitted = fit_grid(weight, bits, each, clip_search=False)
    codes = refitted.encode(weight, torch.arange(COLUMNS))
    dense = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    swept = Swept(refitted.quantize(weight), codes, dense, torch.zeros(ROWS))
    with pytest.raises(AuditError, match=r"6 of 6 rows of scale groups of 2 bits take more than 4"):
        check(swept, declared, DENSE)
    assert check(swept, refitted, DENSE).levels_max == 1


def test_one_level_too_many_fails():
    one = torch.zeros(COLUMNS, dtype=torch.int32)
    weight = (torch.arange(COLUMNS) % 4 - 1.0).expand(ROWS, COLUMNS).clone()
    grid = fit_grid(weight, one.byte() + 2, one, clip_search=False)
    codes = grid.encode(weight, torch.arange(COLUMNS))
    swept = Swept(weight, codes, torch.zeros_like(weight, dtype=torch.bool), torch.zeros(ROWS))
    assert check(swept, grid, DENSE).levels_max == 4
    with pytest.raises(AuditError, match=r"1 of 6 rows .* more than 4 levels, up to 5"):
        check(edited(swept, "weight", (3, 5), 7.0), grid, DENSE)


def test_a_budget_exceeded_by_one_channel_fails():
    swept, grid = swept_linear()
    allowed = (int(grid.bits.sum()) - 1) / COLUMNS
    assert check(swept, grid, max_average_bits=6.25).average_bits == 6.25
    with pytest.raises(AuditError, match=r"6\.25 bits on average where 6\.21875 were allowed"):
        check(swept, grid, max_average_bits=allowed)
    with pytest.raises(AuditError, match=r"16\.0 bits on average"):
        check(replace(swept, codes=None), None, max_average_bits=4.0)


def test_stored_weights_that_are_not_the_cast_fail():
    swept, grid = swept_linear()
    stored = swept.weight.to(torch.bfloat16)
    at = first(~swept.pruned)
    stored[at] = stored[at] * 2
    with pytest.raises(AuditError, match="1 of 192 stored weights"):
        check(swept, grid, stored=stored)


@given(st.integers(0, 2**32), st.none() | st.integers(1, 9), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_levels_are_counted_as_a_set_would(seed, group_size, chunk):
    swept, grid = swept_linear(seed=seed, group_size=group_size)
    counted = max(
        len({float(w) for w, p in zip(values, zeroed, strict=True) if not p})
        for group in grid.scale_group[grid.quantized].unique()
        for values, zeroed in zip(
            swept.weight[:, grid.scale_group == group],
            swept.pruned[:, grid.scale_group == group],
            strict=True,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "CHUNK", chunk)
        assert check(swept, grid).levels_max == counted


def test_a_grid_that_quantizes_nothing_counts_no_levels():
    bits = torch.full((COLUMNS,), 16, dtype=torch.uint8)
    one = torch.zeros(COLUMNS, dtype=torch.int32)
    grid = Grid(bits, one, torch.ones(ROWS, 1), torch.zeros(ROWS, 1, dtype=torch.int32))
    weight = torch.ones(ROWS, COLUMNS)
    swept = Swept(weight, None, torch.zeros_like(weight, dtype=torch.bool), torch.zeros(ROWS))
    assert check(swept, grid, DENSE, original=weight) == AuditReport(0, 16.0, 0.0)
