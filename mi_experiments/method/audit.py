"""Check on a compressed linear what the plan promised, trusting nothing that the sweep says of it.

Every promise is recomputed from the tensors themselves, in time proportional to their size. What
fails raises `AuditError`, one line with the numbers; the caller adds which linear it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mi_experiments.errors import AuditError
from mi_experiments.method.grid import Grid
from mi_experiments.method.number_formats import UNQUANTIZED, smallest_scale, store_scale, top_code
from mi_experiments.method.pruning import Selection, Sparsity
from mi_experiments.method.sparsegpt import Swept

CHUNK = 2**22
"""Weights that are sorted at a time."""


@dataclass(frozen=True)
class AuditReport:
    """What was found in a linear that keeps its promises.

    Attributes:
        levels_max: Most distinct values that one (row, scale group) takes; 0 if not quantized.
        average_bits: Mean width of the codes over all weights.
        sparsity: Fraction of the weights that is pruned.
    """

    levels_max: int
    average_bits: float
    sparsity: float


def audit_linear(
    swept: Swept,
    grid: Grid | None,
    sparsity: Sparsity,
    *,
    original: Float[Tensor, "rows columns"] | None,
    order: Int64[Tensor, "columns"],
    mask_block: int,
    max_average_bits: float | None,
    stored: Float[Tensor, "rows columns"] | None,
    selection: Selection = Selection.exact,
) -> AuditReport:
    """Check finiteness, sparsity, grid membership, the budget and what will be stored.

    Args:
        swept: The compressed linear.
        grid: Levels of its weights; None if nothing was to be quantized.
        sparsity: What was to be pruned.
        original: Weights before the sweep, compared if nothing was to change; None to skip.
        order: The sweep's order of the channels.
        mask_block: Sweep positions whose pruned weights were chosen together.
        max_average_bits: Average width that must not be exceeded; None if the budget spans more
            than this linear.
        stored: The weights in the dtype of the model; None to skip.
        selection: How an unstructured pattern counts what it prunes.

    Raises:
        AuditError: A promise is broken.
    """
    weight, pruned = swept.weight, swept.pruned
    if bad := int((~weight.isfinite()).count_nonzero()):
        raise AuditError(f"{bad} of {weight.numel()} weights are not finite")
    if bad := int((weight[pruned] != 0).count_nonzero()):
        raise AuditError(f"{bad} of {int(pruned.count_nonzero())} pruned weights are not zero")
    if fault := sparsity.kind.fault(pruned, sparsity):
        raise AuditError(fault)
    _audit_mask_blocks(pruned, sparsity, order, mask_block, selection)
    levels_max = 0 if grid is None else _audit_grid(swept, grid)
    if stored is not None and not torch.equal(stored, weight.to(stored.dtype)):
        bad = int((stored != weight.to(stored.dtype)).count_nonzero())
        raise AuditError(f"{bad} of {weight.numel()} stored weights are not those audited")
    bits = weight.shape[1] * UNQUANTIZED if grid is None else int(grid.bits.sum())
    average_bits = bits / weight.shape[1]
    if max_average_bits is not None and average_bits > max_average_bits:
        raise AuditError(f"{average_bits} bits on average where {max_average_bits} were allowed")
    untouched = sparsity.is_dense and (grid is None or not grid.quantized.any())
    if untouched and original is not None and not torch.equal(weight, original.to(weight.dtype)):
        bad = int((weight != original.to(weight.dtype)).count_nonzero())
        raise AuditError(f"{bad} weights changed although none was to be pruned or quantized")
    return AuditReport(levels_max, average_bits, int(pruned.count_nonzero()) / pruned.numel())


def vanishes(target: Float[Tensor, "rows columns"], swept: Swept, grid: Grid | None) -> bool:
    """Say whether weights are lost that were not to be pruned: they are too small to be stored.

    A scale is then the smallest that can be stored, or a matrix became zero without being pruned.
    """
    if grid is not None and bool((grid.scale <= smallest_scale(grid.scale_bits)).any()):
        return True
    return bool(target.any()) and not swept.weight.any() and not swept.pruned.all()


def _audit_mask_blocks(
    pruned: Bool[Tensor, "rows columns"],
    sparsity: Sparsity,
    order: Int64[Tensor, "columns"],
    mask_block: int,
    selection: Selection,
) -> None:
    """Count the pruned weights of every mask block."""
    rows, columns = pruned.shape
    if not torch.equal(order.sort().values, torch.arange(columns, device=order.device)):
        raise AuditError(f"the sweep order is no permutation of {columns} channels")
    counts = torch.split(pruned.count_nonzero(0)[order].cpu(), mask_block)
    for block, count in enumerate(counts):
        found, weights = int(count.sum()), rows * len(count)
        if fault := sparsity.kind.block_fault(found, weights, sparsity, selection):
            start = block * mask_block
            raise AuditError(
                f"{found} weights are pruned at sweep positions {start} to "
                f"{start + len(count) - 1} where {fault}"
            )


def _audit_grid(swept: Swept, grid: Grid) -> int:
    """Check that every kept weight of a quantized channel is on its grid.

    Returns:
        The most distinct levels in one (row, scale group), counted from the weights alone.
    """
    columns = grid.quantized.nonzero()[:, 0]
    if not columns.numel():
        return 0
    if swept.codes is None:
        raise AuditError(f"{columns.numel()} channels are quantized but have no codes")
    kind = f"float{grid.scale_bits}"
    exact = grid.scale == store_scale(grid.scale, grid.scale_bits)
    if bad := int((~((grid.scale > 0) & grid.scale.isfinite() & exact)).count_nonzero()):
        raise AuditError(f"{bad} of {grid.scale.numel()} scales are not positive {kind} numbers")
    levels_max = 0
    rows = torch.arange(len(swept.weight), device=columns.device)
    for part in torch.split(rows, max(1, CHUNK // swept.weight.shape[1])):
        weight, kept = swept.weight[part], ~swept.pruned[part]
        levels_max = max(levels_max, _audit_levels(weight, kept, grid))
        _audit_codes(weight, kept, swept.codes[part], grid, part, columns)
    return levels_max


def _audit_levels(
    weight: Float[Tensor, "part columns"], kept: Bool[Tensor, "part columns"], grid: Grid
) -> int:
    """Count the distinct kept values of each (row, scale group), which no code can hide."""
    levels_max = 0
    # Pruned weights are sorted to the end and not counted; finite weights never equal infinity.
    values = weight.masked_fill(~kept, torch.inf)
    for bits, members in _scale_groups(grid):
        value = values[:, members].sort(dim=-1).values
        new = value.isfinite()
        new[..., 1:] &= value[..., 1:] != value[..., :-1]
        levels = new.count_nonzero(-1)
        most = int(levels.max())
        if most > 2**bits:
            many = int((levels > 2**bits).count_nonzero())
            raise AuditError(
                f"{many} of {levels.numel()} rows of scale groups of "
                f"{bits} bits take more than {2**bits} levels, up to {most}"
            )
        levels_max = max(levels_max, most)
    return levels_max


def _scale_groups(grid: Grid) -> Iterator[tuple[int, Int64[Tensor, "groups size"]]]:
    """Batch the channels of quantized scale groups of equal width and size."""
    index = grid.scale_group.long()
    size = index.bincount()
    width = grid.bits.new_zeros(len(size)).index_copy_(0, index, grid.bits).long()
    by_group = index.argsort(stable=True)
    first = size.cumsum(0) - size
    for bits, length in torch.unique(torch.stack([width, size], 1), dim=0).tolist():
        if bits != UNQUANTIZED and length:
            start = first[(width == bits) & (size == length)]
            yield bits, by_group[start[:, None] + torch.arange(length, device=start.device)]


def _audit_codes(
    weight: Float[Tensor, "part columns"],
    kept: Bool[Tensor, "part columns"],
    codes: Int[Tensor, "part columns"],
    grid: Grid,
    rows: Int64[Tensor, "part"],
    columns: Int64[Tensor, "quantized"],
) -> None:
    """Check weight = scale · level of its code, exactly, with code and zero point in range.

    A zero point that is not stored must be the one that its width implies. The product of an 11-bit
    scale and an 8-bit code is exact in float32, and that of other scales and levels is rounded
    once, here as there: no tolerance is due.
    """
    group = grid.scale_group[columns]
    scale, zero = grid.scale[rows][:, group], grid.zero_point[rows][:, group]
    code, left = codes[:, columns], kept[:, columns]
    bits = grid.bits[columns]
    top, implied = top_code(bits), grid.number_format.implied_zero(bits)
    free = torch.tensor([grid.number_format.zero_bits(width) > 0 for width in bits.tolist()])
    wrong = (zero < 0) | (zero > top) | ((zero != implied) & ~free.to(zero.device))
    if bad := int(wrong.count_nonzero()):
        raise AuditError(f"zero points of {bad} quantized weights are not codes of their width")
    if bad := int((((code < 0) | (code > top)) & left).count_nonzero()):
        raise AuditError(f"codes of {bad} quantized weights do not fit their width")
    level = scale * grid.number_format.decode(code.masked_fill(~left, 0), bits, zero)
    off = (weight[:, columns] != level) & left
    if bad := int(off.count_nonzero()):
        row, at = off.nonzero()[0].tolist()
        raise AuditError(
            f"{bad} quantized weights are not on their grid: row {int(rows[row])}, "
            f"channel {int(columns[at])} is {float(weight[row, columns[at]])!r}, "
            f"its code means {float(level[row, at])!r}"
        )
