"""Documents: every format gives the same text, and what cannot be had is one line with advice."""

import codecs
import gzip
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.errors as hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils import are_progress_bars_disabled
from huggingface_hub.utils import httpx

from mi_experiments.errors import InputError
from mi_experiments.texts import corpora
from mi_experiments.texts.corpora import locate_corpus, read_documents

# Documents


TEXTS = ["first\nline", "", "zwei – drei", "a\u2028b"]


def write_rows(path: Path, texts: Sequence[str], field: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({field: t, "n": 1}, ensure_ascii=False) + "\n" for t in texts)
    if path.suffix.lower() == ".parquet":
        pq.write_table(pa.table({field: texts}), path)
    elif path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(rows.encode()))
    else:
        path.write_text(rows, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.parquet", "x.json.gz", "x.jsonl.gz", "X.JSONL", "X.JSON.GZ", "x.Parquet"]
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / name, TEXTS, "body")
    assert list(read_documents(tmp_path / name, "body")) == TEXTS
    assert capfd.readouterr() == ("", "")  # the libraries draw no bars of their own
    assert not are_progress_bars_disabled()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for texts in (["a", "b"], ["c", "d"]):
        write_rows(tmp_path / "x.jsonl.gz", texts, "text")
        assert list(read_documents(tmp_path / "x.jsonl.gz")) == texts


def test_a_file_that_was_replaced_by_one_of_the_same_time_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    write_rows(path, ["a"], "text")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert list(read_documents(path)) == ["a"]
    write_rows(path, ["b"], "text")
    os.utime(path, ns=times)  # as rsync and tar leave it
    assert list(read_documents(path)) == ["b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"a b"),
        ("X.TXT", b"a b"),
        ("x.jsonl", b'{"text": "a b"}\r\n'),
        ("x.jsonl.gz", b'{"text": "a b"}\n'),
        ("x.json.gz", b'{"text": "a b", "n": 1}\n\n'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    content = codecs.BOM_UTF8 + content
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_documents(tmp_path / name)) == ["a b"]


@pytest.mark.parametrize(
    "stored",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
    ],
    ids=["large_string", "string_view", "dictionary"],
)
def test_text_of_every_arrow_type_is_text(tmp_path: Path, stored: pa.Array) -> None:
    pq.write_table(pa.table({"text": stored}), tmp_path / "x.parquet")
    documents = read_documents(tmp_path / "x.parquet")
    assert list(documents) == TEXTS
    assert [*documents[1:3], documents[3], len(documents)] == [*TEXTS[1:3], TEXTS[3], 4]


def test_rows_that_look_like_dates_are_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.json.gz", ["2020-01-01", "2020-01-02"], "text")
    assert list(read_documents(tmp_path / "x.json.gz")) == ["2020-01-01", "2020-01-02"]


def test_one_line_may_be_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    texts = ["word " * 2_200_000, "b"]
    write_rows(tmp_path / "x.jsonl.gz", texts, "text")
    assert list(read_documents(tmp_path / "x.jsonl.gz")) == texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "x.txt")) == ["one\n\ntwo\n"]


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def table(texts: Sequence[Any]) -> bytes:
    """Write a parquet file; bytes go into a column of text as they are."""
    stored = pa.array(texts)
    if pa.types.is_binary(stored.type):
        stored = pa.Array.from_buffers(pa.string(), len(stored), stored.buffers())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": stored}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


NOISE = zipped(b"".join(b'{"text": "%d"}\n' % (i * 7919**4) for i in range(400)))
FLIPPED = b"".join((NOISE[:900], bytes([NOISE[900] ^ 1]), NOISE[901:]))


