"""Documents: every format gives the same text, published corpora are pinned, faults are a line."""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import huggingface_hub.errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mi_experiments.errors import InputError
from mi_experiments.llm import corpora
from mi_experiments.llm.corpora import CORPORA, load_hub_documents, read_documents

# Documents


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory-mapped files stay out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


TEXTS = ["first\nline", "", "zwei – drei", "a\u2028b"]


def write_rows(path: Path, texts: Sequence[str], field: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({field: t, "n": 1}, ensure_ascii=False) + "\n" for t in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({field: texts}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(rows.encode()))
    else:
        path.write_text(rows, encoding="utf-8")


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.json.gz", "x.jsonl.gz"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, TEXTS, "body")
    assert list(read_documents(tmp_path / name, "body")) == TEXTS


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for texts in (["a", "b"], ["c", "d"]):
        write_rows(tmp_path / "x.jsonl.gz", texts, "text")
        assert list(read_documents(tmp_path / "x.jsonl.gz")) == texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "x.txt")) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "empty"),
        ("x.txt", b" \n ", "no text"),
        ("x.txt", b"\xff\xfe", "UTF-8"),
        ("x.csv", b"a,b", "cannot read this kind"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no text in field 'text'.*body"),
        ("x.jsonl", b'{"text": 3}\n', "line 1: no text in field"),
        ("x.jsonl", b'["text"]\n', "line 1: no text in field.*not a JSON object"),
        ("x.json.gz", gzip.compress(b'{"body": "a"}\n'), "no column 'text'.*body"),
        ("x.json.gz", gzip.compress(b'{"text": 3}\n'), "not text in every row"),
        ("x.json.gz", gzip.compress(b'{"text": "a"}\n{"text": null}\n'), "not text in every row"),
        ("x.json.gz", gzip.compress(b"oops\n"), "cannot be read as json"),
        ("x.json.gz", gzip.compress(b""), "no rows"),
        ("x.parquet", b"oops", "cannot be read as parquet"),
    ],
)
def test_unusable_files_are_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        read_documents("nowhere.txt")


def copy_corpus(directory: Path, name: str, purpose: str, rows: Sequence[str]) -> None:
    for file in CORPORA[name].parts[purpose].files:
        write_rows(directory / file, rows, CORPORA[name].text_field)


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_running_text_is_one_calibration_document_and_evaluation_rows(
    tmp_path: Path, name: str
) -> None:
    rows = ["a b", "", "c"]
    for purpose in ("calibration", "evaluation"):
        copy_corpus(tmp_path, name, purpose, rows)
    assert list(load_hub_documents(name, "calibration", directory=tmp_path)) == ["a b  c"]
    assert list(load_hub_documents(name, "evaluation", directory=tmp_path)) == rows


def test_c4_takes_whole_documents_and_evaluates_the_first_1100(tmp_path: Path) -> None:
    rows = [str(i) for i in range(1200)]
    for purpose in ("calibration", "evaluation"):
        copy_corpus(tmp_path, "c4", purpose, rows)
    assert list(load_hub_documents("c4", "calibration", directory=tmp_path)) == rows
    assert list(load_hub_documents("c4", "evaluation", directory=tmp_path)) == rows[:1100]


def test_downloads_are_pinned_and_obey_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repository: str, file: str, **options: object) -> str:
        calls.append((repository, options["revision"], options["local_files_only"]))
        write_rows(tmp_path / file, ["a"], "text")
        return str(tmp_path / file)

    monkeypatch.setattr(corpora, "hf_hub_download", download)
    load_hub_documents("wikitext2", "evaluation", offline=True)
    load_hub_documents("c4", "evaluation")
    assert calls == [
        ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", True),
        ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", False),
    ]


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("a\nb"),
        huggingface_hub.errors.OfflineModeIsEnabled("a\nb"),
        ConnectionError("a\nb"),
    ],
)
def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(corpora, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"allenai/c4/en/c4-train.*set path") as caught:
        load_hub_documents("c4", "calibration")
    assert "\n" not in str(caught.value)


def test_an_unknown_corpus_lists_those_known() -> None:
    with pytest.raises(InputError, match="one of wikitext2, ptb, c4"):
        load_hub_documents("c5", "calibration")


# Beginning token


def test_revisions_are_commits_where_commits_exist() -> None:
    pinned = {name: bool(re.fullmatch("[0-9a-f]{40}", c.revision)) for name, c in CORPORA.items()}
    assert pinned == {"wikitext2": True, "ptb": False, "c4": True}
