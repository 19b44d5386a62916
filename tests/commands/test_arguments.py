"""The command line as people write it."""

import random
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mi_experiments.commands.arguments import read_arguments
from mi_experiments.config.compose import explain
from mi_experiments.errors import InputError

PARSER = OverridesParser.create()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a=b -m c=1,2", "--multirun a=b c=1,2"),
        ("a=b --config-dir x c=d -m", "--multirun --config-dir=x a=b c=d"),
        ("-m a=b c=1,2", "-m a=b c=1,2"),
        ("--cfg job a=b", "--cfg job a=b"),
        ("a=b --cfg job c=d", "--cfg=job a=b c=d"),
        ("", ""),
    ],
)
def test_flags_may_stand_anywhere(given: str, read: str) -> None:
    assert read_arguments(given.split()) == read.split()


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("model.path=~/models/x", ["~/models/x"]),
        ("model.path=~", ["~"]),
        ("model.path=~someone/x y", ["~someone/x y"]),
        ("model.path=~/a,~/b,c", ["~/a", "~/b", "c"]),
    ],
)
def test_the_home_directory_needs_no_quotes(given: str, values: list[str]) -> None:
    (override,) = PARSER.parse_overrides(read_arguments([given]))
    read = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    assert [value.strip("'\"") for value in read] == values


def test_what_takes_away_a_key_is_left_alone() -> None:
    assert read_arguments(["~tracking", "a='~/x'"]) == ["~tracking", "a='~/x'"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--nosuch", "a=b"], "--nosuch"),
        (["--cfg", "everything"], "--cfg"),
        (["--experimental-rerun=x"], "runs what a file holds"),
        (["model.path=\udcff"], "not valid Unicode"),
    ],
)
def test_a_flag_that_is_none_is_one_line(given: list[str], part: str) -> None:
    with pytest.raises(InputError) as refused:
        read_arguments(given)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize("seed", range(4))
def test_any_path_is_taken_or_its_quoted_form_is_said_and_works(seed: int) -> None:
    draw = random.Random(seed)
    letters = list("ab/~ =[](){},:;#&*?!|<>\"'\\^`$@%+-.é漢🙂\t0")
    for _ in range(40):
        value = "/" + "".join(draw.choices(letters, k=draw.randrange(1, 9))) + "x"
        override = f"model.path={value}"
        try:
            PARSER.parse_overrides([override])
        except HydraException as error:
            line = explain(error)
            (quoted,) = shlex.split(line.rpartition("quote it, as ")[2])
            assert PARSER.parse_override(quoted).value() == value
            assert line.startswith(f"{override} is not understood as it stands")


@pytest.mark.parametrize(
    ("override", "part"), [("word", "give KEY=VALUE"), ("mödel=x", "mödel cannot be a key")]
)
def test_what_is_no_override_is_said(override: str, part: str) -> None:
    with pytest.raises(HydraException) as refused:
        PARSER.parse_overrides([override])
    assert part in explain(refused.value)
