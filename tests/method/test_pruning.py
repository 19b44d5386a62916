import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import take_inventory
from mi_experiments.method.pruning import Sparsity, check_dimensions, choose_pruned


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 17),
    ratio=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.99, 1.0]), st.floats(0, 1)),
    distinct=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_unstructured_prunes_exactly_the_count_with_the_smallest_scores(
    rows, columns, ratio, distinct, seed
):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(distinct, (rows, columns), generator=generator).float()
    pruned = choose_pruned(score, Sparsity(ratio))
    count = round(ratio * (rows * columns))
    assert pruned.sum() == count
    assert torch.equal(score[pruned].sort().values, score.flatten().sort().values[:count])
    assert torch.equal(pruned, choose_pruned(score, Sparsity(ratio)))


def test_unstructured_ignores_the_memory_layout():
    score = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    strided = score.T.contiguous().T
    sparsity = Sparsity(0.3)
    assert torch.equal(choose_pruned(strided, sparsity), choose_pruned(score, sparsity))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (0, 4), (4, 4), (1, 1), (3, 5)])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_every_window_keeps_its_n_largest_and_the_latest_of_equals(n, m, distinct):
    generator = torch.Generator().manual_seed(n)
    score = torch.randint(distinct, (7, 6 * m), generator=generator).float()
    pruned = choose_pruned(score, Sparsity.structured(n, m))
    for window, choice in zip(score.view(-1, m).tolist(), pruned.view(-1, m).tolist(), strict=True):
        ranked = sorted(range(m), key=lambda i, window=window: (window[i], i))
        assert [i for i in range(m) if choice[i]] == sorted(ranked[: m - n])


def test_columns_that_are_no_whole_number_of_windows_are_refused():
    with pytest.raises(ValueError, match="10 columns cannot be cut into windows of 4"):
        choose_pruned(torch.zeros(2, 10), Sparsity.structured(2, 4))


@pytest.mark.parametrize(
    ("ratio", "n", "m"),
    [
        (-0.1, 0, 0),
        (1.1, 0, 0),
        (math.nan, 0, 0),
        (0.5, 5, 4),
        (0.5, -1, 4),
        (0.4, 2, 4),
        (0.0, 2, 0),
    ],
)
def test_a_contradiction_is_refused(ratio, n, m):
    with pytest.raises(ValueError, match=r"ratio|pattern"):
        Sparsity(ratio, n, m)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="empty window"):
        Sparsity.structured(0, 0)


@pytest.mark.parametrize(
    ("sparsity", "bits"),
    [
        (Sparsity(0.0), 0),
        (Sparsity(0.5), 1),
        (Sparsity.structured(2, 4), 3 / 4),  # 6 patterns
        (Sparsity.structured(4, 8), 7 / 8),  # 70 patterns
        (Sparsity.structured(1, 4), 2 / 4),  # 4 patterns need exactly 2 bits
        (Sparsity.structured(0, 4), 0),  # only one pattern
        (Sparsity.structured(4, 4), 0),
    ],
)
def test_pattern_bits_by_hand_count(sparsity, bits):
    assert math.prod(sparsity.count(3, 16)) == 48 * bits


MLP = {"block.0.up_proj": 32, "block.0.down_proj": 44}


@pytest.mark.parametrize(
    "sparsity", [Sparsity(0.5), Sparsity(0.0), Sparsity.structured(2, 4), Sparsity.structured(1, 2)]
)
def test_dimensions_that_a_pattern_fits_are_accepted(sparsity):
    check_dimensions(MLP, sparsity, mask_block=32)
    for columns in MLP.values():
        choose_pruned(torch.zeros(2, columns), sparsity)


def test_a_linear_that_no_whole_number_of_windows_covers_is_named():
    with pytest.raises(InputError, match=r"block\.0\.down_proj has 44 columns.* m = 8 for .* 4:8:"):
        check_dimensions(MLP, Sparsity.structured(4, 8), mask_block=32)
    with pytest.raises(InputError, match=r"down_proj has 44 columns.*, and so have 1 more: "):
        check_dimensions(MLP | {"x": 4}, Sparsity.structured(4, 8), mask_block=32)


def test_a_mask_block_that_cuts_a_window_is_refused():
    with pytest.raises(InputError, match=r"sparsity\.mask_block=30 is not a multiple of m = 4"):
        check_dimensions(MLP, Sparsity.structured(2, 4), mask_block=30)


def test_the_shapes_of_a_model_are_enough_to_tell(tiny_model):
    inventory = take_inventory(tiny_model("llama", device="meta", intermediate_size=44))
    columns = {linear.name: linear.columns for block in inventory.linears for linear in block}
    assert sorted(set(columns.values())) == [32, 44]
    check_dimensions(columns, Sparsity.structured(2, 4), mask_block=32)
    with pytest.raises(
        InputError, match=r"^model\.layers\.0\.mlp\.down_proj has 44 columns.* 1 mo"
    ):
        check_dimensions(columns, Sparsity.structured(4, 8), mask_block=32)
