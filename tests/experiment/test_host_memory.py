"""What a control group may still take, from trees of files as Linux writes them."""

from pathlib import Path

import pytest

from mi_experiments.experiment.host_memory import available_memory, group_room
from mi_experiments.experiment.memory_plan import free_host_memory

MIB = 2**20
HOST = 1000 * MIB
V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
UNLIMITED_1 = str(2**63 - 4096)


class Machine:
    """A root of a file system, as it looks from inside of a process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounts: list[str] = []
        self.write("proc/meminfo", f"MemTotal: 9 kB\nMemAvailable:   {HOST // 1024} kB\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mount(self, point: str, kind: str, options: str = "rw", top: str = "/") -> None:
        self.mounts.append(f"30 23 0:26 {top} {point} rw,relatime shared:9 - {kind} x {options}\n")
        self.write("proc/self/mountinfo", "".join(self.mounts))

    def group(self, folder: str, limit: str, usage: int, cache: int = 0) -> None:
        first = folder.startswith(V1)
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if first
            else ("memory.max", "memory.current", "inactive_file")
        )
        self.write(f"{folder}/{names[0]}", f"{limit}\n")
        self.write(f"{folder}/{names[1]}", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"anon 7\n{names[2]} {cache}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_the_host_counts(machine: Machine) -> None:
    assert free_host_memory(machine.root) == HOST
    machine.write("proc/meminfo", f"MemFree: {HOST // 2048} kB\n")  # kernels before 3.14
    assert free_host_memory(machine.root) == HOST // 2
    assert available_memory(machine.root / "nowhere") > 0


@pytest.mark.parametrize(
    ("limit", "usage", "cache", "room"),
    [
        (str(300 * MIB), 100 * MIB, 0, 200 * MIB),
        (str(300 * MIB), 100 * MIB, 40 * MIB, 240 * MIB),  # the cache is given back
        (str(300 * MIB), 400 * MIB, 0, 0),
        (str(5000 * MIB), 0, 0, HOST),
        ("max", 100 * MIB, 0, HOST),
        ("", 100 * MIB, 0, HOST),
    ],
)
def test_the_smallest_of_host_and_own_group(
    machine: Machine, limit: str, usage: int, cache: int, room: int
) -> None:
    machine.mount(V2, "cgroup2")
    machine.write("proc/self/cgroup", "0::/user.slice/job_1\n")
    machine.group(f"{V2}/user.slice/job_1", limit, usage, cache)
    assert free_host_memory(machine.root) == room


def test_a_group_above_may_be_narrower(machine: Machine) -> None:
    machine.mount(V2, "cgroup2")
    machine.write("proc/self/cgroup", "0::/slurm/uid_1/job_2/step_0\n")
    machine.group(f"{V2}/slurm/uid_1/job_2/step_0", "max", 0)
    machine.group(f"{V2}/slurm/uid_1/job_2", str(50 * MIB), 20 * MIB)
    machine.group(f"{V2}/slurm", str(70 * MIB), 20 * MIB)
    assert free_host_memory(machine.root) == 30 * MIB


def test_version_1_and_both_at_once(machine: Machine) -> None:
    machine.mount(f"{V2}/cpu", "cgroup", "rw,cpu")
    machine.mount(V1, "cgroup", "rw,memory")
    machine.mount("/sys/fs/cgroup/unified", "cgroup2")
    machine.write("proc/self/cgroup", "9:cpu:/other\n4:memory:/slurm/job\n0::/slurm/job\n")
    machine.group(f"{V1}/slurm/job", UNLIMITED_1, 5 * MIB)
    machine.group(f"{V1}/slurm", str(90 * MIB), 60 * MIB, 10 * MIB)
    machine.group(V1, UNLIMITED_1, 5 * MIB)
    machine.group(f"{V1}/other", "1", 1)  # of another controller: not this process
    assert free_host_memory(machine.root) == 40 * MIB


@pytest.mark.parametrize(
    ("top", "path"),
    [
        ("/", "/"),  # a namespace of groups of its own, as Docker with version 2
        ("/docker/ab12", "/docker/ab12"),  # the group of the container, mounted at the top
        ("/docker/ab12", "/"),  # the mount is older than the namespace
        ("/", "/../../job"),  # the process is outside of the namespace that was mounted
        ("/..", "/"),
    ],
)
def test_inside_of_a_container_the_mounted_group_is_the_own(
    machine: Machine, top: str, path: str
) -> None:
    machine.mount(V2, "cgroup2", top=top)
    machine.write("proc/self/cgroup", f"0::{path}\n")
    machine.group(V2, str(64 * MIB), 0)
    assert free_host_memory(machine.root) == 64 * MIB


def test_blanks_in_names_and_lines_that_are_none(machine: Machine) -> None:
    machine.mount("/mnt/control\\040groups", "cgroup2")
    machine.mounts.append("nonsense\n")
    machine.mount("/proc", "proc")
    machine.write("proc/self/cgroup", "0::/a b\nnonsense\n")
    machine.group("/mnt/control groups/a b", str(8 * MIB), 0)
    assert list(group_room(machine.root)) == [8 * MIB]
