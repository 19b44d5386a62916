"""What is known of a site before the budget is spent: its groups, and what each width would cost.

Each site's Hessian is measured once for all linears that read it, its channels are grouped, and
the cost of every group is measured at every width. The costs of finished blocks are committed, so
that a killed run does not measure them again.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int32
from torch import Tensor

from mi_experiments.calibration.fisher import Passage
from mi_experiments.calibration.hessians import (
    check_weights,
    in_passes,
    measure_hessians,
    measure_on_the_way_back,
    measure_scarce,
    site_context,
)
from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation
from mi_experiments.config.recipe import OnSingular, ScarceTokens
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.sites import Site
from mi_experiments.method.grouping import GROUPINGS, Grouping, group_channels
from mi_experiments.method.hessian import Hessian, factorize
from mi_experiments.method.information import (
    SUMMARY_CHANNELS,
    Pairs,
    measure_information,
    some_channels,
)
from mi_experiments.method.information_summary import InformationSummary, summarize
from mi_experiments.method.noise_floor import noise_floor
from mi_experiments.method.stability import split_half_stability
from mi_experiments.out_of_memory import give_back
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.costs import (
    GroupCosts,
    measure_group_costs,
    measure_pruning_costs,
    read_weight,
    unit_of,
)
from mi_experiments.planning.group_count import best_partition


@dataclass(frozen=True)
class LinearCosts:
    """A linear whose groups are known and whose widths and sparsity are still to be chosen.

    Attributes:
        name: the name of the linear.
        block: index of its block.
        site: name of its site.
        rows: output dimension.
        channel_group: group of each channel.
        group_costs: of each group at each width; None if there is nothing to choose.
        pruning: what is lost for each number of 128ths that may be kept; None likewise.
    """

    name: str
    block: int
    site: str
    rows: int
    channel_group: Int[Tensor, "columns"]
    group_costs: GroupCosts | None
    pruning: Float64[Tensor, "choices"] | None = None


@dataclass(frozen=True)
class BlockCosts:
    """The costs of one block.

    Attributes:
        linears: the linears in execution order.
        information: the information by site, where it was measured.
    """

    linears: list[LinearCosts]
    information: dict[str, InformationSummary]

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata that hold everything."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for index, linear in enumerate(self.linears):
            tensors[f"{index}.channel_group"] = linear.channel_group.clone()
            if linear.group_costs is not None:
                tensors[f"{index}.costs"] = linear.group_costs.costs
                tensors[f"{index}.sizes"] = linear.group_costs.sizes
            if linear.pruning is not None:
                tensors[f"{index}.pruning"] = linear.pruning
            rows.append([linear.name, linear.block, linear.site, linear.rows])
        information = {site: dataclasses.asdict(item) for site, item in self.information.items()}
        return tensors, {"costs": json.dumps({"linears": rows, "information": information})}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "BlockCosts":
        """Return what `stored` gave."""
        linears = []
        rest = json.loads(metadata["costs"])
        for index, (name, block, site, rows) in enumerate(rest["linears"]):
            group_costs = None
            if f"{index}.costs" in tensors:
                group_costs = GroupCosts(tensors[f"{index}.costs"], tensors[f"{index}.sizes"])
            group = tensors[f"{index}.channel_group"]
            pruning = tensors.get(f"{index}.pruning")
            linears.append(LinearCosts(name, block, site, rows, group, group_costs, pruning))
        return cls(linears, {s: InformationSummary(**i) for s, i in rest["information"].items()})


def measure_site_costs(
    block: Block,
    site: Site,
    hessian: Hessian | None,
    fisher: Mapping[str, Float[Tensor, "_"]],
    config: Config,
) -> tuple[list[LinearCosts], InformationSummary | None]:
    """Group a site's channels and measure what every group of its linears costs at every width."""
    groups = config.n_groups
    factor = matrix = summary = None
    if hessian is not None and hessian.is_dead:
        # Channels that carry nothing have nothing to be grouped by, and lose nothing at any width.
        hessian = None
    if hessian is not None:
        # What this factor is used for can bear more damping; the sweep that skips has its own.
        escalate = config.recipe.on_singular is not OnSingular.error
        factor = factorize(
            hessian,
            damping=config.recipe.damping,
            power=config.recipe.damping_power,
            escalate=escalate,
        )
        give_back(hessian.matrix.nbytes)
        matrix = noise = None
        grouped = "information" in GROUPINGS[groups.grouping].needs
        pairs = Pairs.full if grouped else groups.information
        if pairs is not Pairs.none:
            whole = pairs is Pairs.full
            seen = hessian if whole else some_channels(hessian, SUMMARY_CHANNELS)
            generator = torch.Generator().manual_seed(groups.seed)
            noise = noise_floor(seen, groups.estimator, generator)
            matrix = measure_information(seen, groups.estimator)
        summary = summarize(matrix, noise, factor, groups.estimator)
    # Nor has an expert without tokens that is to stay as it is.
    measured = hessian is not None or not groups.grouping.needs_activations
    energy = sum_energy(site) if hessian is not None else None

    def partition(count: int) -> Int32[Tensor, "columns"]:
        return group_channels(
            groups.grouping if measured else Grouping.contiguous,
            count,
            site.columns,
            hessian=hessian,
            factor=factor,
            information=matrix,
            weights_energy=energy,
            seed=groups.seed,
            multiple=groups.multiple,
        )

    if groups.adaptive and hessian is not None and factor is not None:
        partitions = map(partition, range(1, groups.count + 1))
        channel_group = best_partition(site, partitions, fisher, hessian, factor, config)
    else:
        channel_group = partition(groups.count)
    if hessian is not None and summary is not None:
        matrix = None
        stability = split_half_stability(
            groups.grouping,
            int(channel_group.max()) + 1,
            hessian.sample,
            estimator=groups.estimator,
            damping=config.recipe.damping,
            weights_energy=energy,
            seed=groups.seed,
            multiple=groups.multiple,
        )
        summary = dataclasses.replace(summary, stability=stability)
    name = f"{block.name}.{site.name}"
    mixed = config.wbits.allocation is Allocation.mixed
    found = []
    for linear in site.linears:
        group_costs = pruning = None
        if (mixed or config.sparsity.allocated) and hessian is not None and factor is not None:
            weight = read_weight(linear, hessian, config)
            linear_fisher = fisher.get(linear.name)
            if mixed:
                group_costs = measure_group_costs(
                    weight, linear_fisher, channel_group, hessian, factor, config
                )
            if config.sparsity.allocated:
                pruning = measure_pruning_costs(weight, linear_fisher, hessian, factor, config)
        group = channel_group.cpu()
        found.append(
            LinearCosts(linear.name, block.index, name, linear.rows, group, group_costs, pruning)
        )
    return found, summary


