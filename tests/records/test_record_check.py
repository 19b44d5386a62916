"""A record that was edited stands against the other files of its run, whatever was edited."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import make_linears, make_manifest, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import average_over
from mi_experiments.records.linears import LINEARS, read_linears, write_linears
from mi_experiments.records.record_check import MANIFEST, check_record
from mi_experiments.records.result import RESULT


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Write a completed run with all of its files."""
    directory = tmp_path / "sweep" / "0"
    make_run(directory, 0.25, seed=0)
    make_linears(directory)
    edit(directory, lambda result: result.update(compressed_sha256="c" * 64))
    make_manifest(directory)
    return directory


def edit(directory: Path, change: Callable[[dict[str, Any]], object], name: str = RESULT) -> None:
    """Change a JSON file of a run, as an editor does."""
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def test_an_honest_record_has_no_contradiction(run_dir: Path) -> None:
    assert check_record(run_dir) == check_record(run_dir, whole=True) == []


def perplexity_in(record: dict[str, Any], phase: str) -> dict[str, Any]:
    """Return the entry of a perplexity in a record."""
    entry: dict[str, Any] = record[phase]["stories"]["measurements"]["perplexity"]
    return entry


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "perplexity": (lambda r: perplexity_in(r, "compressed").update(value=1.65),
                   "compressed.stories.perplexity is 1.65, and 5.75"),
    "dense": (lambda r: perplexity_in(r, "dense").update(mean=1.6),
              "dense.stories.perplexity is 4.48"),
    "both": (lambda r: perplexity_in(r, "compressed").update(value=1.65, mean=math.log(1.65)),
             "numbers are not those that manifest.json was sealed with"),
    "slightly": (lambda r: perplexity_in(r, "compressed").update(
        value=math.exp(1.746), mean=1.746), "sealed with"),
    "negative": (lambda r: perplexity_in(r, "dense").update(mean=-0.1, value=math.exp(-0.1)),
                 "has a mean of -0.1 nats"),
    "overflow": (lambda r: perplexity_in(r, "dense").update(mean=1e300), "and inf by its mean"),
    "effective": (lambda r: r["bits"].update(effective=1.0), "bits.effective is 1, and 3.25 over"),
    "average": (lambda r: r["bits"].update(average=2.0), "bits.average is 2, and 2.99 over"),
    "sparsity": (lambda r: r.update(sparsity=0.9), "sparsity is 0.9, and 0.499 over"),
    "weights": (lambda r: r.update(weights=1), "weights is 1, and "),
    "stability": (lambda r: r.update(stability=1.0), "stability is 1, and missing over"),
    "statuses": (lambda r: r.update(statuses={"compressed": 3}), "statuses are "),
    "no hash": (lambda r: r.update(compressed_sha256=None), "sealed with"),
    "other hash": (lambda r: r.update(compressed_sha256="d" * 64), "sealed with"),
    "text": (lambda r: r["compressed"]["stories"].update(tokens_sha256="x"),
             "dense.stories and compressed.stories differ in tokens_sha256"),
    "both texts": (lambda r: [r[phase]["stories"].update(tokens_sha256="x")
                              for phase in ("dense", "compressed")],
                   "dense.stories.tokens_sha256 is not that of manifest.json"),
    "no text": (lambda r: r.update(compressed={}), "are not of the same texts"),
    "settings": (lambda r: r["config"]["wbits"].update(average=2.0),
                 "config.wbits.average is not that of manifest.json"),
    "threads": (lambda r: r["provenance"].update(threads=64), "provenance.threads is not that"),
    "model": (lambda r: r["provenance"].update(model_files={"a": "b"}), "provenance.model_files"),
    "calibration": (lambda r: r["provenance"].update(calibration_sha256="x"),
                    "provenance.calibration_sha256"),
    "no origin": (lambda r: r.update(provenance=None), "has no provenance"),
    "seconds": (lambda r: r.update(seconds={"a": 1e308, "b": 1e308}), "seconds are no times"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_and_is_in_no_mean(
    lie: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = LIES[lie]
    edit(run_dir, change)
    said = check_record(run_dir)
    assert all(line.startswith(str(run_dir / RESULT)) for line in said)
    assert sentence in "\n".join(said)
    make_run(run_dir.parent / "1", 0.4, seed=1)
    make_run(run_dir.parent / "2", 0.6, seed=2)
    frame = read_runs([run_dir.parent])
    assert frame["status"].tolist() == ["inconsistent", "completed", "completed"]
    assert frame.loc[0, ["compressed", "excess", "effective_bits"]].isna().all()
    means = average_over(frame, ["seed"])
    assert means.loc[means["status"] == "completed", "excess"].tolist() == pytest.approx([0.5])
    main([str(run_dir.parent)])
    assert f"0 inconsistent: {run_dir / RESULT}: " in capsys.readouterr().out


def test_a_changed_table_is_named(run_dir: Path) -> None:
    linears = read_linears(run_dir)
    write_linears(linears[::-1], run_dir)
    assert check_record(run_dir) == [
        f"{run_dir / LINEARS} was changed: it is not the file of {MANIFEST}"
    ]
    (run_dir / LINEARS).unlink()
    assert f"{run_dir / LINEARS} is missing, and {MANIFEST} has it" in check_record(run_dir)


def test_the_hash_of_the_blocks_is_that_of_the_exported_model(run_dir: Path) -> None:
    def export(manifest: dict[str, Any]) -> None:
        for number in range(1, 4):
            name = f"model/model-{number:05}-of-00003.safetensors"
            manifest["files"][name] = {"sha256": str(number), "bytes": 1}

    edit(run_dir, export, MANIFEST)
    (line,) = check_record(run_dir)
    assert line.endswith("compressed_sha256 is not that of the blocks in manifest.json")


@pytest.mark.parametrize("name", [LINEARS, MANIFEST])
def test_what_the_others_are_checked_by_may_be_asked_for(name: str, run_dir: Path) -> None:
    (run_dir / name).unlink()
    assert any(name in line for line in check_record(run_dir, whole=True))


def test_no_record_at_all_is_named(tmp_path: Path) -> None:
    assert check_record(tmp_path) == [f"{tmp_path / RESULT} is missing"]


def test_a_run_that_goes_on_is_held_to_itself_alone(run_dir: Path) -> None:
    edit(run_dir, lambda result: result.update(status="running", weights=1))
    assert check_record(run_dir) == []
