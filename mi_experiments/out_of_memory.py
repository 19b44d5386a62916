"""Where memory is short: recognise it, go on in smaller pieces, and count how often that was done.

Pieces give the same numbers but for the order in which some products are summed, so each retry is
logged and counted, and the count is in the record.
"""

import contextlib
import ctypes
import errno
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from mi_experiments.errors import MemoryShortage

log = logging.getLogger(__name__)

T = TypeVar("T")

SAID = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "bad alloc",
    "bad_alloc",
    "can't start new thread",
)
"""What the CPU allocator, CUDA and its libraries say in a RuntimeError; a thread needs a stack."""

REMEDY = (
    "what was finished is kept: free memory, or choose memory.activations=disk, a smaller "
    "dataset.batch_size or evaluation.batch_tokens, and give the command again"
)


@dataclass
class Retries:
    """How often work was done again in smaller pieces."""

    count: int = 0


_counting: list[Retries] = []


@contextlib.contextmanager
def count_retries() -> Iterator[Retries]:
    """Count the retries for the length of a with statement."""
    retries = Retries()
    _counting.append(retries)
    try:
        yield retries
    finally:
        # By identity: equal counts are not the same count.
        _counting[:] = [other for other in _counting if other is not retries]


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of the options in glibc's malloc.h."""

LARGE = 2**24
"""Bytes below which it is not worth the time to give memory back."""


def keep_small_pieces() -> None:
    """Let glibc take pieces above 32 MiB from the system, and keep up to 128 MiB of smaller ones.

    Tensors of a few MiB come and go many times a second, and each time one is mapped the system
    fills its pages with zeros. What is kept in vain, `give_back` gives back.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(M_MMAP_THRESHOLD, 32 * 2**20)
        set_option(M_TRIM_THRESHOLD, 128 * 2**20)


def give_back(size: int) -> None:
    """Give memory that is free again back to the system, after something of a size was done.

    Python frees what refers to itself only when its collector runs, and glibc keeps small pieces:
    together as much again as the largest linear.

    Args:
        size: bytes of the largest tensor that was worked on.
    """
    if size < LARGE:
        return
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def note_retry(what: str, reason: str) -> None:
    """Log and count that work is done again, and give cached memory back first."""
    log.warning("memory is short: going on with %s (%s)", what, reason)
    for retries in _counting:
        retries.count += 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_shortage(error: BaseException) -> bool:
    """Say whether an exception means that memory is short, on the accelerator or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in SAID)
    return isinstance(error, MemoryError | MemoryShortage)


def describe(error: BaseException) -> str:
    """Return what an exception says of the memory, in one short line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def in_pieces(work: Callable[[int, int], T], length: int, unit: str, least: int = 1) -> list[T]:
    """Do work on a range, and where memory is short on its halves, and on theirs.

    Args:
        work: Does what is asked of start…stop and returns the result. It must have changed nothing
            when it runs out of memory.
        length: The range is 0…length.
        unit: What the range counts, for messages.
        least: Pieces this small are not halved.

    Returns:
        The results, in order.

    Raises:
        MemoryShortage: The smallest piece is still too large.
    """
    return _cover(work, 0, length, length, unit, least)


def _cover(
    work: Callable[[int, int], T], start: int, stop: int, length: int, unit: str, least: int
) -> list[T]:
    """Do as `in_pieces` on a part of the range."""
    try:
        return [work(start, stop)]
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        reason = describe(error)
    # Only here, outside of the handler, is everything freed that the attempt has held.
    count = stop - start
    if count <= least or count < 2:
        raise MemoryShortage(f"no memory for {count} {unit} ({reason}): {REMEDY}")
    middle = start + count // 2
    note_retry(f"{middle - start} of {length} {unit} at a time", reason)
    first = _cover(work, start, middle, length, unit, least)
    return first + _cover(work, middle, stop, length, unit, least)


def until_it_fits(work: Callable[[], T], shrink: Callable[[str], None]) -> T:
    """Do work, and after each shortage of memory from its beginning, once it is made smaller.

    Args:
        work: What to do.
        shrink: Makes it smaller; gets the reason, and raises when it cannot.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError, MemoryShortage) as error:
            if not is_shortage(error):
                raise
            reason = describe(error)
        shrink(reason)


@contextlib.contextmanager
def shortage_in(phase: str) -> Iterator[None]:
    """Turn a shortage of memory that nothing could be done about into one line.

    Raises:
        MemoryShortage: There was one.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        line = f"{phase}: out of memory ({describe(error)}): {REMEDY}"
        raise MemoryShortage(line) from error
