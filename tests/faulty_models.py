"""Tiny models with one fault each, and what a test of them needs."""

from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from tiny_models import build_tiny_model

from mi_experiments.commands.run import conf_directory
from mi_experiments.composing import from_hydra
from mi_experiments.config import Config
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.hessian import Hessian, HessianAccumulator
from mi_experiments.method.pruning import Sparsity
from mi_experiments.pipeline import CompressedLinear, compress_model
from mi_experiments.plan import LinearPlan, Plan, plan_compression
from mi_experiments.solving import Measured, factorize_site, pattern_block, solve_linear

SMALL = ["n_groups.count=2", "n_groups.multiple=1", "dataset.batch_size=2"]

BLIND = ["wbits=uniform", "n_groups=contiguous", "sparsity.scope=linear"]
"""Plans without looking at activations, so that faults meet the sweep."""

UNDAMPED = ["recipe=textbook", "recipe.damping=0", "sparsity=dense"]

SINGULAR = "model.layers.1.mlp.down_proj"
"""The linear of `build_singular` whose Hessian is not positive definite without damping."""

LOUD = 100
"""The token on which `build_overflowing` leaves the range of float16."""


def build_singular(**changes: Any) -> Any:
    """Build a model of which one linear reads two equal channels: its Hessian is semidefinite."""
    model = build_tiny_model("llama", **changes)
    mlp = model.get_submodule("model.layers.1.mlp")
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[7] = linear.weight[3]
    return model


def build_overflowing(**changes: Any) -> Any:
    """Build a float16 model that is finite but for one token, inside its first block."""
    model = build_tiny_model("llama", **changes)
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 0
    embedding[LOUD] = 0
    embedding[LOUD, 0] = 30
    mlp = model.get_submodule("model.layers.0.mlp")
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[:, 0] = 80
    return model.half()


def config_of(*overrides: str) -> Config:
    """Compose a run with two groups a site."""
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        return from_hydra(compose("config", overrides=[*SMALL, *overrides]))


def compress(
    model: Any, tokens: torch.Tensor, overrides: Sequence[str] = (), made: Plan | None = None
) -> dict[str, CompressedLinear]:
    """Compress a model and return its linears by name."""
    config = config_of(*overrides)
    made = made or plan_compression(model, tokens, config)
    blocks = compress_model(model, tokens, made, config)
    return {linear.report.name: linear for block in blocks for linear in block.linears}


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    """Return every bit that a model holds."""
    return {
        key: value.detach().clone().flatten().view(torch.uint8)
        for key, value in model.state_dict().items()
    }


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    """Name the tensors of which a bit has changed."""
    now = bits_of(model)
    assert now.keys() == before.keys()
    return {key for key, bits in before.items() if not torch.equal(bits, now[key])}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def measure(inputs: torch.Tensor) -> Hessian:
    accumulator = HessianAccumulator(inputs.shape[1], dtype=torch.float64)
    accumulator.update(inputs)
    return accumulator.finish()


def solve_here(
    weight: torch.Tensor, inputs: torch.Tensor, bits: int, ratio: float, config: Any
) -> Any:
    """Solve one linear with one scale group a row, audit it, and return what the sweep returned."""
    rows, columns = weight.shape
    one = torch.zeros(columns, dtype=torch.int32)
    widths = torch.full((columns,), bits, dtype=torch.uint8)
    sparsity = Sparsity(ratio)
    linear_plan = LinearPlan(0, "site", rows, columns, one, widths, one, sparsity)
    block = pattern_block(columns, sparsity, config)
    hessian = measure(inputs)
    statistics = factorize_site(Measured(hessian, None, hessian.tokens), [sparsity], config)
    solution = solve_linear(weight, statistics, linear_plan, config)
    audit_linear(
        solution.swept,
        solution.grid,
        sparsity,
        original=weight,
        order=statistics.order(),
        mask_block=block,
        max_average_bits=float(bits),
        stored=solution.swept.weight,
    )
    start = 0
    for positions in torch.split(statistics.order(), block):
        count = int(solution.swept.pruned[:, positions].sum())
        assert count == round(ratio * (rows * len(positions))), start
        start += len(positions)
    return solution.swept
