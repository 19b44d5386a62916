"""A sweep as a person types it: one directory, one lock, jobs that fail alone, no work twice."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, run_directories

from mi_experiments.comparison.run_table import read_runs
from mi_experiments.compression import pipeline
from mi_experiments.records.result import read_result

MI_RUN = [sys.executable, "-c", "from mi_experiments.commands.start import run; run()"]
AXES = ["seed=0,1,2"]
MANY_AXES = ["dataset.nsamples=1,2,3,4", "seed=0,1,2"]
TIMES = ("run.log", "run.lock", "timings.parquet", "result.json")
"""Files that differ between equal runs."""


def read_sweep(root: Path = Path("sweeps")) -> dict[str, Any]:
    """Return the record of the only sweep."""
    (path,) = root.rglob("sweep.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def statuses(root: Path = Path("sweeps")) -> list[str]:
    return [job["status"] for job in read_sweep(root)["jobs"]]


def artefacts(root: Path) -> dict[str, Any]:
    """Return the content of every run of a sweep by its directory, but for times."""
    found: dict[str, Any] = {}
    for run_dir in run_directories(root):
        for path in sorted(run_dir.rglob("*")):
            if path.is_file() and path.name not in TIMES:
                found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
        record = json.loads((run_dir / "result.json").read_text())
        for key in ("seconds", "memory", "resumed", "seal"):
            del record[key]
        del record["provenance"]["started"]
        found[str(run_dir.relative_to(root))] = record
    return found


def identities(root: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of the record of every completed run."""
    return {
        run_dir.name: ((run_dir / "result.json").stat().st_ino,
                       (run_dir / "result.json").stat().st_mtime_ns)
        for run_dir in run_directories(root)
        if read_result(run_dir).status == "completed"
    }  # fmt: skip


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [*MI_RUN, *arguments], cwd=root, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process will do; it must not end before."""
    while True:
        # What a run no longer needs may go while it is looked at.
        with suppress(FileNotFoundError):
            if holds():
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def records(root: Path) -> list[tuple[Path, str]]:
    """Return the run directory and the record of every job of the sweeps in a folder."""
    return [(path.parent, path.read_text()) for path in root.glob("*/*/result.json")]


def completed(root: Path) -> int:
    return sum('"status": "completed"' in record for _, record in records(root))


def has_compressed(root: Path) -> bool:
    """Tell whether a run that goes on has compressed a block, and written it."""
    going_on = [run_dir for run_dir, record in records(root) if '"status": "running"' in record]
    return any(True for run_dir in going_on for _ in run_dir.glob("reports/*"))


# Names


def test_the_same_command_is_the_same_sweep(mi_run: Callable[..., Ended], local: list[str]) -> None:
    sweep = ["-m", *local, "wbits.average=3,5"]
    ended = mi_run(*sweep)
    assert ended.code == 0, ended.err
    (directory,) = Path("sweeps").iterdir()
    assert re.fullmatch(r"local-[0-9a-f]{10}", directory.name)
    assert statuses() == ["done"] * 2
    results = [read_result(run) for run in run_directories(directory)]
    assert {result.config["wbits"]["average"] for result in results} == {3.0, 5.0}
    for result in results:
        assert result.bits is not None
        shown = rf"→ {result.compressed['text'].perplexity:.4f} │ +{result.bits.effective:.4f} │"
        assert re.search(shown, ended.out)
    before = identities(directory)
    again = mi_run(*sweep, "tracking.project=other")
    assert again.code == 0
    assert list(Path("sweeps").iterdir()) == [directory]
    assert statuses() == ["skipped"] * 2
    assert identities(directory) == before
    # What is damaged is no finished job, and becomes what it was.
    table = run_directories(directory)[0] / "linears.parquet"
    content = table.read_bytes()
    table.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    assert mi_run(*sweep).code == 0
    assert sorted(statuses()) == ["done", "skipped"]
    assert table.read_bytes() == content


def test_a_job_has_the_hash_of_the_run_that_it_is(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    assert mi_run("-m", *local, "seed=4").code == 0
    (job,) = run_directories(Path("sweeps"))
    assert mi_run(*local, "seed=4").code == 0
    (single,) = run_directories(Path("outputs"))
    assert job.name[-10:] == single.name[-10:]
    assert artefacts(job)["."]["compressed"] == artefacts(single)["."]["compressed"]


def test_a_sweep_that_grows_keeps_its_runs_in_a_given_directory(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    assert mi_run("-m", *local, "seed=0,1", "hydra.sweep.dir=mine").code == 0
    before = identities(Path("mine"))
    # Other axes, so other names; 4 bits is what the first runs were asked too.
    grown = mi_run("-m", *local, "wbits.average=4,5", "seed=1", "hydra.sweep.dir=mine")
    assert grown.code == 0, grown.err
    assert statuses(Path("mine")) == ["skipped", "done"]
    after = identities(Path("mine"))
    assert len(after) == 3
    assert {name: after[name] for name in before} == before


def test_equal_combinations_run_once_and_different_ones_never_share(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    ended = mi_run("-m", *local, "wbits.average=4,4.0", "seed=0,0")
    assert ended.code == 0, ended.err
    assert len(run_directories(Path("sweeps"))) == 1
    assert "1  (and 3 alike)" in ended.out
    ended = mi_run("-m", *local, "memory.activations=host,disk")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "memory.activations=host and memory.activations=disk compute the same numbers" in line


# The plan


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    ended = mi_run("-m", *local, "wbits.average=3,5", "seed=range(3)", "dry_run=true")
    assert ended.code == 0, ended.err
    for line in ("jobs │ 6", "already finished │ 0", "to do │ 6", "wbits.average = 3, 5",
                 "seed = 0, 1, 2", "unknown: no finished run of the model"):  # fmt: skip
        assert line in re.sub(" +", " ", ended.out)
    assert not Path("sweeps").exists()
    # What is finished, and what it took, is known the next time.
    assert mi_run("-m", *local, "wbits.average=3", "seed=0", "hydra.sweep.dir=s").code == 0
    took = sum(sum(read_result(run).seconds.values()) for run in run_directories(Path("s")))
    sweep = ["-m", *local, "wbits.average=3,5", "seed=0,1,2", "hydra.sweep.dir=s", "dry_run=true"]
    out = re.sub(" +", " ", mi_run(*sweep).out)
    assert "already finished │ 1" in out
    assert f"about {5 * took:.0f} s" in out
    assert "1 finished runs of this sweep" in out


def test_jobs_that_cannot_run_are_named_and_the_others_run(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    ended = mi_run("-m", *local, "wbits=uniform", "wbits.average=3.5,4")
    assert ended.code == 2
    assert statuses() == ["failed", "done"]
    assert "1 of 2 jobs are finished, 1 failed" in ended.err
    assert "wbits.average=3.5 is not allowed: a whole number when uniform" in ended.err
    failed = [r for r in map(read_result, run_directories(Path("sweeps"))) if r.status == "failed"]
    assert [result.config["wbits"]["average"] for result in failed] == [3.5]
    # It is a row of the comparison like all others.
    rows = read_runs([Path("sweeps")]).set_index("wbits")
    assert rows.loc[3.5, "status"] == "failed"
    assert rows.loc[4.0, "status"] == "completed"
    # Where none can run, nothing is begun.
    ended = mi_run("-m", *local, "wbits.average=1,9", "hydra.sweep.dir=other")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["resume=here", "seed=0,1"], "resume="),
        (["wbits.avarage=3,4"], "did you mean wbits.average?"),
        (["model=embedded,resnet"], "resnet"),
        (["hydra.sweep.subdir=x", "seed=0,1"], "hydra.sweep.subdir"),
        (["experiment=nsamples_sweep,budget_sweep"], "cannot be swept over"),
        (["seed=interval(0,1)"], "interval"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    mi_run: Callable[..., Ended], arguments: list[str], part: str
) -> None:
    ended = mi_run("-m", *arguments, "dry_run=true")
    if "model=embedded,resnet" in arguments:
        assert ended.code == 0
        assert "cannot run" in ended.out
        assert part in ended.out
        return
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert part in line


# Failures


def test_a_failing_job_stops_no_other_and_is_repeated(
    mi_run: Callable[..., Ended], local: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = pipeline.compress_linear, []

    def fail_in_the_second_job(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 17:  # of 14 in every job
            raise ZeroDivisionError("by nothing\nat all")
        return real(*arguments)

    monkeypatch.setattr(pipeline, "compress_linear", fail_in_the_second_job)
    sweep = ["-m", *local, "seed=0,1,2"]
    ended = mi_run(*sweep)
    assert ended.code == 1
    assert statuses() == ["done", "failed", "done"]
    assert ended.err.splitlines() == [
        "mi-run: 2 of 3 jobs are finished, 1 failed, the first "
        f"{read_sweep()['jobs'][1]['directory']}: ZeroDivisionError: by nothing"
    ]
    assert "Traceback" not in ended.out
    job = read_sweep()["jobs"][1]
    (directory,) = Path("sweeps").iterdir()
    text = (directory / job["log"]).read_text()
    assert "Traceback" in text
    assert "fail_in_the_second_job" in text
    assert f"job 2 failed: ZeroDivisionError: by nothing  ({directory / job['log']})" in ended.out
    record = read_result(directory / job["directory"])
    assert record.status == "failed"
    assert record.dense  # What was computed before is kept.
    before = identities(directory)
    assert mi_run(*sweep).code == 0
    assert statuses() == ["skipped", "done", "skipped"]
    after = identities(directory)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before


def test_a_job_whose_directory_is_in_use_fails_alone(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    assert mi_run("-m", *local, "seed=0", "hydra.sweep.dir=s").code == 0
    first = Path("s", read_sweep(Path("s"))["jobs"][0]["directory"])
    (first / "result.json").unlink()
    holder = subprocess.Popen(
        ["flock", "--no-fork", str(first / "run.lock"), "sh", "-c", "echo held; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    ended = mi_run("-m", *local, "seed=0,1", "hydra.sweep.dir=s")
    holder.kill()
    holder.communicate()
    assert ended.code == 2
    assert statuses(Path("s")) == ["failed", "done"]
    assert "is in use by another run" in read_sweep(Path("s"))["jobs"][0]["error"]


# Wishes to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_wish_to_stop_ends_a_sweep_between_blocks(
    mi_run: Callable[..., Ended], local: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, calls = pipeline.compress_linear, []

    def stop_in_the_second_job(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 16:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*arguments)

    monkeypatch.setattr(pipeline, "compress_linear", stop_in_the_second_job)
    sweep = ["-m", *local, "seed=0,1,2"]
    ended = mi_run(*sweep)
    assert ended.code == 75
    assert statuses() == ["done", "interrupted", "not run"]
    assert read_sweep()["status"] == "interrupted"
    assert ended.err == (
        f"mi-run: stopped by {name}, 1 of 3 jobs are finished: "
        "give the same command again to continue\n"
    )
    assert re.search(r"│ +2 │ 1 +│ interrupted", ended.out)
    assert re.search(r"│ +3 │ 2 +│ not run", ended.out)
    # The block at work was finished: 7 linears of the second job.
    assert len(calls) == 14 + 7
    assert mi_run(*sweep).code == 0
    assert statuses() == ["skipped", "done", "done"]
    assert len(calls) == 3 * 14


# Processes


@pytest.fixture
def place(tmp_path: Path, local: list[str]) -> tuple[Path, list[str]]:
    """Give an empty folder, and the command of three small jobs in it."""
    root = tmp_path / "place"
    root.mkdir()
    return root, ["-m", *local, *AXES]


def kill_and_continue(root: Path, command: list[str], jobs: int, enough: int) -> None:
    """Kill a sweep in the middle of a job, continue it, and require an unbroken one.

    Args:
        root: where it is done.
        command: the command of the sweep.
        jobs: number of its jobs.
        enough: finished jobs after which it is killed.
    """
    unbroken = start(root, *command)
    out, err = unbroken.communicate()
    assert unbroken.returncode == 0, out + err
    (root / "sweeps").rename(root / "unbroken")
    broken = start(root, *command)
    sweeps = root / "sweeps"
    wait_until(lambda: completed(sweeps) >= enough and has_compressed(sweeps), broken)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    finished = identities(sweeps)
    assert enough <= len(finished) < jobs
    assert read_sweep(sweeps)["status"] == "running"
    again = start(root, *command)
    out, err = again.communicate()
    assert again.returncode == 0, out + err
    assert statuses(sweeps).count("skipped") == len(finished)
    assert statuses(sweeps).count("done") == jobs - len(finished)
    after = identities(sweeps)
    assert {name: after[name] for name in finished} == finished
    assert artefacts(sweeps) == artefacts(root / "unbroken")
    resumed = [read_result(run).resumed for run in run_directories(sweeps)]
    assert sorted(resumed) == [0] * (jobs - 1) + [1]


def test_a_killed_sweep_is_completed_by_the_same_command(place: tuple[Path, list[str]]) -> None:
    kill_and_continue(*place, jobs=3, enough=1)


@pytest.mark.slow
def test_a_killed_sweep_of_the_embedded_model_is_completed(tmp_path: Path) -> None:
    # Nothing is read that the unbroken sweep has left, so that the records must be equal too.
    small = ["tracking=disabled", "cache=false", "evaluation.datasets.embedded.max_windows=4"]
    kill_and_continue(tmp_path, ["-m", *MANY_AXES, *small], jobs=12, enough=5)


def test_two_equal_sweeps_at_once_are_one(place: tuple[Path, list[str]]) -> None:
    root, command = place
    command = [*command[: -len(AXES)], *MANY_AXES]
    first = start(root, *command)
    locks = lambda: [path.read_text() for path in root.rglob("sweep.lock")]  # noqa: E731
    wait_until(lambda: any(locks()), first)
    second = start(root, *command)
    _, err = second.communicate()
    assert second.returncode == 2
    (line,) = err.splitlines()
    assert f"is being swept by process {first.pid} on {socket.gethostname()}" in line
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate()
    assert first.returncode == 75
    assert "stopped by SIGTERM" in err
    assert locks() == [""]
    shutil.rmtree(root)
