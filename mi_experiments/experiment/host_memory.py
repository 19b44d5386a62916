"""How much memory this process can still take: of the host, and of the control groups it is in.

A container, and a job of SLURM or systemd, has less than the host. Linux ends it with SIGKILL where
it takes more, however much the host has free.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Files:
    """The files of one version of Linux's control groups.

    Attributes:
        limit: bytes that the group may take.
        usage: bytes that it has taken, the cache of files included.
        cache: the part of `memory.stat` that is given back before anything is refused.
    """

    limit: str
    usage: str
    cache: str


VERSION_1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = Files("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes of the host that a process can still take, by Linux's own estimate."""
    text = read(root / "proc/meminfo")
    for name in ("MemAvailable", "MemFree"):
        if found := re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE):
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group_room(root: Path = ROOT) -> Iterator[int]:
    """Yield the bytes that each control group of this process, and each above it, has left.

    Args:
        root: the root of the file system, `/`; another one in tests.
    """
    groups = [line.split(":", 2) for line in read(root / "proc/self/cgroup").splitlines()]
    for line in read(root / "proc/self/mountinfo").splitlines():
        if not (mount := read_mount(line)):
            continue
        files, top, point = mount
        for _, controllers, path in (group for group in groups if len(group) == 3):
            own = not controllers if files is VERSION_2 else "memory" in controllers.split(",")
            if own:
                mounted = root / point.lstrip("/")
                for folder in folders(mounted, top, path):
                    room = room_of(folder, files)
                    if room is not None:
                        yield room


def read_mount(line: str) -> tuple[Files, str, str] | None:
    """Return what a line of `mountinfo` mounts of groups with memory; None if it mounts none.

    Returns:
        The version, the group that is mounted, and where.
    """
    left, _, right = line.partition(" - ")
    before, after = left.split(), right.split()
    if len(before) < 5 or len(after) < 3:
        return None
    top, point = (  # blanks and backslashes in them are written as octal numbers
        re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name) for name in before[3:5]
    )
    if after[0] == "cgroup2":
        return VERSION_2, top, point
    if after[0] == "cgroup" and "memory" in after[-1].split(","):
        return VERSION_1, top, point
    return None


def folders(mounted: Path, top: str, path: str) -> Iterator[Path]:
    """Yield the folder of a group and those of the groups above it, up to the mounted one.

    Args:
        mounted: where the hierarchy is mounted.
        top: the group that is mounted there.
        path: of the group of this process. Where the mount is of another namespace of groups than
            the process, one of the two does not begin as the other: then the mounted group is the
            one that is known to hold the process.
    """
    parts = Path(path).parts[1:]
    above = Path(top).parts[1:]
    if parts[: len(above)] == above:
        parts = parts[len(above) :]
    if ".." in parts:
        parts = ()
    for depth in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:depth])


def room_of(folder: Path, files: Files) -> int | None:
    """Return the bytes that a group has left; None if it has no limit."""
    limit, usage = read(folder / files.limit).strip(), read(folder / files.usage).strip()
    if not limit.isdigit() or not usage.isdigit():
        return None
    found = re.search(rf"^{files.cache} (\d+)$", read(folder / "memory.stat"), re.MULTILINE)
    taken = max(0, int(usage) - (int(found[1]) if found else 0))
    return max(0, int(limit) - taken)


def read(path: Path) -> str:
    """Return what a file of the system says; nothing if it cannot be asked."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
