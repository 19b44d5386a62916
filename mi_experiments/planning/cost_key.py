"""What drafting reads of the config, and nothing else, so that drafts can be shared by what it is.

Drafts are a function of the model, the calibration tokens and these fields. Whoever drafts gets a
config that has no others: a field that is missing here cannot be read, and is no silent difference
between two jobs that share a draft.
"""

from dataclasses import replace

from mi_experiments.calibration.hessians import LOSS_FIELDS
from mi_experiments.config.config import Config, measures_loss
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
"""Of the groups and the information of each site."""

PRUNING_FIELDS = (
    "recipe.dead_channels",
    "recipe.order",
    "sparsity.ratio",
    "sparsity.cost",
    "sparsity.mask_block",
    "sparsity.m",
    "sparsity.spread",
)
"""Of what pruning costs, besides."""

PRICE_FIELDS = (
    "recipe.clip_search",
    "recipe.dead_channels",
    "recipe.scale_bits",
    "sparsity.ratio",
    "sparsity.n",
    "sparsity.m",
    "wbits.cost",
    "wbits.symmetric",
    "wbits.group_size",
    "wbits.widths",
)
"""Of what every width costs, besides; the budget itself is not among them."""

ALL_WIDTHS = tuple(range(2, 9))
"""Priced whatever the budget, so that jobs that differ in it alone have the same drafts."""


def drafting_config(config: Config) -> Config:
    """Return a config that has only what drafting reads of it, and prices every width."""
    fields = set(GROUPING_FIELDS)
    mixed = config.wbits.allocation is Allocation.mixed
    if mixed:
        fields.update(PRICE_FIELDS)
    if config.sparsity.scope is SparsityScope.model:
        fields.update(PRUNING_FIELDS)
    if measures_loss(config):
        fields.update(LOSS_FIELDS)
    drafting = narrow(config, fields)
    drafting.n_groups = replace(config.n_groups, adaptive=config.adapts_groups)
    if mixed:
        drafting.wbits.widths = sorted({*config.wbits.candidate_widths(), *ALL_WIDTHS})
    return drafting
