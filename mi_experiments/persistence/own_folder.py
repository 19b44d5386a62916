"""Who may write to a folder: nobody but its user and root, wherever it lies."""

import grp
import os
import pwd
import stat
from pathlib import Path

SHARED = stat.S_IWGRP | stat.S_IWOTH


def refuse_others(folder: Path) -> None:
    """Require that nobody else may change what is in a folder, nor put another one in its place.

    Args:
        folder: that may not exist yet; of what does, each folder above it is looked at too, as it
            is named and as it really lies. Above, a sticky one (/tmp) is safe.

    Raises:
        PermissionError: somebody may; the line says where.
    """
    absolute = folder.absolute()
    for path in dict.fromkeys([*_upwards(absolute), *_upwards(absolute.resolve())]):
        try:
            status = path.stat()
        except OSError:
            continue  # what is not there is made by this process, in the one above
        top = path in (absolute, absolute.resolve())
        if status.st_uid not in (os.getuid(), 0) and (top or status.st_uid != _unmapped()):
            raise PermissionError(f"{path} belongs to {_name(status.st_uid)}")
        if not _private(status) and (top or not status.st_mode & stat.S_ISVTX):
            who = "anybody" if status.st_mode & stat.S_IWOTH else "its group"
            mode = stat.S_IMODE(status.st_mode)
            raise PermissionError(f"{path} may be written by {who} (mode {mode:o})")


def is_own(path: Path) -> bool:
    """Whether a file is there, is no link, and nobody else may write to it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    own = status.st_uid in (os.getuid(), 0)
    return stat.S_ISREG(status.st_mode) and own and _private(status)


def make_own(folder: Path) -> None:
    """Make a folder, and those above it, that nobody else may write to under any umask."""
    if not folder.is_dir():
        make_own(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


def _upwards(path: Path) -> list[Path]:
    """Return a path and all folders above it."""
    return [path, *path.parents]


def _private(status: os.stat_result) -> bool:
    """Whether a mode lets nobody else write; the user's own group of one is nobody else."""
    if status.st_mode & stat.S_IWOTH:
        return False
    return not status.st_mode & stat.S_IWGRP or _alone_in(status.st_gid)


def _alone_in(group: int) -> bool:
    """Whether a group is that of this user alone, as many systems give one to everybody."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return (group, found.gr_name) == (user.pw_gid, user.pw_name) and set(found.gr_mem) <= {
        user.pw_name
    }


def _unmapped() -> int | None:
    """Return the user that a container without the rights of root shows for root; else None."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _name(number: int) -> str:
    """Return the name of a user, or the number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
