"""Write files completely or not at all, and know them by their content."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
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
    """Write tensors as safetensors, as `write_atomically` does.

    Raises:
        ResumableError: the disk is full; what was there before is as it was.
        InputError: the disk refuses for another reason.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    place(path, lambda temporary: save_file(dict(tensors), temporary, dict(metadata)), size)


def place(path: Path, write: Callable[[Path], object], size: int) -> None:
    """Let a file appear whole, or leave everything as it was.

    Args:
        path: of the file; its folder is made where it does not exist.
        write: writes it under the name that it is given.
        size: bytes that it will have, about.

    Raises:
        ResumableError: the disk is full.
        InputError: the disk refuses for another reason.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < HEADROOM * size:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {size:,} are to be written")
        write(temporary)
        temporary.chmod(0o644)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        line = f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        if code in FULL or "os error 28" in str(error) or "os error 27" in str(error):
            raise ResumableError(
                f"{line}; everything finished before is kept: make room, "
                "then give the same command again"
            ) from error
        raise InputError(line) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
