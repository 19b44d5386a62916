"""Solve one linear: from the statistics of its site to weights that are pruned and on their grids.

Where there is nothing to solve, that is said here too: a linear that is to stay as it is, one whose
Hessian is singular and that the recipe skips, and one whose weights are all pruned.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mi_experiments.compression.factorize_site import SiteStatistics, fill_dead
from mi_experiments.config.config import Config
from mi_experiments.config.recipe import DeadChannels, GridFit, WindowChoice
from mi_experiments.method.audit import vanishes
from mi_experiments.method.damping import damp
from mi_experiments.method.gptq_groups import sweep_and_fit
from mi_experiments.method.grid import Grid, fit_grid
from mi_experiments.method.hessian import Factor, Hessian
from mi_experiments.method.number_formats import UNQUANTIZED
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.refine import refine
from mi_experiments.method.relative_error import relative_error
from mi_experiments.method.sparsegpt import Swept, sweep
from mi_experiments.method.targets import Drift, choose_input_correction, correct_target
from mi_experiments.planning.plan import LinearPlan


@dataclass(frozen=True, eq=False)
class Solution:
    """What becomes of one weight matrix.

    Attributes:
        status: see `LinearReport`.
        target: what was aimed at.
        swept: what came out.
        grid: its levels; None if nothing is quantized.
        bits: width of each channel; 16 where the linear is left as it was, whatever was planned.
        sparsity: the pattern that it follows; none where the linear is left as it was.
    """

    status: str
    target: Float[Tensor, "rows columns"]
    swept: Swept
    grid: Grid | None
    bits: UInt8[Tensor, "columns"]
    sparsity: Sparsity


def solve_linear(
    original: Float[Tensor, "rows columns"],
    statistics: SiteStatistics,
    linear_plan: LinearPlan,
    config: Config,
) -> Solution:
    """Compress one matrix, or leave it as it is if nothing is asked or if it must be skipped."""
    sparsity = linear_plan.sparsity
    untouched = sparsity.is_dense and bool((linear_plan.bits == UNQUANTIZED).all())
    if untouched or statistics.skipped or statistics.kept:
        status = "untouched" if untouched else "kept" if statistics.kept else "skipped"
        bits = torch.full_like(linear_plan.bits, UNQUANTIZED)
        return Solution(status, original, leave(original), None, bits, Sparsity(0.0))
    factor, hessian = statistics.factor, statistics.hessian
    if factor is None:
        swept, grid = erase(original, hessian, linear_plan, config)
        return Solution("compressed", original, swept, grid, linear_plan.bits, sparsity)
    target = aim(original, hessian, factor, statistics.drift, config)
    swept, grid = solve(target, hessian, factor, linear_plan, config)
    status = "escalated" if len(statistics.attempts) > 1 else "compressed"
    if hessian.is_dead:
        status = "dead"
    elif vanishes(target, swept, grid):
        status = "vanished"
    return Solution(status, target, swept, grid, linear_plan.bits, sparsity)


def aim(
    original: Float[Tensor, "rows columns"],
    hessian: Hessian,
    factor: Factor,
    drift: Drift | None,
    config: Config,
) -> Float[Tensor, "rows columns"]:
    """Return the matrix to compress: the original, or what restores the dense model's results."""
    if drift is None:
        return original
    input_correction = config.recipe.input_correction
    if input_correction is None:
        input_correction = choose_input_correction(hessian.tokens, len(hessian.diagonal))
    return correct_target(
        original,
        factor,
        drift,
        input_correction=input_correction,
        residual_correction=config.recipe.residual_correction,
    )


def leave(original: Float[Tensor, "rows columns"]) -> Swept:
    """Return a matrix as it is: nothing pruned, nothing quantized, no error."""
    return Swept(
        original,
        None,
        torch.zeros_like(original, dtype=torch.bool),
        original.new_zeros(len(original)),
    )


