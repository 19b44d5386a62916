"""A lock is one process's, which it names; it follows no link, and is free once that has ended."""

import os
from pathlib import Path

import pytest

from mi_experiments.errors import InputError
from mi_experiments.persistence.locks import hold


def refusal(holder: str) -> str:
    return f"taken by {holder}"


def test_a_lock_says_who_has_it_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    taken = pytest.raises(InputError, match=f"^taken by process {os.getpid()} on ")
    with hold(path, refusal), taken, hold(path, refusal):
        pass
    assert path.read_text() == ""
    with pytest.raises(ZeroDivisionError), hold(path, refusal):
        raise ZeroDivisionError
    with hold(path, refusal):
        assert path.read_text().startswith("process ")


def test_whoever_is_refused_leaves_the_name_in_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path, refusal):
        named = path.read_text()
        for _ in range(2):
            with pytest.raises(InputError, match=named), hold(path, refusal):
                pass
        assert path.read_text() == named


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "run.lock").symlink_to(other)
    refused = pytest.raises(InputError, match="it is a link; remove it")
    with refused, hold(tmp_path / "run.lock", refusal):
        pass
    assert other.read_text() == "precious"
