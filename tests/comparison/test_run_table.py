"""The table of runs: every number is the record's, and rows are told apart by what was asked."""

import math
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import make_broken_run, make_run

from mi_experiments.comparison.columns import (
    find_column,
    varying,
)
from mi_experiments.comparison.run_table import (
    flatten,
    read_runs,
)
from mi_experiments.errors import InputError
from mi_experiments.records.result import RESULT, read_result


def test_every_number_is_the_one_of_the_record(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "0", {"stories": 0.25, "news": 0.5}, wbits__average=3.5, seed=7)
    result = read_result(tmp_path / "sweep" / "0")
    assert result.provenance is not None
    assert result.bits is not None
    frame = read_runs([tmp_path])
    assert frame["text"].tolist() == ["stories", "news"]
    for row in frame.to_dict("records"):
        dense, compressed = result.dense[row["text"]], result.compressed[row["text"]]
        expected = {
            "run": "sweep/0", "status": "completed", "model": "local", "dataset": "text",
            "seed": 7, "nsamples": 32, "sparsity": 0.5, "realised_sparsity": result.sparsity,
            "wbits": 3.5, "average_bits": result.bits.average,
            "effective_bits": result.bits.effective, "allocation": "mixed", "scope": "linear",
            "grouping": "random", "n_groups": 4, "recipe": "default",
            "dense": dense.perplexity, "compressed": compressed.perplexity,
            "excess": compressed.nll - dense.nll, "seconds": 0.5 + 1.25,
            "peak_memory": 3_000_000_000, "numerics_version": 1, "device": "cpu",
            "tokens_sha256": dense.tokens_sha256,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == expected
        assert math.isnan(row["error"])


def test_every_config_key_has_a_column(tmp_path: Path) -> None:
    result = make_run(tmp_path / "0")
    frame = read_runs([tmp_path])
    for key, value in flatten(result.config):
        cell = frame[find_column(frame, key)][0]
        assert cell == value or (pd.isna(cell) and pd.isna(value)), key


def test_runs_are_named_by_their_path_in_natural_order(tmp_path: Path) -> None:
    for job in ("10", "2", "1"):
        make_run(tmp_path / "sweep" / job)
    assert read_runs([tmp_path])["run"].tolist() == ["sweep/1", "sweep/2", "sweep/10"]
    assert read_runs([tmp_path / "sweep" / "10"])["run"].tolist() == ["10"]
    overlapping = [tmp_path / "sweep", tmp_path / "sweep" / "2", tmp_path]
    assert read_runs(overlapping)["run"].tolist() == ["1", "2", "10"]


def test_equal_names_below_two_paths_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "0")
    make_run(tmp_path / "b" / "0")
    frame = read_runs([tmp_path / "a", tmp_path / "b"])
    assert frame["run"].tolist() == [str(tmp_path / "a" / "0"), str(tmp_path / "b" / "0")]


def test_failed_and_running_runs_are_rows(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    make_broken_run(tmp_path / "1", "failed", "block 3: no valid factor", seed=1)
    make_broken_run(tmp_path / "2", "running", None, seed=2)
    frame = read_runs([tmp_path])
    assert frame["status"].tolist() == ["completed", "failed", "running"]
    assert frame["error"][1] == "block 3: no valid factor"
    assert frame["seed"].tolist() == [0, 1, 2]
    assert frame.loc[1:, ["excess", "dense", "average_bits", "seconds"]].isna().all(axis=None)


def test_two_hundred_runs_are_read(tmp_path: Path) -> None:
    for job in range(200):
        make_run(tmp_path / str(job), excess=job / 1000, seed=job)
    frame = read_runs([tmp_path])
    assert frame["seed"].tolist() == list(range(200))
    assert frame["excess"].tolist() == pytest.approx([job / 1000 for job in range(200)])


def test_what_varies_leaves_out_copies_and_bookkeeping(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0, tracking__mode="offline", model__seqlen=32, dataset__seqlen=32)
    make_run(tmp_path / "1", seed=1, wbits__group_size=64)
    assert varying(read_runs([tmp_path])) == ["seed", "model.seqlen", "wbits.group_size"]


def test_a_seed_of_its_own_is_no_copy(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0)
    make_run(tmp_path / "1", seed=1, n_groups__seed=5)
    assert varying(read_runs([tmp_path])) == ["seed", "n_groups.seed"]


def test_settings_of_a_text_are_compared_within_it(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"stories": 0.1, "news": 0.2})
    make_run(tmp_path / "1", {"stories": 0.1})
    assert varying(read_runs([tmp_path])) == ["text"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"status": "completed"}', "\xff\x00", '{"dense": 1, "compressed": 2}'],
)
def test_an_unreadable_record_is_named(content: str, tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    (tmp_path / "0" / RESULT).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"0/result\.json is no record of a run"):
        read_runs([tmp_path])


def test_paths_without_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="missing is no directory"):
        read_runs([tmp_path / "missing"])


def test_an_unknown_column_gets_its_neighbour(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    frame = read_runs([tmp_path])
    assert find_column(frame, "wbits.average") == find_column(frame, "wbits") == "wbits"
    assert find_column(frame, "perplexity") == "compressed"
    with pytest.raises(InputError, match=r"unknown column exces; did you mean excess\?"):
        find_column(frame, "exces")


def test_a_row_has_the_settings_of_its_own_text_only(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"stories": 0.1, "news": 0.2})
    frame = read_runs([tmp_path]).set_index("text")
    own = frame[["evaluation.datasets.stories.seqlen", "evaluation.datasets.news.seqlen"]]
    assert own.notna().to_numpy().tolist() == [[True, False], [False, True]]
