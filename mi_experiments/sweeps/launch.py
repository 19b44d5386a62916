"""The jobs of a sweep that are not finished, launched, and what became of each."""

import sys
import time
from collections.abc import Callable, Sequence

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from mi_experiments.config.secrets import scrub
from mi_experiments.errors import MiError, in_a_line
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.export.stored_model import tidy
from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.persistence.commits import Commits
from mi_experiments.records.provenance import scrub_argument
from mi_experiments.records.result import Result, write_result
from mi_experiments.sweeps.jobs import Job, Sweep
from mi_experiments.sweeps.launchers import every_result, launcher_name, share_threads
from mi_experiments.sweeps.outcomes import (
    FINISHED,
    JobEnd,
    read_experience,
    read_outcome,
    record_version,
    try_result,
    write_sweep,
)
from mi_experiments.sweeps.preview import expect, look_at, read_past, show_plan
from mi_experiments.sweeps.sweep_table import print_job, print_outcomes

Task = Callable[[DictConfig], JobEnd]
"""Does one job; it returns its failure, and never raises it."""


class Launch:
    """One launch of a sweep: the jobs that are not finished, and what becomes of each."""

    def __init__(self, sweep: Sweep, console: Console, stop: StopRequest) -> None:
        self.sweep = sweep
        self.console = console
        self.stop = stop
        self.started = time.monotonic()
        self.versions: dict[str, int | None] = {}
        self.outcomes = {job.directory: look_at(sweep, job) for job in sweep.jobs}
        self.runs = read_past(sweep)

    def run(self, task: Task) -> JobEnd:
        """Print the plan, do what is to be done, print the table."""
        sweep = self.sweep
        show_plan(sweep, list(self.outcomes.values()), self.console)
        composed = OmegaConf.to_yaml(scrub(OmegaConf.to_container(sweep.master)))
        write_atomically(sweep.directory / "multirun.yaml", composed.encode())
        for job in sweep.jobs:
            self.prepare(job)
        self.write("running")
        waiting = [job for job in sweep.jobs if self.outcomes[job.directory].status == "not run"]
        try:
            self.launch(waiting, task)
        except KeyboardInterrupt:
            self.stop.received = self.stop.received or "SIGINT"
            for job in waiting:
                self.note(job, None)
        return self.end()

    def prepare(self, job: Job) -> None:
        """Leave what a job leaves that is not to be launched."""
        run_dir = self.sweep.directory / job.directory
        outcome = self.outcomes[job.directory]
        if outcome.status == "skipped":
            # A process that was killed at the end of the job may have left something to remove.
            tidy(Commits(run_dir, {}), job.export)
        elif job.refusal is not None and record_version(run_dir) is None:
            run_dir.mkdir(exist_ok=True)
            write_result(refused_result(job), run_dir)

    def launch(self, jobs: Sequence[Job], task: Task) -> None:
        """Hand jobs to Hydra's launcher, and note how each ended."""
        self.versions = {
            job.directory: record_version(self.sweep.directory / job.directory) for job in jobs
        }
        launcher = open_launcher(self.sweep, task)
        config = self.sweep.master.hydra
        # The basic launcher works in this process: a job at a time, so that between two of them
        # a wish to stop is granted, and the record is written.
        alone = launcher_name(config.launcher) == "basic"
        size = 1 if alone else config.sweeper.max_batch_size or max(len(jobs), 1)
        for start in range(0, len(jobs), size):
            if self.stop.received:
                return
            batch = jobs[start : start + size]
            if alone and self.console.is_terminal:
                self.say(batch[0])
            # A job alone has the number that it has in the whole sweep, whatever is left to do.
            first = self.sweep.jobs.index(batch[0]) if alone else start
            # The same for every command of this sweep, whatever is left to do.
            total = len(self.sweep.jobs)
            at_once = min(config.sweeper.max_batch_size or total, total)
            with share_threads(config.launcher, at_once), every_result(lambda: self.stop.received):
                ends = self.launch_batch(launcher, batch, first)
            for job, end in zip(batch, ends, strict=True):
                self.note(job, end)
                self.say(job)
            self.write("running")

    def launch_batch(
        self, launcher: Launcher, jobs: Sequence[Job], first: int
    ) -> list[JobEnd | None]:
        """Launch jobs; returns how each ended, as far as its process could say.

        A launcher may break down over one job, and take others with it. Those that had not begun
        are launched again together, and those that were at work alone, so that the one that it
        broke down over is known.
        """
        try:
            returned = launcher.launch([job.overrides for job in jobs], initial_job_idx=first)
        except Exception as error:  # noqa: BLE001 - what a launcher raises ends no other job
            if len(jobs) == 1 or self.stop.received:
                return [describe_failure(error)] * len(jobs)
        else:
            return [read_end(job) for job in returned]
        begun = [job for job in jobs if self.has_begun(job)]
        fresh = [job for job in jobs if job not in begun]
        groups = [[job] for job in begun if not self.is_complete(job)]
        groups += [fresh] if begun and fresh else [[job] for job in fresh]
        ends: dict[str, JobEnd | None] = {}
        for group in groups:
            again = self.launch_batch(launcher, group, first)
            ends |= {job.directory: end for job, end in zip(group, again, strict=True)}
        return [ends.get(job.directory) for job in jobs]

    def has_begun(self, job: Job) -> bool:
        """Tell whether this launch has written a record of a job."""
        seen = record_version(self.sweep.directory / job.directory)
        return seen != self.versions[job.directory]

    def is_complete(self, job: Job) -> bool:
        """Tell whether the record of a job says that it completed."""
        result = try_result(self.sweep.directory / job.directory)
        return result is not None and result.status == "completed"

    def say(self, job: Job) -> None:
        """Say in a line which job it is, what became of it, and how long the others will take."""
        number, total = self.sweep.jobs.index(job) + 1, len(self.sweep.jobs)
        left = expect(self.sweep, list(self.outcomes.values()), self.runs)
        outcome = self.outcomes[job.directory]
        print_job(number, total, outcome, self.elapsed, left, self.console)

    def note(self, job: Job, end: JobEnd | None) -> None:
        """Keep what became of a job."""
        before = self.outcomes[job.directory]
        if before.status != "not run":
            return
        seen = self.versions[job.directory]
        outcome = read_outcome(before, self.sweep.directory, seen, end)
        self.outcomes[job.directory] = outcome
        run = read_experience(self.sweep.directory / job.directory, "this sweep")
        if run is not None:
            self.runs.insert(0, run)

    @property
    def elapsed(self) -> float:
        """Seconds since the launch began."""
        return time.monotonic() - self.started

    def write(self, status: str) -> None:
        """Write the record."""
        command = " ".join(["mi-run", *(scrub_argument(argument) for argument in sys.argv[1:])])
        outcomes = list(self.outcomes.values())
        write_sweep(self.sweep.directory, command, status, self.elapsed, outcomes)

    def end(self) -> JobEnd:
        """Print the table; returns what the command ends with, and its last line."""
        outcomes = list(self.outcomes.values())
        print_outcomes(self.sweep.directory, self.sweep.axes, outcomes, self.console)
        finished = sum(outcome.status in FINISHED for outcome in outcomes)
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        so_far = f"{finished} of {len(outcomes)} jobs are finished"
        again = "give the same command again to continue"
        if self.stop.received:
            self.write("interrupted")
            return JobEnd(f"stopped by {self.stop.received}, {so_far}: {again}", 75)
        if failed:
            self.write("failed")
            first = f"{len(failed)} failed, the first {failed[0].directory}: {failed[0].error}"
            return JobEnd(f"{so_far}, {first}", failed[0].exit_code or 1)
        self.write("completed" if finished == len(outcomes) else "interrupted")
        return JobEnd() if finished == len(outcomes) else JobEnd(f"{so_far}: {again}", 75)


