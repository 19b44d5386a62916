"""Names of runs do nothing in a terminal, a spreadsheet, Markdown, LaTeX or a page."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from synthetic_runs import make_run

from mi_experiments.commands.compare import main
from mi_experiments.commands.reproduce import markdown, verdict_table
from mi_experiments.comparison.formats import write_table
from mi_experiments.comparison.inert import escape_markdown, escape_spreadsheet, visible
from mi_experiments.reproduction.verdicts import FAIL, Judgement

NASTY = [
    '=HYPERLINK("http://x.example","y")',
    "=1+1",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "\uff1d1",
    "a|b\nc",
    "a\\|b",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "`a` ![](http://x.example/y.png)",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "a\u202eb\u2028c",
    "[bold]a[/bold]",
    r"\input{/etc/passwd} $x^2$ & 5% #1 ~_",
    "a\x00b",
]


@pytest.fixture(params=NASTY, ids=range(len(NASTY)))
def nasty(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def write(nasty: str) -> Callable[[str], str]:
    """Return what writes a table with a nasty name in a cell and in a heading."""
    frame = pd.DataFrame({"run": [nasty, "b"], f"x={nasty}": [-1.5, 2.0], nasty: ["a", nasty]})
    return lambda form: write_table(frame, form, None).decode()


def test_a_spreadsheet_runs_no_cell(nasty: str, write: Callable[[str], str]) -> None:
    rows = list(csv.reader(io.StringIO(write("csv"), newline="")))
    assert len(rows) == 3
    assert {len(row) for row in rows} == {3}
    for cell in (rows[0][0], rows[0][2], rows[1][0], rows[2][2]):
        assert not re.match(r"\s*[=+\-@＝＋－＠]|[\t\r\n]", cell)
    assert [row[1] for row in rows[1:]] == ["-1.5", "2.0"]
    assert visible(nasty, "\t\n") == rows[2][2].removeprefix("'")


def test_numbers_stay_numbers_in_a_spreadsheet() -> None:
    frame = pd.DataFrame({
        "difference": [-0.25, 0.5], "seed": [-1, 2], "mixed": [-3, "-2+3"], "text": ["-7", "-1e-5"],
    })  # fmt: skip
    read = pd.read_csv(io.BytesIO(write_table(frame, "csv", None)))
    assert read["difference"].tolist() == [-0.25, 0.5]
    assert read["seed"].tolist() == [-1, 2]
    assert read["mixed"].tolist() == ["-3", "'-2+3"]
    assert read["text"].tolist() == [-7.0, -1e-5]


def test_markdown_has_one_row_a_run_and_no_html(write: Callable[[str], str]) -> None:
    text = write("markdown")
    lines = text.splitlines()
    assert len(lines) == 4
    assert {len(re.split(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {5}
    assert "<" not in text
    assert not re.search(r"(?<!\\)[\[\]`]", text)


def test_latex_prints_it(write: Callable[[str], str]) -> None:
    text = write("latex")
    lines = text.splitlines()
    assert len(lines) == 8
    body = "\n".join(line for line in lines if line.endswith(r" \\"))
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"$\pm$",
                    *(f"\\{character}" for character in "&%$#_{}"), r" \\", " & "):  # fmt: skip
        body = body.replace(command, "")
    assert not re.search(r"[\\&%$#_{}~^]", body)


def test_a_terminal_gets_no_control_characters(nasty: str, write: Callable[[str], str]) -> None:
    for form in ("table", "markdown", "latex", "json", "csv"):
        text = write(form)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u202e]", text)
    assert visible(nasty).replace("\\", "").strip()[:6] in write("table").replace("\\", "")


def test_a_page_holds_it_as_text(nasty: str, tmp_path: Path) -> None:
    make_run(tmp_path / "0", model__name=nasty, n_groups__grouping="random")
    make_run(tmp_path / "1", model__name="b")
    main([str(tmp_path), "--html", str(tmp_path / "a.html")])
    page = (tmp_path / "a.html").read_text()
    holder = page.split('id="data">')[1].split("</script>")[0]
    assert nasty in {row["model"] for row in json.loads(holder)["rows"]}
    assert page.count("<script") == 2
    assert "<img" not in page


def test_notes_and_errors_are_inert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "0", seed=0)
    make_run(tmp_path / "\x1b[31m1", seed=1)
    (tmp_path / "\x1b[31m1" / "result.json").write_text("{")
    main([str(tmp_path)])
    assert "left out: " in (shown := capsys.readouterr()).out
    assert "\x1b" not in shown.out + shown.err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "\x1b[31m1")])
    assert "\x1b" not in capsys.readouterr().err


def test_a_name_that_is_no_text_is_written_out(tmp_path: Path) -> None:
    make_run(Path(f"{tmp_path}/\udcff"), seed=0)
    for name in ("a.csv", "a.parquet", "a.md"):
        main([str(tmp_path), "--columns", "run", "--output", str(tmp_path / name)])
    assert pd.read_csv(tmp_path / "a.csv")["run"].tolist() == [r"\xff"]


def test_verdicts_are_inert(nasty: str) -> None:
    judged = Judgement("row", "dense", nasty, 1.0, 2.0, 0.1, FAIL, nasty, nasty, nasty)
    lines = markdown([judged]).splitlines()
    assert len(lines) == 3
    assert "<" not in lines[2]
    console = Console(width=2000, file=io.StringIO())
    with console.capture() as shown:
        console.print(verdict_table([judged]))
    assert "\x1b" not in shown.get()
    assert visible(nasty).strip() in shown.get()


def test_what_is_harmless_is_as_it_was() -> None:
    for text in ("mutual_information", "a=b", "sweep/0", "3-4", "ä ± –", "1.5", "-1.5", ""):
        assert escape_spreadsheet(text) == escape_markdown(text) == visible(text) == text
