"""Locks that one process has, which is named in them, and that end with it in any way."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mi_experiments.errors import InputError, MiError
from mi_experiments.persistence.atomic import open_plain


@contextmanager
def hold(path: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Have a lock for as long as this process lives at most; its forked children do not have it.

    Args:
        path: the path of the lock, a file that is left in its place; no link is followed.
        refusal: the line for the person, from who has it.

    Raises:
        InputError: another process has it, or what is there is a link, or no file.
        ResumableError: the disk is full.
    """
    open_plain(path, "a").close()  # refuses what is no file of this name and nowhere else
    lock = FileLock(path, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(refusal(read_holder(path))) from None
    try:
        with open_plain(path, "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError, MiError):
            open_plain(path, "w").close()
        lock.release()


def read_holder(path: Path) -> str:
    """Return who has a lock, which is written as soon as it is taken."""
    for _ in range(20):
        if holder := path.read_text():
            return holder
        time.sleep(0.05)
    return "an unknown process"
