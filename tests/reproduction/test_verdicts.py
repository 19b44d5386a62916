"""A pinned row is passed by the same bits only, where nothing explains others, and by no lie."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import as_perplexity
from synthetic_runs import make_linears, make_manifest, make_run

from mi_experiments.commands import reproduce
from mi_experiments.commands.reproduce import main
from mi_experiments.config.expected import Comparison, Evidence, ExpectedConfig, NumbersConfig
from mi_experiments.errors import InputError
from mi_experiments.records.result import Result, read_result, write_result
from mi_experiments.reproduction.pin import pin
from mi_experiments.reproduction.verdicts import FAIL, NOT_RUN, PASS, content_hashes, judge

BITS = "c" * 64


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """Write a run with all of its files, and return its record."""
    made = make_run(tmp_path / "run", origin={"model_files": {"model.safetensors": "a" * 64}})
    write_result(replace(made, compressed_sha256=BITS), tmp_path / "run")
    make_linears(tmp_path / "run")
    make_manifest(tmp_path / "run")
    return read_result(tmp_path / "run")


def pinned(result: Result, **changes: Any) -> ExpectedConfig:
    """Return what a row expects that was pinned from a result."""
    parts = {
        phase: NumbersConfig(
            where="", evidence=Evidence.own, comparison=Comparison.within, tolerance=share,
            because="a test", values={t: e.perplexity for t, e in getattr(result, phase).items()},
        )
        for phase, share in (("dense", 1e-5), ("compressed", 5e-3))
    }  # fmt: skip
    return ExpectedConfig(source="", content_hashes=content_hashes(result), **{**parts, **changes})


def verdicts(expected: ExpectedConfig, result: Result, *lies: str) -> list[tuple[str, str]]:
    judged = judge("row", "local", expected, result, [], [], contradictions=lies)
    return [(judgement.verdict, judgement.why) for judgement in judged]


def better(result: Result, share: float) -> Result:
    """Return a result whose compressed perplexity is lower by a share."""
    texts = {
        name: replace(text, measurements=as_perplexity(text.perplexity * (1 - share)))
        for name, text in result.compressed.items()
    }
    return replace(result, compressed=texts)


def elsewhere(result: Result, **origin: Any) -> Result:
    """Return a result of another machine."""
    assert result.provenance is not None
    return replace(result, provenance=replace(result.provenance, **origin))


def test_the_same_run_passes(result: Result) -> None:
    assert verdicts(pinned(result), result) == [(PASS, ""), (PASS, "")]


@pytest.mark.parametrize("share", [0.004, -0.004, 1e-4])
def test_the_same_bits_have_the_same_perplexity(share: float, result: Result) -> None:
    """Wherever they are evaluated: no 0.5 % is needed for weights that are equal."""
    for machine in ({}, {"threads": 8}, {"platform": "AVX2"}):
        _, (verdict, why) = verdicts(pinned(result), better(elsewhere(result, **machine), share))
        assert (verdict, "0.00% are allowed" in why) == (FAIL, True)


@pytest.mark.parametrize("hash_", ["d" * 64, None])
def test_other_bits_of_the_same_machine_fail(hash_: str | None, result: Result) -> None:
    _, (verdict, why) = verdicts(pinned(result), replace(result, compressed_sha256=hash_))
    assert (verdict, "compressed" in why) == (FAIL, True)


def test_other_bits_of_another_machine_are_held_to_the_tolerance(result: Result) -> None:
    other = elsewhere(replace(result, compressed_sha256="d" * 64), threads=8)
    assert verdicts(pinned(result), better(other, 0.004))[1][0] == PASS
    assert verdicts(pinned(result), better(other, 0.006))[1][0] == FAIL


@pytest.mark.parametrize(
    "machine", [{"threads": 8}, {"platform": "AVX2"}, {"versions": {"a": "1"}}]
)
def test_unknown_bits_pass_nowhere(machine: dict[str, Any], result: Result) -> None:
    other = elsewhere(replace(result, compressed_sha256=None), **machine)
    dense, compressed = verdicts(pinned(result), other)
    assert dense[0] == PASS
    assert compressed == (FAIL, "not the same: compressed_sha256 is missing in the record")


def test_a_row_that_pins_no_bits_passes_nothing_compressed(result: Result) -> None:
    expected = pinned(result)
    prints = {key: value for key, value in expected.content_hashes.items() if key != "compressed"}
    _, (verdict, why) = verdicts(replace(expected, content_hashes=prints), result)
    assert (verdict, "pin it again" in why) == (FAIL, True)


def test_a_dense_model_is_judged_before_there_are_bits(result: Result) -> None:
    begun = replace(result, compressed={}, compressed_sha256=None)
    assert [verdict for verdict, _ in verdicts(pinned(result), begun)] == [PASS, NOT_RUN]


def test_a_published_number_needs_no_bits(result: Result) -> None:
    expected = replace(pinned(result), content_hashes={})
    other = replace(better(result, 0.004), compressed_sha256=None)
    assert [verdict for verdict, _ in verdicts(expected, other)] == [PASS, PASS]


def test_no_number_of_a_contradicted_record_passes(result: Result) -> None:
    for expected in (pinned(result), replace(pinned(result), content_hashes={})):
        judged = verdicts(expected, result, "result.json: bits.effective is 1")
        assert [verdict for verdict, _ in judged] == [FAIL, FAIL]
        assert all("result.json: bits.effective is 1" in why for _, why in judged)


def change_file(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_against_an_edited_record_names_the_file(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The row's settings are taken for the run's: only its numbers are at stake here."""
    run_dir = tmp_path / "run"
    monkeypatch.setattr(reproduce, "setting_changes", lambda asked, ran: [])
    monkeypatch.setattr(reproduce, "other_model", lambda *arguments: "")
    row = reproduce.row_config("pinned/embedded")
    expected = pinned(result)
    monkeypatch.setattr(reproduce, "row_config", lambda *_: replace(row, expected=expected))
    command = ["pinned/embedded", "--against", str(run_dir)]
    main(command)
    whole = (run_dir / "result.json").read_text()
    for lie in (
        lambda r: r["bits"].update(effective=1.0),
        lambda r: r["compressed"]["stories"]["measurements"]["perplexity"].update(value=1.65),
        lambda r: r.update(compressed_sha256=None),
    ):
        change_file(run_dir / "result.json", lie)
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 5
        assert f"not the same: {run_dir / 'result.json'}: " in capsys.readouterr().out
        with pytest.raises(InputError, match=r"result\.json: "):
            pin(run_dir, "name", tmp_path)
        (run_dir / "result.json").write_text(whole)
    (run_dir / "linears.parquet").unlink()
    with pytest.raises(SystemExit):
        main(command)
    assert "linears.parquet" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]"])
def test_against_a_broken_record_is_one_line(
    text: str, result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "result.json").write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["pinned/embedded", "--against", str(tmp_path / "run")])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
