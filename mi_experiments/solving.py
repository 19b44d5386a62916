"""Solve one linear: from the statistics of its site to weights that are pruned and on their grids.

Where there is nothing to solve, that is said here too: a linear that is to stay as it is, one whose
Hessian is singular and that the recipe skips, and one whose weights are all pruned.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mi_experiments.config import Config
from mi_experiments.errors import SingularError
from mi_experiments.method.damping import damp
from mi_experiments.method.grid import Grid, fit_grid
from mi_experiments.method.hessian import Factor, Hessian, factorize, sweep_order
from mi_experiments.method.information import total_correlation
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.reached import sweep_and_fit
from mi_experiments.method.refine import refine
from mi_experiments.method.sparsegpt import Swept, sweep
from mi_experiments.method.targets import Drift, choose_input_share, correct_target
from mi_experiments.method_config import (
    UNQUANTIZED,
    DeadChannels,
    GridFit,
    OnSingular,
    WindowChoice,
)
from mi_experiments.plan import LinearPlan


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured at one site.

    Attributes:
        hessian: of what its linears read; of an expert with too few tokens, on all tokens.
        drift: from what they read in the dense model; None if that is not measured.
        tokens: that the site itself read.
        kept: whether its linears stay as they are, because those are too few.
    """

    hessian: Hessian
    drift: Drift | None
    tokens: int
    kept: bool = False


@dataclass(frozen=True)
class SiteStatistics:
    """What the linears of one site share.

    Attributes:
        hessian: of what they read.
        factor: of the damped Hessian; None where all weights are pruned, so that none is needed, or
            where there is none and the recipe says to skip such linears.
        attempts: the dampings that were tried.
        drift: from what they read in the dense model; None if that is not measured.
        tokens: that they read.
        kept: whether they stay as they are, because those are too few.
        retries: how often memory was short while they were measured.
    """

    hessian: Hessian
    factor: Factor | None
    attempts: tuple[float, ...]
    drift: Drift | None
    tokens: int
    kept: bool = False
    retries: int = 0

    @property
    def skipped(self) -> bool:
        """Whether a factor was tried for and not found."""
        return self.factor is None and bool(self.attempts)

    @cached_property
    def total_correlation(self) -> float | None:
        """Of the channels, nats; None without a factor."""
        return None if self.factor is None else total_correlation(self.factor)

    def order(self) -> Int64[Tensor, "columns"]:
        """Return the order in which the channels are swept; natural where they are not."""
        if self.factor is not None:
            return self.factor.order
        return torch.arange(len(self.hessian.diagonal), device=self.hessian.diagonal.device)


def factorize_site(
    measured: Measured, sparsities: Collection[Sparsity], config: Config
) -> SiteStatistics:
    """Factorize a site's Hessian in the order of the sweep, once for all its linears.

    Args:
        measured: at the site.
        sparsities: of its linears; patterns n:m are the same for all.
        config: of the run.

    Raises:
        SingularError: it cannot be, and the recipe does not say to skip its linears.
    """
    recipe, hessian, drift = config.recipe, measured.hessian, measured.drift
    without = SiteStatistics(hessian, None, (), drift, measured.tokens)
    if measured.kept:
        return replace(without, kept=True)
    if all(sparsity.ratio == 1 for sparsity in sparsities):
        return without
    window = max(1, *(sparsity.m for sparsity in sparsities))
    order = sweep_order(hessian.diagonal, recipe.order, window=window)
    escalate = recipe.on_singular is OnSingular.escalate
    try:
        factor = factorize(
            fill_dead(hessian, config),
            damping=recipe.damping,
            power=recipe.damping_power,
            order=order,
            escalate=escalate,
        )
    except SingularError as error:
        if recipe.on_singular is not OnSingular.skip:
            line = "recipe.on_singular=skip leaves the linears that read it as they are"
            raise SingularError(f"{error}; {line}") from error
        return replace(without, attempts=(recipe.damping,))
    return replace(without, factor=factor, attempts=factor.attempts)


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
    input_share = config.recipe.input_share
    if input_share is None:
        input_share = choose_input_share(hessian.tokens, len(hessian.diagonal))
    return correct_target(
        original,
        factor,
        drift,
        input_share=input_share,
        residual_share=config.recipe.residual_share,
    )


def leave(original: Float[Tensor, "rows columns"]) -> Swept:
    """Return a matrix as it is: nothing pruned, nothing quantized, no loss."""
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
    loss = (original.to(hessian.matrix.dtype) @ hessian.matrix * original).sum(1)
    grid = fit(zeros, linear_plan, config, pruned)
    if grid is None:
        return Swept(zeros, None, pruned, loss), None
    columns = grid.quantized.nonzero()[:, 0]
    codes = torch.zeros_like(original, dtype=torch.int16)
    codes[:, columns] = grid.encode(zeros[:, columns], columns)
    return Swept(zeros, codes, pruned, loss), grid


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
        symmetric=config.wbits.symmetric,
        clip_search=config.recipe.clip_search,
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
    if recipe.grid_fit is GridFit.reached and several:
        swept, grid = sweep_and_fit(
            alive,
            factor,
            linear_plan.bits.to(weight.device),
            linear_plan.scale_group.to(weight.device),
            symmetric=config.wbits.symmetric,
            clip_search=recipe.clip_search,
            scale_bits=recipe.scale_bits,
            sparsity=pruning,
            selection=recipe.selection,
            block=block,
        )
    elif pruning is None or recipe.grid_fit is not GridFit.survivors:
        seen = alive if recipe.grid_fit is GridFit.survivors else weight
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
    if sparsity.is_structured and config.recipe.window_choice is WindowChoice.reached:
        return sparsity.m
    return config.sparsity.mask_block_of(columns)


def fill_dead(hessian: Hessian, config: Config) -> Hessian:
    """Give channels that were zero on every token the diagonal that the recipe says, if any.

    It is said in units of 2/nsamples XᵀX, a sum over the tokens of each sequence, as published.
    """
    if not config.recipe.dead_diagonal or not hessian.dead.any():
        return hessian
    energy = config.recipe.dead_diagonal / config.dataset.seqlen
    return replace(hessian, matrix=hessian.matrix + torch.diag(hessian.dead * energy))


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
    change = compressed - original
    energy = torch.sum(original @ hessian.matrix * original, dtype=torch.float64)
    error = torch.sum(change @ hessian.matrix * change, dtype=torch.float64)
    return float(error / energy) if energy > 0 else 0.0
