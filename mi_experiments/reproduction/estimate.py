"""How long a row would take on a stated accelerator: its operations, counted, over stated rates.

An estimate for a plan, from `conf/estimates.yaml`, and no measurement. What is counted is this
project's own work: forward passes, Hessians, factors, sweeps, refinement, columns, weights read.
Not counted: finding groups, costs of widths, clipping ranges, texts, downloads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mi_experiments.config.config import Config
from mi_experiments.config.method import Allocation
from mi_experiments.config.recipe import GridFit
from mi_experiments.experiment.dry_run import Outline

Rates = Mapping[str, Any]
"""The content of `conf/estimates.yaml`."""

HALF = 2
"""Bytes of a weight in a published checkpoint."""


@dataclass(frozen=True)
class Work:
    """What a run does, counted.

    Attributes:
        forward: flop of forward and backward passes through the blocks.
        hessians: flop of Hessians, in half precision.
        sweeps: flop of factors, sweeps and refinement, in float32.
        columns: the columns of all linears, once for every sweep or round that goes through them.
        read: bytes of weights, on every pass over the model.
    """

    forward: float
    hessians: float
    sweeps: float
    columns: int
    read: float

    def seconds(self, rates: Rates) -> float:
        """Return the time that it takes at these rates, one thing after the other."""
        tensor = rates["tensor_flops"] * rates["tensor_share"]
        float32 = rates["float32_flops"] * rates["float32_share"]
        return float(
            (self.forward + self.hessians) / tensor
            + self.sweeps / float32
            + self.columns * rates["column_seconds"]
            + self.read / rates["read_bytes"]
        )


def count_work(outline: Outline, config: Config, rates: Rates) -> Work:
    """Count what a run does.

    With N calibration tokens, c columns and r rows: a Hessian N c² flop, by symmetry; a factor
    c³ / 3; a sweep r c²; a round of refinement 4 r c²; a forward pass 2 for each weight and token.

    Args:
        outline: the outline of the run.
        config: the config of the run.
        rates: the rates for the windows of a text that is read to its end.
    """
    recipe = config.recipe
    tokens = config.dataset.nsamples * config.dataset.seqlen
    evaluated = sum(
        (text.max_windows or rates["joined_windows"]) * text.seqlen
        for text in config.evaluation.datasets.values()
    )
    blocks = max(site.blocks for site in outline.sites)
    # Every pass goes through one block; two evaluations go through all of them.
    forward = 2.0 * outline.weights * (tokens * outline.passes / blocks + 2 * evaluated)
    if config.uses_fisher:
        samples = min(config.wbits.fisher_samples, config.dataset.nsamples)
        forward += 6 * outline.weights * samples * config.dataset.seqlen
    quantized = config.wbits.allocation is not Allocation.unquantized
    pruned = config.sparsity.ratio > 0
    planned = config.needs_activations
    twice = pruned and quantized and recipe.grid_fit is GridFit.compensated
    sweeps = (1 + twice) * (2 if config.has_safety_net else 1) * (pruned or quantized)
    rounds = recipe.refine_rounds * quantized
    corrected = config.needs_dense_pair
    hessians = solving = columns = 0.0
    for site in outline.sites:
        width = site.shapes[0][1]
        rows = sum(rows for rows, _ in site.shapes)
        hessians += site.blocks * tokens * width**2 * (sweeps + planned + 2 * corrected)
        factors = (sweeps > 0) + planned
        solving += site.blocks * (
            factors * width**3 / 3 + rows * width**2 * (sweeps + corrected + 4 * rounds)
        )
        columns += site.blocks * len(site.shapes) * width * (sweeps + rounds)
    passes = 2 + planned + (1 + corrected) * (sweeps > 0)
    return Work(forward, hessians, solving, int(columns), float(passes * HALF * outline.weights))
