"""Drafts follow from what they are known by: no other field can be read, no other changes a bit."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import composed
import pytest
import torch

from mi_experiments.calibration.hessians import FISHER_FIELDS
from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.narrow import narrow
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.cache import content_key
from mi_experiments.planning import plan
from mi_experiments.planning.cost_key import ALL_WIDTHS, GROUPING_FIELDS, cost_config
from mi_experiments.planning.plan import plan_compression
from mi_experiments.planning.site_costs import BlockCosts

SMALL = (
    "n_groups.count=2", "n_groups.multiple=8", "dataset.batch_size=2",
    "sparsity.scope=linear", "wbits.cost=distortion",
)  # fmt: skip
FISHER = ("wbits.cost=fisher", "wbits.scope=model")


config_of = partial(composed.config_of, base=SMALL)


def leaves(part: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of every field of a config."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name


def read(part: Any, path: str) -> Any:
    for name in path.split("."):
        part = getattr(part, name)
    return part


def test_a_narrowed_config_has_its_fields_and_no_other() -> None:
    config = config_of()
    kept = {"seed", "recipe.damping", "sparsity.ratio", "sparsity.n"}
    narrowed = narrow(config, [*kept, "n_groups"])
    assert isinstance(narrowed, Config)
    for path in leaves(config):
        if path in kept or path.startswith("n_groups."):
            assert read(narrowed, path) == read(config, path)
        else:
            with pytest.raises(AttributeError):
                read(narrowed, path)
    assert list(to_plain(narrowed)) == ["n_groups", "recipe", "seed", "sparsity"]
    narrowed.recipe.damping = 0.7
    assert config.recipe.damping != 0.7


@pytest.fixture
def measured_costs(
    tiny_model: Callable[..., Any],
    tiny_tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[BlockCosts]]:
    """Give the site costs that a plan is made of."""

    def costs_of(*overrides: str) -> list[BlockCosts]:
        found: list[BlockCosts] = []
        real = plan.measure_block_costs

        def spy(*arguments: Any) -> BlockCosts:
            found.append(real(*arguments))
            return found[-1]

        with monkeypatch.context() as patch:
            patch.setattr(plan, "measure_block_costs", spy)
            plan_compression(Walker(tiny_model("llama")), tiny_tokens(4, 16), config_of(*overrides))
        return found

    return costs_of


def bits_of(all_costs: list[BlockCosts]) -> list[Any]:
    """Return every bit of site costs as something that can be compared."""
    return [
        (name, tensor.dtype, tensor.flatten().view(torch.uint8).tolist())
        for block_costs in all_costs
        for name, tensor in block_costs.stored()[0].items()
    ] + [block_costs.stored()[1] for block_costs in all_costs]


def key_of(*overrides: str) -> str:
    return content_key(to_plain(cost_config(config_of(*overrides))))


SAME = [
    ["wbits.average=3"],
    ["wbits.average=2.5"],
    ["wbits.average=7.75"],
    ["wbits.widths=[2,3,4,8]"],
    ["wbits.scope=model", "n_groups.adaptive=false"],
    ["wbits.fisher_samples=3"],
    ["sparsity.mask_block=64"],
    ["recipe.order=natural", "recipe.refine_rounds=0", "recipe.grid_fit=static"],
    ["recipe.input_correction=0", "recipe.residual_correction=0.5", "recipe.max_escalated=0.5"],
    ["model.name=other", "memory.activations=disk", "export=dense", "cache=false"],
    ["evaluation.batch_tokens=64", "evaluation.logits_chunk=32"],
]
OTHER = [
    ["seed=1"],  # through n_groups.seed
    ["model.ignore=['*.q_proj']"],
    ["dataset.batch_size=3"],
    ["n_groups.count=3"],
    ["wbits.scope=model"],  # through n_groups.adaptive
    ["n_groups.multiple=4"],
    ["n_groups=mutual_information"],
    ["n_groups.estimator=gaussian"],
    ["n_groups.sample_tokens=32"],
    ["recipe.damping=0.2"],
    ["recipe.damping_power=1"],
    ["recipe.on_singular=error"],
    ["recipe.dead_channels=zero"],
    ["recipe.min_tokens=64"],
    ["recipe.scarce_tokens=keep"],
    ["sparsity.ratio=0.25"],
    ["sparsity=semistructured_2_4"],
    ["wbits.cost=relative"],
    ["wbits.symmetric=true"],
    ["wbits.group_size=8"],
    ["recipe.clip_search=false"],
    ["recipe.scale_bits=32"],
    ["wbits.widths=[4,16]"],
    ["wbits=uniform"],
    [*FISHER],
    ["sparsity.scope=model"],
]


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_what_site_costs_do_not_depend_on_is_not_in_the_key(overrides: list[str]) -> None:
    assert key_of(*overrides) == key_of()


def test_what_is_not_in_the_key_moves_no_bit_of_the_costs(
    measured_costs: Callable[..., list[BlockCosts]],
) -> None:
    """All that agree with each other at once, and each of the others with them."""
    expected = bits_of(measured_costs())
    together = [override for overrides in SAME[4:] for override in overrides]
    for average in SAME[:3]:
        assert bits_of(measured_costs(*average, *together)) == expected
    assert bits_of(measured_costs(*SAME[3], *together)) == expected


@pytest.mark.parametrize("overrides", OTHER, ids=" ".join)
def test_what_site_costs_depend_on_is_in_the_key(overrides: list[str]) -> None:
    assert key_of(*overrides) != key_of()


@pytest.mark.parametrize(
    "overrides",
    [
        ["sparsity.mask_block=64"],
        ["sparsity.spread=0.1"],
        ["sparsity.cost=relative"],
        ["sparsity.ratio=0.25"],
        ["recipe.order=natural"],
        ["wbits.fisher_samples=3"],
        ["seed=1"],
    ],
    ids=" ".join,
)
def test_what_pricing_of_pruning_reads_is_in_the_key(overrides: list[str]) -> None:
    spread = "sparsity.scope=model"
    assert key_of(spread, *overrides) != key_of(spread)


def test_what_the_loss_feels_follows_from_its_own_fields() -> None:
    def key(*overrides: str) -> str:
        return content_key(to_plain(narrow(config_of(*FISHER, *overrides), FISHER_FIELDS)))

    for same in (["n_groups=random"], ["recipe.damping=0.2"], ["wbits.average=3"], *SAME[6:]):
        assert key(*same) == key()
    for other in ("seed=1", "wbits.fisher_samples=3", "model.ignore=['*.q_proj']"):
        assert key(other) != key()
    assert key_of(*FISHER, "wbits.fisher_samples=3") != key_of(*FISHER)


@pytest.mark.parametrize("overrides", [(), FISHER, ("wbits=uniform",)])
def test_site_costs_can_read_no_other_field(
    tiny_model: Callable[..., Any],
    tiny_tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    config = config_of(*overrides)
    given: list[Config] = []
    real = plan.measure_block_costs

    def spy(*arguments: Any) -> BlockCosts:
        given.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(plan, "measure_block_costs", spy)
    plan_compression(Walker(tiny_model("llama")), tiny_tokens(4, 16), config)
    assert given
    known = to_plain(cost_config(config))
    assert all(to_plain(found) == known for found in given)


@pytest.mark.parametrize(
    ("cost", "budget"),
    [
        ("distortion", "wbits.average=2.5"),
        ("relative", "wbits.widths=[3,16]"),
        ("fisher", "wbits.average=4"),
    ],
)
def test_the_price_of_a_width_does_not_depend_on_what_else_is_priced(
    tiny_model: Callable[..., Any],
    tiny_tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    cost: str,
    budget: str,
) -> None:
    """So that a plan from shared site costs is the plan from its own, bit for bit."""
    model, tokens = tiny_model("llama"), tiny_tokens(4, 16)
    config = config_of(budget, f"wbits.cost={cost}", "wbits.scope=model")
    shared = plan_compression(Walker(model), tokens, config)

    def alone(config: Config) -> Config:
        narrowed = cost_config(config)
        narrowed.wbits.widths = config.wbits.candidate_widths()
        return narrowed

    assert {*ALL_WIDTHS} - {*alone(config).wbits.candidate_widths()}
    monkeypatch.setattr(plan, "cost_config", alone)
    own = plan_compression(Walker(model), tokens, config)
    assert own.sha256() == shared.sha256()
    assert own.stored()[1] == shared.stored()[1]


def test_whatever_a_walker_takes_from_the_config_is_in_the_key() -> None:
    """It is not read from the narrowed config, so that nothing else would notice."""
    taken = {"path": "model.blocks", "ignore": "model.ignore", "batch_size": "dataset.batch_size"}
    # What the dense model is, where it lives and in how many passes it is measured: no bit moves.
    free = {"model", "weights", "allocate", "hessian_bytes", "piecewise"}
    assert {field.name for field in dataclasses.fields(Walker)} == free | taken.keys()
    assert set(taken.values()) <= set(GROUPING_FIELDS)
