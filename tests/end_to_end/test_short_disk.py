"""A disk without room interrupts a run, whenever that is found, and the line says what is short."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import config_of, run

from mi_experiments.config.config import Config
from mi_experiments.errors import InputError, ResumableError
from mi_experiments.experiment import memory_plan
from mi_experiments.persistence import atomic
from mi_experiments.persistence.atomic import free_disk, open_plain, require_disk
from mi_experiments.records.result import read_result

__all__ = ["config_of"]


def test_a_disk_that_is_full_from_the_start_interrupts_the_run(
    config_of: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is said of hidden states, for which the host has room."""
    monkeypatch.setattr(memory_plan, "free_disk", lambda *_: 1000)
    with pytest.raises(ResumableError) as stopped:
        run(config_of(), tmp_path / "run")
    line = str(stopped.value)
    assert "the compressed blocks need 0.00 GiB of the disk, and 0.00 GiB are free" in line
    assert "make room, then give the same command again" in line
    assert "hidden states" not in line
    result = read_result(tmp_path / "run")
    assert (result.status, result.error) == ("interrupted", line)
    monkeypatch.undo()
    monkeypatch.setenv("MI_EXPERIMENTS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run").rename(tmp_path / "earlier")
    assert run(config_of(), tmp_path / "run").status == "completed"


@pytest.mark.parametrize(
    ("size", "free", "fits"), [(100, 120, True), (100, 119, False), (0, 0, True)]
)
def test_room_is_asked_for_with_what_writing_asks_for(
    size: int, free: int, fits: bool, tmp_path: Path
) -> None:
    if fits:
        require_disk(tmp_path, size, free)
    else:
        with pytest.raises(ResumableError, match="make room"):
            require_disk(tmp_path, size, free)


def test_what_is_stored_already_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run that has nearly filled the disk could not be continued."""
    usage = type("Usage", (), {"free": 7})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    assert free_disk(tmp_path / "not" / "yet", "model") == 7
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "block").write_bytes(b"x" * 100)
    (tmp_path / "other").write_bytes(b"x" * 1000)
    assert free_disk(tmp_path, "model", "candidates") == 107


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (28, ResumableError, "No space left on device; everything finished before is kept"),
        (122, ResumableError, "Disk quota exceeded"),
        (13, InputError, "run.log cannot be written: Permission denied"),
    ],
)
def test_a_log_that_cannot_be_opened_says_so(
    number: int,
    kind: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=words):
        open_plain(tmp_path / "run.log", "a")
