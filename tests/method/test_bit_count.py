"""Every stored bit is counted by hand, packed into exactly that many, and read back."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.method import bit_packing
from mi_experiments.method.bit_count import Storage, average_bits, count_storage, find_layout
from mi_experiments.method.bit_packing import pack, unpack
from mi_experiments.method.grid import Grid, scale_groups
from mi_experiments.method.number_formats import SYMMETRIC, Uniform, store_scale
from mi_experiments.method.pruning import Sparsity, choose_pruned

DENSE, HALF = Sparsity(0.0), Sparsity(0.5)


def random_grid(rows, bits, channel_group, group_size, generator, symmetric=False, scale_bits=16):
    """Draw a grid as `fit_grid` would fit it: scale 1 and zero point 0 where unquantized."""
    shared = scale_groups(channel_group, group_size)
    width = torch.zeros(int(shared.max()) + 1, dtype=torch.int32)
    width[shared.long()] = bits.int()
    shape = (rows, len(width))
    scale = store_scale(torch.rand(shape, generator=generator) + 0.1, scale_bits)
    zero = torch.randint(0, 2**16, shape, generator=generator).int() % 2**width
    if symmetric:
        zero = (2 ** (width - 1)).expand(shape).int()
    plain = width == 16
    scale, zero = scale.masked_fill(plain, 1.0), zero.masked_fill(plain, 0)
    return Grid(bits, shared, scale, zero, scale_bits, Uniform(symmetric))


def random_linear(grid, sparsity, rows, columns, generator, dtype=torch.float16):
    """Draw weights on the grid, 16-bit ones off it, zeros where pruned."""
    pruned = choose_pruned(torch.rand(rows, columns, generator=generator), sparsity)
    weight = torch.randn(rows, columns, generator=generator).to(dtype).float()
    codes = None
    if grid is not None:
        codes = torch.randint(0, 2**16, weight.shape, generator=generator) % 2 ** grid.bits.long()
        codes = codes.masked_fill(pruned | ~grid.quantized, 0).to(torch.int16)
        at = grid.quantized.nonzero()[:, 0]
        weight[:, at] = grid.decode(codes[:, at], at)
    return weight.masked_fill(pruned, 0), codes, pruned


def uniform_grid(rows, columns, width, group_size=None):
    one_group = torch.zeros(columns, dtype=torch.int64)
    bits = torch.full((columns,), width, dtype=torch.uint8)
    return random_grid(rows, bits, one_group, group_size, torch.Generator().manual_seed(0))


def half_pruned(rows, columns):
    return torch.arange(rows * columns).view(rows, columns) % 2 == 0


def test_half_pruned_four_bits_cost_three_bits_and_metadata():
    grid, pruned = uniform_grid(4, 8, 4), half_pruned(4, 8)
    counted = count_storage(grid, pruned, HALF, None)
    assert counted == Storage(
        weights=32, codes=16 * 4, scales=4 * 16, zero_points=4 * 4, pattern=32, group_index=4
    )
    assert (counted.codes + counted.pattern) / counted.weights == 3.0
    assert counted.effective_bits == 180 / 32


def test_two_of_four_costs_three_bits_a_window():
    grid = uniform_grid(2, 8, 4, group_size=4)
    counted = count_storage(grid, half_pruned(2, 8), Sparsity.structured(2, 4), None)
    assert counted == Storage(
        weights=16, codes=8 * 4, scales=4 * 16, zero_points=4 * 4, pattern=4 * 3, group_index=4
    )


@pytest.mark.parametrize(
    ("n", "m", "bits"), [(1, 2, 1), (1, 4, 2), (2, 4, 3), (4, 8, 7), (4, 4, 0)]
)
def test_a_window_costs_the_logarithm_of_its_patterns(n, m, bits):
    pruned = (torch.arange(24) % m >= n).expand(3, 24)
    assert count_storage(None, pruned, Sparsity.structured(n, m), None).pattern == 72 // m * bits


def test_mixed_widths_pay_for_their_index_and_unquantized_channels_sixteen_bits():
    group = torch.tensor([0, 1, 0, 2, 2, 1])
    bits = torch.tensor([2, 16, 2, 3, 3, 16], dtype=torch.uint8)
    grid = random_grid(5, bits, group, 1, torch.Generator().manual_seed(0))
    pruned = torch.zeros(5, 6, dtype=torch.bool)
    assert count_storage(grid, pruned, DENSE, group) == Storage(
        weights=30,
        codes=5 * (2 + 16 + 2 + 3 + 3 + 16),
        scales=5 * 4 * 16,
        zero_points=5 * (2 + 2 + 3 + 3),
        pattern=0,
        group_index=6 * 2 + 3 * 4,
    )
    assert average_bits(bits) == 7.0


def test_a_symmetric_grid_stores_no_zero_points():
    one = torch.zeros(4, dtype=torch.int64)
    bits = torch.full((4,), 3, dtype=torch.uint8)
    grid = random_grid(2, bits, one, None, torch.Generator().manual_seed(0), symmetric=True)
    pruned = torch.zeros(2, 4, dtype=torch.bool)
    counted = count_storage(grid, pruned, DENSE, None)
    assert counted == Storage(8, 24, 32, 0, 0, 4)


def test_a_float32_scale_costs_thirty_two_bits():
    one, generator = torch.zeros(4, dtype=torch.int64), torch.Generator().manual_seed(0)
    bits = torch.full((4,), 3, dtype=torch.uint8)
    grid = random_grid(2, bits, one, None, generator, scale_bits=32)
    counted = count_storage(grid, torch.zeros(2, 4, dtype=torch.bool), DENSE, None)
    assert counted == Storage(8, 24, 64, 6, 0, 4)


def test_without_a_grid_the_weights_left_cost_sixteen_bits():
    pruned = half_pruned(2, 8)
    assert count_storage(None, pruned, HALF, None) == Storage(16, 8 * 16, 0, 0, 16, 0)
    assert count_storage(None, pruned & False, DENSE, None).effective_bits == 16.0


@st.composite
def linears(draw):
    """Draw a linear of any shape, widths, grouping, pattern, symmetry and 16-bit dtype."""
    m = draw(st.integers(1, 6))
    rows, columns = draw(st.integers(1, 5)), m * draw(st.integers(1, 5))
    sparsity = draw(
        st.sampled_from([DENSE, Sparsity(draw(st.floats(0, 1)))])
        | st.integers(0, m).map(lambda n: Sparsity.structured(n, m))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    symmetric = draw(st.booleans())
    grid = group = None
    if draw(st.booleans()):
        group = torch.randint(0, draw(st.integers(1, 5)), (columns,), generator=generator) * 3
        width = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16])
        bits = torch.tensor(draw(st.lists(width, min_size=13, max_size=13)), dtype=torch.uint8)
        size = draw(st.none() | st.integers(1, 4))
        wide = draw(st.sampled_from([16, 32]))
        grid = random_grid(rows, bits[group], group, size, generator, symmetric, wide)
    weight, codes, pruned = random_linear(grid, sparsity, rows, columns, generator, dtype)
    return weight, codes, pruned, grid, group, sparsity, dtype


def assert_round_trip(linear):
    weight, codes, pruned, grid, group, sparsity, dtype = linear
    layout = find_layout(grid, pruned, sparsity, group, dtype=dtype)
    streams = pack(weight, codes, pruned, grid, group, layout)
    counted = count_storage(grid, pruned, sparsity, group)
    names = [field.name for field in fields(Storage) if field.name != "weights"]
    assert {name: len(streams[name]) for name in streams} == {
        name: -(-getattr(counted, name) // 8) for name in names
    }
    read = unpack(streams, layout)
    assert torch.equal(read.weight, weight)
    assert torch.equal(read.pruned, pruned)
    if grid is None:
        assert read.grid is None
        return
    assert torch.equal(read.codes, codes.long())
    for name in ("bits", "scale_group", "scale", "zero_point"):
        assert torch.equal(getattr(read.grid, name), getattr(grid, name))
    assert read.grid.scale_bits == grid.scale_bits


@given(linears())
@settings(max_examples=150, deadline=None)
def test_streams_have_the_counted_bytes_and_are_read_back_exactly(linear):
    assert_round_trip(linear)


@given(linears(), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_chunks_that_end_inside_a_byte_change_nothing(linear, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_packing, "CHUNK", chunk)
        assert_round_trip(linear)


def test_every_pattern_of_a_window_has_its_own_number():
    sparsity = Sparsity.structured(3, 7)
    kept = torch.combinations(torch.arange(7), 3)
    pruned = torch.ones(35, 7, dtype=torch.bool).scatter_(1, kept, value=False)
    ranks = sparsity.kind.pack(pruned, sparsity)
    assert ranks.sort().values.tolist() == list(range(35))
    assert torch.equal(sparsity.kind.unpack(ranks, 35, 7, sparsity), pruned)


def test_bits_are_written_lowest_first_without_gaps():
    stream = bit_packing._write([(torch.tensor([0b101, 0b110, 0b111]), 3), (torch.tensor([1]), 2)])
    assert stream.tolist() == [0b11_110_101, 0b011]


def test_what_the_streams_could_not_say_is_refused():
    grid, dense = uniform_grid(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="although the sparsity is 0"):
        count_storage(grid, half_pruned(2, 8), DENSE, None)
    with pytest.raises(ValueError, match="keep 2 of 4"):
        count_storage(grid, dense, Sparsity.structured(2, 4), None)
    with pytest.raises(ValueError, match="cut into windows of 3"):
        count_storage(grid, dense, Sparsity.structured(1, 3), None)
    shifted = replace(grid, zero_point=grid.zero_point * 0, number_format=SYMMETRIC)
    with pytest.raises(ValueError, match="zero point that is not stored"):
        count_storage(shifted, dense, DENSE, None)
    with pytest.raises(ValueError, match="16 bits, not as"):
        find_layout(grid, dense, DENSE, None, dtype=torch.float32)
    mixed = torch.tensor([2] * 4 + [3] * 4, dtype=torch.uint8)
    halves = torch.arange(8) // 4
    two = random_grid(2, mixed, halves, None, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="different bits"):
        count_storage(two, dense, DENSE, None)
    interleaved = Grid(grid.bits, (torch.arange(8) % 2).int(), two.scale, two.zero_point)
    with pytest.raises(ValueError, match="not chunks of 4"):
        count_storage(interleaved, dense, DENSE, None)
