"""A config that has only the fields that a result depends on."""

from collections.abc import Iterable, Sequence
from typing import Any

from mi_experiments.config.config import Config


def narrow(config: Config, fields: Iterable[str]) -> Config:
    """Return a config with some of its fields: to read any other is an AttributeError.

    Args:
        config: the config of which the parts are copied, so that they can be changed.
        fields: dotted paths; that of a part stands for all its fields.
    """
    narrowed: Config = _take(config, [field.split(".") for field in sorted(fields)])
    return narrowed


def _take(part: Any, paths: Sequence[Sequence[str]]) -> Any:
    """Return a value of the same class with the fields at the ends of some paths."""
    taken = object.__new__(type(part))
    for head in dict.fromkeys(path[0] for path in paths):
        rests = [path[1:] for path in paths if path[0] == head]
        value = getattr(part, head)
        setattr(taken, head, value if [] in rests else _take(value, rests))
    return taken
