"""compress_model: the sequential layer pipeline.

Blocks are compressed in order, each on the outputs of the compressed blocks before it, and inside
a block (true-sequential) each site on the outputs of the compressed linears before it. A site's
Hessian and its one Cholesky factor serve all linears that read it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.config import UNQUANTIZED, Config, GridFit, Scope
from mi_experiments.llm.blocks import Block, walk_blocks
from mi_experiments.llm.export import LinearGrid
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.replay import Allocate, Stream
from mi_experiments.llm.sites import Site
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.twins import Twins
from mi_experiments.measure import in_passes, measure_hessians, measure_twins, site_context
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.grid import Grid, fit_grid
from mi_experiments.method.hessian import Factor, Hessian, factorize, sweep_order
from mi_experiments.method.information import total_correlation
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.refine import refine
from mi_experiments.method.sparsegpt import Swept, sweep
from mi_experiments.method.storage import count_storage
from mi_experiments.method.targets import Drift, correct_target
from mi_experiments.plan import LinearPlan, Plan
from mi_experiments.record import LinearReport


@dataclass(frozen=True)
class SiteStatistics:
    """What the linears of one site share: Hessian, factor, drift and total correlation."""

    hessian: Hessian
    factor: Factor
    drift: Drift | None
    total_correlation: float

    def damped_hessian(self) -> Float[Tensor, "columns columns"]:
        """Return H′, with the damping that the factor finally used."""
        damping = self.factor.damping * self.hessian.diagonal.mean()
        return self.hessian.matrix + torch.diag(damping.expand(len(self.hessian.diagonal)))


@dataclass(frozen=True)
class CompressedLinear:
    """One weight matrix after its sweep, still in the model.

    Attributes:
        linear: the matrix.
        report: what happened to it.
        grids: as an export writes them.
        sparsity: the pattern that it follows.
    """

    linear: LinearView
    report: LinearReport
    grids: LinearGrid
    sparsity: Sparsity


@dataclass(frozen=True, eq=False)
class CompressedBlock:
    """One block after its sweeps, still holding its weights.

    Attributes:
        index: of the block.
        linears: in execution order.
    """

    index: int
    linears: list[CompressedLinear]


def compress_model(
    model: PreTrainedModel,
    calibration: Int[Tensor, "nsamples seqlen"],
    plan: Plan,
    config: Config,
    on_linear: Callable[[LinearReport], None] = lambda report: None,
    *,
    weights: BlockWeights | None = None,
    allocate: Allocate | None = None,
    hessian_bytes: int | None = None,
    restore: Callable[[int], bool] = lambda block: False,
) -> Iterator[CompressedBlock]:
    """Prune and quantize every linear of the model, in place, block after block.

    Args:
        model: changed in place, linear by linear.
        calibration: token ids.
        plan: groups and widths of every linear.
        config: of the run.
        on_linear: called after each linear, for progress and tracking.
        weights: loads each block when its turn comes and drops it afterwards; None for a model that
            holds all its weights.
        allocate: makes room for hidden states; by default where blocks run.
        hessian_bytes: bytes that Hessians measured in one pass may take; None for no limit.
        restore: puts the weights of a block that was compressed earlier into the model, or answers
            no; such a block is not yielded.

    Yields:
        Each block when it is compressed, to be stored before the next one is asked for.

    Raises:
        NumericalError: activations that are not finite or a Hessian that cannot be factorized.
        AuditError: a linear that does not keep a promise of its plan.
    """
    walk = walk_blocks(
        model,
        calibration,
        batch_size=config.dataset.batch_size,
        ignore=tuple(config.model.ignore),
        path=config.model.blocks,
        weights=weights,
        allocate=allocate,
    )
    dense: Stream | None = None
    for block in walk:
        twins = Twins.open(block, dense) if corrects_targets(config) else None
        if not restore(block.index):
            linears = []
            for site, hessian, drift in measure_sites(block, twins, config, hessian_bytes):
                with site_context(block, site):
                    statistics = factorize_site(hessian, drift, plan.sparsity, config)
                    for linear in site.linears:
                        linears.append(compress_linear(linear, statistics, plan, config))
                        on_linear(linears[-1].report)
            yield CompressedBlock(block.index, linears)
        dense = twins.advance() if twins else None


def corrects_targets(config: Config) -> bool:
    """Say whether sweeps aim at the dense model, which then runs along block by block."""
    return config.recipe.input_share > 0 or config.recipe.residual_share > 0


def measure_sites(
    block: Block, twins: Twins | None, config: Config, hessian_bytes: int | None = None
) -> Iterator[tuple[Site, Hessian, Drift | None]]:
    """Measure each stage when it is asked for (true-sequential), or all of them at the beginning.

    The experts of one stage are measured together, and without drift: the dense model sends them
    other tokens.
    """
    if twins is None and not config.recipe.true_sequential:
        stages = [list(block.sites)]
    else:
        stages = [list(sites) for _, sites in groupby(block.sites, lambda site: site.stage)]
    for sites in stages:
        if twins is not None and not sites[0].routed:
            yield sites[0], *measure_twins(twins, sites[0], config)
            continue
        for together in in_passes(sites, hessian_bytes):
            hessians = measure_hessians(block, together, config)
            for site in together:
                yield site, hessians.pop(site.name), None


def factorize_site(
    hessian: Hessian, drift: Drift | None, sparsity: Sparsity, config: Config
) -> SiteStatistics:
    """Factorize a site's Hessian in the order of the sweep, once for all its linears."""
    order = sweep_order(hessian.diagonal, config.recipe.order, window=max(1, sparsity.m))
    factor = factorize(hessian, damping=config.recipe.damping, order=order)
    return SiteStatistics(hessian, factor, drift, total_correlation(factor))


