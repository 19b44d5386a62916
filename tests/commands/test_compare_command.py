"""mi-compare as a person types it: what it prints and writes, and the one line of bad input."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from synthetic_runs import make_broken_run, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import average_over
from mi_experiments.records.result import RESULT

EXCESS = {("random", 0): 0.1 + 0.2, ("random", 1): 0.34, ("mutual_information", 0): 1 / 7,
          ("mutual_information", 1): 0.26}  # fmt: skip


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write two groupings with two seeds each."""
    root = tmp_path / "sweep"
    for job, ((grouping, seed), excess) in enumerate(EXCESS.items()):
        make_run(root / str(job), excess, n_groups__grouping=grouping, seed=seed)
    return root


@pytest.fixture
def mi_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run `mi-compare` with arguments, beside the sweep."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        code = 0
        try:
            main(arguments)
        except SystemExit as left:
            code = int(left.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


def parse_table(text: str) -> list[dict[str, str]]:
    """Read a printed table back: columns are at least two blanks apart."""
    lines = [line for line in text.splitlines() if line.strip()]
    rule = next(index for index, line in enumerate(lines) if set(line.strip()) == {"─"})
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[rule + 1 :] if "  " in line]
    names = re.split(r"\s{2,}", lines[rule - 1].strip())
    return [dict(zip(names, row, strict=False)) for row in rows]


