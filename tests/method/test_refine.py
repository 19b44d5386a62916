"""Refinement against brute force: every move is the best one, so no row's loss ever rises."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_experiments.errors import NumericalError
from mi_experiments.method import refine as module
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.grid import Grid, fit_grid, scale_groups
from mi_experiments.method.hessian import factorize
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.refine import descend, refine, refit_scales
from mi_experiments.method.sparsegpt import Swept, sweep

ROWS, COLUMNS, MASK_BLOCK = 6, 21, 8
DENSE, HALF = Sparsity(0.0), Sparsity(0.5)
WIDTHS = [(2,), (3, 4), (2, 16, 4)]
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_hessian(columns, seed=0):
    """A strongly coupled damped Hessian: an AR(1) process, channels of very different energy."""
    lag = (torch.arange(columns)[:, None] - torch.arange(columns)).abs()
    energy = torch.exp(normal(columns, seed=seed) / 2)
    coupling = torch.linalg.cholesky(0.9 ** lag.double()).mT
    tokens = normal(4 * columns, columns, seed=seed + 1) @ coupling * energy
    hessian = 2 / len(tokens) * tokens.mT @ tokens
    return hessian + 0.02 * hessian.diagonal().mean() * torch.eye(columns)


def make_grid(weight, widths, group_size=4):
    """Widths in turn over interleaved channel groups, so that leaves and scale groups mix."""
    kind = torch.arange(weight.shape[1]) * 7 % 11 % len(widths)
    bits = torch.tensor(widths, dtype=torch.uint8)[kind]
    groups = scale_groups(kind, group_size)
    return fit_grid(weight, bits, groups, clip_search=False)


def make_problem(widths=(3, 4), sparsity=DENSE, seed=0, dtype=torch.float64):
    """A linear after its sweep, and all that the sweep was given."""
    hessian = make_hessian(COLUMNS, seed).to(dtype)
    target = normal(ROWS, COLUMNS, seed=seed + 2).to(dtype)
    grid = make_grid(target, widths)
    factor = factorize(hessian, damping=0.0)
    swept = sweep(target, factor, grid=grid, sparsity=sparsity, mask_block=MASK_BLOCK)
    return swept, grid, target, hessian


def quadratic(weight, target, hessian):
    """Loss of each row in float64, whatever the dtype."""
    error = (weight - target).double()
    return ((error @ hessian.double()) * error).sum(-1)


def shuffled(columns, seed=3):
    return torch.randperm(columns, generator=torch.Generator().manual_seed(seed))


def level_of(grid, row, channel, code):
    group = grid.scale_group[channel]
    return float(grid.scale[row, group]) * (code - int(grid.zero_point[row, group]))


def descend_by_trial(swept, grid, target, hessian, order):
    """One row and channel after another: try every code, keep the old one unless another wins."""
    weight, codes = swept.weight.clone(), swept.codes.clone()
    for row, channel in itertools.product(range(ROWS), order.tolist()):
        if swept.pruned[row, channel]:
            continue
        if not grid.quantized[channel]:
            slope = (weight[row] - target[row]) @ hessian[:, channel]
            weight[row, channel] -= slope / hessian[channel, channel]
            continue
        trials = weight[row].repeat(2 ** int(grid.bits[channel]), 1)
        for code in range(len(trials)):
            trials[code, channel] = level_of(grid, row, channel, code)
        losses = quadratic(trials, target[row], hessian)
        if losses.min() < losses[codes[row, channel]] - 1e-12:
            codes[row, channel] = losses.argmin()
        weight[row, channel] = trials[codes[row, channel], channel]
    return weight, codes


@pytest.mark.parametrize("sparsity", [DENSE, HALF], ids=["dense", "half"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("leaf", "natural"), [(1, True), (5, False), (64, True), (64, False)])
def test_descent_equals_trying_every_code_of_every_weight(widths, sparsity, leaf, natural):
    swept, grid, target, hessian = make_problem(widths, sparsity)
    order = torch.arange(COLUMNS) if natural else shuffled(COLUMNS)
    given = None if natural else order
    found = descend(swept, grid, target, hessian, order=given, leaf=leaf)
    weight, codes = descend_by_trial(swept, grid, target, hessian, order)
    assert (codes != swept.codes).any()
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-12)


def refit_by_search(swept, grid, target, hessian):
    """One row and scale group after another: the vertex of a parabola through three trials."""
    weight, scale = swept.weight.clone(), grid.scale.clone()
    for row, group in itertools.product(range(ROWS), range(scale.shape[1])):
        inside = grid.scale_group == group
        if not grid.quantized[inside].all():
            continue
        old = float(scale[row, group])
        level = torch.where(inside, weight[row] / old, 0)
        trials = weight[row] + torch.tensor([-1.0, 0.0, 1.0])[:, None] * level
        down, here, up = quadratic(trials, target[row], hessian).tolist()
        curvature = up - 2 * here + down
        if curvature < 1e-9:
            continue
        new = float(np.float16(old - (up - down) / 2 / (curvature * (1 + module.RIDGE))))
        if old / 4 <= new <= 4 * old:
            scale[row, group] = new
            weight[row] += (new - old) * level
    return weight, scale


@pytest.mark.parametrize("sparsity", [DENSE, HALF], ids=["dense", "half"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_refit_equals_a_line_search_of_every_scale(widths, sparsity):
    swept, grid, target, hessian = make_problem(widths, sparsity)
    found, refitted = refit_scales(swept, grid, target, hessian)
    weight, scale = refit_by_search(swept, grid, target, hessian)
    assert (scale != grid.scale).any()
    assert torch.equal(refitted.scale, scale)
    assert torch.equal(found.codes, swept.codes)
    assert torch.equal(refitted.zero_point, grid.zero_point)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-12)


def one_group(bits=3, seed=0):
    """A linear with a single scale per row, rounded to the nearest level of a poor scale."""
    target, hessian = normal(ROWS, 9, seed=seed), make_hessian(9, seed)
    widths = torch.full((9,), bits, dtype=torch.uint8)
    group = torch.zeros(9, dtype=torch.int32)
    grid = fit_grid(target, widths, group, clip_search=False)
    grid = replace(grid, scale=(grid.scale * 0.7).half().double())
    return as_swept(target, grid), grid, target, hessian


def as_swept(target, grid, pruned=None):
    """Round to nearest, without any sweep."""
    pruned = torch.zeros_like(target, dtype=torch.bool) if pruned is None else pruned
    weight = grid.quantize(target.masked_fill(pruned, 0))
    codes = torch.zeros(target.shape, dtype=torch.int16)
    columns = grid.quantized.nonzero()[:, 0]
    codes[:, columns] = grid.encode(weight[:, columns], columns)
    return Swept(weight, codes, pruned, weight.new_zeros(len(weight)))


@pytest.mark.parametrize(
    ("scale_bits", "stored", "digits"), [(16, np.float16, 11), (32, np.float32, 24)]
)
def test_refit_of_one_group_is_least_squares(monkeypatch, scale_bits, stored, digits):
    monkeypatch.setattr(module, "RIDGE", 0.0)
    swept, grid, target, hessian = one_group()
    grid = replace(grid, scale_bits=scale_bits)
    found, refitted = refit_scales(swept, grid, target, hessian)
    root = np.linalg.cholesky(hessian.numpy())
    for row in range(ROWS):
        level = (swept.codes[row] - grid.zero_point[row, 0]).double().numpy()
        best = np.linalg.lstsq((level @ root)[:, None], target[row].numpy() @ root, rcond=None)[0]
        assert float(refitted.scale[row, 0]) == float(stored(best[0]))
        residual = (best[0] * level - target[row].numpy()) @ root
        rounding = (best[0] * 2.0**-digits * level) @ root
        excess = float(found.quadratic_error[row]) - residual @ residual
        assert -1e-12 <= excess <= rounding @ rounding
    assert (refitted.scale != grid.scale).all()


@pytest.mark.parametrize(
    ("factor", "moves"), [(3.98, True), (4.02, False), (0.252, True), (0.248, False), (-1, False)]
)
def test_refit_rejects_a_scale_beyond_a_factor_of_four(factor, moves):
    swept, grid, _, hessian = one_group()
    found, refitted = refit_scales(swept, grid, factor * swept.weight, hessian)
    if moves:
        torch.testing.assert_close(refitted.scale, factor * grid.scale, rtol=1e-3, atol=0)
    else:
        assert torch.equal(refitted.scale, grid.scale)
        assert torch.equal(found.weight, swept.weight)


def test_refit_leaves_the_scale_of_a_group_without_weights():
    _, grid, target, hessian = make_problem()
    pruned = torch.zeros_like(target, dtype=torch.bool)
    pruned[2, grid.scale_group == 1] = True
    _, refitted = refit_scales(as_swept(target, grid, pruned), grid, target, hessian)
    assert refitted.scale[2, 1] == grid.scale[2, 1]
    assert (refitted.scale[3:] != grid.scale[3:]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sparsity", [DENSE, HALF, Sparsity(1 / 3)], ids=["dense", "half", "third"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_step_raises_the_loss_of_a_row_and_the_result_passes_the_audit(
    widths, sparsity, seed, dtype
):
    swept, grid, target, hessian = make_problem(widths, sparsity, seed, dtype)
    pruned, before = swept.pruned, quadratic(swept.weight, target, hessian)
    start = before.sum()
    for step in range(6):
        if step % 2:
            swept, grid = refit_scales(swept, grid, target, hessian)
        else:
            swept = descend(swept, grid, target, hessian)
        after = quadratic(swept.weight, target, hessian)
        assert (after <= before * (1 + SLACK[dtype])).all()
        torch.testing.assert_close(
            swept.quadratic_error.double(), after, rtol=100 * SLACK[dtype], atol=0
        )
        before = after
        assert swept.weight.dtype == dtype
        assert torch.equal(swept.pruned, pruned)
        assert (swept.codes[:, ~grid.quantized] == 0).all()
        audit_linear(
            swept,
            grid,
            sparsity,
            original=None,
            order=torch.arange(COLUMNS),
            mask_block=MASK_BLOCK,
            max_average_bits=None,
            stored=None,
        )
    assert before.sum() < 0.99 * start


def test_refine_takes_turns():
    swept, grid, target, hessian = make_problem(sparsity=HALF)
    order = shuffled(COLUMNS)
    found, found_grid = refine(swept, grid, target, hessian, rounds=2, order=order)
    for _ in range(2):
        swept = descend(swept, grid, target, hessian, order=order)
        swept, grid = refit_scales(swept, grid, target, hessian)
    assert torch.equal(found.weight, swept.weight)
    assert torch.equal(found.codes, swept.codes)
    assert torch.equal(found.quadratic_error, swept.quadratic_error)
    assert torch.equal(found_grid.scale, grid.scale)


def every_change_of_one_code(swept, grid, target, hessian):
    """The least that a row's error changes by when one kept weight takes another code."""
    here = quadratic(swept.weight, target, hessian)
    for row, channel in itertools.product(range(len(here)), range(len(hessian))):
        if not swept.pruned[row, channel]:
            for code in range(2 ** int(grid.bits[channel])):
                trial = swept.weight[row].clone()
                trial[channel] = level_of(grid, row, channel, code)
                yield float(quadratic(trial, target[row], hessian) - here[row])


