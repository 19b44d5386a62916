"""Tokens computed once: a cache on disk whose keys are contents, shared by concurrent jobs.

An entry is a safetensors file named by the SHA-256 of everything that decides its tokens, and it
carries the SHA-256 of the tokens themselves, so that a hit is bit-identical or is not used.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.atomic import disk_errors, file_hash, save_atomically
from mi_experiments.errors import MiError

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised by every change in how documents are read, tokenized or cut."""

LIBRARIES = ("tokenizers", "transformers", "datasets")
"""Whose versions are part of every key."""


def cache_directory() -> Path:
    """Return where entries live: `$MI_EXPERIMENTS_CACHE`, or a folder in the user's cache."""
    root = os.environ.get("MI_EXPERIMENTS_CACHE") or Path.home() / ".cache" / "mi_experiments"
    return Path(root).expanduser() / "tokens"


def cache_key(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], parameters: Mapping[str, object]
) -> str:
    """Hash everything that decides what the tokens of a text will be.

    Args:
        tokenizer: hashed as the files that it saves.
        files: that the text is read from, hashed by content; their names and places do not count.
        parameters: of reading and cutting; anything that is JSON, and enums.
    """
    parts = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "tokenizer": hash_tokenizer(tokenizer),
        "files": [file_hash(file) for file in files],
        "parameters": parameters,
    }
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    """Return an enum by its name; nothing else is expected that is not JSON."""
    if isinstance(value, Enum):
        return value.name
    raise TypeError(f"{value!r} cannot be part of a cache key")


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of each file that the tokenizer saves, by name."""
    with tempfile.TemporaryDirectory() as directory, disk_errors(Path(directory)):
        tokenizer.save_pretrained(directory)
        return {file.name: file_hash(file) for file in sorted(Path(directory).iterdir())}


def cached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors under a key, computed once by whoever asks first.

    Concurrent processes wait for one another, per key. An entry that is damaged is named in a
    warning, set aside, and computed again. A cache that cannot be written is a warning too: the
    tokens do not depend on it.

    Args:
        key: of `cache_key`.
        compute: gives the tensors.
    """
    path = cache_directory() / f"{key}.safetensors"
    if (found := _read(path)) is not None:
        return found
    with _locked(path.with_suffix(".lock")) as writable:
        # Somebody else may have written it while this process waited.
        if (found := _read(path)) is not None:
            return found
        damaged = path.exists()
        if damaged:
            log.warning("the cached tokens %s are damaged: set aside, computed again", path)
        tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
        if writable:
            try:
                if damaged:
                    path.replace(path.with_suffix(".damaged"))
                save_atomically(path, tensors, {"sha256": hash_tensors(tensors)})
            except (OSError, MiError) as error:
                log.warning("the token cache %s cannot be written: %s", path.parent, error)
        return tensors


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return a sound entry, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensors if hash_tensors(tensors) == stored else None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of one key, waiting for it; give False where there is no place for a lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        log.warning("the token cache %s cannot be used: %s", path.parent, error)
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
