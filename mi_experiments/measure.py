"""Measure what a block's sites read: from activations to a Hessian a site."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.config import Allocation, Config, Cost
from mi_experiments.errors import MiError, NumericalError
from mi_experiments.llm.blocks import Block, held
from mi_experiments.llm.fisher import measure_fisher
from mi_experiments.llm.inventory import LinearView, take_inventory
from mi_experiments.llm.sites import Site
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.twins import Twins
from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.targets import Drift, DriftAccumulator
from mi_experiments.shortage import until_it_fits


def check_weights(linears: Iterable[LinearView]) -> None:
    """Require finite weights, before the first of them is used or changed.

    Args:
        linears: of a model or a block; those without weights, on the meta device, are passed over.

    Raises:
        NumericalError: of which linear they are not.
    """
    for linear in linears:
        if linear.parameter.is_meta:
            continue
        weight = linear.read_weight()
        if bad := int((~weight.isfinite()).count_nonzero()):
            raise NumericalError(
                f"{bad} of {weight.numel()} weights of {linear.name} are not finite: "
                f"the checkpoint is damaged, or beyond the range of {linear.dtype}"
            )


def measure_hessians(block: Block, sites: Sequence[Site], config: Config) -> dict[str, Hessian]:
    """Run the block on all its inputs once and return the Hessian of each site, by name.

    Where memory is short that is done again, from the beginning, in batches of half the size.

    Raises:
        MemoryShortage: there is no room for a single sample.
        NumericalError: an input is not finite, or its second moments overflow; names block and
            site.
    """

    def measure() -> dict[str, Hessian]:
        accumulators = {site.name: accumulator(block, site, config) for site in sites}

        def consume(site: Site, inputs: Float[Tensor, "tokens columns"]) -> None:
            with site_context(block, site):
                accumulators[site.name].update(inputs)

        block.feed(sites, consume)
        return {site.name: finish(block, site, accumulators[site.name]) for site in sites}

    return until_it_fits(measure, block.stream.shrink)


def in_passes(sites: Sequence[Site], statistics: int | None) -> Iterator[list[Site]]:
    """Divide sites, in order, into those whose Hessians are measured in one pass.

    Args:
        sites: whose inputs do not depend on what is done with the others.
        statistics: bytes that their Hessians may take together; None for no limit.
    """
    chosen: list[Site] = []
    size = 0
    for site in sites:
        needed = 4 * site.columns**2
        if chosen and statistics is not None and size + needed > statistics:
            yield chosen
            chosen, size = [], 0
        chosen.append(site)
        size += needed
    if chosen:
        yield chosen


def measure_twins(twins: Twins, site: Site, config: Config) -> tuple[Hessian, Drift]:
    """Return the Hessian of what a site reads now, and how far that is from the dense model.

    Where memory is short that is done again, from the beginning, in batches of half the size.

    Raises:
        MemoryShortage: there is no room for a single sample.
        NumericalError: an input is not finite, or its second moments overflow; names block and
            site.
    """

    def measure() -> tuple[Hessian, Drift]:
        hessian = accumulator(twins.block, site, config)
        drift = DriftAccumulator(site.columns, *arithmetic(twins.block))
        with site_context(twins.block, site):
            for batch in twins.observe(site):
                hessian.update(batch.compressed)
                drift.update(batch.compressed, batch.dense, batch.drift)
            return hessian.finish(), drift.finish()

    return until_it_fits(measure, twins.shrink)


def accumulator(block: Block, site: Site, config: Config) -> HessianAccumulator:
    """Return what sums up a site, and names its tokens by their samples where it can."""
    device, dtype = arithmetic(block)
    seqlen = block.stream.hidden.shape[1]

    def name_token(token: int) -> str:
        sample = block.stream.screen.names[token // seqlen]
        return (
            f"token {token} of those routed here"
            if site.routed
            else f"{sample}, token {token % seqlen}"
        )

    return HessianAccumulator(
        site.columns,
        sample_tokens=config.n_groups.sample_tokens,
        device=device,
        dtype=dtype,
        name_token=name_token,
    )


def arithmetic(block: Block) -> tuple[torch.device, torch.dtype]:
    """Return where and in which format a block is measured: float32, or float64 as the model is."""
    hidden = block.stream.hidden
    return block.stream.device, torch.promote_types(hidden.dtype, torch.float32)


def finish(block: Block, site: Site, accumulator: HessianAccumulator) -> Hessian:
    """Return the Hessian of a site, or say whose it could not be."""
    with site_context(block, site):
        return accumulator.finish()


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
def site_context(block: Block, site: Site, linear: LinearView | None = None) -> Iterator[None]:
    """Say in which block and site, and in which linear, an expected failure happened."""
    try:
        yield
    except MiError as error:
        where = f"block {block.index}, {site.name}"
        if linear is not None and len(site.linears) > 1:
            where += f" ({linear.name})"
        raise type(error)(f"{where}: {error}") from error