@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [NOISE[:-200], NOISE[:-4], NOISE[:14], NOISE[:3], FLIPPED, NOISE[:-6] + b"0" + NOISE[-5:]],
    ids=["cut", "cut in the check sum", "no data", "cut header", "a bit", "check sum"],
)
def test_a_damaged_download_is_one_line(
    tmp_path: Path, name: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="the file is damaged or cut off") as caught:
        read_documents(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert capfd.readouterr() == ("", "")


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
        ("x.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: no text in .*holds null"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800b"}\n', "line 2: .*not valid Unicode"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "caf\xe9"}\n', "line 3: not UTF-8"),
        ("x.jsonl", b'{"text": "a", "n": ' + b"[" * 9**6 + b"}\n", "line 1: not valid JSON"),
        ("x.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: not valid JSON"),
        ("x.jsonl", b'{"text": ""}\n{"text": " "}\n', "no text"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8"),
        ("x.txt", b"a\nb\nc\xff", "line 3: not UTF-8"),
        ("x.json.gz", zipped(b'{"body": "a"}\n'), "no text in field 'text'.*body"),
        ("x.json.gz", zipped(b'{"text": 3}\n'), "line 1: no text in .*holds 3"),
        ("x.json.gz", zipped(b'{"text": "a"}\n{"text": null}\n'), "line 2: no text in .*null"),
        ("x.json.gz", zipped(b'{"text": "a"}\n{"text": "\\udfff"}\n'), "line 2: .*Unicode"),
        ("x.json.gz", zipped(b'{"text": "a"}\n{"text": "caf\xe9"}\n'), "line 2: not UTF-8"),
        ("x.json.gz", zipped(b'{"text": "a", "n": ' + b"[" * 9**5 + b"}\n"), "line 1: not valid"),
        ("x.json.gz", zipped(b"oops\n"), "line 1: not valid JSON"),
        ("x.json.gz", zipped(b""), "no rows"),
        ("x.json.gz", b'{"text": "a"}\n', "damaged or cut off.*Not a gzipped file"),
        ("x.parquet", table([b"a", b"\xed\xa0\x80"]), "row 2: .*not UTF-8"),
        ("x.parquet", table(["a", "b", None]), "row 3: no text in .*null"),
        ("x.parquet", table([1, 2]), "holds int64"),
        ("x.parquet", table([None]), "holds null"),
        ("x.parquet", table(["a", "b"])[:-9], "cannot be read as parquet.*cut off"),
        ("x.parquet", b"oops", "cannot be read as parquet"),
    ],
)
def test_unusable_files_are_one_line(
    tmp_path: Path, name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the libraries say nothing of their own


@pytest.mark.parametrize("name", ["nowhere.txt", "~nobody-of-this-name/x.txt", "a\0b.txt"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(InputError, match=r"no such file|home"):
        read_documents(name)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.json.gz"])
def test_reading_a_local_file_asks_no_network(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("the network is refused")

    # As on a machine whose libraries may ask: with this set, some do not even try.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_rows(tmp_path / name, ["a"], "text")
    assert len(read_documents(tmp_path / name)) == 1
    assert asked == []


# Published corpora

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def locate(
    *files: str, hub_id: str = "org/name", directory: Path | None = None, offline: bool = False
) -> list[Path]:
    return locate_corpus(hub_id, COMMIT, files, directory=directory, offline=offline)


def test_a_directory_stands_for_the_hub(tmp_path: Path) -> None:
    write_rows(tmp_path / "en" / "b.json.gz", ["b"], "text")
    write_rows(tmp_path / "en" / "a.json.gz", ["a"], "text")
    found = locate("en/b.json.gz", "en/a.json.gz", directory=tmp_path)
    assert found == [tmp_path / "en" / "b.json.gz", tmp_path / "en" / "a.json.gz"]
    with pytest.raises(InputError, match=r"en/c.json.gz: no such file; path=.* of org/name under"):
        locate("en/c.json.gz", directory=tmp_path)


class FakeHub:
    """A hub with some files, of which some are in the cache; it remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: Sequence[str] = ()) -> None:
        self.cached = cached
        self.calls: list[tuple[object, ...]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(corpora, "hf_hub_download", self.download)
        monkeypatch.setattr(corpora, "HfApi", lambda: self)

    def download(
        self,
        hub_id: str,
        file: str,
        *,
        repo_type: str,
        revision: str,
        local_files_only: bool = False,
    ) -> str:
        assert repo_type == "dataset"
        self.calls.append(("cache" if local_files_only else "hub", hub_id, file, revision))
        if local_files_only and file not in self.cached:
            raise hub.LocalEntryNotFoundError("not cached")
        if self.error and not local_files_only:
            raise self.error
        return f"/cache/{file}"

    def dataset_info(self, hub_id: str, *, revision: str, timeout: float) -> None:
        self.calls.append(("info", hub_id, revision))
        if self.error and not isinstance(self.error, hub.EntryNotFoundError):
            raise self.error


def test_what_is_cached_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in (True, False):
        fake = FakeHub(monkeypatch, cached=["a", "b"])
        assert locate("a", "b", offline=offline) == [Path("/cache/a"), Path("/cache/b")]
        assert fake.calls == [
            ("cache", "org/name", "a", COMMIT),
            ("cache", "org/name", "b", COMMIT),
        ]


def test_what_is_missing_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch)
    assert locate("a") == [Path("/cache/a")]
    assert fake.calls == [
        ("cache", "org/name", "a", COMMIT),
        ("info", "org/name", COMMIT),
        ("hub", "org/name", "a", COMMIT),
    ]


def test_offline_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch)
    with pytest.raises(InputError, match="not in the local cache, and the run is offline; run `hf"):
        locate("a", offline=True)
    assert fake.calls == [("cache", "org/name", "a", COMMIT)]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            hub.GatedRepoError,
            "accept its terms at https://huggingface.co/datasets/org/name and run",
        ),
        (hub.RepositoryNotFoundError, "is not on the hub; check the spelling"),
        (hub.RevisionNotFoundError, f"has no revision {COMMIT}"),
        (hub.RemoteEntryNotFoundError, f"has no file en/a.json.gz at revision {COMMIT}"),
        (hub.LocalEntryNotFoundError, "cannot reach the hub (it is the test that fails); run `hf "),
        (hub.OfflineModeIsEnabled, "cannot reach the hub (it is the test that fails); run `hf "),
        (
            ConnectionError,
            "cannot reach the hub (it is the test that fails); run `hf download org/",
        ),
        (httpx.ConnectError, "or set path to a directory that holds it"),
        (httpx.ReadTimeout, "cannot reach the hub (it is the test that fails)"),
        (hub.HFValidationError, "is no hub id, which looks like org/name"),
        (hub.DisabledRepoError, "en/a.json.gz cannot be downloaded: it is the test that fails"),
        (hub.HfHubHTTPError, "en/a.json.gz cannot be downloaded: it is the test that fails"),
        (PermissionError, "en/a.json.gz cannot be downloaded: it is the test that fails"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    error: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch)
    text = "it is the test\nthat fails"
    if issubclass(error, hub.HfHubHTTPError):
        request = httpx.Request("GET", "http://x")
        fake.error = error(text, response=httpx.Response(403, request=request))
    else:
        fake.error = error(text)
    with pytest.raises(InputError) as caught:
        locate("en/a.json.gz")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("corpus org/name")
    assert advice in line


def test_offline_without_the_file_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not in the local cache, and the run is offline; run `hf"):
        locate("a.parquet", offline=True)
    with pytest.raises(InputError, match="is no hub id"):
        locate("a.parquet", hub_id="a/b/c", offline=True)


def test_a_cached_file_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "datasets--org--name" / "snapshots" / COMMIT / "en" / "a.json.gz"
    write_rows(kept, ["a"], "text")
    (found,) = locate("en/a.json.gz", offline=True)
    assert found == kept
    assert list(read_documents(found)) == ["a"]
