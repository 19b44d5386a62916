"""Measure the Hessian of what each site reads, and the Fisher information of a plan."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_experiments.calibration.drift import DensePair
from mi_experiments.calibration.fisher import Fisher, Passage, measure_fisher
from mi_experiments.calibration.scarce_experts import feed_all_tokens
from mi_experiments.config.config import Config
from mi_experiments.config.narrow import narrow
from mi_experiments.config.recipe import ScarceTokens
from mi_experiments.errors import MiError, NumericalError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.sites import Site
from mi_experiments.llm.walker import Walker
from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.targets import Drift, DriftAccumulator
from mi_experiments.out_of_memory import until_it_fits
from mi_experiments.persistence.commits import Commits

FISHER_FIELDS = (
    "seed",
    "model.ignore",
    "model.blocks",
    "wbits.fisher_samples",
)
"""Fields of the config that Fisher information depends on."""


NAMED_TOKENS = 16
"""Tokens that are kept of a site for messages."""

FISHER = "site_costs/fisher.safetensors"
"""Name under which Fisher information is committed, once a run."""


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
        accumulators = {
            site.name: accumulator(block, site, config.n_groups.sample_tokens) for site in sites
        }

        def consume(site: Site, inputs: Float[Tensor, "tokens columns"]) -> None:
            if site.routed:
                # Some mixtures show every expert every token, those of others as zeros.
                inputs = inputs[inputs.any(-1)]
            with site_context(block, site):
                accumulators[site.name].update(inputs)

        block.feed(sites, consume)
        return {site.name: finish_hessian(block, site, accumulators[site.name]) for site in sites}

    return until_it_fits(measure, block.shrink)


def in_passes(block: Block, sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Divide sites, in order, into those whose Hessians are measured in one pass.

    Args:
        block: says how many bytes their Hessians may take together.
        sites: whose inputs do not depend on what is done with the others.
    """
    limit = block.hessian_bytes
    chosen: list[Site] = []
    size = 0
    for site in sites:
        needed = 4 * site.columns**2
        if chosen and limit is not None and size + needed > limit:
            yield chosen
            chosen, size = [], 0
        chosen.append(site)
        size += needed
    if chosen:
        yield chosen


def measure_scarce(
    block: Block, hessians: dict[str, Hessian], sites: Sequence[Site], config: Config
) -> dict[str, Hessian]:
    """Measure experts that too few tokens are routed to on all tokens that enter their module.

    Args:
        block: the block at which the walk stands.
        hessians: the hessians of the sites, on their own tokens.
        sites: the sites of one pass.
        config: the config of the run.

    Returns:
        The Hessians of those experts, on all tokens.

    Raises:
        InputError: an expert cannot be shown all tokens.
        MemoryShortage: there is no room for a single sample.
        NumericalError: an expert has too few tokens, and `recipe.scarce_tokens` is `error`.
    """
    least = config.recipe.min_tokens
    scarce = [s for s in sites if s.routed and hessians[s.name].tokens < least]
    if scarce and config.recipe.scarce_tokens is ScarceTokens.error:
        tokens = hessians[scarce[0].name].tokens
        raise NumericalError(
            f"block {block.index}, {scarce[0].name}: {tokens} tokens are routed to it, fewer than "
            f"recipe.min_tokens={least}, and {len(scarce) - 1} more like it: calibrate on more "
            "tokens, or choose recipe.scarce_tokens=all_tokens or keep"
        )
    if not scarce:
        return {}

    def measure() -> dict[str, Hessian]:
        accumulators = {
            site.name: accumulator(block, site, config.n_groups.sample_tokens) for site in scarce
        }

        def consume(site: Site, inputs: Float[Tensor, "tokens columns"]) -> None:
            with site_context(block, site):
                accumulators[site.name].update(inputs)

        feed_all_tokens(block, scarce, consume)
        return {site.name: finish_hessian(block, site, accumulators[site.name]) for site in scarce}

    return until_it_fits(measure, block.shrink)


