"""Refine a swept linear: better codes for its scales, then better scales for its codes.

The sweep never looks back: a weight once fixed stays. With E = Ŵ − W the error of a row is
e H′ eᵀ and its gradient in channel j is twice g_j = (e H′)_j, so with all other weights of the row
fixed the best value of a weight is

    w_j ← ŵ_j − g_j / H′_jj

(coordinate descent, as in QuantEase, arXiv:2309.01885). Likewise the best scale of a row's scale
group, whose weights are scale · level, moves by −Σ_j g_j level_j / (level H′ levelᵀ).

Both moves are minimisers of a parabola, rounded to the nearest point of a grid that the old value
is on as well, whatever its number format. The nearest point is never worse than any other, so no
move can raise a row's error.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.method.grid import Grid
from mi_experiments.method.number_formats import UNQUANTIZED, store_scale
from mi_experiments.method.sparsegpt import Swept
from mi_experiments.out_of_memory import in_pieces

RIDGE = 1e-4
"""Pull towards the old scale, as a fraction of the curvature."""

LARGEST_CHANGE = 4.0
"""A scale that wants to grow or shrink by more than this factor is left as it is."""

LEAF = 64
"""Channels that share one product for their gradient."""


def refine(
    swept: Swept,
    grid: Grid,
    target: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    rounds: int = 2,
    order: Int64[Tensor, "columns"] | None = None,
) -> tuple[Swept, Grid]:
    """Descend on the codes, then refit the scales, in turns.

    What is pruned, the widths and the zero points stay; no row's error rises. Where memory is
    short, fewer rows are refined at a time: they do not influence each other.

    Args:
        swept: The linear after the sweep, on ``grid``.
        grid: Levels of its weights.
        target: The weights that the sweep approximated, W or W*.
        hessian: H′, damped, by channel: both axes in storage order.
        rounds: How many turns.
        order: The channel at each position of the descent; natural by default.

    Returns:
        The refined linear, with its quadratic error under H′, and the grid it is on.

    Raises:
        MemoryShortage: There is no room for a single row.
        NumericalError: The quadratic error is not finite.
        ValueError: The Hessian has a diagonal entry that is not positive.
    """

    def refine_rows(start: int, stop: int) -> tuple[Swept, Grid]:
        part, levels = swept.of_rows(start, stop), grid.of_rows(start, stop)
        wanted = target[start:stop]
        for _ in range(rounds):
            part = _descend(part, levels, wanted, hessian, order, LEAF)
            part, levels = _refit_scales(part, levels, wanted, hessian)
        return _with_loss(part, wanted, hessian), levels

    parts = in_pieces(refine_rows, len(target), "rows")
    return Swept.join([part for part, _ in parts]), Grid.join([levels for _, levels in parts])


@torch.no_grad()
def descend(
    swept: Swept,
    grid: Grid,
    target: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    order: Int64[Tensor, "columns"] | None = None,
    leaf: int = LEAF,
) -> Swept:
    """Move every kept weight once to its best value given all others, one channel after another.

    Quantized weights go to the nearest code, the old one if two are equally near; the others take
    the minimiser as it is. The arithmetic is done in the dtype of the Hessian.

    Args:
        swept: The linear to start from, on ``grid``.
        grid: Levels of its weights.
        target: The weights to approximate.
        hessian: H′, damped, by channel.
        order: The channel at each position of the descent; natural by default.
        leaf: Channels that share one product for their gradient; no influence but on speed.

    Raises:
        NumericalError: The quadratic error is not finite.
        ValueError: The Hessian has a diagonal entry that is not positive.
    """
    return _with_loss(_descend(swept, grid, target, hessian, order, leaf), target, hessian)


@torch.no_grad()
def _descend(
    swept: Swept,
    grid: Grid,
    target: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    order: Int64[Tensor, "columns"] | None,
    leaf: int,
) -> Swept:
    """Do as `descend`, and leave the quadratic error as it was."""
    if (hessian.diagonal() <= 0).any():
        raise ValueError("the diagonal of the Hessian must be positive: damp it")
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    weight, error = _transposed(swept, target, hessian)
    # Kept on the host, so that the loop need not wait for the device.
    widths = grid.bits[order].cpu()
    for channels, bits in zip(torch.split(order, leaf), torch.split(widths, leaf), strict=True):
        panel = hessian[channels]
        coupling, gradient = panel[:, channels], panel @ error
        scale = _scales(grid, channels, weight.dtype)
        levels = weight[channels] / scale
        least, most = _room(levels, swept.pruned[:, channels].T, grid, channels)
        step = torch.zeros_like(gradient)
        newton = (scale * coupling.diagonal()[:, None]).reciprocal_().neg_()
        for j, width in enumerate(bits.tolist()):
            # The gradient knows the error before the leaf: add what the leaf has moved since.
            gradient[j].addmv_(step[:j].T, coupling[j, :j])
            change = gradient[j].mul_(newton[j])
            if width != UNQUANTIZED:
                grid.number_format.round_step_(change, levels[j], width)
            torch.mul(change.clamp_(least[j], most[j]), scale[j], out=step[j])
        error.index_add_(0, channels, step)
        weight.index_add_(0, channels, step)
    codes = swept.codes
    if codes is not None:
        columns = grid.quantized.nonzero()[:, 0]
        codes = codes.index_copy(1, columns, grid.encode(weight[columns].T, columns))
    return _on_grid(replace(swept, weight=weight.T, codes=codes), grid, hessian.dtype)


@torch.no_grad()
def refit_scales(
    swept: Swept,
    grid: Grid,
    target: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
) -> tuple[Swept, Grid]:
    """Refit every scale once by least squares, given the codes and all other scales.

    Each row's scale groups take turns. The new scale is as stored again; one that would leave
    [s/4, 4s] is rejected. Zero points and codes stay.

    Args:
        swept: The linear to start from, on ``grid``.
        grid: Levels of its weights.
        target: The weights to approximate.
        hessian: H′, damped, by channel.

    Raises:
        NumericalError: The quadratic error is not finite.
    """
    swept, grid = _refit_scales(swept, grid, target, hessian)
    return _with_loss(swept, target, hessian), grid


@torch.no_grad()
def _refit_scales(
    swept: Swept,
    grid: Grid,
    target: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
) -> tuple[Swept, Grid]:
    """Do as `refit_scales`, and leave the quadratic error as it was."""
    weight, error = _transposed(swept, target, hessian)
    scales = grid.scale.clone()
    sizes = torch.bincount(grid.scale_group).tolist()
    groups = torch.split(grid.scale_group.argsort(stable=True), sizes)
    quantized = grid.quantized[torch.stack([channels[0] for channels in groups])].tolist()
    for group, channels in enumerate(groups):
        if not quantized[group]:
            continue
        old = grid.scale[:, group].to(weight.dtype)
        level, panel = weight[channels] / old, hessian[channels]
        slope = (panel @ error).mul_(level).sum(0)
        curvature = (panel[:, channels] @ level).mul_(level).sum(0)
        new = store_scale(old - slope / (curvature * (1 + RIDGE)), grid.scale_bits)
        # Where all levels are zero the minimiser is 0/0, which is in no range.
        in_range = (new >= old / LARGEST_CHANGE) & (new <= old * LARGEST_CHANGE)
        new = torch.where(in_range, new, old)
        scales[:, group] = new.to(scales.dtype)
        error.index_add_(0, channels, level.mul_(new - old))
    refitted = replace(grid, scale=scales)
    return _on_grid(swept, refitted, hessian.dtype), refitted


def _transposed(
    swept: Swept, target: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"]
) -> tuple[Float[Tensor, "columns rows"], Float[Tensor, "columns rows"]]:
    """Copy the weights and their error so that a channel is contiguous."""
    weight = swept.weight.T.to(hessian.dtype, copy=True, memory_format=torch.contiguous_format)
    return weight, weight - target.T.to(hessian.dtype)


def _scales(
    grid: Grid, channels: Int64[Tensor, "chosen"], dtype: torch.dtype
) -> Float[Tensor, "chosen rows"]:
    """Scale of every weight of some channels; 1 where unquantized."""
    return grid.scale[:, grid.scale_group[channels]].T.to(dtype)


def _room(
    level: Float[Tensor, "chosen rows"],
    pruned: Bool[Tensor, "chosen rows"],
    grid: Grid,
    channels: Int64[Tensor, "chosen"],
) -> tuple[Float[Tensor, "chosen rows"], Float[Tensor, "chosen rows"]]:
    """Farthest a weight may move down and up, in levels; a pruned weight may not move."""
    zero = grid.zero_point[:, grid.scale_group[channels]].T
    low, high = grid.number_format.limits(grid.bits[channels, None], zero)
    unbounded = ~grid.quantized[channels, None]
    least = (low - level).masked_fill(unbounded, -torch.inf)
    most = (high - level).masked_fill(unbounded, torch.inf)
    return least.masked_fill_(pruned, 0), most.masked_fill_(pruned, 0)


def _on_grid(moved: Swept, grid: Grid, dtype: torch.dtype) -> Swept:
    """Decode the codes, so that weights are exactly on their grid."""
    weight = moved.weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if moved.codes is not None:
        columns = grid.quantized.nonzero()[:, 0]
        level = grid.decode(moved.codes[:, columns], columns)
        weight.index_copy_(1, columns, level.to(weight.dtype))
    return replace(moved, weight=weight)


@torch.no_grad()
def _with_loss(
    swept: Swept, target: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"]
) -> Swept:
    """Measure the quadratic error of every row."""
    error = swept.weight - target.to(swept.weight.dtype)
    quadratic_error = (error @ hessian).mul_(error).sum(1)
    if not quadratic_error.isfinite().all():
        raise NumericalError("the quadratic error of the refined linear is not finite")
    return replace(swept, quadratic_error=quadratic_error)
