"""Rows of papers compose; the embedded run is what was pinned; verdicts by hand."""

import io
import json
import re
from pathlib import Path

import pytest
from command_line import mi_reproduce
from omegaconf import OmegaConf
from rich.console import Console

from mi_experiments.commands.reproduce import compose_row, find_rows, main
from mi_experiments.commands.run_tables import print_result
from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.config.expected import Comparison, Evidence, ExpectedConfig, NumbersConfig
from mi_experiments.config.identity import asked_config
from mi_experiments.records.result import read_result
from mi_experiments.reproduction.verdicts import (
    FAIL,
    NONE,
    NOT_RUN,
    PASS,
    decide,
    recognise,
    setting_changes,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduction.md").read_text()
NUMBER = r"[+-]?\d[\d,.]*%?"
TABLES = re.findall(r"^\| `(papers/\w+|pinned)` \| (\d+) \| (.*?) \|", PAGE, re.MULTILINE)


def numbers(**changes: object) -> NumbersConfig:
    given = {"where": "", "evidence": Evidence.read, "comparison": Comparison.within,
             "tolerance": 0.01, "because": "a test", "values": {"t": 10.0}}  # fmt: skip
    return NumbersConfig(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("table", "count", "_"), TABLES)
def test_every_row_says_what_it_expects(table: str, count: str, _: str) -> None:
    """That rows compose is said of one of every kind, in test_paper_settings.py."""
    rows = find_rows(table, None)
    assert len(rows) == int(count)
    for row in rows:
        file = Path(conf_directory()) / "experiment" / f"{row}.yaml"
        parts = [
            OmegaConf.load(part) for part in (file.with_name("base.yaml"), file) if part.exists()
        ]
        said = [part.expected for part in parts]
        expected = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExpectedConfig), *said))
        assert isinstance(expected, ExpectedConfig)
        assert expected.source


def test_the_page_names_every_table() -> None:
    root = Path(conf_directory()) / "experiment"
    folders = {str(file.parent.relative_to(root)) for file in root.glob("*/**/*.yaml")}
    assert {table for table, _, _ in TABLES} == folders


def test_what_is_expected_is_no_part_of_what_is_asked() -> None:
    row = from_hydra(compose_row("papers/sparsegpt/opt_2_7b_50", []))
    same = from_hydra(compose_row("papers/sparsegpt/opt_2_7b_50_nsamples_128", []))
    assert row.expected != same.expected
    assert asked_config(row) == asked_config(same)


@pytest.mark.parametrize(
    ("changes", "value", "ours", "settings", "verdict"),
    [
        ({}, 10.0, 10.1, [], PASS),
        ({}, 10.0, 10.11, [], FAIL),
        ({}, 10.0, 9.89, [], FAIL),
        ({}, 10.0, 10.0, ["seed: 0 → 1"], FAIL),
        ({}, 10.0, float("nan"), [], FAIL),
        ({}, 10.0, None, [], NOT_RUN),
        ({}, None, 10.0, [], NONE),
        ({"evidence": Evidence.second_hand}, 10.0, 10.0, [], NONE),
        ({"evidence": Evidence.recalled}, 10.0, 99.0, [], NONE),
        ({"comparison": Comparison.at_most}, 10.0, 5.0, [], PASS),
        ({"comparison": Comparison.at_most}, 10.0, 10.01, [], FAIL),
    ],
)
def test_the_verdict(
    changes: dict[str, object],
    value: float | None,
    ours: float | None,
    settings: list[str],
    verdict: str,
) -> None:
    assert decide(numbers(**changes), value, ours, settings)[0] == verdict


def test_another_place_is_no_change_and_another_revision_is() -> None:
    row = "papers/sparsegpt/opt_125m_50"
    asked = asked_config(from_hydra(compose_row(row, [])))
    moved = compose_row(row, ["model.path=copy", "model.revision=null", "corpora.c4.path=there"])
    assert setting_changes(asked, asked_config(from_hydra(moved))) == []
    for change in ("model.revision=other", "dataset.nsamples=8", "evaluation=gptq_old", "seed=1"):
        changed = asked_config(from_hydra(compose_row(row, [change])))
        lines = setting_changes(asked, changed)
        assert lines, change


def test_a_known_wrong_number_is_recognised() -> None:
    known = [{"model": "m", "phase": "dense", "text": "t", "value": 7.72, "cause": "why",
              "source": "who"}]  # fmt: skip
    assert "why" in recognise(known, "m", "dense", "t", 7.721)[0]
    assert recognise(known, "m", "dense", "t", 5.12) == []
    assert recognise(known, "n", "dense", "t", 7.72) == []


def check_shown_output(run_dir: Path) -> None:
    """Require of what the README shows that the run prints it, and its numbers within 2 %."""
    console = Console(width=120, file=io.StringIO(), record=True)
    print_result(read_result(run_dir), run_dir, None, [], console)
    printed = [re.sub(r"[ ━─]+", " ", line) for line in console.export_text().splitlines()]
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"^```text\n(┏.*?)^```", readme, re.DOTALL | re.MULTILINE)
    for line in shown.splitlines():
        if "│" in line:
            label = line.split("│")[1].strip()
            (same,) = [other for other in printed if other.startswith(f"│ {label} │")]
            assert re.sub(NUMBER, "#", same) == re.sub(NUMBER, "#", re.sub(r"[ ━─]+", " ", line))
            pairs = zip(re.findall(NUMBER, line), re.findall(NUMBER, same), strict=True)
            for ours, now in pairs:
                values = [float(each.strip("%+").replace(",", "")) for each in (ours, now)]
                # A change is a difference of two perplexities.
                tolerance = 2.0 if "%" in ours else 0.02 * values[0]
                assert abs(values[0] - values[1]) <= tolerance, line
        elif "┃" in line or "result.json" in line:
            assert re.sub(r"[ ━─]+", " ", line) in printed


def test_the_embedded_run_is_what_was_pinned(tmp_path: Path) -> None:
    ended = mi_reproduce(tmp_path, "pinned/embedded", "tracking=disabled", "--json", "first.json")
    assert ended.code == 0, ended
    verdicts = json.loads((tmp_path / "first.json").read_text())
    assert [verdict["verdict"] for verdict in verdicts] == [PASS, PASS]
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    assert re.search(rf"\breaches {verdicts[0]['ours']:.2f}\b", tutorial)
    (run_dir,) = (tmp_path / "outputs").iterdir()
    check_shown_output(run_dir)
    main(["pinned/embedded", "--against", str(run_dir), "--json", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == verdicts
