"""From what Hydra composed to a checked `Config`, and from errors to one line that teaches."""

import dataclasses
import difflib
import math
import re
import shlex
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mi_experiments.config.config import Config
from mi_experiments.config.fields import SEEDS, allowed, fields_below, hint_at
from mi_experiments.config.renames import KEYS, refuse_old_names, with_added
from mi_experiments.config.vetting import first_line, vet, walk
from mi_experiments.errors import InputError, MiError, ValueRefused

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def from_hydra(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises:
        InputError: unknown key, wrong type, missing or out-of-range value, in one line.
    """
    vet(composed)
    plain = OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    said = OmegaConf.to_container(plain)
    assert isinstance(said, dict)
    given = {str(key): value for key, value in said.items()}
    refuse_old_names(given)
    seed = OmegaConf.select(plain, "seed", throw_on_resolution_failure=False)
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        # Before those that follow it, which would be named instead.
        raise ValueRefused("seed", seed, SEEDS)
    check_numbers(plain)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), with_added(given))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(explain(error)) from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        # A section that is no section, which the checks of the others look into.
        raise InputError(f"the config cannot be used: {first_line(error)}") from error
    return check(values)


def check(values: Any) -> Config:
    """Turn values of the right types into a `Config`, if they are in their ranges.

    Raises:
        InputError: one is not; the line names its key, the value and what is allowed.
    """
    # Imported late: what needs no config, as --help, starts without it.
    from pydantic import ValidationError

    try:
        return checker().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [str(name) for name in first["loc"] if isinstance(name, str)]
        refused = first.get("ctx", {}).get("error")
        if isinstance(refused, ValueRefused):
            line = ".".join([*place, refused.key]) + refused.rest
        else:
            said = allowed(hint_at(Config, first["loc"])) or first["msg"]
            line = str(ValueRefused(".".join(place), first["input"], said))
        raise InputError(line) from error


@cache
def checker() -> "TypeAdapter[Config]":
    """Return what checks the fields of a config, one inside another, against their ranges."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def check_numbers(config: DictConfig) -> None:
    """Refuse numbers that nothing here can count with.

    Raises:
        InputError: one is not finite, or a whole one has more than 63 bits.
    """
    for key, value in walk(OmegaConf.to_container(config)):
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless or (isinstance(value, int) and abs(value) >= 2**63):
            shown = f"{value:.3g}" if endless else f"{str(value)[:20]}…"
            raise InputError(f"{key}={shown} is not allowed: a finite number below 2^63")


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


def explain(error: Exception) -> str:
    """Say in one line which key is wrong, its value, and what is allowed."""
    if isinstance(error, MiError):
        return str(error)
    if not str(error) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)
    key = getattr(error, "full_key", None) or ""
    text = str(getattr(error, "msg", None) or error)
    first = text.splitlines()[0].strip()
    if isinstance(error, OverrideParseException):
        return explain_override(error.override)
    if found := re.search(r"Ambiguous value for argument '(.*)'", first):
        return f"{found[1]} is several values: sweep over them with -m, or {quoted_form(found[1])}"
    if found := re.search(r"Could not override '([^']*)'", text):
        return unknown_key(found[1]) if found[1] else "a value without a key: give KEY=VALUE"
    if key and ("is not Optional" in first or "value 'None' for" in first):
        below = hint_at(Config, key.split("."))
        keys = ", ".join(name for name, _ in fields_below(below))
        return f"{key}=null is not allowed: " + (f"it has {keys}" if keys else "it needs a value")
    if isinstance(error, ConfigKeyError) or "not in" in first:
        return unknown_key(key)
    if "missing mandatory value" in text.lower():
        return f"{key} has no value: give it on the command line as {key}=VALUE"
    place = key or getattr(error, "override", None)
    return f"{place}: {first}" if place else first


def explain_override(override: str) -> str:
    """Say how to write an override that Hydra's grammar does not take."""
    key, equals, _ = override.partition("=")
    if not equals:
        return f"{override} is not understood: give KEY=VALUE"
    if form := quoted_form(override):
        return f"{override} is not understood as it stands: {form}"
    return f"{override} is not understood: {key} cannot be a key"


def quoted_form(override: str) -> str:
    """Return how an override is quoted, for Hydra and for the shell; nothing if it cannot be."""
    key, _, value = override.partition("=")
    quoted = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    try:
        read = OverridesParser.create().parse_override(quoted).value()
    except (HydraException, ValueError):
        return ""
    return f"quote it, as {shlex.quote(quoted)}" if read == value else ""


def unknown_key(key: str) -> str:
    """Name an unknown key, its nearest known neighbour, and its known siblings."""
    if key in KEYS:
        return f"{key} is called {KEYS[key]} now: write {KEYS[key]}=VALUE"
    *parents, last = key.split(".")
    known = [name for name, _ in fields_below(hint_at(Config, parents))]
    near = difflib.get_close_matches(last, known, n=1)
    hint = f"; did you mean {'.'.join([*parents, near[0]])}?" if near else ""
    place = ".".join(parents) or "the config"
    return f"unknown key {key}{hint} ({place} has: {', '.join(known)})"


def conf_directory() -> str:
    """Return the folder of configs: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return str(checkout if (checkout / "config.yaml").is_file() else package / "conf")
