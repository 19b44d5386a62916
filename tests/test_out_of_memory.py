"""Short memory: pieces cover everything once and give the same numbers; what cannot be halved ends
in one line."""

import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mi_experiments.errors import MemoryShortage, NumericalError
from mi_experiments.method import sparsegpt
from mi_experiments.method.gram import add_gram_, mirror_
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.hessian import HessianAccumulator, factorize
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.refine import refine
from mi_experiments.method.sparsegpt import sweep
from mi_experiments.out_of_memory import (
    count_retries,
    in_pieces,
    is_shortage,
    note_retry,
    shortage_in,
    until_it_fits,
)

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (CPU, True),
        (MemoryError(), True),
        (MemoryShortage("no memory for 1 rows"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (NumericalError("out of memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_is_told_from_other_errors(error, short):
    assert is_shortage(error) is short


def test_what_the_cpu_allocator_really_says_is_a_shortage():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_shortage(caught.value)


@given(st.integers(0, 60), st.integers(1, 60))
def test_pieces_cover_the_range_once_in_order_and_none_is_too_large(length, room):
    attempts = []

    def work(start, stop):
        attempts.append(stop - start)
        if stop - start > room:
            raise CPU
        return list(range(start, stop))

    with count_retries() as retries:
        pieces = in_pieces(work, length, "rows")
    assert [index for piece in pieces for index in piece] == list(range(length))
    assert max(map(len, pieces)) <= room
    assert retries.count == sum(attempt > room for attempt in attempts) == len(pieces) - 1


@pytest.mark.parametrize(("length", "least"), [(1, 1), (6, 6), (5, 3)])
def test_what_cannot_be_halved_ends_in_one_line_with_a_remedy(length, least):
    def work(start, stop):
        raise CPU

    with pytest.raises(
        MemoryShortage, match=r"no memory for \d rows .*memory.activations=disk"
    ) as e:
        in_pieces(work, length, "rows", least)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 75


def test_other_errors_pass_through_untouched():
    def work(*_):
        raise RuntimeError("shapes cannot be multiplied")

    for attempt in (lambda: in_pieces(work, 8, "rows"), lambda: until_it_fits(work, pytest.fail)):
        with pytest.raises(RuntimeError, match="shapes") as caught, shortage_in("plan"):
            attempt()
        assert type(caught.value) is RuntimeError


def test_work_starts_again_until_it_fits():
    size = 8

    def work():
        if size > 2:
            raise MemoryShortage("no memory") if size == 4 else CPU
        return size

    def shrink(reason):
        nonlocal size
        size //= 2

    assert until_it_fits(work, shrink) == 2


def test_counts_nest_and_end():
    with count_retries() as outer:
        note_retry("half", "reason")
        with count_retries() as inner:
            note_retry("half", "reason")
    note_retry("half", "reason")
    assert (outer.count, inner.count) == (2, 1)


def test_a_phase_says_that_its_memory_ran_out():
    with (
        pytest.raises(MemoryShortage, match=r"plan: out of memory \(.*can't allocate"),
        shortage_in("plan"),
    ):
        torch.empty(2**60)


def failing(function, times, choose=lambda *args: True):
    """Let a function run out of memory as often as said, among the calls that are chosen."""
    left = [times]

    def attempt(*args, **kwargs):
        if left[0] and choose(*args):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    return attempt


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("columns", "at"), [(3, 0), (700, 0), (700, 1), (700, 2)])
def test_a_gram_matrix_counts_every_token_once_in_every_panel(columns, at, monkeypatch):
    """Panels that were already added must not be added again."""
    inputs = normal(10, columns)
    expected = normal(columns, columns, seed=1).zero_().addmm_(inputs.T, inputs)
    calls = iter(range(1000))
    once = failing(torch.Tensor.addmm_, 1, lambda *_: next(calls) == at)
    monkeypatch.setattr(torch.Tensor, "addmm_", once)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    with count_retries() as retries:
        add_gram_(total, inputs)
    assert retries.count == 1
    torch.testing.assert_close(mirror_(total), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("operation", ["addmm_", "aminmax", "index_select_or_cat"])
def test_a_hessian_is_the_same_wherever_its_memory_runs_out(operation, monkeypatch):
    inputs = normal(40, 6)
    whole = HessianAccumulator(6, sample_tokens=9, dtype=torch.float64)
    whole.update(inputs[:10])
    whole.update(inputs[10:])
    expected = whole.finish()
    pieces = HessianAccumulator(6, sample_tokens=9, dtype=torch.float64)
    pieces.update(inputs[:10])
    owner, name = (
        (torch, "cat") if operation == "index_select_or_cat" else (torch.Tensor, operation)
    )
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), 3))
    with count_retries() as retries:
        pieces.update(inputs[10:])
    monkeypatch.undo()
    found = pieces.finish()
    assert retries.count == 3
    assert found.tokens == expected.tokens == 40
    assert torch.equal(found.sample, expected.sample)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-13, atol=1e-13)


