"""The page's table of what was run is what the configs and the recorded verdicts say."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mi_experiments.commands.reproduce import main
from mi_experiments.config.compose import conf_directory
from mi_experiments.config.identity import NUMERICS_VERSION
from mi_experiments.errors import InputError
from mi_experiments.reproduction.rows import find_rows, find_tables
from mi_experiments.reproduction.status import read_verdicts, status_table

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "reproduction.md").read_text()
ROOT = Path(conf_directory()) / "experiment"
VERDICTS = REPOSITORY / "verdicts"


def entry(row: str, verdict: str, **changes: object) -> dict[str, object]:
    given = {"row": row, "verdict": verdict, "device": "cpu", "numerics_version": NUMERICS_VERSION}
    return given | changes


def test_the_page_shows_what_was_run() -> None:
    """Else: mi-reproduce --status verdicts, and put it there."""
    assert f"\n\n{status_table(find_tables(ROOT), ROOT, VERDICTS).strip()}\n" in PAGE


@pytest.mark.parametrize("file", sorted(VERDICTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_recorded_verdict_is_of_the_row_as_it_is_now(file: Path) -> None:
    """Else run the table again: mi-reproduce TABLE --json verdicts/TABLE.json."""
    table = file.stem.replace("-", "/", 1)
    entries = read_verdicts(file, find_rows(table, None))
    assert entries
    for each in entries:
        content = OmegaConf.load(ROOT / f"{each['row']}.yaml").expected[each["phase"]]
        assert content["values"].get(each["text"]) == each["expected"]
        within = abs(each["ours"] - each["expected"]) <= each["tolerance"]
        assert (each["verdict"] == "PASS") is within


def test_rows_are_counted_by_verdict_and_named_where_they_ran(tmp_path: Path) -> None:
    rows = ["papers/wanda/a", "papers/wanda/b", "papers/wanda/c"]
    for row in rows:
        content = "expected: {dense: {values: {t: 2.0}}, compressed: {values: {t: 3.0}}}"
        file = tmp_path / f"{row}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (tmp_path / "papers/wanda/base.yaml").write_text(
        "expected: {source: S, dense: {values: {}},"
        " compressed: {where: T, evidence: read, values: {}}}"
    )
    content = [
        entry(rows[0], "PASS"), entry(rows[0], "PASS", device="NVIDIA A100"),
        entry(rows[1], "PASS"), entry(rows[1], "FAIL"),
    ]  # fmt: skip
    (tmp_path / "papers-wanda.json").write_text(json.dumps(content))
    table = status_table({"papers/wanda": rows}, tmp_path, tmp_path)
    run = "1 FAIL and PASS, 1 NOT RUN, 1 PASS, on NVIDIA A100, cpu"
    assert table.splitlines()[-1] == f"| `papers/wanda` | 3 | {run} | S: T |"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([entry("papers/wanda/gone", "PASS")], "papers/wanda/gone is not of this table"),
        ([entry("papers/wanda/a", "PASS", numerics_version=0)], "stale: 0 is not of this table"),
        ([{"verdict": "PASS"}], "no file of mi-reproduce --json"),
        ("{", "no file of mi-reproduce --json"),
        ("[" * 100_000, "no file of mi-reproduce --json"),
    ],
)
def test_verdicts_of_another_table_or_version_are_refused(
    content: object, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "v.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=re.escape(reason)):
        read_verdicts(file, ["papers/wanda/a"])


def test_every_row_is_listed_with_its_source_before_anything_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["papers/wanda", "--judge", "--markdown", "rows.md"])
    head, _, *lines = Path("rows.md").read_text().splitlines()
    names, *cells = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)
    )
    rows = [dict(zip(names, cell, strict=True)) for cell in cells]
    assert {row["row"] for row in rows} == set(find_rows("papers/wanda", None))
    (row,) = [
        row for row in rows if row["row"].endswith("llama2_7b_2_4") and row["model"] == "compressed"
    ]
    assert (row["expected"], row["verdict"]) == ("10.17", "NOT RUN")
    assert row["source"] == "Wanda, README of locuslab/wanda 8e8fc87, LLaMA-2 table, SparseGPT"
