"""Another model is told by its name, its shape or its dense numbers, and gets no verdict."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mi_experiments.commands.reproduce import main, parse
from mi_experiments.config.compose import from_hydra, to_plain
from mi_experiments.errors import InputError
from mi_experiments.reproduction.rows import compose_row, find_rows, read_conf
from mi_experiments.reproduction.substitution import (
    OTHER,
    other_model,
    set_aside,
    shorten,
    substitute,
    unproved,
)
from mi_experiments.reproduction.verdicts import FAIL, NONE, NOT_RUN, PASS, Judgement

SHAPES = read_conf("shapes")
ASKED = from_hydra(compose_row("papers/sparsegpt/opt_125m_50", []))
RAN = to_plain(ASKED)["model"]
DENSE = Judgement("r", "dense", "wikitext2", 27.66, 27.66, 0.1, PASS, "", "s")


def save_config(folder: Path, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES["opt_125m"] | changes))
    return str(folder)


def test_a_copy_is_the_same_model_and_another_name_or_shape_is_not(tmp_path: Path) -> None:
    assert other_model(ASKED.model, RAN, SHAPES) == ""
    copy = save_config(tmp_path / "copy", dtype="float32", torch_dtype="float32")
    assert other_model(ASKED.model, RAN | {"path": copy}, SHAPES) == ""
    named = RAN | {"path": copy, "name": "substitute_for_opt_125m"}
    assert other_model(ASKED.model, named, SHAPES) == f"run on {copy}, not on facebook/opt-125m"
    for key, value in {
        "hidden_size": 32,
        "do_layer_norm_before": False,
        "model_type": "gpt2",
    }.items():
        other = save_config(tmp_path / key, **{key: value})
        why = other_model(ASKED.model, RAN | {"path": other}, SHAPES)
        assert f"{key} is {value}, not {SHAPES['opt_125m'][key]}" in why


@pytest.mark.parametrize(
    ("verdict", "readable", "doubted"),
    [(PASS, False, False), (PASS, True, False), (FAIL, True, False), (FAIL, False, True),
     (NOT_RUN, True, True), (NONE, True, True)],
)  # fmt: skip
def test_dense_numbers_show_which_model_it_was(
    verdict: str, readable: bool, doubted: bool, tmp_path: Path
) -> None:
    """A wrong dense number is held against a row only if the model has at least the row's shape."""
    path = save_config(tmp_path / "copy") if readable else "gone"
    judged = [replace(DENSE, verdict=verdict)]
    assert bool(unproved(ASKED.model, RAN | {"path": path}, judged, SHAPES)) is doubted
    assert unproved(ASKED.model, RAN, judged, SHAPES) == ""


def test_every_measured_number_of_another_model_loses_its_verdict() -> None:
    verdicts = [replace(DENSE, verdict=verdict) for verdict in (PASS, FAIL, NONE)]
    verdicts.append(replace(DENSE, ours=None, verdict=NOT_RUN, why="a reason"))
    assert set_aside(verdicts, "") == verdicts
    taken = set_aside(verdicts, "another")
    assert [(v.verdict, v.why) for v in taken] == [(OTHER, "another")] * 3 + [(NOT_RUN, "a reason")]


def test_a_model_is_found_in_a_directory_or_by_its_name_in_a_folder(tmp_path: Path) -> None:
    save_config(tmp_path / "opt_125m")
    one = substitute(tmp_path / "opt_125m", "opt_125m")
    assert substitute(tmp_path, "opt_125m") == one
    model = from_hydra(compose_row("papers/sparsegpt/opt_125m_50", one)).model
    assert (model.path, model.revision) == (str(tmp_path / "opt_125m"), None)
    with pytest.raises(InputError, match=r"no config\.json"):
        substitute(tmp_path, "llama_7b")


def test_a_directory_with_quotes_is_one_value(tmp_path: Path) -> None:
    directory = tmp_path / "it's, {a} model"
    save_config(directory)
    overrides = substitute(directory, "opt_125m")
    assert from_hydra(compose_row("papers/sparsegpt/opt_125m_50", overrides)).model.path == str(
        directory
    )


@pytest.mark.parametrize("row", ["sparsegpt/opt_2_7b_50_nsamples_2", "wanda/llama2_7b_2_4"])
def test_a_short_row_differs_in_length_alone_and_is_nowhere_longer(row: str) -> None:
    asked = from_hydra(compose_row(f"papers/{row}", []))
    limits = read_conf("rehearsal")
    short = from_hydra(compose_row(f"papers/{row}", shorten(asked, limits)))
    assert short.model.seqlen == short.dataset.seqlen == limits["seqlen"]
    assert short.dataset.nsamples == min(asked.dataset.nsamples, limits["nsamples"])
    for text in short.evaluation.datasets.values():
        assert (text.seqlen, text.max_windows) == (limits["seqlen"], limits["max_windows"])
    before, after = flat(to_plain(asked)), flat(to_plain(short))
    changed = {key.rpartition(".")[2] for key in before if before[key] != after[key]}
    assert changed <= {"seqlen", "nsamples", "max_windows"}


def flat(value: object, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{path}.{key}").items()}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--against", "/nonexistent"], "/nonexistent: no run is recorded there (no result.json)"),
        (["--against", "."], "result.json is no record of this version"),
        (["--model", "/nonexistent"], "--model /nonexistent: no config.json"),
        (["--status", "nowhere"], "--status nowhere: no such folder"),
        (["--only", "nothing_*"], "no row nothing_* in papers/wanda: there are"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result.json").write_text("[]")
    with pytest.raises(SystemExit) as left:
        main(["papers/wanda", *arguments])
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.startswith("mi-reproduce: ")
    assert printed.count("\n") == 1


def test_an_error_of_the_system_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as left:
        main(["papers/wanda", "--against", "file"])
    assert left.value.code == 2
    assert (
        capsys.readouterr().err
        == "mi-reproduce: file/result.json cannot be read: Not a directory\n"
    )


def test_only_takes_a_pattern() -> None:
    options = parse(["papers", "--only", "llama2_13b_?_?"])
    rows = ["papers/wanda/llama2_13b_2_4", "papers/wanda/llama2_13b_4_8"]
    assert find_rows(options.table, options.only) == rows
