"""Where a checkpoint stores each linear of a block: in which tensors, at which rows and columns.

In memory the experts of a mixture are slices of one parameter, and gate and up are one matrix; on
disk they may be matrices of their own, under other names. Which is which is the knowledge of
transformers: its own code takes row and column numbers apart in the place of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.streaming import BlockWeights


def find_places(
    weights: BlockWeights, block: int, linears: Sequence[LinearView]
) -> dict[str, list[dict[str, Any]]]:
    """Say of each linear of a loaded block which stored tensors hold it.

    Args:
        weights: the weights of the model.
        block: which is loaded.
        linears: the linears of the block.

    Returns:
        By linear, its parts: `tensor`, its name on disk; `expert`, the index in a 3-D tensor, or
        None; `transposed`, whether it is stored as [columns, rows]; `rows` and `columns` of the
        linear that it holds, as [start, stop, step] or, where that says too little, as {"order":
        […]}.

    Raises:
        InputError: a linear is stored in another way than as matrices.
    """
    first, total = {}, 0
    for linear in linears:
        first[linear.name] = total
        total += linear.rows
    names, starts = list(first), torch.tensor(list(first.values()))
    places: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    row_numbers, column_numbers = number(weights, block, linears, first)
    for tensor, rows in row_numbers.items():
        columns = column_numbers[tensor]
        for expert in range(len(rows)) if rows.ndim == 3 else [None]:
            row, column = (rows, columns) if expert is None else (rows[expert], columns[expert])
            if row.ndim != 2 or int(row.min()) < 0:
                continue
            transposed = not is_product(row, column)
            if transposed and not is_product(row.T, column.T):
                raise InputError(
                    f"{tensor} is no matrix, nor part of one: export=packed can say it"
                )
            down, across = (row[0], column[:, 0]) if transposed else (row[:, 0], column[0])
            at = int(torch.searchsorted(starts, down.min(), right=True)) - 1
            places[names[at]].append({
                "tensor": tensor,
                "expert": expert,
                "transposed": transposed,
                "rows": shorten((down - starts[at]).tolist()),
                "columns": shorten(across.tolist()),
            })
    return places


def number(
    weights: BlockWeights, block: int, linears: Sequence[LinearView], first: Mapping[str, int]
) -> tuple[dict[str, Int32[Tensor, "..."]], dict[str, Int32[Tensor, "..."]]]:
    """Return, in the place of each stored tensor, which row and column of a linear each number is.

    Args:
        weights: the weights of the model.
        block: which is loaded.
        linears: the linears of the block.
        first: number of the first row of each linear; what belongs to none gets -1.
    """
    owners: dict[str, LinearView] = {}
    for linear in linears:
        key = linear.parameter_name
        owners.setdefault(f"{key}.weight" if linear.key == "weight" else key, linear)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, tensor in weights.blocks[block].state_dict().items():
        key = f"{weights.path}.{block}.{name}"
        rows[key] = columns[key] = torch.full((), -1, dtype=torch.int32).expand(tensor.shape)
        if key in owners:
            linear = owners[key]
            # Views that repeat one row or column: they take no memory.
            count = len(tensor) * linear.rows if tensor.ndim == 3 else linear.rows
            down = torch.arange(count, dtype=torch.int32) + first[linear.name]
            down = down.view(*tensor.shape[:-2], linear.rows, 1)
            across = torch.arange(linear.columns, dtype=torch.int32)
            shape = (*tensor.shape[:-2], linear.rows, linear.columns)
            rows[key], columns[key] = down.expand(shape), across.expand(shape)
            if linear.transposed:
                rows[key], columns[key] = rows[key].mT, columns[key].mT
    return weights.as_stored(block, rows), weights.as_stored(block, columns)


def is_product(row: Int32[Tensor, "down across"], column: Int32[Tensor, "down across"]) -> bool:
    """Say whether the row number depends on the first axis alone, and the column on the second."""
    return bool((row == row[:, :1]).all()) and bool((column == column[:1]).all())


def shorten(numbers: list[int]) -> Any:
    """Return numbers as [start, stop, step] if they are evenly spaced, else as {"order": […]}."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    spaced = range(numbers[0], numbers[0] + step * len(numbers), step) if step > 0 else range(0)
    return [spaced.start, spaced.stop, step] if list(spaced) == numbers else {"order": numbers}
