"""What a person reads of a sweep: the plan, a line for each job, and the table at the end."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mi_experiments.comparison.inert import visible
from mi_experiments.evaluation.measurements import PERPLEXITY
from mi_experiments.sweeps.outcomes import Estimate, Outcome, tell_models

SHOWN_VALUES = 12
"""Most values of one key that the plan names."""


def print_plan(
    directory: Path,
    axes: Mapping[str, Sequence[str]],
    outcomes: Sequence[Outcome],
    alike: int,
    expected: Estimate | None,
    console: Console,
) -> None:
    """Print what a sweep will do.

    Args:
        directory: the directory of the sweep.
        axes: values of each swept key.
        outcomes: the outcomes of all jobs, as they are now.
        alike: combinations that are the same job as another one.
        expected: what is to be done is likely to take; None if nothing is known.
        console: the console to print on.
    """
    counts = {status: 0 for status in ("skipped", "not run", "failed")}
    for outcome in outcomes:
        counts[outcome.status] += 1
    table = Table(title=f"sweep {show_path(directory)}", title_justify="left", show_header=False)
    table.add_row("jobs", str(len(outcomes)) + (f"  (and {alike} alike)" if alike else ""))
    table.add_row("already finished", str(counts["skipped"]))
    table.add_row("to do", str(counts["not run"]))
    if counts["failed"]:
        first = next(outcome for outcome in outcomes if outcome.status == "failed")
        table.add_row("cannot run", Text(visible(f"{counts['failed']}: {first.error}")))
    for key, values in axes.items():
        shown = ", ".join(values[:SHOWN_VALUES]) + (", …" if len(values) > SHOWN_VALUES else "")
        table.add_row("swept", Text(visible(f"{key} = {shown}")))
    if counts["not run"] and expected is not None:
        table.add_row("time", f"about {show_seconds(expected.seconds)}, one job after another")
        table.add_row("disk", f"about {show_bytes(expected.bytes)}")
        table.add_row("estimated from", expected.basis)
    elif counts["not run"]:
        table.add_row("time and disk", "unknown: no finished run of the model, here or in outputs")
    console.print(table)


def print_job(
    number: int,
    total: int,
    outcome: Outcome,
    elapsed: float,
    left: Estimate | None,
    console: Console,
) -> None:
    """Print one line of a job: which, what is swept, what became of it, and the time."""
    swept = " ".join(f"{key}={value}" for key, value in outcome.swept.items())
    parts = [f"job {number} of {total}", swept]
    if outcome.status != "not run":
        measured = [show_measured(outcome, name) for name in outcome.dense]
        parts += [outcome.status, *measured, show_cost(outcome)]
    parts.append(f"elapsed {show_seconds(elapsed)}")
    if left is not None and left.seconds:
        parts.append(f"about {show_seconds(left.seconds)} left")
    line = " · ".join(part for part in parts if part)
    console.print(visible(line), soft_wrap=True, highlight=False, markup=False)


def print_outcomes(
    directory: Path, axes: Mapping[str, Sequence[str]], outcomes: Sequence[Outcome],
    console: Console,
) -> None:  # fmt: skip
    """Print what became of all jobs, of each failure where its log is, and what to type next."""
    table = Table(title="jobs", title_justify="left")
    measured = list(dict.fromkeys(name for outcome in outcomes for name in outcome.dense))
    measured = measured or [PERPLEXITY]
    headings = ("job", *axes, "status", *measured, "effective bits", "seconds")
    for heading in headings:
        right = heading in {"job", "effective bits", "seconds"}
        table.add_column(
            Text(visible(heading)), justify="right" if right else "left", overflow="fold"
        )
    for number, outcome in enumerate(outcomes, start=1):
        bits, seconds = outcome.effective_bits, outcome.seconds
        table.add_row(
            str(number),
            *(Text(visible(outcome.swept[key])) for key in axes),
            outcome.status,
            *(Text(visible(show_measured(outcome, name))) for name in measured),
            "" if bits is None else f"{bits:.4f}",
            "" if seconds is None else f"{seconds:.1f}",
        )
    console.print(table)
    lines = []
    for number, outcome in enumerate(outcomes, start=1):
        if outcome.error is not None:
            log = f"  ({show_path(directory / outcome.log)})" if outcome.log else ""
            lines.append(f"job {number} {outcome.status}: {' '.join(outcome.error.split())}{log}")
    if models := tell_models(outcomes):
        lines.append(models)
    lines.append(f"records  {show_path(directory)}")
    if any(outcome.compressed for outcome in outcomes):
        lines.append(f"compare  mi-compare {show_path(directory)}")
    if (directory / "wandb").is_dir():
        lines.append(f"W&B      wandb leet {show_path(directory / 'wandb')}")
    for line in lines:
        console.print(visible(line), soft_wrap=True, highlight=False, markup=False)


def show_measured(outcome: Outcome, measurement: str) -> str:
    """Show what is known of one measurement of the dense and the compressed model, by text."""
    texts = []
    dense = outcome.dense.get(measurement, {})
    compressed = outcome.compressed.get(measurement, {})
    for name, value in dense.items():
        after = f" → {compressed[name]:.4f}" if name in compressed else ""
        named = f"{name} " if len(dense) > 1 else ""
        texts.append(f"{named}{value:.4f}{after}")
    return ", ".join(texts)


def show_cost(outcome: Outcome) -> str:
    """Show effective bits and seconds."""
    bits = "" if outcome.effective_bits is None else f"{outcome.effective_bits:.3f} bits "
    return bits + ("" if outcome.seconds is None else f"{outcome.seconds:.1f} s")


def show_seconds(seconds: float) -> str:
    """Show a time: `42 s`, `0:03:10`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def show_bytes(size: float) -> str:
    """Show a size on disk."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def show_path(path: Path) -> str:
    """Show a path as it is typed from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
