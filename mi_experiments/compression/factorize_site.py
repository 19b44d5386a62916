"""What is measured at a site, with its one Cholesky factor, for all linears that read it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int64
from torch import Tensor

from mi_experiments.calibration.drift import DensePair
from mi_experiments.calibration.hessians import site_context
from mi_experiments.calibration.measure_sites import Measured, measure_sites
from mi_experiments.config.config import Config
from mi_experiments.config.recipe import OnSingular
from mi_experiments.errors import SingularError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.sites import Site
from mi_experiments.method.hessian import Factor, Hessian, factorize, sweep_order
from mi_experiments.method.information import total_correlation
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.targets import Drift
from mi_experiments.out_of_memory import count_retries, give_back
from mi_experiments.planning.plan import Plan


@dataclass(frozen=True)
class SiteStatistics:
    """What the linears of one site share.

    Attributes:
        hessian: the hessian of what they read.
        factor: of the damped Hessian; None where all weights are pruned, so that none is needed, or
            where there is none and the recipe says to skip such linears.
        attempts: the dampings that were tried.
        drift: the drift from what they read in the dense model; None if that is not measured.
        tokens: the tokens that they read.
        kept: whether they stay as they are, because those are too few.
        retries: how often memory was short while they were measured.
    """

    hessian: Hessian
    factor: Factor | None
    attempts: tuple[float, ...]
    drift: Drift | None
    tokens: int
    kept: bool = False
    retries: int = 0

    @property
    def skipped(self) -> bool:
        """Whether a factor was tried for and not found."""
        return self.factor is None and bool(self.attempts)

    @cached_property
    def total_correlation(self) -> float | None:
        """Of the channels, nats; None without a factor, or where no channel carries anything."""
        if self.factor is None or self.hessian.is_dead:
            return None
        return total_correlation(self.factor)

    def order(self) -> Int64[Tensor, "columns"]:
        """Return the order in which the channels are swept; natural where they are not."""
        if self.factor is not None:
            return self.factor.order
        return torch.arange(len(self.hessian.diagonal), device=self.hessian.diagonal.device)


def measure_statistics(
    block: Block,
    pair: DensePair | None,
    plan: Plan,
    config: Config,
) -> Iterator[tuple[Site, SiteStatistics]]:
    """Measure and factorize each site when it is asked for."""
    sites = measure_sites(block, pair, config)
    while True:
        # Only while measuring: what the caller does with a site is counted there.
        with count_retries() as retries:
            found = next(sites, None)
        if found is None:
            return
        site, measured = found
        del found
        give_back(measured.hessian.matrix.nbytes)
        with site_context(block, site):
            sparsities = [plan.linears[linear.name].sparsity for linear in site.linears]
            shared = factorize_site(measured, sparsities, config)
        yield site, replace(shared, retries=retries.count)


def factorize_site(
    measured: Measured, sparsities: Collection[Sparsity], config: Config
) -> SiteStatistics:
    """Factorize a site's Hessian in the order of the sweep, once for all its linears.

    Args:
        measured: what was measured at the site.
        sparsities: the sparsities of its linears; patterns n:m are the same for all.
        config: the config of the run.

    Raises:
        SingularError: it cannot be, and the recipe does not say to skip its linears.
    """
    recipe, hessian, drift = config.recipe, measured.hessian, measured.drift
    without = SiteStatistics(hessian, None, (), drift, measured.tokens)
    if measured.kept:
        return replace(without, kept=True)
    if all(sparsity.ratio == 1 for sparsity in sparsities):
        return without
    window = max(1, *(sparsity.window for sparsity in sparsities))
    order = sweep_order(hessian.diagonal, recipe.order, window=window)
    escalate = recipe.on_singular is OnSingular.escalate
    if hessian.is_dead and recipe.on_singular is OnSingular.skip:
        return replace(without, attempts=(recipe.damping,))
    try:
        factor = factorize(
            fill_dead(hessian, config),
            damping=recipe.damping,
            power=recipe.damping_power,
            order=order,
            escalate=escalate,
        )
    except SingularError as error:
        if recipe.on_singular is not OnSingular.skip:
            line = "recipe.on_singular=skip leaves the linears that read it as they are"
            raise SingularError(f"{error}; {line}") from error
        return replace(without, attempts=(recipe.damping,))
    return replace(without, factor=factor, attempts=factor.attempts)


def fill_dead(hessian: Hessian, config: Config) -> Hessian:
    """Give channels that were zero on every token the diagonal that the recipe says, if any.

    It is said in units of 2/nsamples XᵀX, a sum over the tokens of each sequence, as published.
    Where all channels are dead, none can be preferred to another: then it is 1 in any case, which
    rounds to nearest and prunes by magnitude.
    """
    if hessian.is_dead:
        return replace(hessian, matrix=torch.eye(len(hessian.matrix)).to(hessian.matrix))
    if not config.recipe.dead_diagonal or not hessian.dead.any():
        return hessian
    energy = config.recipe.dead_diagonal / config.dataset.seqlen
    return replace(hessian, matrix=hessian.matrix + torch.diag(hessian.dead * energy))
