"""The token cache: a hit is bit-identical, a miss is computed once, damage is never trusted."""

import fcntl
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_byte_tokenizer
from torch import Tensor
from transformers import AutoTokenizer
from word_tokenizers import ADDING, BARE, PLAIN, build_tokenizer

from mi_experiments.config.texts import BosPolicy
from mi_experiments.texts.token_cache import cache_directory, cache_key, cached, hash_tokenizer

TENSORS = {"tokens": torch.arange(12).view(3, 4), "lengths": torch.tensor([3, 0, 2**40])}


class Computing:
    """A computation that counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return {name: tensor.clone() for name, tensor in TENSORS.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def entry(key: str) -> Path:
    return cache_directory() / f"{key}.safetensors"


def test_a_hit_is_bit_identical_and_computes_nothing(token_cache: Path) -> None:
    compute = Computing()
    assert same(cached("k", compute), TENSORS)
    assert same(cached("k", compute), TENSORS)
    assert compute.times == 1
    assert same(cached("other", compute), TENSORS)
    assert compute.times == 2
    assert {path.name for path in (token_cache / "tokens").iterdir()} == {
        "k.safetensors", "k.lock", "other.safetensors", "other.lock",
    }  # fmt: skip
    assert same(load_file(entry("k")), TENSORS)
    assert entry("k").stat().st_mode & 0o777 == 0o644


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MI_EXPERIMENTS_CACHE", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here" / "tokens"
    monkeypatch.delenv("MI_EXPERIMENTS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "mi_experiments" / "tokens"


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"no safetensors",
        # One bit of one token: the file is valid and loads.
        lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
    ],
    ids=["truncated", "empty", "foreign", "flipped"],
)
def test_a_damaged_entry_is_named_set_aside_and_computed_again(
    harm: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    compute = Computing()
    cached("k", compute)
    sound = entry("k").read_bytes()
    entry("k").write_bytes(harm(sound))
    with caplog.at_level(logging.WARNING):
        assert same(cached("k", compute), TENSORS)
    assert compute.times == 2
    (warning,) = caplog.messages
    assert str(entry("k")) in warning
    assert entry("k").with_suffix(".damaged").read_bytes() == harm(sound)
    assert entry("k").read_bytes() == sound


def test_a_failed_computation_leaves_no_entry() -> None:
    def fail() -> dict[str, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached("k", fail)
    assert not entry("k").exists()
    assert same(cached("k", Computing()), TENSORS)


def test_a_failed_write_leaves_no_file_and_costs_no_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert same(cached("k", Computing()), TENSORS)
    assert "No space left on device" in caplog.text
    assert [path.name for path in cache_directory().iterdir()] == ["k.lock"]


def test_no_place_for_a_cache_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("MI_EXPERIMENTS_CACHE", str(tmp_path / "file"))
    assert same(cached("k", Computing()), TENSORS)
    assert len(caplog.messages) == 1
    assert "cannot be used" in caplog.text


JOB = """
import sys, time, torch
from pathlib import Path
from mi_experiments.texts.token_cache import cached

place, name = Path(sys.argv[1]), sys.argv[2]
(place / f"{name}.ready").touch()
while not (place / "go").exists():
    time.sleep(0.01)

def compute():
    (place / f"{name}.computed").touch()
    time.sleep(1)  # the other one asks in the meantime
    return {"tokens": torch.randint(1000, (4, 4))}  # another result for whoever computes again

tokens = cached("k", compute)["tokens"]
(place / f"{name}.tokens").write_bytes(tokens.numpy().tobytes())
"""


def test_two_jobs_compute_once_and_get_equal_bytes(tmp_path: Path) -> None:
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path), name]) for name in ("a", "b")
    ]
    while not all((tmp_path / f"{name}.ready").exists() for name in ("a", "b")):
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [job.wait(60) for job in jobs] == [0, 0]
    assert len(list(tmp_path.glob("*.computed"))) == 1
    first, second = (path.read_bytes() for path in tmp_path.glob("*.tokens"))
    assert first == second == load_file(entry("k"))["tokens"].numpy().tobytes()


def test_another_key_does_not_wait() -> None:
    cache_directory().mkdir(parents=True)
    with (cache_directory() / "held.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert same(cached("free", Computing()), TENSORS)


# Keys


def test_a_key_is_the_content_of_everything_that_decides_the_tokens(tmp_path: Path) -> None:
    for name, text in {"a": "text", "b": "text", "c": "texT"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    parameters = {"seqlen": 8, "add_bos": BosPolicy.auto, "reading": {"first_rows": None}}
    key = cache_key(ADDING, [a], parameters)
    assert cache_key(build_tokenizer(), [b], dict(reversed(parameters.items()))) == key
    others = [
        cache_key(ADDING, [c], parameters),
        cache_key(ADDING, [a, b], parameters),
        cache_key(PLAIN, [a], parameters),
        cache_key(BARE, [a], parameters),
        cache_key(ADDING, [a], parameters | {"seqlen": 9}),
        cache_key(ADDING, [a], parameters | {"add_bos": BosPolicy.always}),
        cache_key(ADDING, [a], parameters | {"reading": {"first_rows": 3}}),
    ]
    assert len({key, *others}) == 1 + len(others)
    with pytest.raises(TypeError, match="cannot be part of a cache key"):
        cache_key(ADDING, [a], {"seqlen": object()})


def test_a_library_of_another_version_is_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("text")
    before = cache_key(ADDING, [tmp_path / "a"], {})
    version = "mi_experiments.texts.token_cache.importlib.metadata.version"
    monkeypatch.setattr(version, lambda name: "0")
    assert cache_key(ADDING, [tmp_path / "a"], {}) != before


def test_a_tokenizer_is_known_by_what_it_does_not_by_its_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        build_byte_tokenizer().save_pretrained(tmp_path / place)
    here, there = (AutoTokenizer.from_pretrained(tmp_path / p) for p in ("here", "there"))
    assert hash_tokenizer(here) == hash_tokenizer(there)
    state = json.loads((tmp_path / "there" / "tokenizer.json").read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "there" / "tokenizer.json").write_text(json.dumps(state))
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "there")) != hash_tokenizer(here)
