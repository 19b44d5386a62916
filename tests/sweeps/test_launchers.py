"""The same sweep through every launcher, and launchers whose processes die or are taken away."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import run_directories
from slurm_cluster import ask, missing_programs, slurm_cluster

MI_RUN = [sys.executable, "-c", "from mi_experiments.commands.start import run; run()"]
TWELVE = ["-m", "dataset.nsamples=2,4,8", "seed=0,1,2,3"]
FOUR = ["-m", "dataset.nsamples=2,4", "seed=0,1"]
"""Of the twelve."""
EMBEDDED = [
    "tracking=disabled", "cache=false", "export=packed", "dataset.batch_size=2",
    "model.seqlen=32", "evaluation.datasets.embedded.max_windows=2",
]  # fmt: skip
SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=30"]
DIFFERENT = ("run.log", "run.lock", "timings.parquet", "result.json", "hydra.yaml")
"""Files that hold times, or say which launcher it was."""


def artefacts(root: Path) -> dict[str, Any]:
    """Return what each run of a sweep computed, by its directory: hashes, and its record."""
    found: dict[str, Any] = {}
    for run_dir in run_directories(root):
        for path in sorted(run_dir.rglob("*")):
            if path.is_file() and path.name not in DIFFERENT:
                name = str(path.relative_to(run_dir.parent))
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        record = json.loads((run_dir / "result.json").read_text())
        for key in ("seconds", "memory", "resumed", "seal"):
            del record[key]
        for key in ("started", "command"):
            del record["provenance"][key]
        found[run_dir.name] = record
    return found


def of_jobs(root: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found of the runs that a sweep has too."""
    names = {run_dir.name for run_dir in run_directories(root)}
    return {path: value for path, value in found.items() if path.split("/")[0] in names}


def environment(**more: str) -> dict[str, str]:
    """Return one thread a job: their number moves bits."""
    package = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1", **more}


def sweep(root: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and what it said."""
    root.mkdir(exist_ok=True)
    done = subprocess.run(
        [*MI_RUN, *arguments], cwd=root, env=env or environment(), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def statuses(root: Path) -> list[str]:
    (path,) = root.rglob("sweep.json")
    return [job["status"] for job in json.loads(path.read_text())["jobs"]]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give the environment of a real SLURM, with one node of this machine."""
    if missing := missing_programs():
        pytest.skip(f"not on this machine: {', '.join(missing)} (make test-slurm installs them)")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as variables:
        yield environment(**variables)


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give what the sweep of the embedded model computes in one process."""
    root = tmp_path_factory.mktemp("basic")
    code, out = sweep(root, *TWELVE, *EMBEDDED)
    assert code == 0, out
    found = artefacts(root)
    assert sum(name.endswith(".safetensors") for name in found) >= 12
    return found


def wait_until(holds: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Wait for something that a process will do; it must not end before."""
    while True:
        # What a run no longer needs may go while it is looked at.
        with suppress(FileNotFoundError):
            if found := holds():
                return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_slurm_computes_the_same_bytes(
    tmp_path: Path, slurm: dict[str, str], basic: dict[str, Any]
) -> None:
    code, out = sweep(tmp_path, *TWELVE, *EMBEDDED, *SLURM, env=slurm)
    assert code == 0, out
    assert statuses(tmp_path) == ["done"] * 12
    assert artefacts(tmp_path) == basic


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGUSR1", "SIGTERM"])
def test_a_job_that_slurm_stops_is_requeued_and_goes_on(
    tmp_path: Path, slurm: dict[str, str], basic: dict[str, Any], name: str
) -> None:
    command = [*MI_RUN, *FOUR, *EMBEDDED, *SLURM, "hydra.launcher.max_num_timeout=3"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=slurm, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def at_work() -> list[Path]:
        return [path.parents[1] for path in tmp_path.rglob("reports/*")]

    run_dir = wait_until(at_work, process)[0]
    # It goes no further until the signal has reached it.
    worker = holder(run_dir / "run.lock")
    os.kill(worker, signal.SIGSTOP)
    # A step, not the job: scancel of SLURM 22.05 repeats a signal to a job of an array for half a
    # minute, and so into the requeued job.
    (record,) = tmp_path.rglob("sweep.json")
    names = [job["directory"] for job in json.loads(record.read_text())["jobs"]]
    queued = ask(slurm, "squeue", "--noheader", "--array", "--format=%K %A").splitlines()
    job_id = dict(line.split() for line in queued)[str(names.index(run_dir.name))]
    ask(slurm, "scancel", f"--signal={name}", f"{job_id}.0")
    wait_until(lambda: has_pending(worker, signal.Signals[name]), process)
    os.kill(worker, signal.SIGCONT)
    # The block at work is finished, and the record says what stopped it.
    wait_until(lambda: f"stopped by {name}" in (run_dir / "run.log").read_text(), process)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert statuses(tmp_path) == ["done"] * 4
    assert json.loads((run_dir / "result.json").read_text())["resumed"] == 1
    assert artefacts(tmp_path) == of_jobs(tmp_path, basic)


@pytest.mark.slow
def test_a_job_that_slurm_kills_loses_no_other(
    tmp_path: Path, slurm: dict[str, str], basic: dict[str, Any]
) -> None:
    command = [*FOUR, *EMBEDDED, *SLURM]
    process = subprocess.Popen(
        [*MI_RUN, *command], cwd=tmp_path, env=slurm, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lock = wait_until(lambda: list(tmp_path.rglob("run.lock")), process)[0]
    wait_until(lambda: list(lock.parent.glob("reports/*")), process)
    os.kill(holder(lock), signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 75, out
    assert sorted(statuses(tmp_path)) == ["done"] * 3 + ["interrupted"]
    assert "its process ended without a result" in out
    code, out = sweep(tmp_path, *command, env=slurm)
    assert code == 0, out
    assert sorted(statuses(tmp_path)) == ["done"] + ["skipped"] * 3
    assert artefacts(tmp_path) == of_jobs(tmp_path, basic)


LOCAL = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_local_launchers_compute_the_same_bytes_and_lose_no_other_job(
    tmp_path: Path, basic: dict[str, Any], name: str
) -> None:
    command = [*TWELVE, *EMBEDDED, *LOCAL[name]]
    process = subprocess.Popen(
        [*MI_RUN, *command], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    report = wait_until(lambda: list(tmp_path.rglob("reports/*")), process)[0]
    os.kill(holder(report.parents[1] / "run.lock"), signal.SIGKILL)
    out, _ = process.communicate()
    if name == "submitit_local":
        assert process.returncode == 75, out
        assert sorted(statuses(tmp_path)) == ["done"] * 11 + ["interrupted"]
        assert "its process ended without a result" in out
        code, out = sweep(tmp_path, *command)
        assert code == 0, out
    else:
        # Its pool dies with one worker; what had not ended is launched again.
        assert process.returncode == 0, out
        assert statuses(tmp_path) == ["done"] * 12
    assert artefacts(tmp_path) == basic


def holder(lock: Path) -> int:
    """Return the process that holds a run."""
    inode = str(lock.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[5].rpartition(":")[2] == inode:
            return int(fields[4])
    raise AssertionError(f"nobody holds {lock}")


def has_pending(process: int, number: signal.Signals) -> bool:
    """Tell whether a signal waits for a stopped process."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("ShdPnd", "SigPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
