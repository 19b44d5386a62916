"""Names of run and sweep directories, which follow from what is computed in them.

The same command has the same name in every process: `conf/config.yaml` asks for these names
through the resolvers `config_hash`, `run_id` and `sweep_id`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf

from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.renames import ADDED
from mi_experiments.config.secrets import scrub

NUMERICS_VERSION = 4
"""Raised by every change that may move a number; CHANGELOG.md says which, under "Numerics"."""


INCIDENTAL = (
    "tracking",
    "memory",
    "cache",
    "dry_run",
    "resume",
    "expected",
    "recipe.max_escalated",
)
"""Parts of the config that move no number."""


HASH = 10
"""Hexadecimal digits of a hash, at the end of a name."""

READABLE = 60
"""Most characters of a job's name before its hash."""


def register_resolvers() -> None:
    """Let configs ask for names; every process that composes one must have called this."""
    OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)
    OmegaConf.register_new_resolver("sweep_id", sweep_id, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)


def config_hash(*, _root_: DictConfig) -> str:
    """Name what a run will compute: ten hexadecimal digits of everything that moves a number."""
    return digest(asked_of(_root_))


def run_id(*, _root_: DictConfig) -> str:
    """Name a run: its model, to read, and what it will compute."""
    return f"{scrub(_root_.model.name)}-{config_hash(_root_=_root_)}"


def sweep_id(*, _root_: DictConfig) -> str:
    """Name what a sweep will compute: its experiment file or model, and a hash.

    The hash is over the swept values and over everything else that moves a number, as it is
    composed without the swept values.
    """
    hydra = _root_.hydra
    choices = read_choices(hydra.sweeper.get("params") or {}, list(hydra.overrides.task))
    swept = {key: choice.values for key, choice in choices.items() if choice.swept}
    name = hydra.runtime.choices.get("experiment") or _root_.model.name
    if {"experiment", "model", "model.name"} & swept.keys():
        name = "sweep"
    moving = {key: values for key, values in swept.items() if not is_incidental(key)}
    return f"{as_word(scrub(name))}-{digest([asked_of(_root_), moving])}"


@dataclass(frozen=True)
class Choice:
    """What a sweep is given for one key.

    Attributes:
        values: as on the command line; one where nothing is swept, and a pattern as it was given.
        overrides: one for each value, as Hydra reads them.
        swept: whether the values are jobs of their own, or come from the file of a sweep.
    """

    values: tuple[str, ...]
    overrides: tuple[str, ...]
    swept: bool


def read_choices(
    params: Mapping[str, Any], overrides: Sequence[str], parser: OverridesParser | None = None
) -> dict[str, Choice]:
    """Return what is chosen for each key, in the order in which jobs go through them.

    Args:
        params: those that a file gives (`hydra.sweeper.params`).
        overrides: those of the command line, which win.
        parser: one that knows the config files, so that patterns become values.
    """
    parser = parser or OverridesParser.create()
    filed = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices = {override.get_key_element(): read_choice(override, parser) for override in filed}
    choices = {key: replace(choice, swept=True) for key, choice in choices.items()}
    given = parser.parse_overrides(list(overrides))
    return choices | {
        override.get_key_element(): read_choice(override, parser) for override in given
    }


def read_choice(override: Override, parser: OverridesParser) -> Choice:
    """Return the values of one override."""
    pattern = override.value_type is ValueType.GLOB_CHOICE_SWEEP and parser.config_loader is None
    if not override.is_discrete_sweep() or pattern:
        line = override.input_line or ""
        return Choice((line.partition("=")[2],), (line,), swept=override.is_sweep_override())
    values = tuple(override.sweep_string_iterator())
    key = override.get_key_element()
    return Choice(values, tuple(f"{key}={value}" for value in values), swept=True)


def job_name(swept: Mapping[str, str], name: str) -> str:
    """Name the run directory of one job: what is swept, to read, before its `config_hash`."""
    words = [f"{key.rpartition('.')[2]}_{value}" for key, value in swept.items()]
    readable = as_word("-".join(words))[:READABLE].rstrip("-")
    return f"{readable}-{name}".lstrip("-")


def as_word(text: str) -> str:
    """Replace what would have to be quoted on a command line."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def asked_of(composed: DictConfig) -> dict[str, Any]:
    """Return the part of a composed config that moves a number, interpolations as written."""
    keys = [key for key in map(str, composed) if key not in ("hydra", *INCIDENTAL)]
    plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys))
    assert isinstance(plain, dict)
    return without_incidental({str(key): part for key, part in plain.items()})


def is_incidental(key: str) -> bool:
    """Tell whether a key of the config, or a group, moves no number."""
    return any(key == name or key.startswith(f"{name}.") for name in INCIDENTAL)


def digest(value: Any) -> str:
    """Return ten hexadecimal digits that stand for a JSON-ready value."""
    text = json.dumps([NUMERICS_VERSION, same_numbers(value)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH]


def same_numbers(value: Any) -> Any:
    """Write whole numbers alike: 4 and 4.0 are the same budget."""
    if isinstance(value, Mapping):
        return {key: same_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [same_numbers(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def without_incidental(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the parts of a config that can move a number, against every run before `ADDED`."""
    return {
        key: without_incidental(part, f"{path}{key}.") if isinstance(part, Mapping) else part
        for key, part in config.items()
        if path + key not in INCIDENTAL and part != ADDED.get(path + key, ...)
    }


def asked_config(config: Config) -> dict[str, Any]:
    """Return what was asked, as far as it can move a number, without secrets."""
    asked: dict[str, Any] = scrub(without_incidental(to_plain(config)))
    return asked
