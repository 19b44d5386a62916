"""From what Hydra composed to a checked `Config`, and from errors to one line that teaches."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mi_experiments.config.config import Config
from mi_experiments.errors import InputError


def from_hydra(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises:
        InputError: unknown key, wrong type, missing or out-of-range value, in one line.
    """
    refuse_targets(composed)
    plain = OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(explain(error)) from error
    assert isinstance(config, Config)
    return config


def to_plain(config: Config) -> dict[str, Any]:
    """Return the config as JSON-ready values, enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        # Not by asdict: a config may have been narrowed to some of its fields.
        return plain(vars(value)) if dataclasses.is_dataclass(value) else value

    return {key: plain(value) for key, value in vars(config).items()}


def refuse_targets(composed: DictConfig) -> None:
    """Refuse keys that would make Hydra run code; no config of this project has them."""
    text = OmegaConf.to_yaml(
        OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    )
    found = re.search(r"(^|\s)['\"]?_(target|recursive|convert|partial|args)_['\"]?\s*:", text)
    if found:
        raise InputError(
            f"{found.group(0).strip()} in the config is refused: configs are data, not code"
        )


def explain(error: Exception) -> str:
    """Say in one line which key is wrong, its value, and what is allowed."""
    if not str(error) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)
    key = getattr(error, "full_key", None) or ""
    text = str(getattr(error, "msg", None) or error)
    first = text.splitlines()[0].strip()
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(found.group(1))
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        choices = ", ".join(line.strip() for line in text.splitlines() if line.startswith("\t"))
        return f"{found.group(1)}={found.group(2)} is not known: one of {choices}"
    if isinstance(error, ConfigKeyError) or "not in" in first:
        return unknown_key(key)
    if "missing mandatory value" in text.lower():
        return f"{key} has no value: give it on the command line as {key}=VALUE"
    place = key or getattr(error, "override", None)
    return f"{place}: {first}" if place else first


def unknown_key(key: str) -> str:
    """Name an unknown key, its nearest known neighbour, and its known siblings."""
    *parents, last = key.split(".")
    known = list(children(parents))
    near = difflib.get_close_matches(last, known, n=1)
    hint = f"; did you mean {'.'.join([*parents, near[0]])}?" if near else ""
    place = ".".join(parents) or "the config"
    return f"unknown key {key}{hint} ({place} has: {', '.join(known)})"


def children(parents: Iterable[str]) -> Iterable[str]:
    """Names of the keys below a path of the schema."""
    node: Any = Config
    for name in parents:
        if dataclasses.is_dataclass(node):
            node = {field.name: field.type for field in dataclasses.fields(node)}.get(name)
        else:  # a dictionary: whatever the key, its value is of the last type that it names
            node = next(reversed(get_args(node)), None)
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []


def conf_directory() -> str:
    """Return the folder of configs: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return str(checkout if (checkout / "config.yaml").is_file() else package / "conf")
