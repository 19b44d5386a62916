"""A pattern is one value: what is registered at run time is chosen, checked, counted, stored."""

import math
from dataclasses import replace

import pytest
import torch

from mi_experiments.errors import AuditError, InputError
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.bit_count import count_storage, find_layout
from mi_experiments.method.bit_packing import pack, unpack
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.hessian import Factor
from mi_experiments.method.pruning import (
    PATTERNS,
    Pattern,
    Sparsity,
    check_dimensions,
)
from mi_experiments.method.sparsegpt import sweep

ROWS, COLUMNS, BLOCK = 5, 32, 8


class Columns(Pattern):
    """Whole columns, those of the smallest sums of scores; stored as a bit a column."""

    among_rows = True

    def choose(self, score, sparsity, selection):
        least = score.sum(0).argsort(stable=True)[: round(sparsity.ratio * score.shape[1])]
        return torch.zeros_like(score, dtype=torch.bool).index_fill_(1, least, value=True)

    def fault(self, pruned, sparsity):
        broken = int((pruned != pruned[:1]).any(0).sum())
        return f"{broken} columns are pruned in part" if broken else None

    def block_fault(self, count, weights, sparsity, selection):
        return None if count == sparsity.ratio * weights else "half of the columns were asked for"

    def count(self, rows, columns, sparsity):
        return columns, 1

    def pack(self, pruned, sparsity):
        return pruned[0].long().cpu()

    def unpack(self, numbers, rows, columns, sparsity):
        return numbers.bool().expand(rows, columns).clone()


class Alternating(Pattern):
    """Of every two consecutive pairs of channels one whole pair; a bit says which."""

    def window(self, sparsity):
        return 4

    def choose(self, score, sparsity, selection):
        pairs = score.reshape(len(score), -1, 2, 2).sum(-1)
        second = pairs[..., 1] < pairs[..., 0]
        return self.unpack(second.flatten().long(), *score.shape, sparsity)

    def fault(self, pruned, sparsity):
        same = torch.equal(
            self.unpack(self.pack(pruned, sparsity), *pruned.shape, sparsity), pruned
        )
        return None if same else "a pair of channels is kept or pruned in part"

    def count(self, rows, columns, sparsity):
        return rows * columns // 4, 1

    def pack(self, pruned, sparsity):
        return pruned.reshape(-1, 4)[:, 2].long().cpu()

    def unpack(self, numbers, rows, columns, sparsity):
        second = numbers.bool()[:, None].expand(-1, 2)
        return torch.cat([~second, second], 1).reshape(rows, columns)


MADE_UP = {"columns": Columns(), "alternating": Alternating()}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Register the patterns, as one more row of the table would."""
    for name, pattern in MADE_UP.items():
        monkeypatch.setitem(PATTERNS, name, pattern)


def swept_linear(sparsity):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    upper = (torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.1).triu(1) + torch.eye(COLUMNS)
    factor = Factor(upper, torch.arange(COLUMNS), 0.0, (0.0,))
    bits = torch.full((COLUMNS,), 3, dtype=torch.uint8)
    one = torch.zeros(COLUMNS, dtype=torch.int64)
    grid = fit_grid(weight, bits, scale_groups(one, None), clip_search=True)
    return sweep(weight, factor, grid=grid, sparsity=sparsity, mask_block=BLOCK), grid


def audit(swept, grid, sparsity):
    return audit_linear(
        swept, grid, sparsity, original=None, order=torch.arange(COLUMNS), mask_block=BLOCK,
        max_average_bits=None, stored=None,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "numbers"), [("columns", 32), ("alternating", 40)])
def test_a_pattern_goes_from_the_choice_to_the_packed_bits(name, numbers):
    sparsity = Sparsity(0.5, pattern=name)
    swept, grid = swept_linear(sparsity)
    assert audit(swept, grid, sparsity).sparsity == 0.5
    assert not swept.weight[swept.pruned].any()
    assert math.prod(sparsity.count(ROWS, COLUMNS)) == numbers
    counted = count_storage(grid, swept.pruned, sparsity, None)
    assert counted.pattern == numbers
    layout = find_layout(grid, swept.pruned, sparsity, None)
    streams = pack(swept.weight, swept.codes, swept.pruned, grid, None, layout)
    assert len(streams["pattern"]) == numbers // 8
    read = unpack(streams, layout)
    assert torch.equal(read.pruned, swept.pruned)
    assert torch.equal(read.weight, swept.weight)


@pytest.mark.parametrize("name", MADE_UP)
def test_one_weight_pruned_beside_the_pattern_fails(name):
    sparsity = Sparsity(0.5, pattern=name)
    swept, grid = swept_linear(sparsity)
    pruned = swept.pruned.clone()
    row, column = pruned.logical_not().nonzero()[0].tolist()
    pruned[row, column] = True
    weight = swept.weight.masked_fill(pruned, 0)
    with pytest.raises(AuditError, match="in part"):
        audit(replace(swept, weight=weight, pruned=pruned), grid, sparsity)
    with pytest.raises(ValueError, match="in part"):
        count_storage(grid, pruned, sparsity, None)


def test_windows_of_any_pattern_must_fit_the_columns():
    sparsity = Sparsity(0.5, pattern="alternating")
    check_dimensions({"a": 32}, sparsity, mask_block=8)
    with pytest.raises(InputError, match=r"a has 30 columns.* m = 4 for sparsity alternating"):
        check_dimensions({"a": 30}, sparsity, mask_block=8)


def test_a_name_is_stored_only_where_it_is_given():
    """So that plans and files of earlier versions, which had none, keep their hashes."""
    assert repr(Sparsity(0.5)) == "Sparsity(ratio=0.5, n=0, m=0)"
    assert Sparsity(0.5).stored() == {"ratio": 0.5, "n": 0, "m": 0}
    named = Sparsity(0.5, pattern="columns")
    assert Sparsity(**named.stored()) == named
    assert repr(named) == "Sparsity(ratio=0.5, n=0, m=0, pattern='columns')"
    assert Sparsity(0.5, 2, 4).kind is PATTERNS["windows"]
