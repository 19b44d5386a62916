"""What is said beside a field of the config: its range, and its meaning in words.

A field is `Annotated[type, range, About(words)]`, where a range is one of `annotated_types`. Errors
and `docs/configuration.md` say what is allowed in the same words, which come from here.
"""

import dataclasses
import types
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval

ENDS = ("gt", "ge", "lt", "le", "min_length")
"""What the ranges of `annotated_types` call their ends."""


@dataclasses.dataclass(frozen=True)
class About:
    """The words of a field.

    Attributes:
        words: what the field means.
        unit: the unit of its range.
        allowed: what is allowed, where its range does not say it.
    """

    words: str = ""
    unit: str = ""
    allowed: str = ""


SEED_RANGE = Interval(ge=0, lt=2**63)
"""The seeds that every generator takes, of torch, numpy and Python."""

SEEDS = "a whole number from 0 to 2^63 - 1"
"""The same in words."""


def take_apart(hint: Any) -> tuple[Any, list[Any], bool]:
    """Return the type of a field without what is said of it, that, and whether it may be null."""
    base, said = hint, []
    if get_origin(hint) is Annotated:
        base, *said = get_args(hint)
    if get_origin(base) in {Union, types.UnionType}:
        choices = [choice for choice in get_args(base) if choice is not types.NoneType]
        inner, more, _ = take_apart(choices[0])
        return inner, [*said, *more], True
    return base, said, False


def about(hint: Any) -> About:
    """Return the words of a field; empty ones where it has none."""
    return next((part for part in take_apart(hint)[1] if isinstance(part, About)), About())


def allowed(hint: Any) -> str:
    """Say what is allowed for a field; empty if its type says it all."""
    base, said, nullable = take_apart(hint)
    words = about(hint)
    text = words.allowed or " ".join(filter(None, [said_range(said), words.unit]))
    if not text and isinstance(base, type) and issubclass(base, Enum):
        text = ", ".join(member.name for member in base)
    return f"{text}, or null" if text and nullable and "null" not in text else text


def said_range(said: Sequence[Any]) -> str:
    """Say in words which values a range of `annotated_types` holds."""
    ends = [(end, getattr(part, end, None)) for part in said for end in ENDS]
    match {end: value for end, value in ends if value is not None}:
        case {"min_length": 1}:
            return "at least one"
        case {"ge": low, "le": high}:
            return f"from {low} to {high}"
        case {"gt": low, "lt": high}:
            return f"between {low} and {high}"
        case {"ge": low, "lt": high}:
            return f"at least {low} and below {high}"
        case {"ge": low}:
            return f"at least {low}"
        case {"gt": low}:
            return f"above {low}"
    return ""


def hint_at(part: Any, path: Sequence[str | int]) -> Any:
    """Return what is declared at a path below a dataclass; None if there is nothing."""
    for name in path:
        base, _, _ = take_apart(part)
        if dataclasses.is_dataclass(base):
            part = get_type_hints(base, include_extras=True).get(str(name))
        else:  # a dictionary or a list: every entry is of the last type that it names
            part = next(reversed(get_args(base)), None)
    return part


def fields_below(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names of the fields of a dataclass with what is declared; none for other types."""
    base, _, _ = take_apart(part)
    if dataclasses.is_dataclass(base):
        yield from get_type_hints(base, include_extras=True).items()
