"""A real SLURM on this machine: munged, slurmctld and slurmd of one node, in one folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
"""Debian has them in munge, slurmctld, slurmd and slurm-client."""

SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])


def missing_programs() -> list[str]:
    """Name the programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster of this one machine; all its daemons are stopped by id at the end.

    Args:
        folder: existing, receives configuration, state and logs.

    Yields:
        The environment in which `sbatch` and its like talk to it.
    """
    write_configuration(folder)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM_PATH}
    socket_path = folder / "munge.socket"
    with ExitStack() as daemons:

        def daemon(*command: str) -> None:
            daemons.enter_context(running(folder, environment, *command))

        daemon(
            "munged", "--foreground", "--force", f"--key-file={folder / 'munge.key'}",
            f"--socket={socket_path}", f"--pid-file={folder / 'munged.pid'}",
            f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'munged.seed'}",
        )  # fmt: skip
        wait_until(socket_path.exists, folder)
        daemon("slurmctld", "-D", "-c")
        daemon("slurmd", "-D", "-c")
        wait_until(lambda: "idle" in ask(environment, "sinfo", "--noheader"), folder)
        try:
            yield environment
        finally:
            # Jobs first: their processes belong to steps of their own, not to the daemons.
            ask(environment, "scancel", "--user", getpass.getuser())
            wait_until(lambda: not ask(environment, "squeue", "--noheader"), folder)


def write_configuration(folder: Path) -> None:
    """Write what the three daemons read."""
    host = socket.gethostname().split(".")[0]
    user = getpass.getuser()
    ports = free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder / "munge.socket"},cred_expire=5
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder / "spool"}
SlurmctldPidFile={folder / "slurmctld.pid"}
SlurmdPidFile={folder / "slurmd.pid"}
SlurmctldLogFile={folder / "slurmctld.log"}
SlurmdLogFile={folder / "slurmd.log"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=60
RequeueExit=75
PlugStackConfig=/dev/null
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""
    )
    mounted = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/{mounted}\nCgroupAutomount=yes\n")


def free_ports(number: int) -> list[int]:
    """Find ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running(folder: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    """Run a daemon in the foreground of a process of its own; it is gone at the end."""
    with (folder / f"{command[0]}.out").open("w") as out:
        # Gone too if this process is killed, and ends nothing itself.
        bound = ["setpriv", "--pdeathsig", "TERM", *command]
        process = subprocess.Popen(bound, env=environment, stdout=out, stderr=out)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(environment: dict[str, str], *command: str) -> str:
    """Return what a command says."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def wait_until(holds: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    """Wait for something that the cluster will do; what it said is shown if it does not."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
            said = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)
            raise TimeoutError(f"the cluster did not come to it:\n{said}")
        time.sleep(0.1)
