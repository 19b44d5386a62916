"""Write files completely or not at all, and know them by their content."""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mi_experiments.errors import InputError, ResumableError

HEADROOM = 1.2
"""Free space is asked for this many times what is to be written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file: temporary sibling, fsync, rename, fsync of the folder.

    Raises:
        ResumableError: the disk is full; what was there before is as it was.
        InputError: the disk refuses for another reason.
    """
    place(path, lambda temporary: temporary.write_bytes(content), len(content))


def save_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, as `write_atomically` does; equal content is equal bytes.

    Args:
        path: of the file.
        tensors: by name.
        metadata: at most one entry: safetensors writes several in a different order every time.

    Raises:
        ValueError: more metadata.
        ResumableError: the disk is full; what was there before is as it was.
        InputError: the disk refuses for another reason.
    """
    if len(metadata) > 1:
        raise ValueError(f"{path}: equal files need one entry of metadata, not {list(metadata)}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # Of no tensors with empty metadata, safetensors writes a header that it cannot read.
    given = dict(metadata) if metadata or tensors else None
    place(path, lambda temporary: save_file(dict(tensors), temporary, given), size)


def place(path: Path, write: Callable[[Path], object], size: int) -> None:
    """Let a file appear whole, or leave everything as it was.

    Args:
        path: of the file, in a folder that exists.
        write: writes it under the name that it is given.
        size: bytes that it will have, about.

    Raises:
        ResumableError: the disk is full.
        InputError: the disk refuses for another reason.
    """
    temporary = temporary_sibling(path)
    try:
        with disk_errors(path):
            free = shutil.disk_usage(path.parent).free
            if free < HEADROOM * size:
                line = f"{free:,} bytes are free, {size:,} are to be written"
                raise OSError(errno.ENOSPC, line)
            write(temporary)
            temporary.chmod(0o644)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one line which file the disk refused, and what to do.

    Raises:
        ResumableError: the disk is full.
        InputError: the disk refuses for another reason.
    """
    try:
        yield
    except Exception as error:
        # Libraries written in Rust raise exceptions of their own, with the system's number.
        found = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code is None and not isinstance(error, OSError | SafetensorError):
            raise
        line = f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        if code in FULL:
            raise ResumableError(
                f"{line}; everything finished before is kept: make room, "
                "then give the same command again"
            ) from error
        raise InputError(line) from error


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside a file, for what becomes it when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what a process that was killed has left half written, below a folder."""
    for path in list(folder.rglob(".*.tmp")):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush(path: Path) -> None:
    """Bring one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
