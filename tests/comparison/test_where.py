"""A written condition selects what it says, and nothing in it ever runs."""

from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import make_broken_run, make_run

from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.where import select_rows
from mi_experiments.errors import InputError


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Three runs and a failed one: a, b, c, d."""
    make_run(tmp_path / "a", 0.3, wbits__average=3.0, n_groups__grouping="random")
    make_run(tmp_path / "b", 0.2, wbits__average=4.0, n_groups__grouping="energy")
    make_run(tmp_path / "c", 0.1, wbits__average=4.0, wbits__group_size=64, wbits__symmetric=True)
    make_broken_run(tmp_path / "d", "failed", "it's `broken` @here", wbits__average=6.0)
    return read_runs([tmp_path])


@pytest.mark.parametrize(
    ("expression", "runs"),
    [
        ("wbits.average<=4 and n_groups.grouping=='random'", "ac"),
        ("wbits <= 4 and not grouping == 'random'", "b"),
        ("not (wbits.average < 4 or grouping == 'energy')", "cd"),
        ("wbits.average in [3, 6.0]", "ad"),
        ("grouping not in ('energy',)", "acd"),
        ("wbits.average not in []", "abcd"),
        ("3 < wbits.average <= 4", "bc"),
        ("4 == wbits", "bc"),
        ("excess > -1", "abc"),
        ("compressed > dense", "abc"),
        ("wbits.group_size == 64", "c"),
        ("not wbits.group_size == 64", "abd"),
        ("wbits.group_size == null", "abd"),
        ("wbits.group_size != None", "c"),
        ("wbits.group_size in [null, 3]", "abd"),
        ("wbits.symmetric == true", "c"),
        ("wbits.symmetric == False", "abd"),
        ("status == 'failed'", "d"),
        ('error == "it\'s `broken` @here"', "d"),
        ("  model.path == 'models/a' and run != 'b'  ", "acd"),
    ],
)
def test_conditions(frame: pd.DataFrame, expression: str, runs: str) -> None:
    selected = select_rows(frame, expression)
    assert "".join(selected["run"]) == runs
    assert selected.index.tolist() == list(range(len(runs)))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "__import__('os') == 1",
        "wbits.average.__class__ == 1",
        "_private == 1",
        "model.lower() == 'x'",
        "grouping.str.startswith('r')",
        "grouping.str == 'r'",
        "wbits[0] == 1",
        "wbits + 1 == 4",
        "wbits == 1 + 2",
        "wbits == -wbits",
        "(lambda: 1)() == wbits",
        "[x for x in (1,)] == wbits",
        "wbits in [[3]]",
        "wbits in [seed]",
        "wbits in 'abc'",
        "wbits == [3]",
        "wbits is None",
        "wbits < None",
        "None == wbits",
        "(wbits := 3) == 3",
        "wbits == f'{3}'",
        "wbits == b'3'",
        "wbits == 3j",
        "wbits == 3 if seed else 4",
        "wbits",
        "1 == 1",
        "True",
        "@frame == 1",
        "wbits == 3; seed == 1",
        "wbits ==",
        "",
        "grouping < 3",
        "wbits > 'three'",
        "nothing == 1",
        "grouping == random",
        "wbits == 99",
        "not " * 5000 + "wbits == 3",
        "wbits == 3\0",
    ],
)
def test_anything_else_is_refused_in_one_line(frame: pd.DataFrame, expression: str) -> None:
    with pytest.raises(InputError) as caught:
        select_rows(frame, expression)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "not " * 2000 + "wbits == 3",
        "not " * 20_000 + "wbits == 3",
        "(" * 4000 + "wbits == 3" + ")" * 4000,
        "-" * 9000 + "1 == wbits",
        "wbits" + ".a" * 4500 + " == 3",
        "wbits == " + "[" * 4000 + "]" * 4000,
        " and ".join(["wbits == 99"] * 2000),
        "wbits == " + "9" * 5000,
        "excess < " + "9" * 400,
        "wbits == 3 # " + "x" * 10_000,
        "grouping == '" + "x" * 11_000 + "'",
        "wbits ==\n\n 'a' + 1",
        "excess in [" + "9" * 400 + "]",
    ],
    ids=range(13),
)
def test_an_absurd_condition_is_one_short_line(frame: pd.DataFrame, expression: str) -> None:
    with pytest.raises(InputError) as caught:
        select_rows(frame, expression)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
