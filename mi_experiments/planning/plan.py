"""plan_compression: what every linear will get, and why.

One pass over the dense model measures the costs of every site (`site_costs`), then the budget is
spent exactly. A `Plan` is a value: groups and widths of every linear. Plans that depend on no
activation (uniform widths on contiguous or random groups) need no pass.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mi_experiments.calibration.fisher import Fisher, Passage
from mi_experiments.calibration.hessians import check_weights, measure_plan_fisher
from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.walker import Walker
from mi_experiments.method.grid import scale_groups
from mi_experiments.method.information_summary import InformationSummary
from mi_experiments.method.pruning import Sparsity
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.budgets import allocate_pruning, allocate_widths
from mi_experiments.planning.cost_key import cost_config
from mi_experiments.planning.site_costs import (
    LinearCosts,
    block_costs_name,
    measure_block_costs,
    read_block_costs,
)


@dataclass(frozen=True)
class LinearPlan:
    """Groups and widths of one weight matrix.

    Attributes:
        block: index of the decoder block.
        site: name of the site, unique in the model.
        rows: output dimension.
        columns: input dimension.
        channel_group: group of each channel.
        bits: width of each channel; 16 is not quantized.
        scale_group: channels with one scale and zero point per row.
        sparsity: how many weights are pruned, and in which pattern.
    """

    block: int
    site: str
    rows: int
    columns: int
    channel_group: Int[Tensor, "columns"]
    bits: UInt8[Tensor, "columns"]
    scale_group: Int[Tensor, "columns"]
    sparsity: Sparsity


@dataclass(frozen=True)
class Plan:
    """What every linear gets.

    Attributes:
        linears: the linears by name, in the order of the model.
        information: the information by site, where it was measured.
        sparsity: the sparsity of the model: what was asked for.
        requested: average bits asked for.
    """

    linears: dict[str, LinearPlan]
    information: dict[str, InformationSummary]
    sparsity: Sparsity
    requested: float

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata that hold everything, for a safetensors file."""
        tensors = {}
        for name, linear in self.linears.items():
            tensors[f"{name}.bits"] = linear.bits
            tensors[f"{name}.channel_group"] = linear.channel_group.clone()
            tensors[f"{name}.scale_group"] = linear.scale_group.clone()
        linears = {
            n: [p.block, p.site, p.rows, p.columns, p.sparsity.stored()]
            for n, p in self.linears.items()
        }
        information = {site: dataclasses.asdict(item) for site, item in self.information.items()}
        rest = {
            "requested": self.requested,
            "sparsity": self.sparsity.stored(),
            "linears": linears,
            "information": information,
        }
        return tensors, {"plan": json.dumps(rest)}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "Plan":
        """Return what `stored` gave."""
        linears = {}
        rest = json.loads(metadata["plan"])
        for name, (block, site, rows, columns, sparsity) in rest["linears"].items():
            group, bits, scale_group = (
                tensors[f"{name}.{key}"] for key in ("channel_group", "bits", "scale_group")
            )
            linears[name] = LinearPlan(
                block, site, rows, columns, group, bits, scale_group, Sparsity(**sparsity)
            )
        information = {s: InformationSummary(**i) for s, i in rest["information"].items()}
        return cls(linears, information, Sparsity(**rest["sparsity"]), rest["requested"])

    def sha256(self) -> str:
        """SHA-256 of all groups, widths and sparsities."""
        digest = hashlib.sha256()
        for name, linear in self.linears.items():
            shape = [name, linear.rows, linear.columns, repr(linear.sparsity)]
            digest.update(json.dumps(shape).encode())
            for tensor in (linear.bits, linear.channel_group, linear.scale_group):
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def plan_compression(
    walker: Walker,
    calibration: Int[Tensor, "nsamples seqlen"],
    config: Config,
    on_block: Callable[[str], None] = lambda name: None,
    *,
    commits: Commits | None = None,
) -> Plan:
    """Group the channels of every site, and allocate the bit budget and the pruned weights.

    Args:
        walker: the walker of the dense model, which is not changed.
        calibration: token ids.
        config: the config of the run.
        on_block: called with the name of each block when its costs are measured, and before that
            when `measure_plan_fisher` passes it; see `count_steps`.
        commits: keep and give back the Fisher information, and the costs of finished blocks.

    Returns:
        Groups, widths and sparsity of every linear; the average width is at most the budget, and
        the total of pruned weights at least what was asked, exactly.

    Raises:
        InputError: more groups than channels.
        NumericalError: weights or activations that are not finite, or a Hessian that cannot be
            factorized.
    """
    for present in walker.inventory.linears:
        check_weights(present)
        for linear in present:
            config.n_groups.check_count(linear.columns, linear.name)
    narrowed = cost_config(config)
    finished = read_block_costs(commits, len(walker.blocks))

    def measure(block: Block, fisher: Fisher | Passage, activations: bool) -> None:
        finished[block.index] = measure_block_costs(block, fisher, activations, narrowed)
        if commits is not None and activations:
            commits.commit({block_costs_name(block.index): finished[block.index].stored()})

    def visit(passage: Passage) -> None:
        if passage.index not in finished:
            measure(passage.outline(), passage, True)

    if len(finished) < len(walker.blocks):
        together = on_the_way_back(len(calibration), narrowed)
        fisher = measure_plan_fisher(
            walker,
            calibration,
            narrowed,
            commits=commits,
            on_block=on_block,
            visit=visit if together else None,
        )
    if len(finished) < len(walker.blocks):
        activations = narrowed.needs_activations
        for block in walker.walk(calibration if activations else calibration[:1, :2]):
            if block.index not in finished:
                measure(block, fisher, activations)
            on_block(block.name)
    linears = [
        linear for _, block_costs in sorted(finished.items()) for linear in block_costs.linears
    ]
    if config.wbits.allocation is Allocation.mixed:
        linears = [keep_widths(linear, narrowed, config) for linear in linears]
    information = {
        s: i
        for _, block_costs in sorted(finished.items())
        for s, i in block_costs.information.items()
    }
    widths, pruned = allocate_widths(linears, config), allocate_pruning(linears, config)
    planned = {
        linear.name: spread_widths(linear, widths[linear.name], pruned[linear.name], config)
        for linear in linears
    }
    return Plan(planned, information, config.sparsity.average, config.wbits.average)


