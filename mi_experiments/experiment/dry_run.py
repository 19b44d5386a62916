"""dry_run: what a run would do, from the shapes of the model alone; no weight is loaded."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation
from mi_experiments.errors import InputError
from mi_experiments.experiment.memory_plan import (
    GIB,
    MemoryPlan,
    Needs,
    find_room,
    measure_needs,
    plan_memory,
)
from mi_experiments.experiment.outline import outline_model
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.loading import choose_device
from mi_experiments.llm.sites import Site
from mi_experiments.method.grouping import group_sizes

ACCELERATORS = (80, 24, 8)
"""Sizes in GiB that a dry run plans for beside the machine that it runs on."""


@dataclass(frozen=True)
class SiteOutline:
    """A site before anything is measured.

    Attributes:
        blocks: number of blocks that have this site with this shape.
        name: the linears that read one input; with a star, those of every expert.
        shapes: rows × columns of each linear.
        group_sizes: channels in each group.
        effective_bits: everything stored, per weight, if the budget is met exactly.
        megabytes: the megabytes of the compressed linears of all these blocks.
    """

    blocks: int
    name: str
    shapes: tuple[tuple[int, int], ...]
    group_sizes: tuple[int, ...]
    effective_bits: float
    megabytes: float


@dataclass(frozen=True)
class Outline:
    """What a run would do.

    Attributes:
        sites: one entry for all blocks with the same shape.
        weights: the weights of all linears to be compressed.
        passes: block passes over the calibration data: to measure and to go on, for the plan if
            it needs activations, and for the sweep of every candidate; twice where the dense model
            runs along.
        memory: what will live where, by the name of a machine; a line where it does not fit.
    """

    sites: tuple[SiteOutline, ...]
    weights: int
    passes: int
    memory: dict[str, MemoryPlan | str]


def dry_run(config: Config) -> Outline:
    """Outline a run from the model's config file.

    Raises:
        InputError: the model's config cannot be read, or more groups than channels are asked for.
    """
    model, blocks = outline_model(config)
    sites = [(block, site) for block in blocks for site in block.sites]
    kinds: dict[object, list[tuple[Block, Site]]] = {}
    for block, site in sites:
        kinds.setdefault((site.family, shapes(site)), []).append((block, site))
    streams = 2 if config.needs_dense_pair else 1
    measured = blocks[-1].sites[-1].stage + 1 if config.recipe.true_sequential else 1
    sweeps = 2 if config.has_safety_net else 1
    passes = len(blocks) * (2 * config.needs_activations + sweeps * streams * (measured + 1))
    return Outline(
        sites=tuple(outline(members, config) for members in kinds.values()),
        weights=sum(linear.rows * linear.columns for _, site in sites for linear in site.linears),
        passes=passes,
        memory=plan_machines(measure_needs(model, blocks, config), config),
    )


def plan_machines(needs: Needs, config: Config) -> dict[str, MemoryPlan | str]:
    """Plan the memory of this machine, or of the one described, and of usual accelerators."""
    room = find_room(choose_device(config.model.device), Path.cwd(), config)
    rooms = {"this machine": room} | {
        f"{size} GiB accelerator": replace(room, accelerator=size * GIB) for size in ACCELERATORS
    }
    plans: dict[str, MemoryPlan | str] = {}
    for name, place in rooms.items():
        try:
            plans[name] = plan_memory(needs, place, config)
        except InputError as error:
            plans[name] = str(error)
    return plans


def shapes(site: Site) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of each linear of a site."""
    return tuple((linear.rows, linear.columns) for linear in site.linears)


def outline(members: list[tuple[Block, Site]], config: Config) -> SiteOutline:
    """Outline the sites of equal shape."""
    _, site = members[0]
    sizes = group_sizes(site.columns, config.n_groups.count, config.n_groups.multiple)
    effective = expected_effective_bits(site, sizes, config)
    weights = sum(rows * columns for rows, columns in shapes(site))
    return SiteOutline(
        blocks=len({block.index for block, _ in members}),
        name=site.family,
        shapes=shapes(site),
        group_sizes=tuple(sizes),
        effective_bits=effective,
        megabytes=len(members) * weights * effective / 8e6,
    )


def expected_effective_bits(site: Site, sizes: list[int], config: Config) -> float:
    """Return the stored bits per weight of a site whose linears meet the budget exactly.

    Codes of kept weights, scales and zero points per (row, scale group), sparsity pattern,
    and group index; method `count_storage` counts the same on real linears.
    """
    sparsity = config.sparsity.average
    average = config.wbits.average
    weights = sum(rows * columns for rows, columns in shapes(site))
    pattern = sum(math.prod(sparsity.count(*shape)) for shape in shapes(site))
    per_weight = (1 - sparsity.ratio) * average + pattern / weights
    if config.wbits.allocation is not Allocation.unquantized:
        size = config.wbits.group_size or max(sizes)
        scales = sum(math.ceil(channels / size) for channels in sizes)
        low, zero_bits = int(average), config.wbits.number_format.zero_bits
        zero_points = zero_bits(low) + (average - low) * (zero_bits(low + 1) - zero_bits(low))
        per_weight += scales * (config.recipe.scale_bits + zero_points) / site.columns
    if len(sizes) > 1 and config.wbits.allocation is not Allocation.unquantized:
        index = site.columns * math.ceil(math.log2(len(sizes))) + 4 * len(sizes)
        per_weight += index * len(site.linears) / weights
    return per_weight
