"""Cluster the channels of a site by what they know about each other, into groups of given sizes."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_OVERSAMPLING = 8
_POWER_STEPS = 10
_SWAP_ROUNDS = 200
_SWAP_DEPTH = 32


def cluster_channels(
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