@pytest.mark.parametrize("sparsity", [DENSE, HALF], ids=["dense", "half"])
def test_no_single_change_of_a_code_lowers_the_loss_at_convergence(sparsity):
    swept, grid, target, hessian = make_problem(sparsity=sparsity)
    assert min(every_change_of_one_code(swept, grid, target, hessian)) < -1e-3
    swept, grid = refine(swept, grid, target, hessian, rounds=200)
    again, same = refine(swept, grid, target, hessian, rounds=1)
    assert torch.equal(again.codes, swept.codes)
    assert torch.equal(same.scale, grid.scale)
    assert min(every_change_of_one_code(swept, grid, target, hessian)) > -1e-12


@pytest.mark.parametrize(("columns", "least_share"), [(3, 0.85), (4, 0.68)])
def test_tiny_rows_mostly_reach_the_best_codes_there_are(columns, least_share):
    """Rows are problems of their own: 200 of them, of which the sweep solves 74 % and 56 %."""
    shares = []
    for seed in range(5):
        hessian, target = make_hessian(columns, seed), normal(40, columns, seed=seed + 9)
        grid = make_grid(target, (2,), None)
        swept = sweep(target, factorize(hessian, damping=0.0), grid=grid)
        refined = swept
        for _ in range(10):
            refined = descend(refined, grid, target, hessian)
        codes = torch.tensor(list(itertools.product(range(4), repeat=columns)))
        every = (codes[:, None] - grid.zero_point) * grid.scale
        best = quadratic(every, target, hessian).amin(0)
        swept_loss, loss = quadratic(swept.weight, target, hessian), refined.quadratic_error
        assert (loss <= swept_loss * (1 + 1e-12)).all()
        shares.append([(x <= best * (1 + 1e-9)).double().mean() for x in (swept_loss, loss)])
    swept_share, share = torch.tensor(shares).mean(0).tolist()
    assert share >= max(least_share, swept_share + 0.1)


