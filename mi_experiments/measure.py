"""Measure what a block's sites read: from activations to a Hessian a site."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.config import Allocation, Config, Cost
from mi_experiments.errors import MiError
from mi_experiments.llm.blocks import Block, held
from mi_experiments.llm.fisher import measure_fisher
from mi_experiments.llm.inventory import take_inventory
from mi_experiments.llm.sites import Site
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.twins import Twins
from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.targets import Drift, DriftAccumulator


def measure_hessians(block: Block, sites: Sequence[Site], config: Config) -> dict[str, Hessian]:
    """Run the block on all its inputs once and return the Hessian of each site, by name.

    Raises:
        NumericalError: an input is not finite; names block and site.
    """
    device = block.stream.hidden.device
    accumulators = {
        site.name: HessianAccumulator(
            site.columns, sample_tokens=config.n_groups.sample_tokens, device=device
        )
        for site in sites
    }

    def consume(site: Site, inputs: Float[Tensor, "tokens columns"]) -> None:
        with site_context(block, site):
            accumulators[site.name].update(inputs)

    block.feed(sites, consume)
    return {name: accumulator.finish() for name, accumulator in accumulators.items()}


def in_passes(sites: Sequence[Site], hessian_bytes: int | None) -> Iterator[list[Site]]:
    """Divide sites, in order, into those whose Hessians are measured in one pass.

    Args:
        sites: whose inputs do not depend on what is done with the others.
        hessian_bytes: bytes that their Hessians may take together; None for no limit.
    """
    chosen: list[Site] = []
    size = 0
    for site in sites:
        needed = 4 * site.columns**2
        if chosen and hessian_bytes is not None and size + needed > hessian_bytes:
            yield chosen
            chosen, size = [], 0
        chosen.append(site)
        size += needed
    if chosen:
        yield chosen


def measure_twins(twins: Twins, site: Site, config: Config) -> tuple[Hessian, Drift]:
    """Return the Hessian of what a site reads now, and how far that is from the dense model.

    Raises:
        NumericalError: an input is not finite; names block and site.
    """
    device = twins.block.stream.hidden.device
    hessian = HessianAccumulator(
        site.columns, sample_tokens=config.n_groups.sample_tokens, device=device
    )
    drift = DriftAccumulator(site.columns, device)
    with site_context(twins.block, site):
        for batch in twins.observe(site):
            hessian.update(batch.compressed)
            drift.update(batch.compressed, batch.dense, batch.drift)
    return hessian.finish(), drift.finish()


def measure_loss(
    model: PreTrainedModel,
    calibration: Int[Tensor, "nsamples seqlen"],
    config: Config,
    weights: BlockWeights | None = None,
) -> dict[str, Float[Tensor, "_"]]:
    """Return what the loss feels of each output of each linear, if the budget is spent by that."""
    wbits = config.wbits
    if wbits.allocation is not Allocation.mixed or wbits.cost is not Cost.fisher:
        return {}
    inventory = take_inventory(model, ignore=config.model.ignore, path=config.model.blocks)
    with contextlib.ExitStack() as stack:
        for index in range(len(inventory.modules)):
            stack.enter_context(held(weights, index))
        samples = calibration[: wbits.fisher_samples]
        return measure_fisher(model, samples, inventory, seed=config.seed)


@contextmanager
def site_context(block: Block, site: Site) -> Iterator[None]:
    """Say in which block and site an expected failure happened."""
    try:
        yield
    except MiError as error:
        raise type(error)(f"block {block.index}, {site.name}: {error}") from error
