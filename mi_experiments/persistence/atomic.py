"""Write files completely or not at all, and know them by their content."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mi_experiments.errors import InputError, ResumableError

HEADROOM = 1.2
"""Free space is asked for this many times what is to be written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""What is half written, by its name."""


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
        path: the path of the file.
        tensors: the tensors by name.
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

    def write(temporary: Path) -> None:
        # safetensors has a temporary file of its own, beside the one that it is to write: in a
        # folder of ours, which is known for what it is if this process is killed.
        folder = temporary_sibling(path)
        folder.mkdir()
        try:
            save_file(dict(tensors), folder / path.name, given)
            (folder / path.name).replace(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    place(path, write, size)


def place(path: Path, write: Callable[[Path], object], size: int) -> None:
    """Let a file appear whole, or leave everything as it was; its mode is what umask leaves.

    Args:
        path: the path of the file, in a folder that exists.
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
            temporary.touch(exist_ok=False)
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            # Whatever wrote it may have put a file of its own into its place.
            temporary.chmod(mode)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, done: str = "written") -> Iterator[None]:
    """Say in one line which file the disk refused, and what to do.

    Args:
        path: the path of the file.
        done: what was to be done with it.

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
        line = f"{path} cannot be {done}: {getattr(error, 'strerror', None) or error}"
        if code in FULL:
            raise ResumableError(
                f"{line}; everything finished before is kept: make room, "
                "then give the same command again"
            ) from error
        raise InputError(line) from error


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside a file, for what becomes it when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(folder: Path, *, below: bool = True) -> None:
    """Remove what a process that was killed has left half written in a folder.

    Args:
        folder: the folder that this process alone works in; links in it are not followed.
        below: whether to look into the folders in it too.

    Raises:
        InputError: the disk refuses.
    """
    for parent, folders, files in os.walk(folder):
        for name in filter(TEMPORARY.fullmatch, [*folders, *files]):
            path = Path(parent) / name
            with disk_errors(path, "removed"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        folders[:] = [name for name in folders if below and not TEMPORARY.fullmatch(name)]


def inside(folder: Path, name: str) -> Path:
    """Return where a file is whose name below a folder was read from a file.

    Raises:
        InputError: the name leads out of the folder, or through a link in it.
    """
    parts = PurePosixPath(name).parts
    sound = bool(parts) and name == "/".join(parts) and not name.startswith("/")
    if not sound or ".." in parts or any(c in name for c in "\\\0"):
        raise InputError(f"{folder}: {name!r} is no name of a file below it: nothing was touched")
    path = folder
    for part in parts[:-1]:
        path /= part
        if path.is_symlink():
            raise InputError(
                f"{path} is a link, and what is in it may be anywhere: put the folder itself there"
            )
    return folder / name


def open_plain(path: Path, mode: str) -> IO[str]:
    """Open a file to write, of this name and nowhere else: no link is followed, no pipe waited for.

    Args:
        path: the path of the file.
        mode: the mode as for `open`.

    Raises:
        InputError: it is a link, or no file, or the disk refuses.
        ResumableError: the disk is full.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a file")
        return descriptor

    with disk_errors(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link; remove it")
        return open(path, mode, opener=opener, encoding="utf-8")


def free_disk(folder: Path, *own: str) -> int:
    """Return the bytes that are free for a folder, which may not exist yet.

    Args:
        folder: the folder that is to be filled.
        own: names in it; what they hold already counts as free, since it is not written again.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held = [file for name in own for file in (folder / name).rglob("*") if file.is_file()]
    return shutil.disk_usage(existing).free + sum(file.stat().st_size for file in held)


def require_disk(folder: Path, size: int, free: int) -> None:
    """Require room for what is to be stored in a folder.

    Args:
        folder: the folder that is to be filled.
        size: bytes that are to be stored.
        free: bytes that are free for it.

    Raises:
        ResumableError: there is not enough.
    """
    if HEADROOM * size > free:
        raise ResumableError(
            f"{folder}: the compressed blocks need {size / 2**30:.2f} GiB of the disk, and "
            f"{free / 2**30:.2f} GiB are free: make room, then give the same command again"
        )


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