def measure_dense_pair(pair: DensePair, site: Site) -> tuple[Hessian, Drift]:
    """Return the Hessian of what a site reads now, and how far that is from the dense model.

    Where memory is short that is done again, from the beginning, in batches of half the size.

    Raises:
        MemoryShortage: there is no room for a single sample.
        NumericalError: an input is not finite, or its second moments overflow; names block and
            site.
    """

    def measure() -> tuple[Hessian, Drift]:
        # The sample serves the plan's rank statistics; here it only names what is wrong.
        hessian = accumulator(pair.block, site, NAMED_TOKENS)
        drift = DriftAccumulator(site.columns, *arithmetic(pair.block))
        with site_context(pair.block, site):
            for batch in pair.observe(site):
                hessian.update(batch.compressed)
                drift.update(batch.compressed, batch.dense, batch.drift)
            return hessian.finish(), drift.finish()

    return until_it_fits(measure, pair.shrink)


def accumulator(block: Block, site: Site, sample_tokens: int) -> HessianAccumulator:
    """Return what sums up a site, and names its tokens by their samples where it can."""
    device, dtype = arithmetic(block)
    seqlen = block.stream.hidden.shape[1]

    def name_token(token: int) -> str:
        sample = block.stream.finite.names[token // seqlen]
        return (
            f"token {token} of those routed here"
            if site.routed
            else f"{sample}, token {token % seqlen}"
        )

    return HessianAccumulator(
        site.columns,
        sample_tokens=sample_tokens,
        device=device,
        dtype=dtype,
        name_token=name_token,
    )


def arithmetic(block: Block) -> tuple[torch.device, torch.dtype]:
    """Return where and in which format a block is measured: float32, or float64 as the model is."""
    hidden = block.stream.hidden
    return block.stream.device, torch.promote_types(hidden.dtype, torch.float32)


def finish_hessian(block: Block, site: Site, accumulator: HessianAccumulator) -> Hessian:
    """Return the Hessian of a site, or say whose it could not be."""
    with site_context(block, site):
        return accumulator.finish()


def measure_plan_fisher(
    walker: Walker,
    calibration: Int[Tensor, "nsamples seqlen"],
    config: Config,
    *,
    commits: Commits | None = None,
    on_block: Callable[[str], None] | None = None,
    visit: Callable[[Passage], None] | None = None,
) -> Fisher:
    """Return the Fisher information about each output of each linear, if the budget is spent by it.

    Args:
        walker: the walker of the dense model.
        calibration: token ids; the first `wbits.fisher_samples` sequences are read.
        config: the config of the run.
        commits: keep the result, and give it back.
        on_block: called with the name of each block, forward and backward.
        visit: see `measure_fisher`; called even if the result is known.
    """
    if not config.uses_fisher:
        return {}
    config = narrow(config, FISHER_FIELDS)
    committed = commits.read_tensors(FISHER) if commits is not None else None
    known = None if committed is None else committed[0]
    if known is not None and visit is None:
        return known
    fisher = measure_fisher(
        walker,
        calibration[: config.wbits.fisher_samples],
        seed=config.seed,
        on_block=on_block,
        visit=visit,
        known=known,
    )
    if commits is not None and known is None:
        commits.commit({FISHER: (fisher, {})})
    return fisher


def measure_on_the_way_back(
    passage: Passage, block: Block, config: Config
) -> tuple[dict[str, Hessian], Fisher]:
    """Return the Hessian of each site of a block, by name, and the Fisher information.

    Both come from one forward pass and its way back.

    Raises:
        NumericalError: an input is not finite, or its second moments overflow; names block and
            site.
    """
    sites = {site.linears[0].name: site for site in block.sites}
    accumulators = {
        site.name: accumulator(block, site, config.n_groups.sample_tokens) for site in block.sites
    }

    def read(linear: LinearView, inputs: Tensor) -> None:
        if (site := sites.get(linear.name)) is not None:
            with site_context(block, site):
                accumulators[site.name].update(inputs.flatten(0, -2))

    fisher = passage.go_back(read)
    hessians = {
        site.name: finish_hessian(block, site, accumulators[site.name]) for site in block.sites
    }
    return hessians, fisher


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