def test_a_hessian_without_room_for_one_token_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "addmm_", failing(torch.Tensor.addmm_, 100))
    with pytest.raises(MemoryShortage, match="no memory for 1 tokens"):
        HessianAccumulator(6).update(torch.ones(8, 6))


def problem(rows=9, columns=24):
    tokens = normal(100, columns) * torch.linspace(0.2, 3, columns, dtype=torch.float64)
    weight = normal(rows, columns, seed=1)
    kind = torch.arange(columns) % 3
    bits = torch.tensor([3, 4, 16], dtype=torch.uint8)[kind]
    grid = fit_grid(weight, bits, scale_groups(kind, 4), clip_search=False)
    hessian = 2 / 100 * tokens.T @ tokens
    return weight, hessian, factorize(hessian, damping=0.01), grid


PATTERN = normal(9, 24, seed=2) > 0.3
APART = {
    "codes": {},
    "pattern": {"pruned": PATTERN},
    "windows": {"sparsity": Sparsity.structured(2, 4)},
}


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("room", [1, 4])
def test_rows_are_swept_apart_without_changing_one(kind, room, monkeypatch):
    weight, _, factor, grid = problem()
    whole = sweep(weight, factor, grid=grid, mask_block=8, **APART[kind])
    init = sparsegpt.SweepState.__init__
    short = failing(init, 1000, lambda _, rows, *__: len(rows) > room)
    monkeypatch.setattr(sparsegpt.SweepState, "__init__", short)
    with count_retries() as retries:
        pieces = sweep(weight, factor, grid=grid, mask_block=8, **APART[kind])
    assert retries.count == {1: 8, 4: 2}[room]
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.pruned, whole.pruned)
    torch.testing.assert_close(pieces.weight, whole.weight, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        pieces.quadratic_error, whole.quadratic_error, rtol=1e-12, atol=1e-12
    )


def test_a_pattern_chosen_among_all_rows_needs_them_all(monkeypatch):
    weight, _, factor, grid = problem()
    monkeypatch.setattr(sparsegpt.SweepState, "__init__", failing(sparsegpt.SweepState.__init__, 1))
    with pytest.raises(MemoryShortage, match="no memory for 9 rows"):
        sweep(weight, factor, grid=grid, sparsity=Sparsity(0.5), mask_block=8)


def test_rows_are_refined_apart_without_changing_one(monkeypatch):
    weight, hessian, factor, grid = problem()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    swept = sweep(weight, factor, grid=grid, sparsity=Sparsity(0.5), mask_block=8)
    whole, grids = refine(swept, grid, weight, damped, rounds=2)
    once = failing(torch.Tensor.index_add_, 1)
    monkeypatch.setattr(torch.Tensor, "index_add_", once)
    with count_retries() as retries:
        pieces, levels = refine(swept, grid, weight, damped, rounds=2)
    assert retries.count == 1
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(levels.scale, grids.scale)
    assert torch.equal(levels.zero_point, grids.zero_point)
    torch.testing.assert_close(pieces.weight, whole.weight, rtol=1e-12, atol=1e-12)
