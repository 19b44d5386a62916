"""What a sweep will do and is likely to take, before it is launched."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mi_experiments.records.result import RESULT
from mi_experiments.sweeps.jobs import Job, Sweep
from mi_experiments.sweeps.outcomes import (
    Estimate,
    Experience,
    Outcome,
    describe,
    estimate,
    read_experience,
    try_result,
)
from mi_experiments.sweeps.sweep_table import print_plan


def look_at(sweep: Sweep, job: Job) -> Outcome:
    """Return what is known of a job before anything is launched."""
    outcome = Outcome(job.directory, job.swept)
    if job.refusal is not None:
        return replace(outcome, status="failed", error=job.refusal, exit_code=2)
    result = try_result(sweep.directory / job.directory)
    complete = result is not None and result.status == "completed"
    if result is not None and complete and job.is_asked_in(result.config):
        from mi_experiments.experiment.finished import is_intact

        if not is_intact(sweep.directory / job.directory, job.export):
            # Its own process says what is damaged, and computes that again.
            return outcome
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
        for record in sorted(place.glob(f"*/{RESULT}"))
    ]
    return [run for run in found if run is not None]


def expect(
    sweep: Sweep, outcomes: Sequence[Outcome], runs: Sequence[Experience]
) -> Estimate | None:
    """Estimate what is still to be done."""
    waiting = {outcome.directory for outcome in outcomes if outcome.status == "not run"}
    return estimate([job.config for job in sweep.jobs if job.directory in waiting], runs)
