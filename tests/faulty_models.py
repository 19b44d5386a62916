"""Tiny models with one fault each, and what a test of them needs."""

from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from tiny_models import build_tiny_model

from mi_experiments.commands.run import conf_directory
from mi_experiments.composing import from_hydra
from mi_experiments.config import Config
from mi_experiments.pipeline import CompressedLinear, compress_model
from mi_experiments.plan import Plan, plan_compression

SMALL = ["n_groups.count=2", "n_groups.multiple=1", "dataset.batch_size=2"]

BLIND = ["wbits=uniform", "n_groups=contiguous"]
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
