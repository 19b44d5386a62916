"""A pinned run is run again with one thing changed; the verdict fails, and names that thing alone.

Nothing is edited in a record: seeds, bits of weights, texts, protocols, revisions and versions are
changed, the run is done, and `mi-reproduce` judges it against a row that `--pin` has written.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from command_line import SMALL, mi_reproduce
from tiny_models import build_byte_tokenizer, build_tiny_model

from mi_experiments.commands import reproduce, run
from mi_experiments.compression import pipeline
from mi_experiments.embedded import MODEL_DIRECTORY
from mi_experiments.experiment import unchanged
from mi_experiments.records import provenance
from mi_experiments.records.result import read_result
from mi_experiments.reproduction import rows as row_files
from mi_experiments.reproduction.verdicts import FAIL, NOT_RUN, PASS

QUICK = ["recipe=textbook", "wbits=uniform", "n_groups=contiguous", "sparsity.scope=linear"]
"""No pass to plan by: what is judged here does not depend on how a run plans."""

MAIN, OTHER, COPY = "a" * 40, "b" * 40, "c" * 40
"""Commits of a tiny model in the hub's cache: its weights, others, and the first ones again."""


@dataclass(frozen=True)
class Judged:
    """What `mi-reproduce` said."""

    code: int
    verdicts: list[dict[str, Any]]
    out: str

    @property
    def whys(self) -> list[str]:
        """The diagnosis of every number that failed."""
        return [each["why"] for each in self.verdicts if each["verdict"] == FAIL]


def flip_lowest_bit(file: Path) -> None:
    """Change the last weight of a file by its lowest bit; float32 is stored little-endian."""
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


