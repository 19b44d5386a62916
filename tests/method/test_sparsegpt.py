"""The sweep against explicit OBS elimination and the classic recursion, both written out here."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mi_experiments.errors import NumericalError
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.hessian import Factor
from mi_experiments.method.number_formats import Uniform
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.sparsegpt import sweep

TOLERANCE = 1e-12
ROWS, COLUMNS = 7, 37
HALF = Sparsity(0.5)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_hessian(columns, seed=0, dtype=torch.float64):
    """A strongly coupled Hessian: an AR(1) process with channels of very different energy."""
    lag = (torch.arange(columns)[:, None] - torch.arange(columns)).abs()
    energy = torch.exp(normal(columns, seed=seed) / 2)
    coupling = torch.linalg.cholesky(0.9 ** lag.double()).mT
    tokens = normal(4 * columns, columns, seed=seed + 1) @ coupling * energy
    return (2 / len(tokens) * tokens.mT @ tokens).to(dtype)


def factorise(hessian, order=None):
    order = torch.arange(len(hessian)) if order is None else order
    swept = hessian[order][:, order]
    upper = torch.linalg.cholesky(swept.flip(0, 1)).flip(0, 1)
    return Factor(upper, order, 0.0, (0.0,))


def shuffled(columns, window=1, seed=5):
    """A random order that moves windows of channels whole."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randperm(columns // window, generator=generator)
    inside = torch.stack([
        torch.randperm(window, generator=generator) for _ in range(columns // window)
    ])
    return (windows[:, None] * window + inside).flatten()


def make_grid(weight, widths=(4,), *, symmetric=False, group_size=5):
    """Widths in turn over interleaved channel groups, so that leaves and scale groups mix."""
    kind = torch.arange(weight.shape[1]) * 7 % 11 % len(widths)
    bits = torch.tensor(widths, dtype=torch.uint8)[kind]
    groups = scale_groups(kind, group_size)
    return fit_grid(weight, bits, groups, number_format=Uniform(symmetric), clip_search=True)


def round_channel(value, grid, channel):
    """One channel to its grid, by the definition."""
    bits = int(grid.bits[channel])
    if bits == 16:
        return value
    group = int(grid.scale_group[channel])
    scale, zero = grid.scale[:, group].to(value), grid.zero_point[:, group]
    return scale * (((value / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


def choose(saliency, sparsity, channels):
    """The exact number of smallest saliencies, element by element."""
    rows, width = saliency.shape
    pruned = torch.zeros(rows, width, dtype=torch.bool)
    if sparsity.m:
        for window in set((channels // sparsity.m).tolist()):
            inside = ((channels // sparsity.m) == window).nonzero()[:, 0].tolist()
            for row in range(rows):
                ranked = sorted(inside, key=lambda j, row=row: saliency[row, j])
                pruned[row, ranked[: sparsity.m - sparsity.n]] = True
        return pruned
    ranked = sorted(range(rows * width), key=lambda k: saliency.flatten()[k])
    pruned.view(-1)[ranked[: round(sparsity.ratio * rows * width)]] = True
    return pruned


def explicit_obs(weight, hessian, order, mask_block, grid=None, sparsity=None, pruned=None):
    """Optimal brain surgeon with a fresh inverse of the remaining Hessian for every channel."""
    remaining, hessian = weight[:, order].clone(), hessian[order][:, order]
    columns = len(order)
    pruned = torch.zeros_like(weight, dtype=torch.bool) if pruned is None else pruned[:, order]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % mask_block == 0 and sparsity is not None:
            block = range(j, min(j + mask_block, columns))
            variance = torch.stack([inverses[k][0, 0] for k in block])
            saliency = remaining[:, j : block.stop].square() / variance
            pruned[:, j : block.stop] = choose(saliency, sparsity, order[j : block.stop])
        value = remaining[:, j] if grid is None else round_channel(remaining[:, j], grid, order[j])
        value = torch.where(pruned[:, j], 0, value)
        error = (remaining[:, j] - value) / inverses[j][0, 0]
        remaining[:, j:] -= error[:, None] * inverses[j][0]
        remaining[:, j] = value
    back = order.argsort()
    return remaining[:, back], pruned[:, back]


def classic_sparsegpt(weight, hessian, mask_block, grid=None, sparsity=None):
    """The published recursion: upper Cholesky factor of the inverse, lazy blocks."""
    weight, columns = weight.clone(), len(hessian)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pruned, loss = torch.zeros_like(weight, dtype=torch.bool), torch.zeros(len(weight)).to(weight)
    for low in range(0, columns, mask_block):
        high = min(low + mask_block, columns)
        block, errors = weight[:, low:high].clone(), torch.zeros_like(weight[:, low:high])
        factor = inverse[low:high, low:high]
        if sparsity is not None:
            saliency = (block / factor.diagonal()).square()
            pruned[:, low:high] = choose(saliency, sparsity, torch.arange(low, high))
        for j in range(high - low):
            value = block[:, j]
            if grid is not None:
                value = round_channel(value, grid, low + j)
            value = torch.where(pruned[:, low + j], 0, value)
            errors[:, j] = (block[:, j] - value) / factor[j, j]
            loss += errors[:, j].square()
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
            weight[:, low + j] = value
        weight[:, high:] -= errors @ inverse[low:high, high:]
    return weight, pruned, loss


def quadratic(weight, result, hessian):
    error = weight - result
    return ((error @ hessian) * error).sum(1)


TASKS = {
    "prune": (None, HALF),
    "prune a third": (None, Sparsity(1 / 3)),
    "quantize": ((3,), None),
    "quantize mixed": ((2, 16, 4, 3), None),
    "joint": ((4,), HALF),
    "joint mixed": ((2, 4, 16), Sparsity(0.3)),
    "prune all": ((4,), Sparsity(1.0)),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mask_block", [1, 4, 12, 128, COLUMNS])
@pytest.mark.parametrize("permuted", [False, True])
def test_sweep_equals_explicit_obs(task, mask_block, permuted):
    widths, sparsity = TASKS[task]
    weight, hessian = normal(ROWS, COLUMNS), make_hessian(COLUMNS)
    order = shuffled(COLUMNS) if permuted else torch.arange(COLUMNS)
    grid = widths and make_grid(weight, widths)
    expected, pruned = explicit_obs(weight, hessian, order, mask_block, grid, sparsity)
    result = sweep(
        weight,
        factorise(hessian, order),
        grid=grid,
        sparsity=sparsity,
        mask_block=mask_block,
        leaf=5,
    )
    assert torch.equal(result.pruned, pruned)
    assert (result.weight - expected).abs().max() < TOLERANCE
    torch.testing.assert_close(
        result.quadratic_error, quadratic(weight, expected, hessian), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (0, 4)])
@pytest.mark.parametrize("widths", [None, (3,), (2, 16)])
@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("permuted", [False, True])
def test_structured_sweep_equals_explicit_obs(n, m, widths, blocks, permuted):
    weight, hessian = normal(ROWS, 40), make_hessian(40)
    order = shuffled(40, m) if permuted else torch.arange(40)
    grid, sparsity = widths and make_grid(weight, widths), Sparsity.structured(n, m)
    expected, pruned = explicit_obs(weight, hessian, order, blocks * m, grid, sparsity)
    result = sweep(
        weight,
        factorise(hessian, order),
        grid=grid,
        sparsity=sparsity,
        mask_block=blocks * m,
        leaf=3,
    )
    assert torch.equal(result.pruned, pruned)
    assert (result.pruned.view(ROWS, -1, m).sum(-1) == m - n).all()
    assert (result.weight - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("widths", [None, (4,)])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_given_pattern_is_used_as_it_is(widths, permuted):
    weight, hessian = normal(ROWS, COLUMNS), make_hessian(COLUMNS)
    pattern = normal(ROWS, COLUMNS, seed=9) > 0.3
    order = shuffled(COLUMNS) if permuted else torch.arange(COLUMNS)
    grid = widths and make_grid(weight, widths)
    expected, _ = explicit_obs(weight, hessian, order, 8, grid, pruned=pattern)
    result = sweep(weight, factorise(hessian, order), grid=grid, pruned=pattern)
    assert torch.equal(result.pruned, pattern)
    assert not result.weight[pattern].any()
    assert (result.weight - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("columns", "mask_block"), [(128, 32), (150, 128), (37, 1)])
def test_sweep_equals_the_classic_recursion(task, columns, mask_block):
    widths, sparsity = TASKS[task]
    weight, hessian = normal(12, columns), make_hessian(columns)
    grid = widths and make_grid(weight, widths, symmetric=True, group_size=16)
    expected, pruned, loss = classic_sparsegpt(weight, hessian, mask_block, grid, sparsity)
    result = sweep(weight, factorise(hessian), grid=grid, sparsity=sparsity, mask_block=mask_block)
    assert torch.equal(result.pruned, pruned)
    assert (result.weight - expected).abs().max() < TOLERANCE
    torch.testing.assert_close(result.quadratic_error, loss, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("task", TASKS)
def test_the_leaf_size_has_no_influence(task):
    widths, sparsity = TASKS[task]
    weight, factor = normal(ROWS, COLUMNS), factorise(make_hessian(COLUMNS), shuffled(COLUMNS))
    grid = widths and make_grid(weight, widths)
    results = [
        sweep(weight, factor, grid=grid, sparsity=sparsity, mask_block=16, leaf=leaf)
        for leaf in (1, 2, 3, 7, 16, 1000)
    ]
    for result in results[1:]:
        assert torch.equal(result.pruned, results[0].pruned)
        assert (result.weight - results[0].weight).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sparsity", [None, HALF, Sparsity.structured(2, 4)])
def test_codes_reproduce_the_weights_exactly(dtype, symmetric, sparsity):
    weight = normal(ROWS, 40, dtype=dtype)
    grid = make_grid(weight, (2, 4, 16, 8), symmetric=symmetric)
    factor = factorise(make_hessian(40, dtype=dtype), shuffled(40, 4))
    result = sweep(weight, factor, grid=grid, sparsity=sparsity, mask_block=8)
    columns = grid.quantized.nonzero()[:, 0]
    codes, levels = result.codes[:, columns], result.weight[:, columns]
    top = 2 ** grid.bits[columns].int() - 1
    zero = grid.zero_point[:, grid.scale_group[columns]]
    assert ((codes >= 0) & (codes <= top)).all()
    assert torch.equal(grid.decode(codes, columns), levels)
    assert torch.equal(codes[result.pruned[:, columns]].int(), zero[result.pruned[:, columns]])
    assert not result.codes[:, ~grid.quantized].any()
    assert not result.weight[result.pruned].any()
    assert not result.weight[result.pruned].signbit().any()
    for row in range(ROWS):
        for group in grid.scale_group[columns].unique():
            inside = grid.scale_group == group
            levels = result.weight[row, inside].unique()
            assert len(levels) <= 2 ** int(grid.bits[inside][0])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("mask_block", [8, 37])
def test_every_mask_block_has_exactly_its_count_even_if_all_scores_tie(ratio, mask_block):
    weight, factor = torch.ones(ROWS, COLUMNS).double(), factorise(torch.eye(COLUMNS).double())
    result = sweep(weight, factor, sparsity=Sparsity(ratio), mask_block=mask_block)
    for block in result.pruned.split(mask_block, dim=1):
        assert block.sum() == round(ratio * block.numel())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_do_is_bit_identical(weight_dtype):
    weight = normal(ROWS, COLUMNS).to(weight_dtype)
    weight[0, 0], weight[1, 1] = -0.0, 1e-40
    factor = factorise(make_hessian(COLUMNS, dtype=torch.float32), shuffled(COLUMNS))
    for arguments in (
        {},
        {"sparsity": Sparsity(0.0), "grid": make_grid(weight.float(), (16,))},
        {"pruned": torch.zeros(ROWS, COLUMNS, dtype=torch.bool)},
    ):
        result = sweep(weight, factor, **arguments)
        assert torch.equal(result.weight.view(torch.int32), weight.float().view(torch.int32))
        assert result.codes is None
        assert not result.pruned.any()
        assert not result.quadratic_error.any()
        assert result.weight.data_ptr() != weight.data_ptr()


def test_the_arguments_are_left_alone():
    weight, factor = normal(ROWS, COLUMNS), factorise(make_hessian(COLUMNS))
    pattern = normal(ROWS, COLUMNS) > 0
    copies = weight.clone(), factor.upper.clone(), pattern.clone()
    sweep(weight, factor, grid=make_grid(weight), sparsity=HALF)
    sweep(torch.nn.Parameter(weight), factor, grid=make_grid(weight), pruned=pattern)
    for argument, copy in zip((weight, factor.upper, pattern), copies, strict=True):
        assert torch.equal(argument, copy)


def test_scoring_the_targets_instead_of_the_conditional_optimum_is_worse():
    """The trap: within a block the targets lack the corrections that SparseGPT's weights have."""
    weight, hessian = normal(64, 96), make_hessian(96)
    factor = factorise(hessian)
    result = sweep(weight, factor, sparsity=HALF, mask_block=32)

    upper, remaining = factor.upper, weight.clone()
    naive = torch.zeros_like(weight, dtype=torch.bool)
    for low in range(0, 96, 32):
        span = slice(low, low + 32)
        target = weight[:, span] + remaining_shift(weight, remaining, upper, low, span)
        saliency = (target * upper.diagonal()[span]).square()
        naive[:, span] = choose(saliency, HALF, torch.arange(low, low + 32))
        remaining = sweep(weight, factor, pruned=naive, mask_block=32).weight
    raw = sweep(weight, factor, pruned=naive)
    assert not torch.equal(raw.pruned, result.pruned)
    assert torch.equal(raw.pruned[:, :32], result.pruned[:, :32])
    assert raw.quadratic_error.sum() > 1.05 * result.quadratic_error.sum()


def remaining_shift(weight, compressed, upper, low, span):
    """t − w of a block: what the channels before it carry into it."""
    error = weight[:, :low] - compressed[:, :low]
    return error @ upper[:low, span] / upper.diagonal()[span]


def test_pruning_before_the_last_channel_compensates_like_least_squares():
    weight, hessian = normal(ROWS, 6), make_hessian(6)
    pattern = torch.zeros(ROWS, 6, dtype=torch.bool)
    pattern[:, :5] = True
    result = sweep(weight, factorise(hessian), pruned=pattern)
    best = weight @ hessian[:, 5] / hessian[5, 5]
    assert (result.weight[:, 5] - best).abs().max() < TOLERANCE
    torch.testing.assert_close(result.quadratic_error, quadratic(weight, result.weight, hessian))


def test_pruning_the_first_channel_alone_equals_least_squares_of_all_the_others():
    weight, hessian = normal(ROWS, 9), make_hessian(9)
    pattern = torch.zeros(ROWS, 9, dtype=torch.bool)
    pattern[:, 0] = True
    result = sweep(weight, factorise(hessian), pruned=pattern, leaf=2)
    best = torch.linalg.solve(hessian[1:, 1:], hessian[1:] @ weight.mT).mT
    assert (result.weight[:, 1:] - best).abs().max() < 1e-11


def test_float32_is_as_good_as_the_exact_answer():
    weight, hessian = normal(48, 96), make_hessian(96)
    grid = make_grid(weight, (4,), group_size=32)
    exact = sweep(weight, factorise(hessian), grid=grid, sparsity=HALF)
    single = sweep(weight.float(), factorise(hessian.float()), grid=grid, sparsity=HALF)
    true_loss = quadratic(weight, single.weight.double(), hessian).sum()
    assert abs(true_loss / exact.quadratic_error.sum() - 1) < 1e-2
    assert abs(single.quadratic_error.sum() / true_loss - 1) < 1e-4


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(rows, columns, widths, sparsity):
    weight = normal(rows, columns, dtype=torch.float32)
    factor = factorise(torch.eye(columns))
    grid = widths and make_grid(weight, widths, group_size=64)
    with CountOperations() as operations:
        sweep(weight, factor, grid=grid, sparsity=sparsity)
    return operations.count


@pytest.mark.parametrize("task", TASKS)
def test_at_most_ten_operations_per_channel_whatever_the_rows(task):
    count = count_operations(32, 512, *TASKS[task])
    assert count <= 10 * 512
    assert count_operations(256, 512, *TASKS[task]) == count


def test_weights_that_are_not_finite_are_counted():
    weight = normal(ROWS, COLUMNS)
    weight[2, 3] = weight[4, 4] = math.nan
    with pytest.raises(NumericalError, match="2 of 259 weights are not finite"):
        sweep(weight, factorise(make_hessian(COLUMNS)), sparsity=HALF)


def test_a_useless_factor_is_an_error_and_not_a_result():
    factor = factorise(make_hessian(COLUMNS))
    factor.upper[3, 3] = 0
    with pytest.raises(NumericalError, match="diverged"):
        sweep(normal(ROWS, COLUMNS), factor, pruned=normal(ROWS, COLUMNS) > 0)


def test_two_sources_of_the_pattern_are_refused():
    weight, factor = normal(ROWS, COLUMNS), factorise(make_hessian(COLUMNS))
    with pytest.raises(ValueError, match="not both"):
        sweep(weight, factor, sparsity=HALF, pruned=weight > 0)


@pytest.mark.parametrize(
    ("columns", "mask_block", "order", "message"),
    [
        (37, 8, None, "37 columns cannot be cut into windows of 4"),
        (40, 6, None, "several mask blocks of 6"),
        (40, 8, shuffled(40), "an order that moves windows whole"),
    ],
)
def test_windows_that_the_sweep_would_tear_apart_are_refused(columns, mask_block, order, message):
    factor = factorise(make_hessian(columns), order)
    with pytest.raises(ValueError, match=message):
        sweep(
            normal(ROWS, columns),
            factor,
            sparsity=Sparsity.structured(2, 4),
            mask_block=mask_block,
        )
