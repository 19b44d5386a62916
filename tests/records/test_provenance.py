"""Provenance says where numbers come from, and no secret."""

import subprocess
from pathlib import Path

import pytest
import torch
from composed import config_of

from mi_experiments.llm.loading import ModelSource
from mi_experiments.records import provenance
from mi_experiments.records.provenance import checkout_commit, measure_provenance, scrub_argument
from mi_experiments.texts.overlap import Overlap
from mi_experiments.texts.windows import token_hash

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("secret", ["hf_AbCdEfGh1234", "sk-abcdefgh12345678", KEY])
def test_secrets_in_arguments_are_blotted_out(secret: str) -> None:
    assert scrub_argument(f"model.path={secret}") == "model.path=***"
    assert scrub_argument(secret) == "***"
    assert "pass" not in scrub_argument("model.path=https://user:pass@host/model")


def test_a_pinned_revision_is_no_secret() -> None:
    assert scrub_argument(f"model.revision={KEY}") == f"model.revision={KEY}"


def test_the_commit_is_that_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mi_experiments" / "records"
    package.mkdir(parents=True)
    (package / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert checkout_commit() is None

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD")
    assert checkout_commit() == head
    (package / "provenance.py").write_text("changed")
    assert checkout_commit() == f"{head}+"


def test_the_command_is_recorded_without_secrets(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/mi-run", f"tracking.entity={KEY}", "wbits.average=3"])
    source, tokens = ModelSource(tiny_directory, None), torch.arange(24).view(3, 8)
    found = measure_provenance(config_of(), source, torch.nn.Linear(1, 1), tokens, True)
    assert found.command == "mi-run tracking.entity=*** wbits.average=3"


def test_what_the_calibration_was_is_recorded(tiny_directory: Path) -> None:
    config = config_of("dataset.nsamples=9")
    calibration = torch.arange(24).view(3, 8)  # fewer than asked for
    found = measure_provenance(
        config, ModelSource(tiny_directory, None), torch.nn.Linear(1, 1), calibration, True
    )
    assert (found.calibration_samples, found.calibration_bos) == (3, True)
    assert found.calibration_sha256 == token_hash(calibration)
    assert (found.calibration_documents, found.calibration_left_out) == (None, None)
    found = measure_provenance(
        config, ModelSource(tiny_directory, None), torch.nn.Linear(1, 1), calibration, True,
        overlap=Overlap(7, 2, ((3, 0, 5),)), left_out=1,
    )  # fmt: skip
    assert (found.calibration_documents, found.calibration_duplicates) == (7, 2)
    assert (found.calibration_shared, found.calibration_left_out) == (1, 1)
