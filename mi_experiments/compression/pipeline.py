"""compress_model: the sequential layer pipeline.

Blocks are compressed in order, each on the outputs of the compressed blocks before it, and inside
a block (true-sequential) each site on the outputs of the compressed linears before it. A site's
Hessian and its one Cholesky factor serve all linears that read it.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float32, Int, Int32, UInt8
from torch import Tensor

from mi_experiments.calibration.drift import DensePair
from mi_experiments.calibration.hessians import check_weights, site_context
from mi_experiments.compression.compress_linear import (
    Solution,
    output_error,
    pattern_block,
    solve_linear,
)
from mi_experiments.compression.factorize_site import (
    SiteStatistics,
    measure_statistics,
)
from mi_experiments.config.config import Config
from mi_experiments.config.method import Scope
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.walker import Walker
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.bit_count import average_bits, count_storage
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.sixteen_bits import choose_exact, round_to_half
from mi_experiments.out_of_memory import count_retries, give_back
from mi_experiments.planning.plan import LinearPlan, Plan
from mi_experiments.records.linears import CHANGED, LinearReport


class LinearGrid(TypedDict):
    """The grids of one linear, in the order [rows, columns] = [output, input] for every class.

    A weight that is kept is scale · level, with the level of a code in the run's number format and
    the scale and zero point of its row and of its channel's scale group. (GPT-2's `Conv1D`
    holds its weight as [columns, rows]; its grids are in the order above all the same.)

    Attributes:
        bits: width of each channel; 16 = not quantized.
        channel_group: group of each channel.
        scale_group: scale group of each channel.
        scale: of each row and scale group.
        zero_point: code of the weight zero.
        pruned: True where the weight is set to zero.
    """

    bits: UInt8[Tensor, "columns"]
    channel_group: Int32[Tensor, "columns"]
    scale_group: Int32[Tensor, "columns"]
    scale: Float32[Tensor, "rows scale_groups"]
    zero_point: Int32[Tensor, "rows scale_groups"]
    pruned: Bool[Tensor, "rows columns"]


@dataclass(frozen=True)
class CompressedLinear:
    """One weight matrix after its sweep, still in the model.

    Attributes:
        linear: the matrix.
        report: what happened to it.
        grids: the grids as an export writes them.
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
        index: the index of the block.
        linears: the linears in execution order.
    """

    index: int
    linears: list[CompressedLinear]


def compress_model(
    walker: Walker,
    calibration: Int[Tensor, "nsamples seqlen"],
    plan: Plan,
    config: Config,
    on_linear: Callable[[LinearReport], None] = lambda report: None,
    *,
    restore: Callable[[int], bool] = lambda block: False,
) -> Iterator[CompressedBlock]:
    """Prune and quantize every linear of the model, in place, block after block.

    Args:
        walker: the walker of the model, which is changed in place, linear by linear.
        calibration: token ids.
        plan: groups and widths of every linear.
        config: the config of the run.
        on_linear: called after each linear, for progress and tracking.
        restore: puts the weights of a block that was compressed earlier into the model, or answers
            no; such a block is not yielded.

    Yields:
        Each block when it is compressed, to be stored before the next one is asked for.

    Raises:
        NumericalError: weights or activations that are not finite, or a Hessian that cannot be
            factorized.
        AuditError: a linear that does not keep a promise of its plan.
        MemoryShortage: there is no memory even for the smallest pieces.
    """
    check_weights(itertools.chain(*walker.inventory.linears))
    dense: Stream | None = None
    for block in walker.walk(calibration):
        pair = DensePair.open(block, dense) if config.needs_dense_pair else None
        if not restore(block.index):
            check_weights(block.linears)
            linears = []
            found = measure_statistics(block, pair, plan, config)
            for site, shared in found:
                for linear in site.linears:
                    with site_context(block, site, linear):
                        linears.append(compress_linear(linear, shared, plan, config))
                    give_back(4 * linear.rows * linear.columns)
                    on_linear(linears[-1].report)
            yield CompressedBlock(block.index, linears)
        dense = pair.advance() if pair else None


def compress_linear(
    linear: LinearView, statistics: SiteStatistics, plan: Plan, config: Config
) -> CompressedLinear:
    """Compress one linear, write it back, and audit what was written."""
    started = time.perf_counter()
    linear_plan = plan.linears[linear.name]
    original = linear.read_weight()
    with count_retries() as retries:
        solution = solve_linear(original, statistics, linear_plan, config)
    grid, sparsity = solution.grid, solution.sparsity
    swept = solution.swept
    dtype: torch.dtype | None
    if solution.status == "untouched":
        dtype = choose_exact(original, linear.dtype)
    else:
        swept, dtype = round_to_half(swept, grid, linear.dtype)
        linear.write_weight(swept.weight)
    alone = config.bit_scope is Scope.linear and not config.wbits.tied
    linear_budget = alone and solution.status in CHANGED
    audit = audit_linear(
        swept,
        grid,
        sparsity,
        original=original if dtype is None else original.to(dtype),
        order=statistics.order(),
        mask_block=pattern_block(linear.columns, sparsity, config),
        selection=config.recipe.selection,
        max_average_bits=plan.requested if linear_budget else None,
        # A kernel that computes scale · (code − zero) in the model's format rounds just so.
        stored=linear.read_weight().to(linear.dtype),
    )
    group = linear_plan.channel_group
    storage = count_storage(grid, swept.pruned, sparsity, group, dtype=dtype or torch.float16)
    widths, channels = torch.unique(solution.bits, return_counts=True)
    bits, average = dict(zip(widths.tolist(), channels.tolist(), strict=True)), audit.average_bits
    if dtype is not None and dtype.itemsize > 2:
        bits, average = {8 * dtype.itemsize: linear.columns}, 8.0 * dtype.itemsize
    information = plan.information.get(linear_plan.site)
    report = LinearReport(
        block=linear_plan.block,
        name=linear.name,
        site=linear_plan.site,
        rows=linear.rows,
        columns=linear.columns,
        bits=bits,
        average_bits=average,
        effective_bits=storage.effective_bits,
        sparsity=audit.sparsity,
        output_error=output_error(solution.target, swept.weight, statistics.hessian),
        levels=audit.levels_max,
        groups=int(group.max()) + 1,
        pairwise_information=information.mean_pairwise if information else None,
        information_noise=information.noise_mean if information else None,
        redundancy=information.mean_redundancy if information else None,
        total_correlation=statistics.total_correlation,
        damping=statistics.factor.damping if statistics.factor else None,
        damping_attempts=statistics.attempts,
        plan_damping=information.damping if information else None,
        stability=information.stability if information else None,
        dead_channels=int(statistics.hessian.dead.sum()),
        tokens=statistics.tokens,
        all_tokens=statistics.hessian.tokens > statistics.tokens,
        retries=statistics.retries + retries.count,
        seconds=time.perf_counter() - started,
        status=solution.status,
        unquantized_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        planned_bits=average_bits(linear_plan.bits),
    )
    return CompressedLinear(linear, report, stored_form(solution, linear_plan), sparsity)


def stored_form(solution: Solution, linear_plan: LinearPlan) -> LinearGrid:
    """Return groups, grids and pattern of a linear on the CPU; without a grid, 16 bits."""
    grid = solution.grid
    rows, columns = solution.swept.weight.shape
    return LinearGrid(
        bits=solution.bits,
        channel_group=linear_plan.channel_group.int(),
        scale_group=(grid.scale_group if grid else torch.zeros(columns)).int().cpu(),
        scale=(grid.scale if grid else torch.ones(rows, 1)).float().cpu(),
        zero_point=(grid.zero_point if grid else torch.zeros(rows, 1)).int().cpu(),
        pruned=solution.swept.pruned.cpu(),
    )
