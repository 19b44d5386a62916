"""A sweep with Hydra: which jobs there are, which are finished, and the others, launched.

Hydra composes, and its launchers launch. That a sweep has one directory, leaves out what is
finished and goes on when a job fails is decided here, in the process that was started.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from mi_experiments.atomic import write_atomically
from mi_experiments.commands.sweep_jobs import BASIC_SWEEPER, Job, Sweep, fix_directory, read_sweep
from mi_experiments.commands.sweep_tables import print_job, print_outcomes, print_plan
from mi_experiments.errors import MiError
from mi_experiments.provenance import scrub_argument
from mi_experiments.record import Result, write_result
from mi_experiments.resume import Commits, StopRequest
from mi_experiments.scrubbing import scrub
from mi_experiments.stored_model import tidy
from mi_experiments.sweeps import (
    FINISHED,
    Estimate,
    Experience,
    JobEnd,
    Outcome,
    describe,
    estimate,
    hold,
    read_experience,
    read_outcome,
    record_version,
    try_result,
    write_sweep,
)

Task = Callable[[DictConfig], JobEnd]


def run_sweep(
    arguments: Sequence[str], conf: str, task: Task, stop: StopRequest, console: Console
) -> JobEnd | None:
    """Do the sweep that a command line asks for; returns None if it asks for none.

    Args:
        arguments: of the command line.
        conf: the folder of configs.
        task: does one job; it returns its failure, and never raises it.
        stop: a wish to stop, granted between blocks and between jobs.
        console: receives the plan, a line for each job and the table.

    Raises:
        MiError: nothing was begun: another process holds the sweep, or no job can run.
    """
    args = get_args_parser().parse_args(list(arguments))
    elsewhere = ("help", "hydra_help", "cfg", "info", "shell_completion", "run")
    if any(getattr(args, flag) for flag in elsewhere) or args.experimental_rerun:
        return None
    with open_hydra(args, conf) as hydra:
        master = compose_master(hydra, args)
        if master is None:
            return None
        if master.hydra.sweeper.get("_target_") != BASIC_SWEEPER:
            # Another sweeper chooses its jobs as it goes; its workers must see one directory too.
            sys.argv.append(fix_directory(master))
            return None
        sweep = read_sweep(hydra, args, master)
        if sweep.master.dry_run:
            show_plan(sweep, [look_at(sweep, job) for job in sweep.jobs], console)
            return JobEnd()
        sweep.directory.mkdir(parents=True, exist_ok=True)
        with hold(sweep.directory):
            return Launch(sweep, console, stop).run(task)


@contextmanager
def open_hydra(args: argparse.Namespace, conf: str) -> Iterator[Hydra]:
    """Look for configs where Hydra would."""
    version.setbase("1.3")
    path = create_automatic_config_search_path(__file__, None, args.config_path or conf)
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("mi-run", path)
    finally:
        GlobalHydra.instance().clear()


def compose_master(hydra: Hydra, args: argparse.Namespace) -> DictConfig | None:
    """Compose what is not swept; None for a single run, or for what Hydra will refuse."""

    def compose(*more: str) -> DictConfig:
        name, overrides = args.config_name or "config", [*args.overrides, *more]
        return hydra.compose_config(name, overrides, run_mode=RunMode.MULTIRUN)

    if args.multirun:
        return compose("hydra.mode=MULTIRUN")
    try:
        master = compose()
    except (HydraException, OmegaConfBaseException):
        return None
    return master if master.hydra.mode is RunMode.MULTIRUN else None


def look_at(sweep: Sweep, job: Job) -> Outcome:
    """Return what is known of a job before anything is launched."""
    outcome = Outcome(job.directory, job.swept)
    if job.refusal is not None:
        return replace(outcome, status="failed", error=job.refusal, exit_code=2)
    result = try_result(sweep.directory / job.directory)
    if result is not None and result.status == "completed" and job.is_asked_in(result.config):
        return replace(describe(outcome, result), status="skipped", exit_code=0)
    return outcome


def show_plan(sweep: Sweep, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what will be done, and what it is likely to take."""
    runs = read_past(sweep)
    print_plan(sweep.directory, sweep.axes, outcomes, sweep.alike, expect(sweep, outcomes, runs),
               console)  # fmt: skip


def read_past(sweep: Sweep) -> list[Experience]:
    """Read what finished runs of this sweep took, then those of single runs."""
    places = {"this sweep": sweep.directory, "outputs": Path(sweep.master.hydra.run.dir).parent}
    found = [
        read_experience(record.parent, name)
        for name, place in places.items()
        for record in sorted(place.glob("*/result.json"))
    ]
    return [run for run in found if run is not None]


def expect(
    sweep: Sweep, outcomes: Sequence[Outcome], runs: Sequence[Experience]
) -> Estimate | None:
    """Estimate what is still to be done."""
    waiting = {outcome.directory for outcome in outcomes if outcome.status == "not run"}
    return estimate([job.config for job in sweep.jobs if job.directory in waiting], runs)


class Launch:
    """One launch of a sweep: the jobs that are not finished, and what becomes of each."""

    def __init__(self, sweep: Sweep, console: Console, stop: StopRequest) -> None:
        self.sweep = sweep
        self.console = console
        self.stop = stop
        self.started = time.monotonic()
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
        elif job.refusal is not None and not run_dir.exists():
            run_dir.mkdir()
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
        alone = config.launcher.get("_target_") == BasicLauncherConf._target_
        size = 1 if alone else config.sweeper.max_batch_size or max(len(jobs), 1)
        for start in range(0, len(jobs), size):
            if self.stop.received:
                return
            batch = jobs[start : start + size]
            if alone:
                self.announce(batch[0], start + 1, len(jobs))
            ends = launch_batch(launcher, batch, start)
            for number, (job, end) in enumerate(zip(batch, ends, strict=True), start + 1):
                self.note(job, end)
                self.report(job, number, len(jobs))
            self.write("running")

    def announce(self, job: Job, number: int, total: int) -> None:
        """Say what begins, where a person is looking."""
        if self.console.is_terminal:
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

    def report(self, job: Job, number: int, total: int) -> None:
        """Say in a line what became of a job."""
        outcome = self.outcomes[job.directory]
        left = expect(self.sweep, list(self.outcomes.values()), self.runs)
        print_job(number, total, outcome, self.elapsed, left, self.console)

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


def launch_batch(launcher: Launcher, jobs: Sequence[Job], first: int) -> list[JobEnd | None]:
    """Launch jobs; returns how each ended, as far as its process could say."""
    try:
        returned = launcher.launch([job.overrides for job in jobs], initial_job_idx=first)
    except Exception as error:  # noqa: BLE001 - what a launcher raises ends no other job
        return [describe_failure(error)] * len(jobs)
    return [read_end(job) for job in returned]


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
    if isinstance(error, OSError) and error.filename is not None:
        return JobEnd(f"{error.strerror}: {error.filename}", 2)
    first = (str(error).strip() or "no message").splitlines()[0]
    return JobEnd(scrub(f"{type(error).__name__}: {first}"), 1)
