"""Values computed once and shared by concurrent jobs: files whose names are what decides them.

An entry is a safetensors file named by the SHA-256 of everything that determines its content, and
it carries the SHA-256 of that content, so that what is read is bit for bit what was computed, or is
not used. Whoever finds no entry takes the lock of its key, which the system releases when its
holder ends in any way, and computes; whoever comes later waits, and reads.

Entries live in the cache of the user and not in a sweep's folder: they are known by content, so
none is ever out of date, and a single run, a repeated sweep and a resumed one share them as jobs of
one sweep do. Nothing but time is lost when the folder is removed, at any moment.

The SHA-256 finds damage, and no forgery; so a folder that others may write to is refused.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mi_experiments.errors import InputError, MiError
from mi_experiments.persistence.atomic import TEMPORARY, save_atomically
from mi_experiments.persistence.own_folder import is_own, make_own, refuse_others

log = logging.getLogger(__name__)

Content = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""Tensors and text, each by name."""

POLL_SECONDS = 0.1
"""Between two looks at a lock that another job holds."""


def cache_root() -> Path:
    """Return where entries live: `$MI_EXPERIMENTS_CACHE`, or a folder in the user's cache."""
    root = os.environ.get("MI_EXPERIMENTS_CACHE") or Path.home() / ".cache" / "mi_experiments"
    return Path(root).expanduser()


def content_key(parts: Mapping[str, object]) -> str:
    """Hash everything that decides a value: anything that is JSON, and enums."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    """Return an enum by its name; nothing else is expected that is not JSON."""
    if isinstance(value, Enum):
        return value.name
    raise TypeError(f"{value!r} cannot be part of a cache key")


def find_or_compute(path: Path, compute: Callable[[], Content]) -> Content:
    """Return an entry, computed by whoever asks first and waited for by everybody else.

    A cache that cannot be written is a warning: the value does not depend on it.

    Args:
        path: the path of the entry.
        compute: gives its content.
    """
    if (found := read_entry(path)) is not None:
        return found
    with locked(path) as writable:
        # Somebody else may have written it while this process waited.
        if (found := read_entry(path)) is not None:
            return found
        content = compute()
        if writable:
            write_entry(path, content)
        return content


def check_folder(folder: Path) -> None:
    """Refuse a cache to which anybody else may write.

    Raises:
        InputError: it is one.
    """
    try:
        refuse_others(folder)
    except PermissionError as error:
        raise InputError(
            f"the cache {folder} is not used: {error}, who could put false numbers there; set "
            "MI_EXPERIMENTS_CACHE to a folder that is yours alone, or take their right to write "
            "away (chmod go-w)"
        ) from error


def read_entry(path: Path) -> Content | None:
    """Return a sound entry, or None.

    Raises:
        InputError: others may write to its folder.
    """
    check_folder(path.parent)
    try:
        if not is_own(path):
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seal = json.loads((file.metadata() or {})["entry"])
            texts, stored = seal["texts"], seal["sha256"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return (tensors, texts) if hash_content(path.stem, tensors, texts) == stored else None


def write_entry(path: Path, content: Content) -> None:
    """Write an entry; one that is damaged is set aside, and a disk that refuses is a warning."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in content[0].items()}
    texts = dict(content[1])
    seal = {"sha256": hash_content(path.stem, tensors, texts), "texts": texts}
    try:
        if path.exists():
            log.warning("the shared entry %s is damaged: set aside, computed again", path)
            path.replace(path.with_suffix(".damaged"))
        save_atomically(path, tensors, {"entry": json.dumps(seal, sort_keys=True)})
    except (OSError, MiError) as error:
        log.warning("the cache %s cannot be written: %s", path.parent, error)


def hash_content(name: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Return the SHA-256 of an entry: its name, and names, types, shapes and values in it."""
    digest = hashlib.sha256(json.dumps([name, texts], sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def locked(
    path: Path, on_wait: Callable[[], None] | None = None, check: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Hold the lock of an entry, waiting for it; give False where there is no place for a lock.

    Args:
        path: the path of the entry.
        on_wait: called once if another job holds it.
        check: called now and then while waiting; may raise to give up.

    Raises:
        InputError: others may write to its folder.
    """
    check_folder(path.parent)
    try:
        make_own(path.parent)
    except (OSError, MiError) as error:
        log.warning("the cache %s cannot be used: %s", path.parent, error)
        yield False
        return
    lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False, thread_local=False)
    try:
        writable = _wait(lock, on_wait, check)
        if writable:
            _remove_halves(path)
        yield writable
    finally:
        lock.release()


def _remove_halves(path: Path) -> None:
    """Remove what a process that was killed has left of an entry whose lock is held."""
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        if TEMPORARY.fullmatch(half.name):
            with suppress(OSError):
                shutil.rmtree(half) if half.is_dir() else half.unlink()


def _wait(
    lock: FileLock, on_wait: Callable[[], None] | None, check: Callable[[], None] | None
) -> bool:
    """Take a lock when it is free; give False where there is none to take."""
    waiting = False
    while True:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            pass
        except OSError as error:
            log.warning("the cache has no lock %s: %s", lock.lock_file, error)
            return False
        else:
            return True
        if not waiting and on_wait is not None:
            on_wait()
        waiting = True
        if check is not None:
            check()
        time.sleep(POLL_SECONDS)