def parse_pipes(text: str) -> list[dict[str, str]]:
    """Read a markdown table back."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def parse_tabular(text: str) -> list[dict[str, str]]:
    """Read a LaTeX tabular back."""
    lines = [
        [cell.strip().replace(r"\_", "_") for cell in line.removesuffix(r" \\").split(" & ")]
        for line in text.splitlines()
        if line.endswith(r" \\")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "csv": lambda text: list(csv.DictReader(io.StringIO(text))),
    "json": json.loads,
    "markdown": parse_pipes,
    "latex": parse_tabular,
}


@pytest.mark.parametrize("form", READERS)
def test_every_text_format_reads_back_to_the_same_numbers(
    form: str, sweep: Path, mi_compare: Callable[..., Ended]
) -> None:
    ended = mi_compare("sweep", "--format", form)
    assert (ended.code, ended.err) == (0, "")
    rows = READERS[form](ended.out)
    frame = read_runs([sweep])
    assert len(rows) == len(frame)
    assert list(rows[0]) == [
        "run", "seed", "grouping", "realised_sparsity", "average_bits", "effective_bits", "dense",
        "compressed", "excess", "seconds", "peak_memory",
    ]  # fmt: skip
    for row, expected in zip(rows, frame.to_dict("records"), strict=True):
        assert row["grouping"] == expected["grouping"]
        for name in list(row)[3:]:
            assert float(row[name]) == expected[name], name


@pytest.mark.parametrize(("name", "read"), [("a.csv", pd.read_csv), ("a.parquet", pd.read_parquet)])
def test_files_hold_all_columns_when_asked(
    name: str, read: Callable[..., pd.DataFrame], sweep: Path, mi_compare: Callable[..., Ended]
) -> None:
    make_broken_run(sweep / "9", "failed", "no", wbits__symmetric=True, wbits__widths=[2, 3])
    ended = mi_compare("sweep", "--columns", "all", "--output", name)
    assert (ended.code, ended.out) == (0, f"{name}: 5 rows\n")
    written, frame = read(name), read_runs([sweep])
    assert list(written) == list(frame)
    for column in ("excess", "seed", "compressed", "peak_memory", "wbits.symmetric"):
        pd.testing.assert_series_equal(
            written[column], frame[column], check_dtype=False, rtol=1e-15, atol=0
        )
    assert written["wbits.widths"][4] == "[2, 3]"


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_averages_are_written_with_their_interval(
    form: str, sweep: Path, mi_compare: Callable[..., Ended]
) -> None:
    rows = READERS[form](mi_compare("sweep", "--over", "seed", "--format", form).out)
    averaged = average_over(read_runs([sweep]), ["seed"])
    for row, expected in zip(rows, averaged.to_dict("records"), strict=True):
        assert row["runs"] == "2"
        mean, width = re.split(r"±|\$\\pm\$", row["excess"])
        assert (float(mean), float(width)) == (expected["excess"], expected["excess_ci95"])


def test_the_table_shows_what_varies_and_the_results(
    sweep: Path, mi_compare: Callable[..., Ended]
) -> None:
    ended = mi_compare("sweep")
    rows = parse_table(ended.out)
    assert [row["grouping"] for row in rows] == ["random", "random", *["mutual_information"] * 2]
    assert [row["excess"] for row in rows] == ["0.3000", "0.3400", "0.1429", "0.2600"]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    assert rows[0]["compressed"] == f"{math.exp(1.8):.4f}"
    assert {row["seconds"] for row in rows} == {"1.8"}
    assert {row["memory"] for row in rows} == {"3.00 GB"}
    assert "scope" not in ended.out


def test_failed_and_running_runs_are_listed_with_their_line(
    sweep: Path, mi_compare: Callable[..., Ended]
) -> None:
    make_broken_run(sweep / "8", "failed", "block 3: [bold]no\nvalid factor", seed=8)
    make_broken_run(sweep / "9", "running", None, seed=9)
    table = mi_compare("sweep")
    assert "8 failed: block 3: [bold]no valid factor\n9 running\n" in table.out
    assert [row["status"] for row in parse_table(table.out)[4:]] == ["failed", "running"]
    assert "9 running" in mi_compare("sweep", "--over", "seed").out
    ended = mi_compare("sweep", "--format", "csv")
    written = pd.read_csv(io.StringIO(ended.out))
    assert written["error"][4] == "block 3: [bold]no\nvalid factor"
    assert ended.err.splitlines()[1] == "mi-compare: note: 9 running"
    pivoted = mi_compare("sweep", "--pivot", "grouping", "seed", "excess", "--format", "csv")
    assert "8 failed" in pivoted.err


def test_sort_where_and_columns(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    falling = mi_compare("sweep", "--sort", "-excess", "--columns", "run,excess", "--format", "csv")
    assert re.findall(r"^\d", falling.out, re.MULTILINE) == ["1", "0", "3", "2"]
    two = mi_compare("sweep", "--sort=n_groups.grouping,-seed", "--columns", "run", "--format=csv")
    assert two.out.split() == ["run", "3", "2", "1", "0"]
    kept = mi_compare("sweep", "--where", "seed == 1 and excess < 0.3", "--columns", "run,wbits")
    assert [row["run"] for row in parse_table(kept.out)] == ["3"]


def test_baseline_over_seeds_and_pivot(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    arguments = ("sweep", "--baseline", "grouping=random", "--over", "seed", "--format", "json")
    rows = json.loads(mi_compare(*arguments).out)
    differences = [EXCESS["mutual_information", seed] - EXCESS["random", seed] for seed in range(2)]
    assert rows[1]["difference"] == pytest.approx(sum(differences) / 2)
    half = 12.706204736 * abs(differences[0] - differences[1]) / 2
    assert rows[1]["difference_ci95"] == pytest.approx(half)
    spread = json.loads(mi_compare(*arguments, "--pivot", "wbits", "grouping", "difference").out)
    assert spread[0]["wbits"] == 3.0
    assert spread[0]["grouping=mutual_information"] == rows[1]["difference"]


def test_an_interval_goes_with_its_mean(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    asked = ("sweep", "--over", "seed", "--columns", "grouping,excess")
    head = mi_compare(*asked, "--format", "csv").out.splitlines()[0]
    assert head == "grouping,excess,excess_ci95,excess_n"
    averaged = average_over(read_runs([sweep]), ["seed"])
    cells = [row["excess"] for row in parse_table(mi_compare(*asked).out)]
    pairs = zip(averaged["excess"], averaged["excess_ci95"], strict=True)
    assert cells == [f"{mean:.4f} ± {width:.4f}" for mean, width in pairs]


def test_a_mean_of_fewer_samples_is_marked(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    make_run(sweep / "9", 0.2, n_groups__grouping="mutual_information", seed=9)
    ended = mi_compare("sweep", "--over", "seed", "--baseline", "grouping=random")
    first, second = parse_table(ended.out)
    assert first["excess"].endswith("(n=2)")
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", second["excess"])
    assert second["difference"].endswith("(n=2)")
    assert "1 rows have no partner with grouping=random" in ended.out


def test_digits(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    ended = mi_compare("sweep", "--digits", "2", "--columns", "excess,sparsity", "--format", "csv")
    assert ended.out == "excess,sparsity\n0.3,0.5\n0.34,0.5\n0.14,0.5\n0.26,0.5\n"
    latex = mi_compare("sweep", "--digits", "2", "--columns", "excess,sparsity", "--format=latex")
    assert "0.30 & 0.5 \\\\" in latex.out


def test_latex_prints_special_characters(tmp_path: Path, mi_compare: Callable[..., Ended]) -> None:
    make_run(tmp_path / "50%_a&b")
    (row,) = mi_compare(".", "--columns", "run", "--format", "latex").out.splitlines()[4:5]
    assert row == r"50\%\_a\&b \\"


def test_a_table_in_a_file(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    mi_compare("sweep", "--output", "a.txt")
    assert Path("a.txt").read_text() == mi_compare("sweep").out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["missing"], "missing is no directory"),
        (["empty"], "empty holds no run"),
        (["broken"], "no record can be read: "),
        (["sweep", "--columns", "run,exces"], "unknown column exces; did you mean excess?"),
        (["sweep", "--sort", "nothing"], "unknown column nothing"),
        (["sweep", "--over", "wbit"], "unknown column wbit; did you mean wbits?"),
        (["sweep", "--pivot", "grouping", "seeds", "excess"], "unknown column seeds"),
        (["sweep", "--where", "__import__('os')"], "__import__('os') is not allowed"),
        (["sweep", "--where", "seed = 1"], "(compare with ==, write text in quotes)"),
        (["sweep", "--where", "seed == 5"], "holds for none of 4 rows"),
        (["sweep", "--baseline", "grouping=none"], "no run has grouping=none"),
        (["sweep", "--format", "parquet"], "--format parquet is binary: give --output FILE"),
        (["sweep", "--output", "a.xlsx"], "--output a.xlsx: give --format"),
        (["sweep", "--output", "nowhere/a.csv"], "No such file or directory"),
        (["sweep", "--html", "nowhere/a.html"], "No such file or directory"),
        (["sweep", "--html", "a.html", "--by", "excess"], "--by excess is not allowed"),
        (["sweep", "--html", "a.html", "--by", "colour"], "unknown column colour"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], line: str, sweep: Path, tmp_path: Path, mi_compare: Callable[..., Ended]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RESULT).write_text("{")
    ended = mi_compare(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("mi-compare: ")
    assert line in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sweep", "--digits", "-1"],
        ["sweep", "--columns", "run", "--pivot", "a", "b", "c"],
        ["sweep", "--html", "a.html", "--pivot", "a", "b", "c"],
        ["sweep", "--by", "grouping"],
    ],
)
def test_a_wrong_command_line_shows_the_usage(
    arguments: list[str], mi_compare: Callable[..., Ended]
) -> None:
    ended = mi_compare(*arguments)
    assert ended.code == 2
    assert ended.err.startswith("usage: mi-compare")


def test_a_page_and_a_file_in_one_command(sweep: Path, mi_compare: Callable[..., Ended]) -> None:
    make_broken_run(sweep / "9", "failed", "no", seed=9)
    ended = mi_compare("sweep", "--html", "a b.html", "--by", "seed", "--output", "a.csv")
    assert ended.out == "a b.html: a page of 5 runs\na.csv: 5 rows\n"
    assert ended.err == "mi-compare: note: 9 failed: no\n"
    page = Path("a b.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["colour"] == "seed"
    assert data["command"] == "mi-compare sweep --html 'a b.html' --by seed --output a.csv"
    alone = mi_compare("sweep", "--html", "b.html", "--where", "seed == 0 and wbits == 3",
                       "--columns", "run,excess")  # fmt: skip
    assert (alone.out, alone.err) == ("b.html: a page of 2 runs\n", "")
    data = json.loads(Path("b.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert data["columns"] == ["run", "excess"]
    assert [row["run"] for row in data["rows"]] == ["0", "2"]


@pytest.mark.parametrize(
    ("arguments", "module", "view", "name"),
    [
        (["--plots", "figures"], "matplotlib", "plots", "plots"),
        (["--wandb"], "wandb_workspaces", "workspace", "workspaces"),
    ],
)
def test_a_missing_extra_is_named(
    arguments: list[str], module: str, view: str, name: str, sweep: Path,
    mi_compare: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delitem(sys.modules, f"mi_experiments.comparison.views.{view}", raising=False)
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    ended = mi_compare("sweep", *arguments)
    option = arguments[0]
    line = f"mi-compare: {option} needs {module}: pip install 'mi-experiments[{name}]'\n"
    assert (ended.code, ended.out, ended.err) == (2, "", line)


def test_a_reader_that_leaves_is_no_error(sweep: Path) -> None:
    # The pipe's buffer holds 64 KiB; more rows than that, so that the writer meets its end.
    for job in range(10, 60):
        make_run(sweep / str(job), {f"text{i}": 0.1 for i in range(30)}, seed=job)
    read, write = os.pipe()
    os.close(read)
    code = "from mi_experiments.commands.compare import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(sweep), "--format", "json"],
        stdout=write, stderr=subprocess.PIPE, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")
