"""What the views show are the numbers of the records, every one of them, exactly."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import compare_runs, make_broken_run, make_linears, make_run

from mi_experiments.comparison.columns import (
    AVERAGED,
    COUNT,
    INTERVAL,
)
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import average_over
from mi_experiments.comparison.views.data import (
    LAYER_METRICS,
    below_block,
    choose_colour,
    family,
    gather_details,
    in_common,
    plain,
    to_plain,
)
from mi_experiments.errors import InputError
from mi_experiments.records.linears import LINEARS, read_linears
from mi_experiments.records.result import read_result


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write two groupings with two seeds, two texts, linears, and a failed and a running run."""
    root = tmp_path / "sweep"
    for job in range(4):
        excess = {"stories": (0.1 + 0.2, 0.34, 1 / 7, 0.26)[job], "news": 0.5 + job / 7}
        grouping = ("random", "energy")[job // 2]
        make_run(root / str(job), excess, n_groups__grouping=grouping, seed=job % 2)
        make_linears(root / str(job), salt=job)
    make_broken_run(root / "8", "failed", "block 3: no valid factor", seed=8)
    make_broken_run(root / "9", "running", None, seed=9)
    return root


def test_rows_are_those_of_the_records(sweep: Path) -> None:
    data = to_plain(compare_runs(sweep))
    rows = {(row["run"], row["text"]): row for row in data["rows"]}
    for directory in sorted(sweep.iterdir()):
        result = read_result(directory)
        for text in result.config["evaluation"]["datasets"]:
            row = rows.pop((directory.name, text))
            dense, compressed = result.dense.get(text), result.compressed.get(text)
            assert row["status"] == result.status
            assert row["error"] == result.error
            assert row["seed"] == result.config["seed"]
            assert row["dense"] == (dense and dense.perplexity)
            assert row["compressed"] == (compressed and compressed.perplexity)
            assert row["excess"] == (compressed and dense and compressed.nll - dense.nll)
            assert row["average_bits"] == (result.bits and result.bits.average)
            assert row["effective_bits"] == (result.bits and result.bits.effective)
            assert row["peak_memory"] == (max(result.memory.values(), default=None))
    assert rows == {}


def test_costs_and_linears_are_those_of_the_records(sweep: Path) -> None:
    data = to_plain(compare_runs(sweep))
    assert list(data["runs"]) == ["0", "1", "2", "3", "8", "9"]
    for name, run in data["runs"].items():
        result = read_result(sweep / name)
        assert run["seconds"] == result.seconds
        assert run["memory"] == result.memory
        assert run["status"] == result.status
        if result.status != "completed":
            assert run["linears"] is None
            continue
        shape = data["shapes"][run["linears"]["shape"]]
        for place, report in enumerate(read_linears(sweep / name)):
            for key in ("block", "name", "rows", "columns"):
                assert shape[key][place] == getattr(report, key)
            for metric in (*LAYER_METRICS, "information_noise"):
                assert run["linears"][metric][place] == getattr(report, metric), metric
            widths = {int(width): n for width, n in run["linears"]["bits"][place].items()}
            assert widths == report.bits


def test_equal_names_of_linears_stand_once(sweep: Path) -> None:
    make_run(sweep / "5", seed=5)
    make_linears(sweep / "5", prefix="decoder.")
    data = to_plain(compare_runs(sweep))
    assert [data["runs"][run]["linears"]["shape"] for run in ("0", "1", "5")] == [0, 0, 1]
    assert len(data["shapes"]) == 2


def test_means_are_those_of_the_average(sweep: Path) -> None:
    data = to_plain(compare_runs(sweep, "--over", "seed", "--sort", "-excess"))
    averaged = average_over(read_runs([sweep]), ["seed"])
    expected = averaged.sort_values("excess", ascending=False, kind="stable")
    names = [name + part for name in AVERAGED[:-2] for part in ("", INTERVAL, COUNT)]
    for row, mean in zip(data["means"], expected.to_dict("records"), strict=True):
        assert (row["grouping"], row["text"]) == (mean["grouping"], mean["text"])
        for name in (name for name in names if name in mean):
            assert row[name] == (None if math.isnan(mean[name]) else mean[name]), name
    completed = [row["excess"] for row in data["rows"] if row["status"] == "completed"]
    assert completed == sorted(completed, reverse=True)


def test_differences_are_shown(sweep: Path) -> None:
    data = to_plain(compare_runs(sweep, "--baseline", "grouping=random"))
    found = {(row["run"], row["text"]): row["difference"] for row in data["rows"]}
    losses = {name: read_result(sweep / name).compressed["stories"].nll for name in ("0", "2")}
    assert found["2", "stories"] == pytest.approx(losses["2"] - losses["0"], abs=1e-12)
    assert found["8", "stories"] is None
    assert data["losses"] == ["compressed", "excess", "difference"]


def test_it_survives_json_unchanged(sweep: Path) -> None:
    data = to_plain(compare_runs(sweep, "--over", "seed"))
    tuples_as_lists = data | {"common": [list(pair) for pair in data["common"]]}
    assert json.loads(json.dumps(data, allow_nan=False)) == tuples_as_lists


def test_the_first_completed_run_is_chosen(sweep: Path) -> None:
    assert compare_runs(sweep).chosen == "0"
    assert compare_runs(sweep, "--sort", "excess").chosen == "2"
    assert compare_runs(sweep, "--where", "status != 'completed'").chosen is None
    (sweep / "0" / LINEARS).unlink()
    assert compare_runs(sweep).chosen == "1"


def test_the_colour_is_a_setting_that_varies(sweep: Path) -> None:
    frame = read_runs([sweep])
    assert choose_colour(frame, None) == "grouping"
    assert choose_colour(frame, "wbits.average") == "wbits"
    assert choose_colour(frame[frame["run"] == "0"], None) is None
    assert compare_runs(sweep, "--over", "n_groups.grouping").colour == "seed"
    with pytest.raises(InputError, match="--by excess is not allowed"):
        choose_colour(frame, "excess")


def test_what_is_common_has_its_config_key(sweep: Path) -> None:
    shared = dict(in_common(read_runs([sweep / "0", sweep / "1"])))
    assert shared["dataset.nsamples"] == "32"
    assert shared["n_groups.grouping"] == "random"
    assert shared["wbits.symmetric"] == "false"
    assert {"seed", "text", "wbits.group_size"}.isdisjoint(shared)


@pytest.mark.parametrize(
    ("name", "block", "kind", "kin"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.11.attn.c_attn", 11, "attn.c_attn", "attn.c_attn"),
        ("model.layers.1.mlp.experts.1.up", 1, "mlp.experts.1.up", "mlp.experts.*.up"),
        ("model.layers.13.mlp.experts.3", 13, "mlp.experts.3", "mlp.experts.*"),
        ("3.fc1", 3, "fc1", "fc1"),
        ("odd", 0, "odd", "odd"),
    ],
)
def test_kinds_are_names_inside_the_block(name: str, block: int, kind: str, kin: str) -> None:
    assert below_block(name, block) == kind
    assert family(kind) == kin


@pytest.mark.parametrize(
    ("value", "expected"),
    [(math.nan, None), (math.inf, None), (pd.NA, None), (None, None), (0.1, 0.1), (True, True),
     (pd.Series([3]).iloc[0], 3), ("x", "x")],
)  # fmt: skip
def test_plain_values(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)


def test_unreadable_linears_are_named(sweep: Path) -> None:
    (sweep / "1" / LINEARS).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"1/linears\.parquet cannot be read: Arrow"):
        gather_details([sweep], ["0", "1"])
    assert list(compare_runs(sweep).details) == ["0", "2", "3", "8", "9"]


def test_only_the_chosen_runs_are_read(sweep: Path) -> None:
    (sweep / "1" / LINEARS).write_bytes(b"")
    details = gather_details([sweep], ["0", "2"])
    assert list(details) == ["0", "2"]
    assert details["0"].directory == sweep / "0"