def write_text(file: Path, word: str = "word") -> Path:
    lines = [" ".join(f"{i * (j + 3) % 997:x}" for j in range(40)) for i in range(40)]
    # The last fifth is held out for the evaluation.
    rows = [{"text": f"{word if i < 32 else ''} {line}"} for i, line in enumerate(lines)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run a tiny model of the hub's cache, by its branch and by its commit, and pin both runs.

    The folder has `conf`, the configs with the two rows, `hub`, the cache, and `text.jsonl`.
    """
    root = tmp_path_factory.mktemp("pinned")
    shutil.copytree(run.conf_directory(), root / "conf")
    snapshots = root / "hub" / "models--org--tiny" / "snapshots"
    build_tiny_model("llama", vocab_size=260).save_pretrained(snapshots / MAIN)
    build_byte_tokenizer().save_pretrained(snapshots / MAIN)
    for commit in (OTHER, COPY):
        shutil.copytree(snapshots / MAIN, snapshots / commit)
    flip_lowest_bit(snapshots / OTHER / "model.safetensors")
    refs = snapshots.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(MAIN)
    text = write_text(root / "text.jsonl")
    tiny = ["model=hub", "model.path=org/tiny", "model.name=tiny", "model.offline=true",
            "model.seqlen=32", "dataset=text", f"dataset.path={text}",
            "evaluation.datasets.text.max_windows=4"]  # fmt: skip
    rows = {"branch": [], "commit": [f"model.revision={MAIN}"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MI_EXPERIMENTS_CACHE", str(root / "cache"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
        for module in (reproduce, row_files):
            patch.setattr(module, "conf_directory", lambda: str(root / "conf"))
        patch.chdir(root)
        for name, overrides in rows.items():
            words = ["mi-run", *SMALL, *QUICK, *tiny, *overrides, f"hydra.run.dir={root / name}"]
            patch.setattr(sys, "argv", words)
            run.main()
            reproduce.main(["--pin", str(root / name), name])
        yield root


@pytest.fixture
def judged(
    pinned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Judged]:
    """Run a pinned row with `mi-reproduce`, in an empty folder, and read its verdicts."""
    monkeypatch.chdir(tmp_path)

    def reproduced(row: str, *overrides: str) -> Judged:
        capsys.readouterr()
        code = 0
        given = [f"pinned/{row}", "tracking=disabled", "cache=false", *overrides]
        try:
            reproduce.main([*given, "--json", "verdicts.json", "--markdown", "verdicts.md"])
        except SystemExit as left:
            code = int(left.code or 0)
        verdicts = json.loads(Path("verdicts.json").read_text())
        for each in verdicts:
            (line,) = [
                line
                for line in Path("verdicts.md").read_text().splitlines()
                if line.startswith(f"| {each['row']} | {each['phase']} ")
            ]
            assert each["mismatch"] in line
        return Judged(code, verdicts, capsys.readouterr().out)

    return reproduced


def test_the_same_is_the_same_to_the_last_bit(judged: Callable[..., Judged]) -> None:
    same = judged("branch")
    assert [each["verdict"] for each in same.verdicts] == [PASS, PASS]
    assert all(each["ours"] == each["expected"] for each in same.verdicts)
    assert {each["mismatch"] for each in same.verdicts} == {""}
    assert same.code == 0


MORE_CHANGES = [
    ("dataset.seed=1", "dataset.seed: 0 → 1"),
    ("dataset.nsamples=3", "dataset.nsamples: 4 → 3"),
    ("evaluation.datasets.text.add_bos=never", "evaluation.datasets.text.add_bos: auto → never"),
    ("evaluation.datasets.text.windows=documents",
     "evaluation.datasets.text.windows: joined → documents"),
    ("evaluation.protocol=another", "evaluation.protocol: text → another"),
    ("recipe.damping=0.02", "recipe.damping: 0.01 → 0.02"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("seed=1", "seed: 0 → 1"),
        ("evaluation.datasets.text.seqlen=16", "evaluation.datasets.text.seqlen: 32 → 16"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_CHANGES),
    ],
)
def test_a_changed_setting_fails_by_its_name(
    override: str, cause: str, judged: Callable[..., Judged]
) -> None:
    changed = judged("branch", override)
    assert changed.code == 5
    assert changed.whys == [f"not the same: {cause}"] * 2
    assert f"compressed text: not the same: {cause}\n" in changed.out


@pytest.mark.slow
def test_one_bit_of_the_embedded_weights_fails_before_anything_is_compressed(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL_DIRECTORY, copy)
    flip_lowest_bit(copy / "model.safetensors")
    ended = mi_reproduce(
        tmp_path, "pinned/embedded", "tracking=disabled", "model.path=copy", "--json", "v.json"
    )
    dense, compressed = json.loads((tmp_path / "v.json").read_text())
    assert ended.code == 5
    assert (dense["verdict"], compressed["verdict"]) == (FAIL, NOT_RUN)
    assert dense["ours"] == pytest.approx(dense["expected"], rel=1e-5)  # the hash tells alone
    assert dense["why"].startswith("not the same: model_files.model.safetensors: 42739285d141… → ")
    assert ";" not in dense["why"]
    assert compressed["why"].startswith("dense: embedded ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("dataset.seed=1", "dataset.seed: 0 → 1"),
        ("evaluation.datasets.embedded.seqlen=128",
         "evaluation.datasets.embedded.seqlen: 256 → 128"),
    ],
)  # fmt: skip
def test_the_embedded_set_with_one_thing_changed_fails_by_its_name(
    override: str, cause: str, tmp_path: Path
) -> None:
    given = ["pinned/embedded", "tracking=disabled", override, "--json", "v.json"]
    assert mi_reproduce(tmp_path, *given).code == 5
    verdicts = json.loads((tmp_path / "v.json").read_text())
    assert [each["verdict"] for each in verdicts] == [FAIL, FAIL]
    assert {each["why"] for each in verdicts} == {f"not the same: {cause}"}
    assert all(each["ours"] is not None for each in verdicts)


def test_a_wrong_dense_model_is_not_compressed(judged: Callable[..., Judged]) -> None:
    """Nothing is spent on a model that is not the one that the row is about."""
    wrong = judged("branch", "expected.dense.values.text=4.0")
    dense, compressed = wrong.verdicts
    (run_dir,) = Path("outputs").iterdir()
    result = read_result(run_dir)
    assert result.status == "failed"
    assert set(result.dense) == {"text"}
    assert result.compressed == {}
    assert result.bits is None
    assert "compress" not in result.seconds
    assert compressed["verdict"] == NOT_RUN
    assert compressed["why"].startswith(f"dense: text {dense['ours']:.4f}: ")


def test_a_run_that_was_begun_with_another_bit_is_no_run_of_the_row(
    judged: Callable[..., Judged], pinned: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pinned / "hub" / "models--org--tiny" / "snapshots" / OTHER, copy)
    moved = ["commit", f"model.path={copy}", "model.revision=null"]
    assert judged(*moved).code == 5
    flip_lowest_bit(copy / "model.safetensors")  # back
    refused = judged(*moved)
    assert [each["verdict"] for each in refused.verdicts] == [NOT_RUN, NOT_RUN]
    assert "was begun with something else: model_files.model.safetensors: " in refused.out
    shutil.rmtree("outputs")
    assert judged(*moved).code == 0


def test_a_bit_that_changes_after_the_run_is_seen_where_it_is_recalled(
    judged: Callable[..., Judged], pinned: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pinned / "hub" / "models--org--tiny" / "snapshots" / MAIN, copy)
    moved = ["commit", f"model.path={copy}", "model.revision=null"]
    for _ in ("run", "recalled"):
        same = judged(*moved)
        assert [each["verdict"] for each in same.verdicts] == [PASS, PASS]
        assert "model_revision: " in same.verdicts[0]["mismatch"]  # a directory has none
    flip_lowest_bit(copy / "model.safetensors")
    changed = judged(*moved)
    assert changed.code == 5
    assert len(changed.whys) == 2
    for why in changed.whys:
        assert why.startswith("not the same: model_files.model.safetensors: ")
        assert why.endswith(" was run: remove it to run again")
        assert ";" not in why
    shutil.rmtree(copy)
    gone = judged(*moved)
    assert gone.code == 0
    assert "what it read is not at hand" in gone.verdicts[0]["mismatch"]


def without_beginning(copy: Path) -> None:
    """Let the tokenizer begin no text any more: all tokens change, and follow from this file."""
    state = json.loads((copy / "tokenizer.json").read_text())
    state["post_processor"] = None
    (copy / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (without_beginning, "tokenizer.json"),
        (lambda copy: (copy / "extra.json").write_text("{}"), "extra.json"),
        (lambda copy: (copy / "generation_config.json").unlink(), "generation_config.json"),
    ],
    ids=["changed", "added", "removed"],
)
def test_another_file_of_the_model_fails_by_its_name(
    change: Callable[[Path], None],
    file: str,
    judged: Callable[..., Judged],
    pinned: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pinned / "hub" / "models--org--tiny" / "snapshots" / MAIN, copy)
    change(copy)
    changed = judged("commit", f"model.path={copy}", "model.revision=null")
    assert changed.code == 5
    (why,) = changed.whys
    why, _, revision = why.partition("; model_revision: ")
    assert why.startswith(f"not the same: model_files.{file}: ")
    assert ";" not in why
    assert revision == f"{MAIN} → None"


def test_another_revision_fails_by_its_name(judged: Callable[..., Judged]) -> None:
    for commit in (OTHER, COPY):
        changed = judged("commit", f"model.revision={commit}")
        assert changed.code == 5
        assert set(changed.whys) == {f"not the same: model.revision: {MAIN} → {commit}"}


def test_a_branch_that_moved_fails_only_if_its_files_are_others(
    judged: Callable[..., Judged], pinned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(pinned / "hub", hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    main = hub / "models--org--tiny" / "refs" / "main"
    main.write_text(COPY)
    moved = judged("branch")
    assert [each["verdict"] for each in moved.verdicts] == [PASS, PASS]
    assert {each["mismatch"] for each in moved.verdicts} == {f"model_revision: {MAIN} → {COPY}"}
    main.write_text(OTHER)
    changed = judged("branch", "hydra.run.dir=again")
    assert changed.code == 5
    (why,) = changed.whys
    files, revision = why.removeprefix("not the same: ").split("; ")
    assert files.startswith("model_files.model.safetensors: ")
    assert revision == f"model_revision: {MAIN} → {OTHER}"


def test_another_calibration_text_of_the_same_name_fails_by_its_tokens(
    judged: Callable[..., Judged], pinned: Path
) -> None:
    text = pinned / "text.jsonl"
    before = text.read_text()
    write_text(text, "other")
    try:
        changed = judged("branch")
    finally:
        text.write_text(before)
    assert changed.code == 5
    assert len(changed.whys) == 1  # the evaluation's share of the file is what it was
    assert changed.whys[0].startswith("not the same: calibration: ")
    assert ";" not in changed.whys[0]


def test_other_numerics_fail_by_their_number(
    judged: Callable[..., Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = provenance.NUMERICS_VERSION + 1
    for module in (provenance, unchanged):
        monkeypatch.setattr(module, "NUMERICS_VERSION", raised)
    changed = judged("branch")
    assert changed.code == 5
    cause = f"numerics_version: {raised - 1} → {raised}"
    assert set(changed.whys) == {f"not the same: {cause}"}
    assert {each["mismatch"] for each in changed.verdicts} == {cause}


# Bits that nothing explains: each solve sees weights that are larger by a millionth.


@pytest.fixture
def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = pipeline.solve_linear

    def solved(original: torch.Tensor, *rest: Any) -> Any:
        return solve(original * (1 + 1e-6), *rest)

    monkeypatch.setattr(pipeline, "solve_linear", solved)


@pytest.mark.usefixtures("other_bits")
def test_other_bits_of_the_same_machine_fail_though_the_numbers_are_near(
    judged: Callable[..., Judged],
) -> None:
    changed = judged("branch")
    dense, compressed = changed.verdicts
    assert (dense["verdict"], compressed["verdict"], changed.code) == (PASS, FAIL, 5)
    assert abs(compressed["ours"] - compressed["expected"]) < compressed["tolerance"]
    assert compressed["why"].startswith("not the same: compressed: ")
    assert compressed["why"].endswith("of the same inputs, versions, threads and hardware")
    assert ";" not in compressed["why"]


@pytest.mark.usefixtures("other_bits")
@pytest.mark.parametrize(
    "what",
    [
        "threads",
        pytest.param("versions.python", marks=pytest.mark.slow),
        pytest.param("platform", marks=pytest.mark.slow),
    ],
)
def test_other_bits_of_another_machine_are_shown_beside_the_verdict(
    what: str, judged: Callable[..., Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "threads":
        monkeypatch.setattr(provenance.torch, "get_num_threads", lambda: 64)
    elif what == "platform":
        monkeypatch.setattr(provenance, "name_processor", lambda: "another one")
    else:
        monkeypatch.setattr(provenance.platform, "python_version", lambda: "3.99")
    elsewhere = judged("branch")
    assert [each["verdict"] for each in elsewhere.verdicts] == [PASS, PASS]
    for each in elsewhere.verdicts:
        bits, differs = each["mismatch"].split("; ")
        assert bits.startswith("compressed: ")
        assert differs.startswith(f"{what}: ")
        assert differs.endswith(("→ 64", "→ 3.99", "another one"))
    assert what in elsewhere.out  # the table of the terminal


def test_a_machine_that_differs_is_shown_beside_a_pass_to_the_last_bit(
    judged: Callable[..., Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "name_processor", lambda: "another one")
    elsewhere = judged("branch")
    assert [each["verdict"] for each in elsewhere.verdicts] == [PASS, PASS]
    for each in elsewhere.verdicts:
        assert each["mismatch"].startswith("platform: ")
        assert ";" not in each["mismatch"]