def compress_linear(
    linear: LinearView, statistics: SiteStatistics, plan: Plan, config: Config
) -> CompressedLinear:
    """Sweep one linear, write it back, and audit what was written."""
    started = time.perf_counter()
    linear_plan = plan.linears[linear.name]
    original = linear.read_weight()
    target = aim(linear, original, statistics, linear_plan, plan, config)
    swept, grid = solve(target, statistics, linear_plan, plan.sparsity, config)
    linear.write_weight(swept.weight)
    linear_budget = config.wbits.scope is Scope.linear
    audit = audit_linear(
        swept,
        grid,
        plan.sparsity,
        original=original,
        order=statistics.factor.order,
        mask_block=config.sparsity.mask_block,
        max_average_bits=plan.requested if linear_budget else None,
        # A kernel that computes scale · (code − zero) in the model's format rounds just so.
        stored=linear.read_weight().to(linear.dtype),
    )
    storage = count_storage(
        grid,
        swept.pruned,
        plan.sparsity,
        linear_plan.channel_group,
        symmetric=config.wbits.symmetric,
    )
    widths, channels = torch.unique(linear_plan.bits, return_counts=True)
    information = plan.information.get(linear_plan.site)
    untouched = grid is None and plan.sparsity.is_dense
    report = LinearReport(
        block=linear_plan.block,
        name=linear.name,
        site=linear_plan.site,
        rows=linear.rows,
        columns=linear.columns,
        bits=dict(zip(widths.tolist(), channels.tolist(), strict=True)),
        average_bits=audit.average_bits,
        effective_bits=storage.effective_bits,
        sparsity=audit.sparsity,
        output_error=output_error(target, swept.weight, statistics.hessian),
        levels=audit.levels_max,
        groups=int(linear_plan.channel_group.max()) + 1,
        pairwise_information=information.mean_pairwise if information else None,
        information_noise=information.noise_mean if information else None,
        redundancy=information.mean_redundancy if information else None,
        total_correlation=statistics.total_correlation,
        damping=statistics.factor.damping,
        damping_attempts=statistics.factor.attempts,
        dead_channels=int(statistics.hessian.dead.sum()),
        tokens=statistics.hessian.tokens,
        seconds=time.perf_counter() - started,
        status="untouched" if untouched else "compressed",
    )
    return CompressedLinear(linear, report, stored_form(swept, grid, linear_plan), plan.sparsity)


def aim(
    linear: LinearView,
    original: Float[Tensor, "rows columns"],
    statistics: SiteStatistics,
    linear_plan: LinearPlan,
    plan: Plan,
    config: Config,
) -> Float[Tensor, "rows columns"]:
    """Return the matrix to compress: the original, or what restores the dense model's results.

    A linear that is neither pruned nor quantized stays as it is.
    """
    untouched = plan.sparsity.is_dense and bool((linear_plan.bits == UNQUANTIZED).all())
    if statistics.drift is None or untouched:
        return original
    return correct_target(
        original,
        statistics.factor,
        statistics.drift,
        input_share=config.recipe.input_share,
        residual_share=config.recipe.residual_share,
    )


def solve(
    weight: Float[Tensor, "rows columns"],
    statistics: SiteStatistics,
    linear_plan: LinearPlan,
    sparsity: Sparsity,
    config: Config,
) -> tuple[Swept, Grid | None]:
    """Prune and quantize one matrix as the recipe says; without either it stays as it is."""
    factor, block = statistics.factor, config.sparsity.mask_block
    bits = linear_plan.bits.to(weight.device)
    scale_group = linear_plan.scale_group.to(weight.device)
    quantized = bool((bits < UNQUANTIZED).any())
    pruning = None if sparsity.is_dense else sparsity
    fit = partial(fit_grid, symmetric=config.wbits.symmetric, clip_search=config.wbits.clip_search)
    if not quantized:
        return sweep(weight, factor, sparsity=pruning, mask_block=block), None
    if pruning is None or config.recipe.grid_fit is GridFit.original:
        grid = fit(weight, bits, scale_group)
        swept = sweep(weight, factor, grid=grid, sparsity=pruning, mask_block=block)
    else:
        first = sweep(weight, factor, sparsity=pruning, mask_block=block)
        grid = fit(first.weight, bits, scale_group, pruned=first.pruned)
        swept = sweep(weight, factor, grid=grid, pruned=first.pruned, mask_block=block)
    if rounds := config.recipe.refine_rounds:
        return refine(
            swept, grid, weight, statistics.damped_hessian(), rounds=rounds, order=factor.order
        )
    return swept, grid


def stored_form(swept: Swept, grid: Grid | None, linear_plan: LinearPlan) -> LinearGrid:
    """Return groups, grids and pattern of a linear on the CPU; without a grid, 16 bits."""
    columns = len(linear_plan.bits)
    rows = len(swept.weight)
    return LinearGrid(
        bits=linear_plan.bits,
        channel_group=linear_plan.channel_group.int(),
        scale_group=(grid.scale_group if grid else torch.zeros(columns)).int().cpu(),
        scale=(grid.scale if grid else torch.ones(rows, 1)).float().cpu(),
        zero_point=(grid.zero_point if grid else torch.zeros(rows, 1)).int().cpu(),
        pruned=swept.pruned.cpu(),
    )


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
