"""What is measured at each site, when it is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from mi_experiments.calibration.drift import DensePair
from mi_experiments.calibration.hessians import (
    in_passes,
    measure_dense_pair,
    measure_hessians,
    measure_scarce,
)
from mi_experiments.config.config import Config
from mi_experiments.config.recipe import ScarceTokens
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.sites import Site
from mi_experiments.method.hessian import Hessian
from mi_experiments.method.targets import Drift


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured at one site.

    Attributes:
        hessian: of what its linears read; of an expert with too few tokens, on all tokens.
        drift: the drift from what they read in the dense model; None if that is not measured.
        tokens: the tokens that the site itself read.
        kept: whether its linears stay as they are, because those are too few.
    """

    hessian: Hessian
    drift: Drift | None
    tokens: int
    kept: bool = False


def measure_sites(
    block: Block, pair: DensePair | None, config: Config
) -> Iterator[tuple[Site, Measured]]:
    """Measure each stage when it is asked for (true-sequential), or all of them at the beginning.

    The experts of one stage are measured together, and without drift: the dense model sends them
    other tokens.
    """
    if pair is None and not config.recipe.true_sequential:
        stages = [list(block.sites)]
    else:
        stages = [list(sites) for _, sites in groupby(block.sites, lambda site: site.stage)]
        (pair or block).open_pieces()
    for sites in stages:
        if pair is not None and not sites[0].routed:
            hessian, drift = measure_dense_pair(pair, sites[0])
            yield sites[0], Measured(hessian, drift, hessian.tokens)
            continue
        for together in in_passes(block, sites):
            hessians = measure_hessians(block, together, config)
            tokens = {name: hessian.tokens for name, hessian in hessians.items()}
            keep = config.recipe.scarce_tokens is ScarceTokens.keep
            if not keep:
                hessians |= measure_scarce(block, hessians, together, config)
            for site in together:
                count = tokens[site.name]
                kept = keep and site.routed and count < config.recipe.min_tokens
                yield site, Measured(hessians.pop(site.name), None, count, kept)
