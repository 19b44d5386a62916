"""What Hydra's launchers leave to us: threads, jobs that die, and schedulers that want a job back.

A run stops between blocks when it is asked to, so a job's process takes the signals that submitit
would act on at once, and hands them back to submitit when the block is committed.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from mi_experiments.errors import ResumableError

log = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
"""Where it is set, every job has as many, whatever launches it."""

POLL = 10.0
"""Seconds between two questions to SLURM."""


def launcher_name(launcher: DictConfig) -> str:
    """Return `basic`, or the name by which Hydra's users choose a launcher."""
    target = str(launcher.get("_target_"))
    if BasicLauncherConf._target_ == target:
        return "basic"
    package = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
    submitit = {f"{package}.LocalLauncher": "submitit_local"}
    submitit |= {f"{package}.SlurmLauncher": "submitit_slurm"}
    return submitit.get(target, target)


def threads_of_job(launcher: DictConfig, at_once: int) -> int | None:
    """Return how many threads a job gets, or None where its launcher decides (joblib divides).

    Args:
        launcher: its config.
        at_once: most jobs that work at the same time, if it limits none of them.
    """
    name = launcher_name(launcher)
    if name == "submitit_slurm":
        return launcher.cpus_per_task or launcher.cpus_per_gpu or 1
    if name == "submitit_local":
        return launcher.cpus_per_task or max(len(os.sched_getaffinity(0)) // at_once, 1)
    return None


@contextmanager
def share_threads(launcher: DictConfig, at_once: int) -> Iterator[None]:
    """Let jobs inherit the number of their threads, unless a person has set it."""
    threads = threads_of_job(launcher, at_once)
    if threads is None or THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(threads)
    try:
        yield
    finally:
        del os.environ[THREADS]


@contextmanager
def threads_of(begun: dict[str, Any] | None) -> Iterator[None]:
    """Go on with as many threads as a run was begun with, since their number moves bits.

    Args:
        begun: manifest of the run; None if nothing was begun.
    """
    before = torch.get_num_threads()
    threads = None if begun is None else begun["run_identity"].get("threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def every_result(stopped: Callable[[], str | None]) -> Iterator[None]:
    """Let Hydra's submitit launchers wait for all jobs, and hear of the one that died.

    As they are, they raise at the first job without a result, while others work, and learn of its
    death from SLURM's accounting alone, which a cluster need not have.

    Args:
        stopped: the wish to stop, once there is one; it is passed on to the jobs.
    """
    try:
        from submitit.core.core import Job
        from submitit.core.utils import UncompletedJobError
    except ImportError:
        yield
        return
    original = Job.results

    def results(job: Any) -> list[JobReturn]:
        line = "its process ended without a result"
        if wait_for(job, stopped):
            try:
                returned: list[JobReturn] = original(job)
            except UncompletedJobError as error:
                log.info("%s: %s", line, error)
            else:
                return returned
        died = ChildProcessError(f"{line}, see {job.paths.stderr}")
        return [JobReturn(_return_value=died, status=JobStatus.FAILED)]

    setattr(Job, original.__name__, results)
    try:
        yield
    finally:
        setattr(Job, original.__name__, original)


def wait_for(job: Any, stopped: Callable[[], str | None]) -> bool:
    """Wait until a job of submitit has ended; returns whether submitit knows it."""
    local = hasattr(job, "_process")
    asked, told = time.monotonic(), False
    while not job.done():
        if stopped() and not told:
            told = True
            tell_to_stop(job, local)
        if not local and time.monotonic() - asked > POLL:
            if not is_queued(job.job_id):
                return bool(job.done())
            asked = time.monotonic()
        time.sleep(0.2)
    return True


def is_queued(job_id: str) -> bool:
    """Tell whether SLURM still has work to do for a job, as far as it says."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # A controller that does not answer says nothing about the job.
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.strip())


def tell_to_stop(job: Any, local: bool) -> None:
    """Ask a job to finish its block; one that waits for a node is taken back."""
    if local:
        job._process.send_signal(signal.SIGTERM)
        return
    # Cancelled, so that SLURM does not requeue it; until KillWait has passed it may end its block.
    subprocess.run(["scancel", job.job_id], capture_output=True, check=False)


def in_submitit_job() -> bool:
    """Tell whether this process works on a job of submitit."""
    return "SUBMITIT_EXECUTOR" in os.environ


def stop_signals() -> Sequence[signal.Signals]:
    """Return the signals, beside SIGTERM and SIGUSR1, that ask a job to stop."""
    return (signal.SIGINT, signal.SIGUSR2) if in_submitit_job() else (signal.SIGINT,)


def leave(received: str | None, error: ResumableError) -> None:
    """End the process of a job that a scheduler has stopped, as the scheduler needs it.

    submitit puts the job back into the queue if the signal was its own (SIGUSR2, before the time
    limit). After any other one SLURM decides, by its preemption or `RequeueExit=75`: the process
    leaves no result, so that the sweep waits for as long as the job is in the queue.

    Args:
        received: the signal, if that is what stopped the run.
        error: what the run ended with.
    """
    if received is None or not in_submitit_job():
        return
    if received == "SIGUSR2":
        signal.raise_signal(signal.SIGUSR2)
    raise SystemExit(error.exit_code)