def test_unquantized_survivors_converge_to_least_squares():
    swept, grid, target, hessian = make_problem((16,))
    # Larger than any code, because unquantized weights know no bounds.
    target = 1e6 * target
    pruned = normal(ROWS, COLUMNS, seed=7) > 0
    swept = Swept(target.masked_fill(pruned, 0), None, pruned, swept.quadratic_error)
    found, same = refine(swept, grid, target, hessian, rounds=1000)
    for row in range(ROWS):
        kept = ~pruned[row]
        best = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ target[row])
        torch.testing.assert_close(found.weight[row, kept], best, rtol=0, atol=1e-3)
    assert found.codes is None
    assert (found.weight[pruned] == 0).all()
    assert torch.equal(same.scale, grid.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("hessian", [torch.eye(COLUMNS), make_hessian(COLUMNS)], ids=["eye", "ar"])
def test_weights_already_on_their_grid_do_not_change(hessian, dtype):
    grid = make_grid(normal(ROWS, COLUMNS, dtype=dtype), (2, 16, 4))
    target = grid.quantize(normal(ROWS, COLUMNS, seed=1, dtype=dtype))
    found, same = refine(as_swept(target, grid), grid, target, hessian.to(dtype), rounds=3)
    assert torch.equal(found.weight, target)
    assert torch.equal(found.quadratic_error, torch.zeros(ROWS, dtype=dtype))
    assert torch.equal(same.scale, grid.scale)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_tie_keeps_the_old_code(code):
    """Half-way between two codes, below or above, both are equally good."""
    grid = Grid(
        torch.tensor([2], dtype=torch.uint8),
        torch.tensor([0], dtype=torch.int32),
        torch.ones(2, 1),
        torch.zeros(2, 1, dtype=torch.int32),
    )
    target = torch.tensor([[code + 0.5], [code - 0.5]])
    weight = torch.full((2, 1), float(code))
    codes = torch.full((2, 1), code, dtype=torch.int16)
    swept = Swept(weight, codes, torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2))
    assert torch.equal(descend(swept, grid, target, torch.ones(1, 1)).codes, codes)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_inputs_are_not_modified(rows):
    """The transpose of a single row is contiguous, and so easily no copy."""
    swept, grid, target, hessian = make_problem((2, 16, 4), HALF)
    swept = Swept(
        swept.weight[:rows], swept.codes[:rows], swept.pruned[:rows], swept.quadratic_error[:rows]
    )
    grid = replace(grid, scale=grid.scale[:rows], zero_point=grid.zero_point[:rows])
    given = [swept.weight, swept.codes, swept.pruned, grid.scale, target, hessian]
    copies = [tensor.clone() for tensor in given]
    refine(swept, grid, target[:rows], hessian)
    assert all(map(torch.equal, given, copies))


def test_trouble_is_named():
    swept, grid, target, hessian = make_problem()
    hessian[3, 3] = 0
    with pytest.raises(ValueError, match="damp it"):
        refine(swept, grid, target, hessian)
    hessian[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        descend(swept, grid, target, hessian)
    with pytest.raises(NumericalError, match="not finite"):
        refit_scales(swept, grid, target, hessian)
