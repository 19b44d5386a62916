"""What drafting reads of the config, and nothing else, so that drafts can be shared by what it is.

Drafts are a function of the model, the calibration tokens and these fields. Whoever drafts gets a
config that has no others: a field that is missing here cannot be read, and is no silent difference
between two jobs that share a draft.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from mi_experiments.config import Config
from mi_experiments.method_config import Allocation, Cost, SparsityScope

LOSS_FIELDS = (
    "seed",
    "model.ignore",
    "model.blocks",
    "wbits.fisher_samples",
)
"""Of what the loss feels of each output."""

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


def measures_loss(config: Config) -> bool:
    """Say whether bits or pruned weights are spent by what the loss feels of each output."""
    wbits, sparsity = config.wbits, config.sparsity
    mixed = wbits.allocation is Allocation.mixed and wbits.cost is Cost.fisher
    return mixed or (sparsity.allocated and sparsity.cost is Cost.fisher)


def narrow(config: Config, fields: Iterable[str]) -> Config:
    """Return a config with some of its fields: to read any other is an AttributeError.

    Args:
        config: of which the parts are copied, so that they can be changed.
        fields: dotted paths; that of a part stands for all its fields.
    """
    narrowed: Config = _take(config, [field.split(".") for field in sorted(fields)])
    return narrowed


def _take(part: Any, paths: Sequence[Sequence[str]]) -> Any:
    """Return a value of the same class with the fields at the ends of some paths."""
    taken = object.__new__(type(part))
    for head in dict.fromkeys(path[0] for path in paths):
        rests = [path[1:] for path in paths if path[0] == head]
        value = getattr(part, head)
        setattr(taken, head, value if [] in rests else _take(value, rests))
    return taken