def erase(
    original: Float[Tensor, "rows columns"],
    hessian: Hessian,
    linear_plan: LinearPlan,
    config: Config,
) -> tuple[Swept, Grid | None]:
    """Return a matrix with all weights pruned, which needs no factor: there is nothing to choose.

    Nor may there be one: what reads an erased linear alone reads zeros.
    """
    pruned = torch.ones_like(original, dtype=torch.bool)
    zeros = torch.zeros_like(original)
    quadratic_error = (original.to(hessian.matrix.dtype) @ hessian.matrix * original).sum(1)
    grid = fit(zeros, linear_plan, config, pruned)
    if grid is None:
        return Swept(zeros, None, pruned, quadratic_error), None
    columns = grid.quantized.nonzero()[:, 0]
    codes = torch.zeros_like(original, dtype=torch.int16)
    codes[:, columns] = grid.encode(zeros[:, columns], columns)
    return Swept(zeros, codes, pruned, quadratic_error), grid


def fit(
    weight: Float[Tensor, "rows columns"],
    linear_plan: LinearPlan,
    config: Config,
    pruned: Bool[Tensor, "rows columns"] | None = None,
) -> Grid | None:
    """Fit the grids of a linear to weights; None if nothing is quantized."""
    bits = linear_plan.bits.to(weight.device)
    if bool((bits == UNQUANTIZED).all()):
        return None
    return fit_grid(
        weight,
        bits,
        linear_plan.scale_group.to(weight.device),
        clip_search=config.recipe.clip_search,
        number_format=config.wbits.number_format,
        scale_bits=config.recipe.scale_bits,
        pruned=pruned,
    )


def solve(
    weight: Float[Tensor, "rows columns"],
    hessian: Hessian,
    factor: Factor,
    linear_plan: LinearPlan,
    config: Config,
) -> tuple[Swept, Grid | None]:
    """Prune and quantize one matrix as the recipe says."""
    recipe, sparsity = config.recipe, linear_plan.sparsity
    quantized = bool((linear_plan.bits < UNQUANTIZED).any())
    pruning = None if sparsity.is_dense else sparsity
    block = pattern_block(weight.shape[1], sparsity, config)
    alive = weight
    if recipe.dead_channels is DeadChannels.zero:
        # They are no part of any result; a grid that is fitted to the original still sees them.
        alive = weight.masked_fill(hessian.dead, 0)
    run = partial(sweep, alive, factor, mask_block=block, selection=recipe.selection)
    grid: Grid | None = None
    if not quantized:
        return run(sparsity=pruning), None
    several = bool(linear_plan.scale_group.any())
    if recipe.grid_fit is GridFit.dynamic and several:
        swept, grid = sweep_and_fit(
            alive,
            factor,
            linear_plan.bits.to(weight.device),
            linear_plan.scale_group.to(weight.device),
            clip_search=recipe.clip_search,
            number_format=config.wbits.number_format,
            scale_bits=recipe.scale_bits,
            sparsity=pruning,
            selection=recipe.selection,
            block=block,
        )
    elif pruning is None or recipe.grid_fit is not GridFit.compensated:
        seen = alive if recipe.grid_fit is GridFit.compensated else weight
        grid = fit(seen, linear_plan, config)
        swept = run(grid=grid, sparsity=pruning)
    else:
        first = run(sparsity=pruning)
        grid, pruned = fit(first.weight, linear_plan, config, first.pruned), first.pruned
        del first
        swept = run(grid=grid, pruned=pruned)
    if grid is not None and (rounds := recipe.refine_rounds):
        damped = damped_hessian(fill_dead(hessian, config), factor)
        return refine(swept, grid, alive, damped, rounds=rounds, order=factor.order)
    return swept, grid


def pattern_block(columns: int, sparsity: Sparsity, config: Config) -> int:
    """Return how many sweep positions choose their pruned weights together."""
    if sparsity.window > 1 and config.recipe.window_choice is WindowChoice.dynamic:
        return sparsity.window
    return config.sparsity.mask_block_of(columns)


def damped_hessian(hessian: Hessian, factor: Factor) -> Float[Tensor, "columns columns"]:
    """Return H′, with the damping that the factor finally used."""
    damped = hessian.matrix.clone()
    damped.diagonal().copy_(damp(hessian.diagonal, factor.damping, factor.power))
    return damped


def output_error(
    original: Float[Tensor, "rows columns"],
    compressed: Float[Tensor, "rows columns"],
    hessian: Hessian,
) -> float:
    """Return ‖(Ŵ − W)X‖² / ‖WX‖² on the inputs that the Hessian was measured on."""
    return relative_error(compressed - original, original, hessian.matrix)
