"""A file appears whole or not at all, and what was there before survives every refusal."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mi_experiments.errors import InputError, ResumableError
from mi_experiments.persistence import atomic
from mi_experiments.persistence.atomic import (
    disk_errors,
    file_hash,
    place,
    remove_temporaries,
    save_atomically,
    write_atomically,
)

FULL = OSError(28, "No space left on device")


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    tensors = {"x": torch.randn(3, 4), "y": torch.arange(5, dtype=torch.uint8)}
    save_atomically(tmp_path / "b", tensors, {"format": "pt"})
    read = load_file(tmp_path / "b")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_modes_are_what_umask_leaves(
    umask: int, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of temporaries at every moment too: they are never more open."""
    seen: set[int] = set()

    def note(descriptor: int) -> None:
        for path in tmp_path.rglob(".*"):
            seen.add(stat.S_IMODE(path.stat().st_mode) & 0o666)

    monkeypatch.setattr(os, "fsync", note)
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", b"content")
        write_atomically(tmp_path / "a", b"again")
        save_atomically(tmp_path / "b", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert seen == {mode}


def test_what_a_kill_leaves_of_tensors_is_known_for_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever name the library gives to its own half, before it takes the name that it was given.

    A process that is killed runs no `finally`; a copy of the folder at that moment shows what it
    leaves.
    """
    left = tmp_path.with_name("left")

    def save(tensors: object, path: Path, metadata: object) -> None:
        (Path(path).parent / ".tmpE1jFlF").write_bytes(b"half")
        shutil.copytree(tmp_path, left)
        (Path(path).parent / ".tmpE1jFlF").rename(path)

    monkeypatch.setattr(atomic, "save_file", save)
    save_atomically(tmp_path / "block", {"x": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["block"]
    assert list(left.rglob(".tmpE1jFlF"))
    (left / "kept").write_text("x")
    remove_temporaries(left)
    assert [path.name for path in left.rglob("*")] == ["kept"]


def test_temporaries_below_are_left_where_others_may_work(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    halves = [tmp_path / ".sweep.json.01234567.tmp", tmp_path / "job" / ".a.01234567.tmp"]
    for half in halves:
        half.write_text("x")
    remove_temporaries(tmp_path, below=False)
    assert [half.exists() for half in halves] == [False, True]


def test_a_temporary_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".a.01234567.tmp").write_text("x")
    monkeypatch.setattr(os, "unlink", fail_with(PermissionError(13, "Permission denied")))
    with pytest.raises(
        InputError, match=r"\.a\.01234567\.tmp cannot be removed: Permission denied"
    ):
        remove_temporaries(tmp_path)


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """Whatever the order in which tensors are given; several entries of metadata have none."""
    tensors = {name: torch.full((4,), index) for index, name in enumerate("abcdefgh")}
    save_atomically(tmp_path / "one", tensors, {"all": "x"})
    save_atomically(tmp_path / "other", dict(reversed(tensors.items())), {"all": "x"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert file_hash(tmp_path / "one") == file_hash(tmp_path / "other")
    with pytest.raises(ValueError, match="one entry of metadata"):
        save_atomically(tmp_path / "third", tensors, {"a": "1", "b": "2"})


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_a_failed_write_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result.json"
    write_atomically(target, b"old")
    monkeypatch.setattr(os, step, fail_with(FULL))
    with pytest.raises(ResumableError, match=r"result\.json cannot be written: No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FULL, ResumableError, "No space left on device; everything finished before is kept"),
        (OSError(122, "Disk quota exceeded"), ResumableError, "Disk quota exceeded"),
        (OSError(27, "File too large"), ResumableError, "File too large"),
        (SafetensorError("I/O error: x (os error 28)"), ResumableError, "make room"),
        (Exception("x (os error 27)"), ResumableError, "make room"),
        (PermissionError(13, "Permission denied"), InputError, "Permission denied"),
        (SafetensorError("I/O error: x (os error 13)"), InputError, "os error 13"),
        (SafetensorError("tensors share memory"), InputError, "tensors share memory"),
        (ValueError("a fault of the program"), ValueError, "a fault of the program"),
        (KeyboardInterrupt("asked"), KeyboardInterrupt, "asked"),
    ],
)
def test_every_refusal_says_what_it_is_and_leaves_nothing(
    error: BaseException, kind: type[BaseException], words: str, tmp_path: Path
) -> None:
    target = tmp_path / "a"
    write_atomically(target, b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(kind, match=words) as caught:
        place(target, write, 4)
    if kind in {ResumableError, InputError}:
        assert str(caught.value).startswith(f"{target} cannot be written: ")
        assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_too_little_room_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 119})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    written: list[Path] = []
    with pytest.raises(ResumableError, match="119 bytes are free, 100 are to be written"):
        place(tmp_path / "a", written.append, 100)
    assert written == []
    write_atomically(tmp_path / "b", b"x" * 99)


def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "a", b"")
    assert list(tmp_path.iterdir()) == []


def test_content_is_flushed_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("flush folder" if path == tmp_path else f"flush {path.suffix}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "a", b"content")
    assert events == ["flush .tmp", "rename", "flush folder"]


def test_nothing_but_disk_errors_is_translated() -> None:
    with pytest.raises(ZeroDivisionError), disk_errors(Path("a")):
        _ = 1 / 0


@pytest.mark.parametrize("metadata", [{}, {"all": "x"}])
@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(2)}])
def test_what_is_saved_can_be_read_also_where_it_is_nothing(
    metadata: dict[str, str], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_atomically(tmp_path / "a", tensors, metadata)
    assert load_file(tmp_path / "a").keys() == tensors.keys()
