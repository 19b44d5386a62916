"""Names that keys and values had in earlier versions, and what they are called now.

A config with an old name is refused in one line that gives the new one; a record with old names is
read as if it had been written with the new ones.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mi_experiments.errors import InputError, as_typed

KEYS = {
    "reuse": "cache",
    "expected.fingerprint": "expected.content_hashes",
    "recipe.input_share": "recipe.input_correction",
    "recipe.residual_share": "recipe.residual_correction",
}
"""Keys of a config, to their names now; a renamed key stays in its group."""

VALUES = {
    "recipe.grid_fit": {"original": "static", "survivors": "compensated", "reached": "dynamic"},
    "recipe.name": {"original_grids": "static_grids"},
    "recipe.window_choice": {"reached": "dynamic"},
}
"""Values of a key, to their names now."""

ADDED: dict[str, Any] = {
    "evaluation.measurements": ["perplexity"],
    "n_groups.information": "full",
    "sparsity.pattern": None,
    "wbits.grid": "uniform",
}
"""Keys that earlier versions had not, with what every run of theirs did. A key with that value is
no part of a run's identity, so that older runs keep theirs."""

FIELDS = {"reused": "from_cache"}
"""Fields of a record, to their names now."""


PHASES = ("dense", "compressed")
"""Fields of a record that hold what was measured, by text."""

PERPLEXITY = {"value": "perplexity", "mean": "nll", "standard_error": "standard_error"}
"""Fields of the measured perplexity, to the names that they had in the record of a text."""


def refuse_old_names(config: Mapping[str, Any]) -> None:
    """Refuse a config with a name of an earlier version.

    Raises:
        InputError: there is one; in one line, which gives the new name.
    """
    for path, value in walk(config):
        if path in KEYS:
            raise InputError(
                f"{path} is called {KEYS[path]} now: write {KEYS[path]}={as_typed(value)}"
            )
        new = VALUES.get(path, {}).get(str(value))
        if new:
            raise InputError(f"{path}={value} is called {new} now: write {path}={new}")


def with_new_names(config: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Return a config in which every key and value has its name of today."""
    renamed = {}
    for key, value in config.items():
        path = KEYS.get(group + key, group + key)
        if isinstance(value, Mapping):
            value = with_new_names(value, f"{path}.")
        renamed[path.removeprefix(group)] = VALUES.get(path, {}).get(str(value), value)
    return renamed


def record_with_new_names(record: Any) -> dict[str, Any]:
    """Return a record in which every field, and every name in its config, is that of today.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("config"), Mapping):
        raise TypeError("there is no config in it")
    renamed = {str(FIELDS.get(name, name)): value for name, value in record.items()}
    for phase in PHASES:
        if isinstance(texts := renamed.get(phase), Mapping):
            renamed[phase] = {name: text_with_measurements(text) for name, text in texts.items()}
    return renamed | {"config": with_added(with_new_names(renamed["config"]))}


def with_added(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that also has the keys of `ADDED`, in the groups that it has."""
    filled = dict(config)
    for path, value in ADDED.items():
        group, _, key = path.partition(".")
        if isinstance(filled.get(group), Mapping):
            filled[group] = {key: value} | dict(filled[group])
    return filled


def text_with_measurements(text: Any) -> Any:
    """Return the record of a text with measurements; it was once of its perplexity alone."""
    if not isinstance(text, Mapping) or "measurements" in text:
        return text
    rest = dict(text)
    moved = {now: rest.pop(before) for now, before in PERPLEXITY.items() if before in rest}
    perplexity = moved | {"unit": "nats per token", "lower_is_better": True}
    return rest | {"measurements": {"perplexity": perplexity}}


def text_without_measurements(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a text as it was when it had its perplexity alone, with all others."""
    others = dict(text["measurements"])
    perplexity = others.pop("perplexity", {})
    moved = {before: perplexity[now] for now, before in PERPLEXITY.items() if perplexity}
    rest = {name: value for name, value in text.items() if name != "measurements"}
    return rest | moved | ({"measurements": others} if others else {})


def walk(config: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything that a config says."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from walk(value, f"{group}{key}.")
        else:
            yield f"{group}{key}", value
