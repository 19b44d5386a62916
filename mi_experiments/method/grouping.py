"""Partition the channels of a site into groups that will each have their own bit width.

Two rules use information (`mutual_information`, `redundancy`), two use what a channel is worth
(`energy`, `sensitivity`), and two are blind controls (`random`, `contiguous`). All of them return
groups of the same sizes, so that they can be compared at equal storage.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from mi_experiments.method.hessian import Factor, Hessian
from mi_experiments.method.information import redundancy

_OVERSAMPLING = 8
_POWER_STEPS = 10
_SWAP_ROUNDS = 200
_SWAP_DEPTH = 32


class Grouping(Enum):
    """By which rule channels are put together."""

    mutual_information = "mutual_information"
    redundancy = "redundancy"
    energy = "energy"
    sensitivity = "sensitivity"
    random = "random"
    contiguous = "contiguous"


class Rule(NamedTuple):
    """A rule of grouping: what it must be given, and how it labels the channels."""

    needs: tuple[str, ...]
    label: Callable[..., Tensor]


def group_sizes(columns: int, n_groups: int, multiple: int = 32) -> list[int]:
    """Return the sizes of the groups, as equal as packing allows, larger ones first.

    Sizes are multiples of `multiple` where every group can have at least one; the channels left
    over then join the last group. Otherwise sizes differ by at most one.

    Args:
        columns: number of channels.
        n_groups: number of groups.
        multiple: of channels that pack without padding.

    Raises:
        ValueError: there are more groups than channels, or none.
    """
    if not 1 <= n_groups <= columns:
        raise ValueError(f"cannot put {columns} channels into {n_groups} groups")
    unit = multiple if columns >= n_groups * multiple else 1
    units, remainder = divmod(columns, unit)
    base, larger = divmod(units, n_groups)
    sizes = [(base + (index < larger)) * unit for index in range(n_groups)]
    sizes[-1] += remainder
    return sizes


def group_channels(
    grouping: Grouping,
    n_groups: int,
    columns: int,
    *,
    hessian: Hessian | None = None,
    factor: Factor | None = None,
    information: Float[Tensor, "columns columns"] | None = None,
    weights_energy: Float[Tensor, "columns"] | None = None,
    seed: int = 0,
    multiple: int = 32,
) -> Int32[Tensor, "columns"]:
    """Return the group of each channel.

    Groups are numbered in the order of their first channels, so that equal partitions are equal
    tensors. Every rule is deterministic: the same arguments give the same groups.

    Args:
        grouping: the rule.
        n_groups: number of groups, of the sizes that `group_sizes` gives.
        columns: number of channels.
        hessian: of the site, for `energy`.
        factor: of the Hessian, for `redundancy` and `sensitivity`; its damping is theirs.
        information: of every pair of channels in nats, for `mutual_information`.
        weights_energy: ‖W_j‖² of each channel, summed over the linears of the site, for
            `sensitivity`.
        seed: of `random`, and of the subspace iteration of `mutual_information`.
        multiple: of the group sizes.

    Raises:
        ValueError: what the rule needs is not given, or more groups than channels.
    """
    given = {
        "hessian": hessian,
        "factor": factor,
        "information": information,
        "weights_energy": weights_energy,
        "seed": seed,
    }
    rule = GROUPINGS[grouping]
    if missing := [name for name in rule.needs if given[name] is None]:
        raise ValueError(f"grouping {grouping.value} needs {', '.join(missing)}")
    sizes = group_sizes(columns, n_groups, multiple)
    return _canonical(rule.label(sizes, *(given[name] for name in rule.needs)), n_groups)


def _contiguous(sizes: list[int]) -> Int64[Tensor, "columns"]:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _random(sizes: list[int], seed: int) -> Int64[Tensor, "columns"]:
    generator = torch.Generator().manual_seed(seed)
    return _contiguous(sizes)[torch.randperm(sum(sizes), generator=generator)]


def _quantiles(sizes: list[int], values: Float[Tensor, "columns"]) -> Int64[Tensor, "columns"]:
    """Cut the channels, sorted by value, into groups."""
    labels = _contiguous(sizes).to(values.device)
    return torch.empty_like(labels).index_copy_(0, values.argsort(stable=True), labels)


def _by_redundancy(sizes: list[int], factor: Factor) -> Int64[Tensor, "columns"]:
    return _quantiles(sizes, redundancy(factor))


def _by_energy(sizes: list[int], hessian: Hessian) -> Int64[Tensor, "columns"]:
    return _quantiles(sizes, hessian.diagonal)


def _by_sensitivity(
    sizes: list[int], factor: Factor, weights_energy: Float[Tensor, "columns"]
) -> Int64[Tensor, "columns"]:
    """Quantiles of the OBS saliency ‖W_j‖²/[H′⁻¹]_jj = ‖W_j‖² H′_jj e^(−2·I_j)."""
    return _quantiles(sizes, weights_energy / factor.inverse_diagonal())


def _by_mutual_information(
    sizes: list[int], information: Float[Tensor, "columns columns"], seed: int
) -> Int64[Tensor, "columns"]:
    """Cluster the channels so that much of the pairwise information is within groups.

    Spectral clustering of the normalised affinity finds the groups, an assignment fills them
    exactly, and swaps between pairs of groups then raise the objective itself, the affinity within
    groups. Duplicated channels that the assignment parted come together there.
    """
    if len(sizes) == 1:
        return torch.zeros(len(information), dtype=torch.int64, device=information.device)
    # Estimates of nothing may be negative; a degree must not.
    affinity = information.clamp(min=0)
    # A channel is as close to itself as to its closest companion. With a zero diagonal a lone pair
    # would have the eigenvalues ±1, and subspace iteration cannot tell them apart.
    affinity.diagonal().copy_(affinity.amax(1))
    vectors = _leading_eigenvectors(affinity, len(sizes), seed)
    labels = _fill_groups(_indicator_scores(vectors), sizes)
    return _swap_channels_(labels, affinity, len(sizes))


GROUPINGS: dict[Grouping, Rule] = {
    Grouping.mutual_information: Rule(("information", "seed"), _by_mutual_information),
    Grouping.redundancy: Rule(("factor",), _by_redundancy),
    Grouping.energy: Rule(("hessian",), _by_energy),
    Grouping.sensitivity: Rule(("factor", "weights_energy"), _by_sensitivity),
    Grouping.random: Rule(("seed",), _random),
    Grouping.contiguous: Rule((), _contiguous),
}


def adjusted_rand_index(a: Int32[Tensor, "columns"], b: Int32[Tensor, "columns"]) -> float:
    """Return how well two partitions agree: 1 for equal ones, 0 on average for random ones.

    Closed form over the contingency table (Hubert and Arabie 1985, J. Classification 2:193).
    """
    width = int(b.max()) + 1
    table = torch.bincount(a.long() * width + b.long(), minlength=(int(a.max()) + 1) * width)
    table = table.reshape(-1, width).to(torch.float64)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / max(len(a) * (len(a) - 1) / 2, 1)
    largest = (in_a + in_b) / 2
    # Both trivial in the same way, all together or all apart: equal, and nothing by chance.
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def _canonical(labels: Int64[Tensor, "columns"], n_groups: int) -> Int32[Tensor, "columns"]:
    channels = torch.arange(len(labels), device=labels.device)
    first = torch.full((n_groups,), len(labels), device=labels.device)
    first = first.scatter_reduce(0, labels, channels, "amin")
    return first.argsort().argsort()[labels].to(torch.int32)


def _leading_eigenvectors(
    affinity: Float[Tensor, "columns columns"], count: int, seed: int
) -> Float[Tensor, "columns count"]:
    """Return the leading eigenvectors of D^(−½)·A·D^(−½) by randomised subspace iteration.

    A few products with A replace a dense eigendecomposition (Halko, Martinsson and Tropp,
    arXiv:0909.4061, algorithm 4.4), and the normalised matrix is never stored.
    """
    degree = affinity.sum(1, keepdim=True)
    scale = degree.rsqrt().masked_fill(degree <= 0, 0)
    width = min(count + _OVERSAMPLING, len(affinity))
    start = torch.randn(len(affinity), width, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(start.to(affinity)).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(scale * (affinity @ (scale * basis))).Q
    projected = basis.T @ (scale * (affinity @ (scale * basis)))
    rotation = torch.linalg.eigh((projected + projected.T) / 2).eigenvectors
    leading: Tensor = basis @ rotation[:, -count:]
    return leading


def _indicator_scores(
    vectors: Float[Tensor, "columns groups"],
) -> Float[Tensor, "columns groups"]:
    """Rotate eigenvectors towards indicators of the clusters that they span.

    Pivoting picks one channel per cluster, and the nearest orthogonal matrix to the pivot rows is
    the rotation (Damle, Minden and Ying, arXiv:1609.08251): no restarts, no iteration.
    """
    rows = torch.nn.functional.normalize(vectors, dim=1)
    residual, pivots = rows.clone(), []
    for _ in range(rows.shape[1]):
        pivot = residual.square().sum(1).argmax()
        pivots.append(pivot)
        direction = torch.nn.functional.normalize(residual[pivot], dim=0)
        residual -= torch.outer(residual @ direction, direction)
    left, _, right = torch.linalg.svd(rows[torch.stack(pivots)].T)
    rotation: Tensor = left @ right
    return rows @ rotation


def _fill_groups(
    scores: Float[Tensor, "columns groups"], sizes: list[int]
) -> Int64[Tensor, "columns"]:
    """Assign channels to groups of exactly these sizes, those with most to lose first.

    In every pass each channel left applies to the best group that still has room, and every group
    takes the applicants that would lose most by going elsewhere. A pass fills a group or ends.
    """
    device = scores.device
    demand = torch.bincount(scores.argmax(1), minlength=len(sizes))
    room = torch.empty_like(demand)
    room[demand.argsort(descending=True, stable=True)] = torch.tensor(
        sorted(sizes, reverse=True), device=device
    )
    labels = torch.full((len(scores),), -1, device=device)
    while (labels < 0).any():
        waiting = (labels < 0).nonzero().flatten()
        best = scores[waiting].masked_fill(room == 0, -torch.inf).topk(2, dim=1)
        queue = (best.values[:, 0] - best.values[:, 1]).argsort(descending=True, stable=True)
        choice = best.indices[queue, 0]
        by_group = choice.argsort(stable=True)
        queue, choice = queue[by_group], choice[by_group]
        applicants = torch.bincount(choice, minlength=len(sizes))
        place = (
            torch.arange(len(choice), device=device) - (applicants.cumsum(0) - applicants)[choice]
        )
        taken = place < room[choice]
        labels[waiting[queue[taken]]] = choice[taken]
        room -= torch.bincount(choice[taken], minlength=len(sizes))
    return labels


def _swap_channels_(
    labels: Int64[Tensor, "columns"], affinity: Float[Tensor, "columns columns"], n_groups: int
) -> Int64[Tensor, "columns"]:
    """Swap channels between groups while that raises the affinity within groups.

    Each round pairs the groups whose channels pull most towards each other. The two groups of a
    pair line up their channels, those that would gain most first, and swap the first few, as
    many as raise the objective most, interactions included (Kernighan and Lin 1970). Pairs share
    no group, so their gains add up exactly and the objective only rises.
    """
    affinity = affinity.fill_diagonal_(0)  # a channel takes its affinity to itself along
    one_hot = torch.nn.functional.one_hot(labels, n_groups).to(affinity)
    within = affinity @ one_hot
    tolerance = 64 * torch.finfo(affinity.dtype).eps * within.abs().amax()
    depth = min(_SWAP_DEPTH, int(one_hot.sum(0).min()))
    settled = torch.eye(n_groups, dtype=torch.bool, device=labels.device)
    for _ in range(_SWAP_ROUNDS):
        pull = within - within.gather(1, labels[:, None])
        here, there = _pair_groups(pull, labels, settled, tolerance)
        if len(here) == 0:
            break
        leaving = _front(pull[:, there].T, labels, here, depth)
        # The companion of the first to leave pulls as strongly the other way: it must stay.
        companions = 2 * affinity[leaving[:, 0]]
        entering = _front(pull[:, here].T - companions, labels, there, depth)
        gain = _exchange_gains(pull, affinity, here, there, leaving, entering)
        most = gain.max(1, keepdim=True)
        swapped = torch.arange(depth, device=labels.device) <= most.indices
        swapped &= most.values > tolerance
        pairs = swapped.nonzero()[:, 0]
        labels[leaving[swapped]] = there[pairs]
        labels[entering[swapped]] = here[pairs]
        change = (affinity[entering[swapped]] - affinity[leaving[swapped]]).T
        within.index_add_(1, here[pairs], change)
        within.index_add_(1, there[pairs], change, alpha=-1)
        changed = torch.cat((here[pairs], there[pairs]))
        settled[here, there] = settled[there, here] = True
        settled[changed, :] = settled[:, changed] = False
        settled.fill_diagonal_(True)
    return labels


def _pair_groups(
    pull: Float[Tensor, "columns groups"],
    labels: Int64[Tensor, "columns"],
    settled: Bool[Tensor, "groups groups"],
    tolerance: Float[Tensor, ""],
) -> tuple[Int64[Tensor, "pairs"], Int64[Tensor, "pairs"]]:
    """Pair the groups that prefer each other, judged by the best candidate of each."""
    n_groups = pull.shape[1]
    best = pull.new_full((n_groups, n_groups), -torch.inf)
    best = best.scatter_reduce(0, labels[:, None].expand_as(pull), pull, "amax")
    value, partner = (best + best.T).masked_fill(settled, -torch.inf).max(1)
    groups = torch.arange(n_groups, device=labels.device)
    chosen = (partner[partner] == groups) & (groups < partner) & (value > tolerance)
    return groups[chosen], partner[chosen]


def _front(
    pulled: Float[Tensor, "pairs columns"],
    labels: Int64[Tensor, "columns"],
    source: Int64[Tensor, "pairs"],
    depth: int,
) -> Int64[Tensor, "pairs depth"]:
    """Return the channels of each source group that are pulled most, strongest first."""
    return pulled.masked_fill(labels != source[:, None], -torch.inf).topk(depth).indices


def _exchange_gains(
    pull: Float[Tensor, "columns groups"],
    affinity: Float[Tensor, "columns columns"],
    here: Int64[Tensor, "pairs"],
    there: Int64[Tensor, "pairs"],
    leaving: Int64[Tensor, "pairs depth"],
    entering: Int64[Tensor, "pairs depth"],
) -> Float[Tensor, "pairs depth"]:
    """Return what swapping the first 1, 2, … of both fronts adds to the affinity within groups."""

    def between(first: Tensor, second: Tensor) -> Tensor:
        return affinity[first[:, :, None], second[:, None, :]]

    alone = pull[leaving, there[:, None]] + pull[entering, here[:, None]]
    # Channels that move together stay together, and channels that cross do not meet.
    joint = between(leaving, leaving) + between(entering, entering)
    joint = joint - between(leaving, entering) - between(entering, leaving)
    return alone.cumsum(1) + joint.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
