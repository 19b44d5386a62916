"""The sweep: prune and quantize one channel after another, each time correcting the channels left.

SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323) in the form of Babai's nearest plane
(arXiv:2507.18553). With H′ = R Rᵀ, R upper triangular, and E = W − Ŵ the error is ‖E R‖². Column j
of E R is R_jj (w_j − ŵ_j) + Σ_{i<j} R_ij (w_i − ŵ_i), so once the channels before j are fixed, the
best value of channel j is

    t_j = w_j + Σ_{i<j} R_ij (w_i − ŵ_i) / R_jj

and rounding it costs R_jj² (t_j − ŵ_j)². One factor serves every width and every linear of a site;
nothing is inverted. The sums are matrix products by recursive halving.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int16, Int64
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.method.grid import Grid
from mi_experiments.method.hessian import Factor
from mi_experiments.method.number_formats import UNQUANTIZED
from mi_experiments.method.pruning import Selection, Sparsity, choose_pruned
from mi_experiments.out_of_memory import in_pieces

LEAF = 16
"""Sweep positions that are corrected one by one."""


@dataclass(frozen=True, eq=False)
class Swept:
    """A linear after the sweep, in storage order.

    Attributes:
        weight: Final weights; exactly 0 where pruned, ``grid.decode(codes)`` where quantized.
        codes: Codes of the quantized channels, 0 in the others; None where no channel is quantized.
        pruned: True where the weight was set to zero.
        quadratic_error: ‖(W − Ŵ) R‖² of each row: the quadratic error under the damped Hessian.
    """

    weight: Float[Tensor, "rows columns"]
    codes: Int16[Tensor, "rows columns"] | None
    pruned: Bool[Tensor, "rows columns"]
    quadratic_error: Float[Tensor, "rows"]

    def of_rows(self, start: int, stop: int) -> "Swept":
        """Return some rows, itself for all of them."""
        if stop - start == len(self.weight):
            return self
        codes = None if self.codes is None else self.codes[start:stop]
        return Swept(
            self.weight[start:stop],
            codes,
            self.pruned[start:stop],
            self.quadratic_error[start:stop],
        )

    @classmethod
    def join(cls, parts: Sequence["Swept"]) -> "Swept":
        """Return the whole of consecutive rows."""
        if len(parts) == 1:
            return parts[0]
        codes = [part.codes for part in parts if part.codes is not None]
        return cls(
            torch.cat([part.weight for part in parts]),
            torch.cat(codes) if codes else None,
            torch.cat([part.pruned for part in parts]),
            torch.cat([part.quadratic_error for part in parts]),
        )


@torch.no_grad()
def sweep(
    weight: Float[Tensor, "rows columns"],
    factor: Factor,
    *,
    grid: Grid | None = None,
    sparsity: Sparsity | None = None,
    pruned: Bool[Tensor, "rows columns"] | None = None,
    selection: Selection = Selection.exact,
    mask_block: int = 128,
    leaf: int = LEAF,
) -> Swept:
    """Prune and quantize a linear so that its output changes little.

    The arithmetic is done in the dtype of the factor. What is pruned is chosen at the start of each
    ``mask_block`` consecutive sweep positions, by the saliency (w R_jj)² of the weights that are
    optimal given what is already fixed (SparseGPT, section 3.3), exactly as many as asked.

    Where memory is short, fewer rows are swept at a time. Rows do not influence each other, but for
    an unstructured pattern that is still to be chosen, among all rows: that needs them all at once.

    Args:
        weight: Weights in storage order; not modified.
        factor: Factor of the damped Hessian, and the order of the sweep.
        grid: Levels of the quantized channels; None quantizes nothing.
        sparsity: How many weights to prune and in which pattern; None chooses none.
        pruned: A pattern to use as it is, instead of ``sparsity``.
        selection: How an unstructured pattern counts what it prunes.
        mask_block: Sweep positions whose pruned weights are chosen together.
        leaf: Sweep positions that are corrected one by one; has no influence but on speed.

    Returns:
        The compressed linear; the input itself, bit for bit, where nothing is pruned or quantized.

    Raises:
        MemoryShortage: There is no room for the rows that must be swept at once.
        NumericalError: A weight is not finite, or the sweep has diverged.
        ValueError: Both ``sparsity`` and ``pruned`` are given, or the sweep would tear apart the
            windows of an n:m pattern.
    """
    if sparsity is not None and pruned is not None:
        raise ValueError("give either a sparsity to choose a pattern for, or a pattern, not both")
    if sparsity is not None and sparsity.is_dense:
        sparsity = None
    check_sweep(weight, factor, sparsity, mask_block)
    if pruned is None:
        pruned = torch.zeros_like(weight, dtype=torch.bool)
    if sparsity is None and not pruned.any() and (grid is None or not grid.quantized.any()):
        # Nothing is rounded, so every target is the weight itself.
        exact = weight.to(factor.upper.dtype, copy=True)
        return Swept(exact, None, pruned, exact.new_zeros(len(exact)))
    chosen = pruned

    def sweep_rows(start: int, stop: int) -> Swept:
        rows = slice(start, stop)
        part = None if grid is None else grid.of_rows(start, stop)
        state = SweepState(weight[rows], factor, part, chosen[rows])

        def block(low: int, high: int) -> None:
            if sparsity is not None:
                state.choose(low, high, sparsity, selection)
            halve(low, high, leaf, state.fix, state.carry)

        halve(0, weight.shape[1], mask_block, block, state.carry)
        return state.finish()

    return Swept.join(in_pieces(sweep_rows, len(weight), "rows", least_rows(weight, sparsity)))


def check_sweep(
    weight: Float[Tensor, "rows columns"],
    factor: Factor,
    sparsity: Sparsity | None,
    mask_block: int,
) -> None:
    """Refuse weights that are not finite, and an n:m pattern that the sweep would tear apart.

    Raises:
        NumericalError: A weight is not finite.
        ValueError: The windows of an n:m pattern lie in several mask blocks.
    """
    if sparsity is not None and sparsity.window > 1:
        _check_windows(factor.order, sparsity.window, mask_block)
    if bad := int((~weight.isfinite()).sum()):
        raise NumericalError(f"{bad} of {weight.numel()} weights are not finite")


def least_rows(weight: Float[Tensor, "rows columns"], sparsity: Sparsity | None) -> int:
    """Return how many rows must be swept at once: all where a pattern is chosen among them."""
    return len(weight) if sparsity is not None and sparsity.kind.among_rows else 1


class SweepState:
    """The sweep's tensors, transposed so that a channel is contiguous, in sweep order.

    Attributes:
        error: (W − Ŵ)ᵀ, where Ŵ of a channel not yet fixed counts as zero.
        carried: (E R)ᵀ over the channels already fixed; of a fixed channel, its level if
            quantized, else its value.
        pruned: The pattern as far as it is chosen.
        quadratic_error: ‖E R‖² of each row, over the channels already fixed.
    """

    def __init__(
        self,
        weight: Float[Tensor, "rows columns"],
        factor: Factor,
        grid: Grid | None,
        pruned: Bool[Tensor, "rows columns"],
    ) -> None:
        self.order, self.upper, self.grid = factor.order, factor.upper, grid
        self.diagonal = self.upper.diagonal()[:, None]
        self.error = weight.to(self.upper.dtype).index_select(1, self.order).T.contiguous()
        self.carried = torch.zeros_like(self.error)
        self.pruned = pruned.index_select(1, self.order).T.contiguous()
        self.quadratic_error = self.error.new_zeros(len(weight))
        self.widths = [UNQUANTIZED] * len(self.order)
        if grid is not None:
            self.widths = grid.bits[self.order].tolist()
            self.scale_group = grid.scale_group[self.order]
            self.round_ = grid.number_format.round_
            self.scale = grid.scale.T.to(self.upper.dtype).contiguous()
            self.zero = grid.zero_point.T.to(self.upper.dtype).contiguous()
            limits = grid.number_format.limits(grid.group_bits[:, None], self.zero)
            self.least, self.most = (limit.expand_as(self.zero).clone() for limit in limits)

    def optimum(self, low: int, high: int) -> Float[Tensor, "span rows"]:
        """Return the weights that are optimal given all that is fixed before ``low``.

        All errors must have been carried this far. Such weights solve E R = 0 on the span S:
        W + (E R) R_SS⁻¹. They are what the published recursions hold in their place.
        """
        span = slice(low, high)
        shift = torch.linalg.solve_triangular(
            self.upper[span, span], self.carried[span].T, upper=True, left=False
        )
        optimum: Tensor = self.error[span] + shift.T
        return optimum

    def choose(self, low: int, high: int, sparsity: Sparsity, selection: Selection) -> None:
        """Choose what to prune in a block, given all that is fixed before it.

        The targets t_j are not what SparseGPT scores: they lack the corrections inside the block.
        """
        span = slice(low, high)
        # Not squared: the order is the same, and no square underflows to a tie or overflows.
        saliency = (self.optimum(low, high) * self.diagonal[span]).abs_()
        by_channel = self.order[span].argsort()
        pruned = choose_pruned(saliency.index_select(0, by_channel).T, sparsity, selection)
        self.pruned[span].index_copy_(0, by_channel, pruned.T)

    def carry(self, low: int, middle: int, high: int) -> None:
        """Carry the errors of low…middle into the columns middle…high of E R."""
        coupling = self.upper[low:middle, middle:high]
        self.carried[middle:high].addmm_(coupling.T, self.error[low:middle])

    def fix(self, low: int, high: int) -> None:
        """Fix the channels of a leaf one after another."""
        span = slice(low, high)
        upper, diagonal = self.upper[span, span], self.diagonal[span]
        error, carried, pruned = self.error[span], self.carried[span], self.pruned[span]
        fixed = error.T
        coupling = (upper / diagonal.T).unbind(1)
        target = torch.addcdiv(error, carried, diagonal)
        targets, errors, zeroed = target.unbind(0), error.unbind(0), pruned.unbind(0)
        scale, least, most = self.levels(low, high)
        for j, bits in enumerate(self.widths[low:high]):
            if j:
                targets[j].addmv_(fixed[:, :j], coupling[j][:j])
            if bits != UNQUANTIZED:
                self.round_(targets[j].div_(scale[j]), bits).clamp_(least[j], most[j])
                errors[j].addcmul_(targets[j], scale[j], value=-1)
            else:
                errors[j].sub_(targets[j].masked_fill_(zeroed[j], 0))
        self.quadratic_error += torch.addmm(carried, upper.T, error).square_().sum(0)
        carried.copy_(target)

    def levels(self, low: int, high: int) -> Iterator[tuple[Tensor, ...]]:
        """Scale, least and greatest level of a leaf's channels; pruned weights have only 0."""
        if self.grid is None or all(bits == UNQUANTIZED for bits in self.widths[low:high]):
            return iter(((), (), ()))
        group, pruned = self.scale_group[low:high], self.pruned[low:high]
        scale, least, most = (
            values.index_select(0, group) for values in (self.scale, self.least, self.most)
        )
        limits = least.masked_fill_(pruned, 0), most.masked_fill_(pruned, 0)
        return (rows.unbind(0) for rows in (scale, *limits))

    def put(self, fitted: Grid, groups: Int[Tensor, "fitted"]) -> None:
        """Take the grids of some scale groups, whose channels are still to be fixed."""
        self.scale[groups] = fitted.scale.T.to(self.scale.dtype)
        self.zero[groups] = zero = fitted.zero_point.T.to(self.zero.dtype)
        limits = fitted.number_format.limits(fitted.group_bits[:, None], zero)
        self.least[groups], self.most[groups] = limits

    def finish(self) -> Swept:
        """Bring the result into storage order."""
        if not self.quadratic_error.isfinite().all():
            if self.carried.isfinite().all():
                raise NumericalError(
                    f"the quadratic error of the sweep is beyond {self.quadratic_error.dtype}: the "
                    "weights are too large"
                )
            raise NumericalError(
                "the sweep diverged: its quadratic error is not finite; raise the damping"
            )
        position = self.order.argsort()
        pruned = self.pruned.index_select(0, position).T.contiguous()
        value, codes = self.carried.index_select(0, position), None
        if self.grid is not None and self.grid.quantized.any():
            grid = self.grid
            zero = self.zero.index_select(0, grid.scale_group)
            found = grid.number_format.encode(value, grid.bits[:, None], zero)
            codes = found.masked_fill_(~grid.quantized[:, None], 0).T.contiguous()
            # No zero is negative; the scale is 1 where nothing is quantized.
            value.add_(0.0).mul_(self.scale.index_select(0, grid.scale_group))
        return Swept(value.T.contiguous(), codes, pruned, self.quadratic_error)


def halve(
    low: int,
    high: int,
    unit: int,
    visit: Callable[[int, int], None],
    carry: Callable[[int, int, int], None],
) -> None:
    """Visit low…high in pieces of ``unit``, carrying from each left half into its right half.

    When a piece is visited everything before it has been carried into it, in few large products.
    """
    pieces = -(-(high - low) // unit)
    if pieces <= 1:
        visit(low, high)
        return
    middle = low + (pieces + 1) // 2 * unit
    halve(low, middle, unit, visit, carry)
    carry(low, middle, high)
    halve(middle, high, unit, visit, carry)


def _check_windows(order: Int64[Tensor, "columns"], m: int, mask_block: int) -> None:
    """Refuse a sweep order that spreads a window of m channels over several mask blocks."""
    if len(order) % m:
        raise ValueError(f"{len(order)} columns cannot be cut into windows of {m}")
    block = (order.argsort() // mask_block).view(-1, m)
    if (block != block[:, :1]).any():
        raise ValueError(
            f"windows of {m} channels lie in several mask blocks of {mask_block} sweep positions: "
            f"take a multiple of {m} and an order that moves windows whole"
        )
