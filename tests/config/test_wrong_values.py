"""Whatever value stands at whatever key of a config: it is taken, or refused in a line."""

import copy
import math
import random
from contextlib import suppress
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.errors import InputError

VALUES: list[Any] = [
    None, [], {}, "word", "", -1, 10**20, 10**400, math.nan, math.inf, True, [1], {"a": 1},
    "${seed}",
]  # fmt: skip
TRIED = 12
"""Pairs of key and value that are drawn of a section; all of them take minutes."""


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        return compose("config", overrides=["experiment=pinned/embedded"])


def keys_below(part: Any, path: str = "") -> list[str]:
    """Name every key of a config, those of sections included."""
    if not isinstance(part, dict):
        return []
    own = [f"{path}{key}" for key in part]
    return own + [k for key, below in part.items() for k in keys_below(below, f"{path}{key}.")]


@pytest.mark.parametrize("section", ["dataset", "wbits", "tracking", "model", "expected"])
def test_a_wrong_value_is_taken_or_refused(composed: DictConfig, section: str) -> None:
    small = copy.deepcopy(composed)
    small.corpora = {}  # most of the keys, all of them alike
    plain = OmegaConf.to_container(small)
    assert isinstance(plain, dict)
    keys = [section, *keys_below(plain[section], f"{section}.")]
    pairs = [(key, value) for key in keys for value in VALUES]
    for key, value in random.Random(section).sample(pairs, min(TRIED, len(pairs))):
        changed = copy.deepcopy(small)
        OmegaConf.set_struct(changed, False)
        OmegaConf.update(changed, key, value, merge=False)
        with suppress(InputError):  # and nothing else
            from_hydra(changed)
    OmegaConf.update(small, section, "${seed}", merge=False)
    with pytest.raises(InputError):
        from_hydra(small)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("seed", 2**63, ["seed=9223372036854775808", "from 0 to 2^63 - 1"]),
        ("seed", -1, ["seed=-1", "from 0 to 2^63 - 1"]),
        ("dataset.seed", 10**20, ["dataset.seed=1000000", "2^63"]),
        ("n_groups.seed", -5, ["n_groups.seed=-5", "from 0 to 2^63 - 1"]),
        ("dataset.nsamples", 10**30, ["dataset.nsamples=", "2^63"]),
        ("memory.host", math.inf, ["memory.host=inf", "finite"]),
        ("sparsity.ratio", math.nan, ["sparsity.ratio=nan", "finite"]),
        ("tracking.init_timeout", 10**9, ["tracking.init_timeout=1000000000", "86400"]),
        ("tracking.project", "team/project", ["tracking.project=team/project", "none of /"]),
        ("tracking.entity", "a b", ["tracking.entity=a b", "or null"]),
        ("memory", None, ["memory=null", "activations, accelerator, host"]),
        ("cache", None, ["cache=null", "needs a value"]),
    ],
)
def test_what_is_allowed_is_said(
    composed: DictConfig, key: str, value: Any, parts: list[str]
) -> None:
    changed = copy.deepcopy(composed)
    OmegaConf.update(changed, key, value, merge=False)
    with pytest.raises(InputError) as refused:
        from_hydra(changed)
    for part in parts:
        assert part in str(refused.value)


def test_the_largest_seed_is_a_seed(composed: DictConfig) -> None:
    changed = copy.deepcopy(composed)
    changed.seed = 2**63 - 1
    assert from_hydra(changed).seed == 2**63 - 1
