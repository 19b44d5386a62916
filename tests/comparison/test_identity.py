"""Runs of another model, text, numerics or machine are never one sample's mean without a word."""

import math
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.columns import varying
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import add_difference, average_over, pivot
from mi_experiments.errors import InputError

ONE, OTHER = {"model.safetensors": "a" * 64}, {"model.safetensors": "b" * 64}
HASHES = [
    ("model_files", {"model_files": ONE}, {"model_files": OTHER}),
    ("model_files", {"model_files": ONE}, {"model_files": ONE | {"tokenizer.json": "c" * 64}}),
    ("calibration_text", {"calibration_text_sha256": "a"}, {"calibration_text_sha256": "b"}),
    ("numerics_version", {"numerics_version": 1}, {"numerics_version": 2}),
    ("device", {"device": "cpu"}, {"device": "NVIDIA H100"}),
]


@pytest.mark.parametrize(("name", "one", "other"), HASHES)
def test_a_mean_is_of_runs_of_one_origin(
    name: str, one: dict[str, Any], other: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_run(tmp_path / "0", 0.2, seed=0, origin=one)
    make_run(tmp_path / "1", 2.2, seed=1, origin=other)
    make_run(tmp_path / "2", 0.4, seed=2, origin=one)
    means = average_over(read_runs([tmp_path]), ["seed"])
    assert means["runs"].tolist() == [2, 1]
    assert means["excess"].tolist() == pytest.approx([0.3, 2.2])
    assert means[name].nunique() == 2
    main([str(tmp_path), "--over", "seed", "--format", "csv"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"kept apart, because they differ in {name}: " in line
    assert "(0, 2)" in line
    assert "(1)" in line


def test_evaluations_on_other_tokens_are_no_mean(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"stories": 0.2}, seed=0)
    path = tmp_path / "1" / "result.json"
    make_run(tmp_path / "1", {"stories": 0.4}, seed=1)
    path.write_text(path.read_text().replace("hash of stories", "hash of other stories"))
    assert average_over(read_runs([tmp_path]), ["seed"])["runs"].tolist() == [1, 1]


def test_two_masked_paths_are_two_models(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.2, seed=0, model__path="snap/***", origin={"model_files": ONE})
    make_run(tmp_path / "1", 0.4, seed=1, model__path="snap/***", origin={"model_files": OTHER})
    assert average_over(read_runs([tmp_path]), ["seed"])["runs"].tolist() == [1, 1]


def test_calibration_on_another_text_is_told_by_equal_draws(tmp_path: Path) -> None:
    """Also where a record does not have the hash of the text itself."""
    for job, (grouping, hash_) in enumerate([("random", "a"), ("energy", "b")]):
        make_run(tmp_path / str(job), n_groups__grouping=grouping,
                 origin={"calibration_sha256": hash_})  # fmt: skip
    frame = read_runs([tmp_path])
    assert varying(frame) == ["grouping", "calibration_sha256"]
    assert average_over(frame, ["grouping"])["runs"].tolist() == [1, 1]


def test_what_follows_from_settings_is_no_column_of_its_own(tmp_path: Path) -> None:
    for job, (path, files) in enumerate([("a", ONE), ("b", OTHER)]):
        for seed in range(2):
            origin = {"model_files": files, "calibration_sha256": f"{path}{seed}"}
            make_run(tmp_path / f"{job}{seed}", seed=seed, model__path=path, origin=origin)
    frame = read_runs([tmp_path])
    assert varying(frame) == ["seed", "model.path"]
    assert average_over(frame, ["seed"])["runs"].tolist() == [2, 2]


def test_another_model_in_step_with_a_setting_is_not_hidden_by_it(tmp_path: Path) -> None:
    make_run(tmp_path / "0", wbits__average=3.0, origin={"model_files": ONE})
    make_run(tmp_path / "1", wbits__average=4.0, origin={"model_files": OTHER})
    assert average_over(read_runs([tmp_path]), ["wbits"])["runs"].tolist() == [1, 1]


def test_a_baseline_is_of_the_same_model(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.2, n_groups__grouping="random", origin={"model_files": ONE})
    make_run(tmp_path / "1", 0.4, n_groups__grouping="energy", origin={"model_files": OTHER})
    with pytest.raises(InputError, match="they differ in model_files"):
        add_difference(read_runs([tmp_path]), "grouping=random")


def test_a_pivot_is_of_one_model(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.2, n_groups__grouping="random", origin={"model_files": ONE})
    make_run(tmp_path / "1", 0.4, n_groups__grouping="energy", origin={"model_files": OTHER})
    frame = read_runs([tmp_path])
    with pytest.raises(InputError, match="the cells are of different model_files"):
        pivot(frame, "grouping", "wbits", "excess")
    assert len(pivot(frame, "grouping", "model_files", "excess")) == 2
    moved = tmp_path / "more"
    for job, (grouping, path) in enumerate([("random", "a"), ("energy", "b")]):
        make_run(moved / str(job), n_groups__grouping=grouping, model__path=path)
    with pytest.raises(InputError, match=r"the cells are of different model\.path"):
        pivot(read_runs([moved]), "grouping", "wbits", "excess")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"versions": {"torch": "2.12", "numpy": "2"}},
         "--over: a mean of runs that differ in versions: torch 2.13 (0); torch 2.12 (1)"),
        ({"threads": 8}, "--over: a mean of runs that differ in threads: 1 (0); 8 (1)"),
        ({"platform": "AMD AVX2"}, "--over: a mean of runs that differ in platform: x (0); AMD"),
    ],
)  # fmt: skip
def test_a_mean_over_machines_says_so(
    change: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"versions": {"torch": "2.13", "numpy": "2"}}
    make_run(tmp_path / "0", seed=0, origin=versions)
    make_run(tmp_path / "1", seed=1, origin=versions | change)
    main([str(tmp_path), "--over", "seed"])
    assert line in capsys.readouterr().out
    pairs = tmp_path / "pairs"
    make_run(pairs / "0", n_groups__grouping="energy", origin=versions)
    make_run(pairs / "1", n_groups__grouping="random", origin=versions | change)
    main([str(pairs), "--baseline", "grouping=random"])
    assert line.replace("--over: a mean", "--baseline: differences") in capsys.readouterr().out


def test_a_record_without_provenance_is_no_other_model(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0, origin={"model_files": ONE})
    make_run(tmp_path / "1", seed=1, origin={"model_files": {}})
    frame = read_runs([tmp_path])
    assert math.isnan(frame["model_files"][1])
    assert average_over(frame, ["seed"])["runs"].tolist() == [2]
