"""A cache is read only where nobody else can have put anything."""

import grp
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_experiments.errors import InputError
from mi_experiments.persistence import own_folder
from mi_experiments.persistence.cache import find_or_compute, locked, read_entry, write_entry
from mi_experiments.persistence.own_folder import make_own, refuse_others

ENTRY: Any = ({"x": torch.ones(2)}, {"a": "b"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "above" / "cache" / "results"
    make_own(path)
    return path


def stranger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or folder belong to somebody else, whom a test cannot be."""
    real = os.stat

    def look(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = real(self, follow_symlinks=follow_symlinks)
        if Path(self).name != path.name:
            return found
        values = list(found)
        values[stat.ST_UID] = 4242
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", look)
    monkeypatch.setattr(Path, "lstat", lambda self: look(self, follow_symlinks=False))


@pytest.mark.parametrize(
    ("where", "mode", "words"),
    [
        (0, 0o777, "results may be written by anybody (mode 777)"),
        (0, 0o1777, "results may be written by anybody"),  # others may add entries
        (0, 0o775, "results may be written by its group (mode 775)"),
        (1, 0o777, "cache may be written by anybody"),
        (2, 0o770, "above may be written by its group"),
        (1, 0o1777, None),
        (2, 0o1775, None),
        (0, 0o755, None),
        (0, 0o700, None),
        (1, 0o750, None),
    ],
)
def test_a_folder_that_others_may_write_to_is_refused(
    where: int, mode: int, words: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entry(cache / "key.safetensors", ENTRY)
    monkeypatch.setattr(own_folder, "_alone_in", lambda group: False)
    [cache, *cache.parents][where].chmod(mode)
    uses: list[Callable[[], Any]] = [
        lambda: read_entry(cache / "key.safetensors"),
        lambda: find_or_compute(cache / "other.safetensors", lambda: ENTRY),
        lambda: locked(cache / "key.safetensors").__enter__(),
    ]
    for use in uses:
        if words is None:
            assert use() is not None
            continue
        with pytest.raises(InputError) as refused:
            use()
        line = str(refused.value)
        assert words in line
        assert "MI_EXPERIMENTS_CACHE" in line
        assert "chmod go-w" in line
        assert "\n" not in line
    assert words is None or not (cache / "other.safetensors").exists()


@pytest.mark.parametrize("name", ["results", "cache", "above"])
def test_a_folder_of_somebody_else_is_refused(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger(next(p for p in (cache, *cache.parents) if p.name == name), monkeypatch)
    with pytest.raises(InputError, match=f"{name} belongs to user 4242"):
        read_entry(cache / "key.safetensors")


def test_an_entry_of_somebody_else_is_computed_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is from when the folder was open to all."""
    path = cache / "key.safetensors"
    write_entry(path, ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        stranger(path, patch)
        assert read_entry(path) is None
    path.chmod(0o666)
    assert read_entry(path) is None
    path.chmod(0o644)
    assert read_entry(path) is not None
    path.rename(cache / "elsewhere")
    path.symlink_to(cache / "elsewhere")
    assert read_entry(path) is None


def test_a_link_to_a_folder_of_others_is_refused_by_where_it_leads(
    cache: Path, tmp_path: Path
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (tmp_path / "link").symlink_to(open_to_all)
    refuse_others(tmp_path / "link")
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match="link may be written by anybody"):
        refuse_others(tmp_path / "link" / "cache")
    # And by where it stands, for there another one may be put in its place.
    (open_to_all / "link").symlink_to(cache)
    with pytest.raises(PermissionError, match="open may be written by anybody"):
        refuse_others(open_to_all / "link")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_made_is_accepted_under_any_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        find_or_compute(tmp_path / "a" / "b" / "key.safetensors", lambda: ENTRY)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755 & ~umask
    refuse_others(tmp_path / "a" / "b")


def test_the_group_of_a_user_alone_is_the_user(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = pwd.getpwuid(os.getuid())
    cache.chmod(0o775)

    def group(name: str, *members: str) -> None:
        found = grp.struct_group((name, "x", user.pw_gid, list(members)))
        monkeypatch.setattr(own_folder.grp, "getgrgid", lambda number: found)

    group(user.pw_name)
    refuse_others(cache)
    for name, members in (("users", ()), (user.pw_name, ("colleague",))):
        group(name, *members)
        with pytest.raises(PermissionError, match="its group"):
            refuse_others(cache)


def test_what_a_killed_process_left_of_an_entry_goes_with_its_lock(cache: Path) -> None:
    path = cache / "key.safetensors"
    halves = [cache / ".key.safetensors.01234567.tmp", cache / ".key.safetensors.89abcdef.tmp"]
    halves[0].write_text("x")
    halves[1].mkdir()
    (halves[1] / ".tmpE1jFlF").write_text("x")
    other = cache / ".other.safetensors.01234567.tmp"
    other.write_text("x")
    find_or_compute(path, lambda: ENTRY)
    assert not any(half.exists() for half in halves)
    assert other.exists()