def sum_energy(site: Site) -> Float[Tensor, "columns"]:
    """Return ‖W_j‖² of each channel, summed over the site's linears, in one unit for all."""
    weights = [linear.read_weight() for linear in site.linears]
    # A power of two, so that no square underflows and the order of channels keeps its bits.
    unit = min(map(unit_of, weights))
    return torch.stack([(weight * unit).square().sum(0) for weight in weights]).sum(0)


def measure_block_costs(
    block: Block,
    fisher: Mapping[str, Float[Tensor, "_"]] | Passage,
    activations: bool,
    config: Config,
) -> BlockCosts:
    """Group the channels of a block's sites and measure what every group costs at every width.

    Args:
        block: the block, with its dense weights.
        fisher: Fisher information about each output, by linear; or the passage by which the
            gradient goes back through the block, and the Hessians are measured on the way. Where
            those of all its sites do not fit, or a site is routed, the block runs once more.
        activations: whether anything is measured at all.
        config: the config of the run.
    """
    costs = BlockCosts([], {})
    check_weights(block.linears)
    if isinstance(fisher, Passage):
        if block.leading == block.sites and len(list(in_passes(block, block.sites))) == 1:
            hessians, found = measure_on_the_way_back(fisher, block, config)
            add_site_costs(costs, block, block.sites, hessians, found, config)
            return costs
        fisher = fisher.go_back()
    for sites in in_passes(block, block.sites) if activations else [list(block.sites)]:
        hessians = measure_hessians(block, sites, config) if activations else {}
        if activations and config.recipe.scarce_tokens is ScarceTokens.keep:
            least = config.recipe.min_tokens
            scarce = {site.name for site in sites if site.routed} & {
                name for name, hessian in hessians.items() if hessian.tokens < least
            }
            hessians = {name: hessians[name] for name in hessians.keys() - scarce}
        elif activations:
            hessians |= measure_scarce(block, hessians, sites, config)
        add_site_costs(costs, block, sites, hessians, fisher, config)
    return costs


def add_site_costs(
    costs: BlockCosts,
    block: Block,
    sites: Sequence[Site],
    hessians: dict[str, Hessian],
    fisher: Mapping[str, Float[Tensor, "_"]],
    config: Config,
) -> None:
    """Add what the groups of some sites cost, and let go of their Hessians."""
    for site in sites:
        with site_context(block, site):
            found, summary = measure_site_costs(
                block, site, hessians.pop(site.name, None), fisher, config
            )
        costs.linears.extend(found)
        if summary is not None:
            costs.information[found[0].site] = summary


def block_costs_name(block: int) -> str:
    """Return the name under which the costs of a block are committed."""
    return f"site_costs/{block:05}.safetensors"


def read_block_costs(commits: Commits | None, blocks: int) -> dict[int, BlockCosts]:
    """Return the costs that are committed, by block."""
    if commits is None:
        return {}
    found = {block: commits.read_tensors(block_costs_name(block)) for block in range(blocks)}
    return {
        block: BlockCosts.read(*content) for block, content in found.items() if content is not None
    }
