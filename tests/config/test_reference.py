"""The page of every key says what the dataclasses and conf/ say, and is what the module makes."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Interval, Len

from mi_experiments.config.config import Config
from mi_experiments.config.fields import About, about, allowed, fields_below, hint_at, take_apart
from mi_experiments.config.reference import page
from mi_experiments.method.grouping import Grouping

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def made() -> str:
    return page()


def leaves(part: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every field that holds no others."""
    found = []
    for name, hint in fields_below(part):
        below = leaves(take_apart(hint)[0], (*path, name))
        found += below or [(*path, name)]
    return found


def test_the_page_is_up_to_date(made: str) -> None:
    assert PAGE.read_text() == made, "run `make reference`"


def test_every_key_has_a_row_with_words_and_a_default(made: str) -> None:
    rows = {line.split(" | ")[0]: line for line in made.splitlines() if line.startswith("| `")}
    for path in leaves(Config):
        key = ".".join(path)
        assert about(hint_at(Config, path)).words, f"{key} has no words"
        assert about(hint_at(Config, path)).words in rows[f"| `{key}`"]
        if path[0] != "expected":
            assert " | - | " not in rows[f"| `{key}`"] or key.endswith(("datasets", "corpora"))


@pytest.mark.parametrize(
    ("key", "kind", "range_", "default"),
    [
        ("wbits.average", "number", "from 2 to 8 bits; wbits=unquantized for none", "`4.0`"),
        ("sparsity.mask_block", "integer", "at least 1 channel, or null", "`128`"),
        ("dataset.seqlen", "integer", "at least 2 tokens", "`${model.seqlen}`"),
        ("recipe.grid_fit", "choice", "static, compensated, dynamic", "`compensated`"),
        ("evaluation.datasets.NAME.separator", "text", "text without a backslash", '`""`'),
        ("cache", "true or false", "", "`true`"),
    ],
)
def test_a_row_says_type_range_and_default(
    made: str, key: str, kind: str, range_: str, default: str
) -> None:
    (row,) = [line for line in made.splitlines() if line.startswith(f"| `{key}` |")]
    cells = row.split(" | ")
    assert cells[1] == kind
    assert cells[2].startswith(range_)
    assert cells[3] == default


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[int, Ge(1)], "at least 1"),
        (Annotated[float | None, Gt(0), About(unit="GiB")], "above 0 GiB, or null"),
        (Annotated[float, Interval(ge=0, le=1)], "from 0 to 1"),
        (Annotated[float, Interval(gt=0, lt=1)], "between 0 and 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "at least 0 and below 1"),
        (Annotated[list[str], Len(1)], "at least one"),
        (Annotated[int, Ge(1), About(allowed="a prime")], "a prime"),
        (Grouping | None, ", ".join(rule.name for rule in Grouping) + ", or null"),
        (int, ""),
        (int | None, ""),
    ],
)
def test_a_range_is_said_in_words(hint: Any, text: str) -> None:
    assert allowed(hint) == text