def refused_result(job: Job) -> Result:
    """Return the record of a job whose config cannot be used."""
    return Result(
        status="failed", error=job.refusal, config=scrub(job.config), provenance=None, dense={},
        compressed={}, bits=None, sparsity=None, weights=None, coverage=None, memory={},
        seconds={}, resumed=0,
    )  # fmt: skip


def open_launcher(sweep: Sweep, task: Task) -> Launcher:
    """Return the launcher that the config names."""
    loader, callbacks = sweep.hydra.config_loader, Callbacks(sweep.master)
    return Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
        task_function=task,
        config=sweep.master,
    )


def read_end(returned: JobReturn) -> JobEnd | None:
    """Return what a job's process said."""
    if returned.status is not JobStatus.COMPLETED:
        error = returned._return_value
        return describe_failure(error) if isinstance(error, Exception) else None
    end = returned.return_value
    return end if isinstance(end, JobEnd) else None


def describe_failure(error: Exception) -> JobEnd:
    """Return an exception as the end of a job."""
    if isinstance(error, MiError):
        return JobEnd(scrub(str(error)), error.exit_code)
    if isinstance(error, OSError):
        return JobEnd(scrub(in_a_line(error)), 2)
    first = (str(error).strip() or "no message").splitlines()[0]
    return JobEnd(scrub(f"{type(error).__name__}: {first}"), 1)
