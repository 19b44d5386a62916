"""Every rule is a partition of exact sizes, and planted clusters of information are found."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.method import clustering, grouping
from mi_experiments.method.grouping import (
    Grouping,
    adjusted_rand_index,
    group_channels,
    group_sizes,
)
from mi_experiments.method.hessian import HessianAccumulator, factorize
from mi_experiments.method.information import copula_information, redundancy

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def site(columns, tokens=400, seed=0):
    """Everything that any rule may ask for."""
    mixing = torch.randn(columns, columns, generator=generator(seed), dtype=DOUBLE)
    inputs = torch.randn(tokens, columns, generator=generator(seed + 1), dtype=DOUBLE) @ mixing
    accumulator = HessianAccumulator(columns, dtype=DOUBLE)
    accumulator.update(inputs * torch.linspace(0.5, 2, columns, dtype=DOUBLE))
    hessian = accumulator.finish()
    return {
        "hessian": hessian,
        "factor": factorize(hessian),
        "information": copula_information(hessian.sample),
        "weights_energy": torch.rand(columns, generator=generator(seed + 2), dtype=DOUBLE),
    }


def planted(truth, noise, seed=0):
    """Affinity that is 0.3 to 0.6 within the true groups, above noise everywhere."""
    columns = len(truth)
    values = 0.3 + 0.3 * torch.rand(columns, columns, generator=generator(seed))
    values = values * (truth[:, None] == truth)
    values += noise * torch.rand(columns, columns, generator=generator(seed + 1))
    return values.triu(1) + values.triu(1).T


def by_information(information, n_groups, **options):
    return group_channels(
        Grouping.mutual_information, n_groups, len(information), information=information, **options
    )


def within(information, labels):
    return (information * (labels[:, None] == labels)).sum().item()


@given(columns=st.integers(1, 3000), n_groups=st.integers(1, 80), multiple=st.integers(1, 64))
def test_sizes_are_balanced_and_pack(columns, n_groups, multiple):
    if n_groups > columns:
        with pytest.raises(ValueError, match="groups"):
            group_sizes(columns, n_groups, multiple)
        return
    sizes = group_sizes(columns, n_groups, multiple)
    assert len(sizes) == n_groups
    assert sum(sizes) == columns
    assert min(sizes) >= 1
    if columns >= n_groups * multiple:
        whole = [*sizes[:-1], sizes[-1] - columns % multiple]
        assert all(size % multiple == 0 for size in whole)
        assert max(whole) - min(whole) <= multiple
    else:
        assert max(sizes) - min(sizes) <= 1


def test_sizes_by_hand():
    assert group_sizes(320, 4) == [96, 96, 64, 64]
    assert group_sizes(300, 4) == [96, 64, 64, 76]
    assert group_sizes(100, 4) == [25, 25, 25, 25]
    assert group_sizes(10, 4) == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="0 groups"):
        group_sizes(10, 0)


@settings(max_examples=8, deadline=None)
@given(columns=st.integers(8, 70), n_groups=st.integers(1, 8), multiple=st.sampled_from([1, 4, 32]))
def test_every_rule_is_a_canonical_partition_of_exactly_these_sizes(columns, n_groups, multiple):
    statistics = site(columns)
    for rule in Grouping:
        labels = group_channels(rule, n_groups, columns, multiple=multiple, **statistics)
        assert labels.dtype == torch.int32
        sizes = torch.bincount(labels, minlength=n_groups).tolist()
        assert sorted(sizes) == sorted(group_sizes(columns, n_groups, multiple))
        first = [(labels == group).nonzero()[0].item() for group in range(n_groups)]
        assert first == sorted(first)
        again = group_channels(rule, n_groups, columns, multiple=multiple, **statistics)
        assert torch.equal(labels, again)


def test_missing_statistics_are_named():
    with pytest.raises(ValueError, match="sensitivity needs factor, weights_energy"):
        group_channels(Grouping.sensitivity, 2, 8)


def test_contiguous_and_random_read_no_statistics():
    contiguous = group_channels(Grouping.contiguous, 3, 9)
    assert contiguous.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    one = group_channels(Grouping.random, 3, 96, seed=1)
    assert torch.equal(one, group_channels(Grouping.random, 3, 96, seed=1, **site(96)))
    assert not torch.equal(one, group_channels(Grouping.random, 3, 96, seed=2))


def test_quantile_groups_are_intervals_of_their_value():
    statistics = site(96)
    hessian, factor = statistics["hessian"], statistics["factor"]
    damped = hessian.matrix + 0.01 * hessian.diagonal.mean() * torch.eye(96, dtype=DOUBLE)
    values = {
        Grouping.energy: hessian.diagonal,
        Grouping.redundancy: redundancy(factor),
        Grouping.sensitivity: statistics["weights_energy"] / torch.linalg.inv(damped).diagonal(),
    }
    partitions = []
    for rule, value in values.items():
        labels = group_channels(rule, 3, 96, **statistics)
        groups = sorted((value[labels == g].min().item(), g) for g in range(3))
        for (_, low), (smallest_above, _) in itertools.pairwise(groups):
            assert value[labels == low].max() <= smallest_above
        partitions.append(labels)
    assert not torch.equal(partitions[0], partitions[1])
    assert not torch.equal(partitions[0], partitions[2])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n_groups", "columns"), [(2, 64), (5, 320), (8, 800)])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_planted_clusters_are_recovered(n_groups, columns, noise, shuffle):
    sizes = torch.tensor(group_sizes(columns, n_groups))
    truth = torch.arange(n_groups).repeat_interleave(sizes)
    if shuffle:
        truth = truth[torch.randperm(columns, generator=generator(5))]
    labels = by_information(planted(truth, noise), n_groups)
    assert adjusted_rand_index(labels, truth.to(torch.int32)) == 1.0


def test_spectral_start_ignores_estimates_below_zero(monkeypatch):
    monkeypatch.setattr(clustering, "_SWAP_ROUNDS", 0)
    truth = torch.arange(320) % 5
    information = planted(truth, noise=0.0) - 0.2 * (truth[:, None] != truth)
    labels = by_information(information, 5)
    assert adjusted_rand_index(labels, truth.to(torch.int32)) == 1.0


def test_spectral_start_keeps_lone_pairs_together(monkeypatch):
    monkeypatch.setattr(clustering, "_SWAP_ROUNDS", 0)
    information = torch.rand(128, 128, generator=generator()) * 0.01
    information = information.triu(1) + information.triu(1).T
    pairs = torch.arange(128).reshape(2, 64)
    information[pairs[0], pairs[1]] = information[pairs[1], pairs[0]] = 5.0
    labels = by_information(information, 4)
    assert (labels[:64] == labels[64:]).float().mean() > 0.9


def test_swaps_alone_reunite_pairs(monkeypatch):
    monkeypatch.setattr(clustering, "_fill_groups", lambda _, sizes: grouping._contiguous(sizes))
    information = torch.zeros(4, 4)
    information[0, 2] = information[2, 0] = information[1, 3] = information[3, 1] = 5.0
    assert by_information(information, 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("lone", [0, 16])
@pytest.mark.parametrize("seed", range(5))
def test_duplicated_channels_share_a_group(lone, seed):
    inputs = torch.randn(1000, 24 + lone, generator=generator(seed))
    inputs = torch.cat((inputs, -3 * inputs[:, :24]), 1)
    shuffle = torch.randperm(inputs.shape[1], generator=generator(seed))
    labels = by_information(copula_information(inputs[:, shuffle]), 4, multiple=8)
    by_channel = torch.empty_like(labels).index_copy_(0, shuffle, labels)
    assert torch.equal(by_channel[:24], by_channel[24 + lone :])


@pytest.mark.parametrize("seed", range(3))
def test_result_is_a_local_optimum_of_the_information_within_groups(seed):
    inputs = torch.randn(200, 24, generator=generator(seed + 100), dtype=DOUBLE)
    inputs = inputs @ torch.randn(24, 24, generator=generator(seed), dtype=DOUBLE)
    information = copula_information(inputs).clamp(min=0)
    labels = by_information(information, 2, multiple=1)
    best = within(information, labels)
    for i in range(24):
        for j in range(i):
            swapped = labels.clone()
            swapped[i], swapped[j] = labels[j], labels[i]
            assert within(information, swapped) <= best + 1e-9
    contiguous = group_channels(Grouping.contiguous, 2, 24, multiple=1)
    assert best > within(information, contiguous)


def test_nothing_to_cluster_is_still_a_partition():
    for information in (torch.zeros(40, 40), torch.full((40, 40), 5.0).fill_diagonal_(0)):
        labels = by_information(information, 5, multiple=8)
        assert torch.bincount(labels).tolist() == [8] * 5


def test_inputs_are_left_alone():
    information = planted(torch.arange(64) % 2, noise=0.1)
    before = information.clone()
    by_information(information, 2)
    assert torch.equal(information, before)


def labels(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_adjusted_rand_index_by_hand():
    assert adjusted_rand_index(labels(0, 0, 1, 1), labels(1, 1, 0, 0)) == 1.0
    # Contingency (2 1; 0 3): pairs 1 + 3, sums 3 + 3 and 1 + 6, so (4 − 2.8)/(6.5 − 2.8).
    a, b = labels(0, 0, 0, 1, 1, 1), labels(0, 0, 1, 1, 1, 1)
    assert adjusted_rand_index(a, b) == pytest.approx(1.2 / 3.7)
    assert adjusted_rand_index(b, a) == pytest.approx(1.2 / 3.7)
    assert adjusted_rand_index(labels(0, 0, 1, 1), labels(0, 1, 0, 1)) == pytest.approx(-0.5)
    assert adjusted_rand_index(labels(0, 0, 0), labels(0, 0, 0)) == 1.0
    assert adjusted_rand_index(labels(0, 1, 2), labels(0, 1, 2)) == 1.0
    assert adjusted_rand_index(labels(0, 0, 0), labels(0, 1, 2)) == 0.0


def test_random_partitions_agree_by_chance_only():
    one = group_channels(Grouping.random, 8, 4096, seed=0)
    other = group_channels(Grouping.random, 8, 4096, seed=1)
    assert abs(adjusted_rand_index(one, other)) < 0.005


@pytest.mark.slow
def test_clusters_of_a_very_wide_site():
    """13,824 channels: the width of LLaMA-13B's down projection, in about 1.6 GB."""
    columns, n_groups = 13824, 16
    truth = (torch.arange(columns) * 7) % n_groups
    information = (truth[:, None] == truth).to(torch.float32).mul_(0.05)
    information += torch.rand(columns, 1, generator=generator()) * 0.01
    information = information.fill_diagonal_(0)
    found = by_information(information, n_groups)
    assert adjusted_rand_index(found, truth.to(torch.int32)) == 1.0
