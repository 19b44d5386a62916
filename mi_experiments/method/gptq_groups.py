"""Fit each scale group's grid when the sweep reaches it, to weights that are already compensated.

GPTQ with a group size (arXiv:2210.17323, its published code): a group's scale and zero point are
fitted where the sweep enters it, to the weights as all complete blocks before have left them; what
the present block has done so far is not yet in them.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from mi_experiments.method.grid import Grid, fit_grid
from mi_experiments.method.hessian import Factor
from mi_experiments.method.number_formats import UNIFORM, UNQUANTIZED, NumberFormat
from mi_experiments.method.pruning import Selection, Sparsity
from mi_experiments.method.sparsegpt import LEAF, SweepState, Swept, check_sweep, halve, least_rows
from mi_experiments.out_of_memory import in_pieces


@torch.no_grad()
def sweep_and_fit(
    weight: Float[Tensor, "rows columns"],
    factor: Factor,
    bits: UInt8[Tensor, "columns"],
    scale_group: Int32[Tensor, "columns"],
    *,
    clip_search: bool,
    number_format: NumberFormat = UNIFORM,
    scale_bits: int = 16,
    sparsity: Sparsity | None = None,
    selection: Selection = Selection.exact,
    block: int = 128,
) -> tuple[Swept, Grid]:
    """Sweep a linear, and fit its grids on the way.

    A grid is fitted to all weights of its group, before it is known which of them are pruned. Every
    group is fitted in the block in which the sweep enters it, however its channels are spread;
    where they are many blocks apart, that block solves for all weights in between.

    Args:
        weight: Weights in storage order; not modified.
        factor: Factor of the damped Hessian, and the order of the sweep.
        bits: Width of each channel; 16 leaves it unquantized.
        scale_group: Scale group of each channel, dense from 0.
        clip_search: Whether to try shrunk ranges.
        number_format: Which levels each width has.
        scale_bits: What a scale is rounded to: 16 for float16, 32 for float32.
        sparsity: How many weights to prune and in which pattern; None prunes none.
        selection: How an unstructured pattern counts what it prunes.
        block: Sweep positions whose grids are fitted and whose pruned weights are chosen together.

    Returns:
        The compressed linear and the grids it is on.

    Raises:
        MemoryShortage: There is no room for the rows that must be swept at once.
        NumericalError: A weight is not finite, or the sweep has diverged.
        ValueError: The sweep would tear apart the windows of an n:m pattern.
    """
    check_sweep(weight, factor, sparsity, block)
    columns = weight.shape[1]
    positions = factor.order.argsort()
    groups = int(scale_group.max()) + 1
    first = positions.new_full((groups,), columns)
    first.scatter_reduce_(0, scale_group.long(), positions, "amin")

    def fit(state: SweepState, low: int, high: int) -> None:
        entered = (first >= low) & (first < high)
        inside = entered[scale_group.long()] & (bits != UNQUANTIZED)
        if not inside.any():
            return
        stop = int(positions[inside].max()) + 1
        wanted = inside[factor.order[low:stop]]
        channels = factor.order[low:stop][wanted]
        chosen, label = torch.unique(scale_group[channels], return_inverse=True)
        grid = fit_grid(
            state.optimum(low, stop)[wanted].T,
            bits[channels],
            label.to(torch.int32),
            clip_search=clip_search,
            number_format=number_format,
            scale_bits=scale_bits,
        )
        state.put(grid, chosen)

    def sweep_rows(start: int, stop: int) -> tuple[Swept, Grid]:
        part = weight[start:stop]
        scale = part.new_ones(len(part), groups, dtype=factor.upper.dtype)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        blank = Grid(bits, scale_group, scale, zero, scale_bits, number_format)
        state = SweepState(part, factor, blank, torch.zeros_like(part, dtype=torch.bool))
        for low in range(0, columns, block):
            high = min(low + block, columns)
            fit(state, low, high)
            if sparsity is not None:
                state.choose(low, high, sparsity, selection)
            halve(low, high, LEAF, state.fix, state.carry)
            # Not by halves: later blocks must know all errors as soon as they are made.
            state.carry(low, high, columns)
        scale = state.scale.T.to(torch.promote_types(weight.dtype, torch.float32))
        zero = state.zero.T.to(torch.int32)
        return state.finish(), replace(blank, scale=scale, zero_point=zero)

    parts = in_pieces(sweep_rows, len(weight), "rows", least_rows(weight, sparsity))
    return Swept.join([part for part, _ in parts]), Grid.join([grid for _, grid in parts])
