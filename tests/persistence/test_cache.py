"""Entries are trusted by name and content alone, and a lock is nobody's once its holder is gone.

Damage to the tensors of an entry, and jobs that ask at once, are tests of the token cache.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mi_experiments.persistence.cache import content_key, locked, read_entry, write_entry

TENSORS = {"costs": torch.tensor([[0.1, 1 / 3], [-0.0, 1e-300]], dtype=torch.float64)}
TEXTS = {"of a block": json.dumps({"π": 1 / 3, "": None}), "other": 'a "quoted"\nline'}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "key.safetensors"
    write_entry(path, (TENSORS, TEXTS))
    return path


def test_what_is_read_is_what_was_written(entry: Path) -> None:
    found = read_entry(entry)
    assert found is not None
    assert found[1] == TEXTS
    assert found[0]["costs"].view(torch.int64).equal(TENSORS["costs"].view(torch.int64))


def test_an_entry_may_be_text_alone(tmp_path: Path) -> None:
    write_entry(tmp_path / "key.safetensors", ({}, TEXTS))
    assert read_entry(tmp_path / "key.safetensors") == ({}, TEXTS)


def test_an_entry_under_the_name_of_another_is_not_trusted(entry: Path) -> None:
    assert read_entry(entry.rename(entry.with_stem("other"))) is None


def test_a_flipped_bit_anywhere_is_seen(entry: Path) -> None:
    sound = entry.read_bytes()
    for place in range(len(sound)):
        entry.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        found = read_entry(entry)
        # White space that pads the header may turn into other white space.
        if found is not None:
            assert sound[place : place + 1] in b" !"
            assert found[1] == TEXTS
            assert found[0]["costs"].equal(TENSORS["costs"])
    entry.write_bytes(sound)
    assert read_entry(entry) is not None


def test_equal_content_is_equal_bytes(entry: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / entry.name
    again.parent.mkdir()
    write_entry(again, (TENSORS, dict(reversed(TEXTS.items()))))
    assert again.read_bytes() == entry.read_bytes()


def test_a_key_is_its_parts_in_any_order() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert len({content_key(part) for part in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1})}) == 4


HOLDER = """
import sys, time
from pathlib import Path
from mi_experiments.persistence.cache import locked
with locked(Path(sys.argv[1])) as writable:
    print(writable, flush=True)
    time.sleep(600)
"""


def test_waiting_is_said_once_may_be_given_up_and_ends_with_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        said: list[str] = []
        looked: list[int] = []

        def give_up() -> None:
            looked.append(0)
            if len(looked) == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError), locked(path, lambda: said.append("waits"), give_up):
            pass
        assert said == ["waits"]

        def kill() -> None:
            if holder.poll() is None:
                holder.send_signal(signal.SIGKILL)

        with locked(path, check=kill) as writable:
            assert writable
            assert holder.wait(30) == -signal.SIGKILL
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    started = time.monotonic()

    def check() -> None:
        assert time.monotonic() - started < 30, "nobody can hold it"

    with locked(path, check=check) as writable:
        assert writable


def test_a_lock_that_is_a_link_is_no_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key.lock").symlink_to(tmp_path / "elsewhere")
    with locked(tmp_path / "key.safetensors") as writable:
        assert not writable
    assert "symbolic links" in caplog.text
    assert not (tmp_path / "elsewhere").exists()
