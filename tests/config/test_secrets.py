"""What is secret is masked wherever it stands, and what is a path here is none."""

import logging
import sys
from pathlib import Path

import pytest

from mi_experiments.config.secrets import scrub, scrub_record
from mi_experiments.records.provenance import scrub_argument

KEY = "0123456789abcdef" * 2 + "deadbeef"
TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:word@host/x", "https://***@host/x"),
        ("https://user:w@rd@host/x", "https://***@host/x"),
        ("https://user:w/rd@host/x", "https://***@host/x"),
        ("https://host:8080/x@main", "https://host:8080/x@main"),
        ("https://host/x?a=1&access_token=abc", "https://host/x?a=1&access_token=***"),
        ("https://host/x?X-Amz-Signature=abc&b=2", "https://host/x?X-Amz-Signature=***&b=2"),
        (f"name_{TOKEN}-b", "name_***-b"),
        (f"job-{KEY}_1", "job-***_1"),
        ("ghp_" + "a1B2" * 9, "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        (f"model.revision={KEY} does not exist", f"model.revision={KEY} does not exist"),
        (f"hf download x --revision {KEY}", f"hf download x --revision {KEY}"),
        ("f" * 64, "f" * 64),
    ],
)
def test_a_secret_is_masked_and_nothing_else(text: str, masked: str) -> None:
    assert scrub(text) == masked


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "PGPASSWORD"]
)
def test_secrets_of_the_environment_are_masked(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, "wJalr/XUtn")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SOME_TOKEN", "1")
    assert scrub({"a": ["x wJalr/XUtn", "wJalr%2FXUtn"]}) == {"a": ["x ***", "***"]}
    assert scrub(f"{tmp_path}/1") == f"{tmp_path}/1"
    assert scrub_argument("tracking.entity=wJalr/XUtn") == "tracking.entity=***"
    assert scrub_argument("https://h/x?token=abc") == "https://h/x?token=***"


@pytest.mark.parametrize(
    "name", [KEY, "hf_checkpoints/llama", "sk-experiments", "hf_with_blank in/x"]
)
def test_what_exists_is_no_secret(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    assert scrub({"path": str(folder)}) != {"path": str(folder)}
    folder.mkdir(parents=True)
    assert scrub({"path": str(folder)}) == {"path": str(folder)}
    assert scrub_argument(f"model.path={folder}") == f"model.path={folder}"
    if " " not in name:
        line = f"model.path={folder}/config.json: no such file, '{folder}'."
        assert scrub(line.replace("/config.json", "")) == line.replace("/config.json", "")
        assert scrub(f"{TOKEN}: {folder} is empty") == f"***: {folder} is empty"


def test_a_log_masks_messages_arguments_and_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError(f"refused {TOKEN}")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "%s failed", (TOKEN,), sys.exc_info())
    assert scrub_record(record)
    text = logging.Formatter("%(message)s").format(record)
    assert text.startswith("*** failed\nTraceback")
    assert text.endswith("ValueError: refused ***")
