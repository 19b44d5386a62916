"""What becomes of jobs, what they are likely to take, and who holds a sweep."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import make_broken_run, make_config, make_run

from mi_experiments.errors import InputError
from mi_experiments.records.record_types import short_hash
from mi_experiments.records.result import write_result
from mi_experiments.sweeps.outcomes import (
    Experience,
    JobEnd,
    Outcome,
    estimate,
    lock_sweep,
    read_experience,
    read_outcome,
    record_version,
    tell_models,
    write_sweep,
)

WAITING = Outcome("job", {"seed": "0"})


def test_an_outcome_has_the_numbers_of_the_record(tmp_path: Path) -> None:
    result = make_run(tmp_path / "job", {"stories": 0.25, "news": 0.5})
    outcome = read_outcome(WAITING, tmp_path, None, JobEnd())
    assert result.bits is not None
    assert outcome == Outcome(
        "job", {"seed": "0"}, status="done", exit_code=0, seconds=1.75,
        dense={"perplexity": {t: e.perplexity for t, e in result.dense.items()}},
        compressed={"perplexity": {t: e.perplexity for t, e in result.compressed.items()}},
        effective_bits=result.bits.effective,
    )  # fmt: skip
    # A launcher that broke down afterwards changes nothing of that.
    assert read_outcome(WAITING, tmp_path, None, JobEnd("worker lost", 1)) == outcome
    assert read_outcome(WAITING, tmp_path, None, None) == outcome


@pytest.mark.parametrize(
    ("status", "end", "expected"),
    [
        ("failed", JobEnd("no factor", 3), ("failed", "no factor", 3)),
        ("failed", None, ("failed", "as recorded", 1)),
        ("interrupted", JobEnd("stopped", 75), ("interrupted", "stopped", 75)),
        ("running", None, ("interrupted", "its process ended without a word", 1)),
    ],
)
def test_what_became_of_a_job_that_did_not_complete(
    tmp_path: Path, status: str, end: JobEnd | None, expected: tuple[str, str, int]
) -> None:
    make_broken_run(tmp_path / "job", status, None if status == "running" else "as recorded")
    outcome = read_outcome(WAITING, tmp_path, None, end)
    assert (outcome.status, outcome.error, outcome.exit_code) == expected


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (None, "not run"),
        (JobEnd("stopped by SIGTERM", 75), "not run"),
        (JobEnd("in use by another run", 2), "failed"),
    ],
)
def test_a_record_of_an_earlier_launch_says_nothing_of_this_one(
    tmp_path: Path, end: JobEnd | None, status: str
) -> None:
    make_broken_run(tmp_path / "job", "failed", "last week")
    seen = record_version(tmp_path / "job")
    outcome = read_outcome(WAITING, tmp_path, seen, end)
    assert outcome.status == status
    assert outcome.error != "last week"
    # The same record, written again, is one of this launch.
    result = make_run(tmp_path / "other")
    write_result(replace(result, status="failed", error="now"), tmp_path / "job")
    assert read_outcome(WAITING, tmp_path, seen, None).error == "now"


def test_the_record_of_a_sweep_is_what_its_table_shows(tmp_path: Path) -> None:
    outcomes = [replace(WAITING, status="failed", error="why"), WAITING]
    write_sweep(tmp_path, "mi-run -m seed=0,1", "failed", 1.5, outcomes)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["status"] == "failed"
    assert [Outcome(**job) for job in content["jobs"]] == outcomes


def test_jobs_on_replaced_files_of_a_model_are_named() -> None:
    def jobs(*models: tuple[str, str | None]) -> list[Outcome]:
        return [
            replace(WAITING, swept={"model.path": path, "seed": str(seed)}, model_files=files)
            for seed, (path, files) in enumerate(models)
        ]

    assert tell_models(jobs(("a", "x"), ("b", "y"), ("a", "x"), ("a", None))) == ""
    line = tell_models(jobs(("a", "x"), ("b", "y"), ("a", "z"), ("a", "x")))
    assert line.endswith("have changed between jobs: x (job 1, 4); z (job 3)")


def test_an_outcome_has_the_files_of_its_model(tmp_path: Path) -> None:
    make_run(tmp_path / "job", origin={"model_files": {"model.safetensors": "a"}})
    outcome = read_outcome(WAITING, tmp_path, None, None)
    assert outcome.model_files == short_hash({"model.safetensors": "a"})


def run_of(tokens: int, seconds: float, size: int, place: str = "this sweep") -> Experience:
    return Experience(("local", "models/a"), tokens, float(seconds), size, place)


def jobs_of(*nsamples: int) -> list[dict[str, object]]:
    return [make_config(dataset__nsamples=number) for number in nsamples]


def test_estimates_are_means_of_the_nearest_runs() -> None:
    runs = [run_of(64, 1, 10), run_of(64, 3, 30), run_of(640, 100, 500)]
    runs.append(run_of(64, 9, 9, "outputs"))
    expected = estimate(jobs_of(1, 2, 9), runs)  # 64, 128 and 576 tokens
    assert expected is not None
    assert (expected.seconds, expected.bytes) == (2 + 2 + 100, 20 + 20 + 500)
    assert expected.basis == "3 finished runs of this sweep, nearest in tokens"


def test_nothing_is_estimated_of_an_unknown_model() -> None:
    assert estimate(jobs_of(1), []) is None
    other = replace(run_of(64, 1, 1), model=("local", "models/b"))
    assert estimate(jobs_of(1), [other]) is None
    outputs = estimate(jobs_of(1), [other, run_of(64, 9, 8, "outputs")])
    assert outputs is not None
    assert (outputs.seconds, outputs.basis) == (9, "1 finished runs of outputs, nearest in tokens")


def test_experience_is_that_of_finished_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "job", dataset__nsamples=3)
    (tmp_path / "job" / "plan.safetensors").write_bytes(b"12345")
    size = (tmp_path / "job" / "result.json").stat().st_size + 5
    assert read_experience(tmp_path / "job", "this sweep") == run_of(3 * 64, 1.75, size)
    make_broken_run(tmp_path / "broken", "failed", "why")
    assert read_experience(tmp_path / "broken", "this sweep") is None
    assert read_experience(tmp_path / "none", "this sweep") is None


def test_a_held_sweep_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    held = pytest.raises(InputError, match=f"process {os.getpid()} on ")
    with lock_sweep(tmp_path), held, lock_sweep(tmp_path):
        pass
    with lock_sweep(tmp_path):
        pass


def test_a_lock_does_not_outlive_the_process_that_took_it(tmp_path: Path) -> None:
    """Neither a forked child nor one of another program goes on holding it."""
    script = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from mi_experiments.sweeps.outcomes import lock_sweep\n"
        "with lock_sweep(Path(sys.argv[1])):\n"
        "    other = subprocess.Popen(['sleep', '60'])\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(60)\n"
        "    print(child, other.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert holder.stdout is not None
    children = [int(number) for number in holder.stdout.readline().split()]
    try:
        with pytest.raises(InputError, match=f"process {holder.pid} on "), lock_sweep(tmp_path):
            pass
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)  # It is alive.
        with lock_sweep(tmp_path):
            pass
    finally:
        holder.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        holder.stdout.close()
