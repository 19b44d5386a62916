"""Partition the channels of a site into groups that will each have their own bit width.

Two rules use information (`mutual_information`, `redundancy`), two use what a channel is worth
(`energy`, `sensitivity`), and two are blind controls (`random`, `contiguous`). All of them return
groups of the same sizes, so that they can be compared at equal storage.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from mi_experiments.method.clustering import cluster_channels
from mi_experiments.method.hessian import Factor, Hessian
from mi_experiments.method.information import redundancy


class Grouping(Enum):
    """By which rule channels are put together."""

    mutual_information = "mutual_information"
    redundancy = "redundancy"
    energy = "energy"
    sensitivity = "sensitivity"
    random = "random"
    contiguous = "contiguous"

    @property
    def needs_activations(self) -> bool:
        """Whether the rule reads what the channels carry."""
        return any(name != "seed" for name in GROUPINGS[self].needs)


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
        multiple: the multiple of channels that pack without padding.

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
        hessian: the hessian of the site, for `energy`.
        factor: of the Hessian, for `redundancy` and `sensitivity`; its damping is theirs.
        information: the information of every pair of channels in nats, for `mutual_information`.
        weights_energy: ‖W_j‖² of each channel, summed over the linears of the site, for
            `sensitivity`.
        seed: the seed of `random`, and of the subspace iteration of `mutual_information`.
        multiple: the multiple of the group sizes.

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


GROUPINGS: dict[Grouping, Rule] = {
    Grouping.mutual_information: Rule(("information", "seed"), cluster_channels),
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
