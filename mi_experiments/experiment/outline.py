"""The shapes of a model and of its blocks, from its config file alone."""

from transformers import PreTrainedModel

from mi_experiments.config.config import Config
from mi_experiments.embedded import find_model
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.loading import load_skeleton
from mi_experiments.llm.walker import Walker
from mi_experiments.method.pruning import check_dimensions


def outline_model(config: Config) -> tuple[PreTrainedModel, list[Block]]:
    """Return the shapes of a model and of its blocks, having checked that all of them can be met.

    Raises:
        InputError: a linear has fewer channels than groups, or no whole number of n:m windows.
    """
    model = load_skeleton(
        find_model(config.model.path),
        revision=config.model.revision,
        offline=config.model.offline,
        attention=config.model.attention,
    )
    walker = Walker(model, path=config.model.blocks, ignore=config.model.ignore)
    blocks = walker.describe_blocks(config.dataset.seqlen)
    linears = [linear for block in blocks for site in block.sites for linear in site.linears]
    columns = {linear.name: linear.columns for linear in linears}
    check_dimensions(columns, config.sparsity.average, config.sparsity.mask_block)
    for name, count in columns.items():
        config.n_groups.check_count(count, name)
    return model, blocks