def keep_widths(linear: LinearCosts, narrowed: Config, config: Config) -> LinearCosts:
    """Keep the costs of those widths that a group may get."""
    if linear.group_costs is None:
        return linear
    measured = narrowed.wbits.candidate_widths()
    kept = [measured.index(width) for width in config.wbits.candidate_widths()]
    group_costs = dataclasses.replace(linear.group_costs, costs=linear.group_costs.costs[:, kept])
    return dataclasses.replace(linear, group_costs=group_costs)


def on_the_way_back(nsamples: int, config: Config) -> bool:
    """Say whether Hessians are measured where the gradient goes back through all samples.

    What a job computes must not depend on whether another one has left the Fisher information.
    """
    return config.uses_fisher and config.wbits.fisher_samples >= nsamples


def count_steps(blocks: int, nsamples: int, config: Config) -> int:
    """Return how often `plan_compression` calls `on_block` if nothing was finished earlier."""
    if not config.uses_fisher:
        return blocks
    return blocks * (2 if on_the_way_back(nsamples, config) else 3)


def spread_widths(
    linear: LinearCosts, widths: Int[Tensor, "groups"], sparsity: Sparsity, config: Config
) -> LinearPlan:
    """Spread the groups' widths over the channels."""
    group = linear.channel_group
    return LinearPlan(
        block=linear.block,
        site=linear.site,
        rows=linear.rows,
        columns=len(group),
        channel_group=group,
        bits=widths[group.long()].to(torch.uint8),
        scale_group=scale_groups(group, config.wbits.group_size),
        sparsity=sparsity,
    )
