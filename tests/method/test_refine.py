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
    return fit_grid(weight, bits, groups, symmetric=False, clip_search=False)


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
        trials = weight[row] + torch.tensor([-0.5, 0.0, 0.5])[:, None] * level
        down, here, up = quadratic(trials, target[row], hessian).tolist()
        curvature = 2 * (down - 2 * here + up)
        if curvature < 1e-9:
            continue
        move = -(up - down) / 2 / curvature * 2 / (1 + 1e-4) / 2 * 1.0
        new = float(np.float16(old + move))
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
