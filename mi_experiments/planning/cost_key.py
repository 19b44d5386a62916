"""The fields of the config that site costs depend on, so that jobs can share them by content.

Site costs are a function of the model, the calibration tokens and these fields. What measures them
gets a config that has no other fields: a field that is missing here cannot be read, and so makes no
silent difference between two jobs that share a file. What the `Walker` of a run takes from the
config and may move a bit (`model.ignore`, `model.blocks`, `dataset.batch_size`) is listed too.
"""

from dataclasses import replace

from mi_experiments.calibration.hessians import FISHER_FIELDS
from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation, SparsityScope
from mi_experiments.config.narrow import narrow

GROUPING_FIELDS = (
    "model.ignore",
    "model.blocks",
    "dataset.batch_size",
    "n_groups",
    "recipe.damping",
    "recipe.damping_power",
    "recipe.on_singular",
    "recipe.min_tokens",
    "recipe.scarce_tokens",
    "wbits.allocation",
    "sparsity.scope",
)
"""Fields that the groups and the information of a site depend on."""

PRUNING_FIELDS = (
    "recipe.dead_channels",
    "recipe.order",
    "sparsity.ratio",
    "sparsity.cost",
    "sparsity.mask_block",
    "sparsity.m",
    "sparsity.pattern",
    "sparsity.spread",
)
"""Fields that the costs of pruning depend on, besides."""

COST_FIELDS = (
    "recipe.clip_search",
    "recipe.dead_channels",
    "recipe.scale_bits",
    "sparsity.ratio",
    "sparsity.n",
    "sparsity.m",
    "sparsity.pattern",
    "wbits.cost",
    "wbits.grid",
    "wbits.symmetric",
    "wbits.group_size",
    "wbits.widths",
)
"""Fields that the costs of widths depend on, besides; the budget itself is not among them."""

ALL_WIDTHS = tuple(range(2, 9))
"""Measured whatever the budget, so that jobs that differ in it alone share their site costs."""


def cost_config(config: Config) -> Config:
    """Return a config that has only what site costs depend on, and every width."""
    fields = set(GROUPING_FIELDS)
    mixed = config.wbits.allocation is Allocation.mixed
    if mixed:
        fields.update(COST_FIELDS)
    if config.sparsity.scope is SparsityScope.model:
        fields.update(PRUNING_FIELDS)
    if config.uses_fisher:
        fields.update(FISHER_FIELDS)
    narrowed = narrow(config, fields)
    narrowed.n_groups = replace(config.n_groups, adaptive=config.adapts_groups)
    if mixed:
        known = {width for width in ALL_WIDTHS if width in config.wbits.number_format.widths}
        narrowed.wbits.widths = sorted({*config.wbits.candidate_widths(), *known})
    return narrowed
