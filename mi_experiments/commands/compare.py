"""mi-compare: the runs below some directories as one table, averaged, paired, pivoted, exported."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console

from mi_experiments.comparison.columns import (
    COUNT,
    INTERVAL,
    averaged_columns,
    find_column,
    result_columns,
    show_value,
    synonyms,
    varying,
)
from mi_experiments.comparison.formats import draw, write_table
from mi_experiments.comparison.identity import kept_apart, mixtures
from mi_experiments.comparison.inert import visible
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import (
    add_difference,
    average_over,
    joined_by_means,
    joined_by_pairs,
    pivot,
    split_baseline,
)
from mi_experiments.comparison.views.data import Comparison, choose_colour, gather_details
from mi_experiments.comparison.views.page import write_page
from mi_experiments.comparison.where import select_rows
from mi_experiments.errors import InputError, MiError
from mi_experiments.persistence.atomic import write_atomically

PROGRAM = "mi-compare"
SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".md": "markdown", ".tex": "latex",
            ".json": "json", ".txt": "table"}  # fmt: skip
EXAMPLES = """\
examples:
  mi-compare sweeps/embedded-0123456789                  what varies, and the results
  mi-compare sweeps --where "wbits.average <= 4 and n_groups.grouping in ['random', 'energy']"
  mi-compare sweeps --over seed --sort excess           means with 95 % t intervals
  mi-compare sweeps --baseline grouping=random --over seed      paired differences of excess
  mi-compare sweeps --over seed --pivot grouping wbits excess --output excess.tex --digits 3
  mi-compare sweeps --stability seed                    do the seeds group the channels alike?
  mi-compare sweeps --over seed --html sweeps.html      one page: plots, layers, sortable table

columns: the settings by config key (wbits.average) or short name (wbits); dense and compressed
perplexity, and dense_NAME and compressed_NAME of what else was measured; excess = compressed -
dense negative log-likelihood, nats per token; average_bits and effective_bits per weight; seconds;
peak_memory in bytes. Averaged columns have NAME_ci95 (half the width of the interval) and NAME_n
(samples) beside them.

A record that cannot be read is a note and left out; a run whose files contradict each other is
`inconsistent`, with no number. Runs of other model files, texts or numerics are never one mean.
Exit codes: 0 if anything could be compared, 2 if nothing could or the command line is wrong.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; expected failures are one line and an exit code."""
    try:
        compare(parse(list(sys.argv[1:] if arguments is None else arguments)))
        sys.stdout.flush()
    except MiError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has left; what Python flushes at its end must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}", InputError.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(line: str, code: int) -> None:
    """Print one line to standard error and leave."""
    print(f"{PROGRAM}: {visible(' '.join(line.split()))}", file=sys.stderr)
    sys.exit(code)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Compare runs: a row for each run and evaluation text, failed runs included.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="run directory, sweep, or any tree")
    add("--where", metavar="EXPRESSION", help="keep these rows: comparisons, and, or, not, in")
    add("--baseline", metavar="KEY=VALUE,...", help="add the paired difference of excess to it")
    add("--over", type=names, default=[], metavar="KEYS", help="average over these settings")
    add("--sort", type=names, default=[], metavar="KEYS", help="order of rows; -KEY: descending")
    add("--columns", type=names, default=[], metavar="NAMES", help="what to show, or: all")
    add("--stability", type=names, metavar="KEYS", help="do runs that differ in these group alike?")
    add("--pivot", nargs=3, metavar=("ROWS", "COLUMNS", "VALUE"), help="a table of two settings")
    add("--format", choices=list(dict.fromkeys(SUFFIXES.values())), help="default: by --output")
    add("--output", type=Path, metavar="FILE", help="write there instead of the terminal")
    add("--html", type=Path, metavar="FILE", help="write a page: plots, layers, sortable table")
    add("--plots", type=Path, metavar="DIR", help="write the plots of the page as PNG and PDF")
    add("--wandb", action="store_true", help="save a view of the runs in Weights & Biases")
    add("--by", metavar="KEY", help="the setting that colours tell apart (default: what varies)")
    add("--digits", type=int, metavar="N", help="decimals of results (table: 4; others: exact)")
    # argparse takes the value -excess for an option unless it is joined to its own.
    joined = re.sub(r"(^|\0)--sort\0(?=-\w)", r"\1--sort=", "\0".join(arguments))
    options = parser.parse_args(joined.split("\0") if joined else [])
    options.command = shlex.join([PROGRAM, *arguments])
    options.views = bool(options.html or options.plots or options.wandb)
    if options.stability and (options.over or options.pivot or options.columns or options.views):
        parser.error("--stability is a table of its own: leave out --over, --pivot and --columns")
    if options.pivot and options.views:
        parser.error("--pivot is for tables: leave out --html, --plots and --wandb")
    if options.by and not (options.html or options.plots):
        parser.error("--by is a plot's colour: give --html or --plots")
    if options.pivot and options.columns:
        parser.error("--columns and --pivot cannot be joined")
    if options.digits is not None and options.digits < 0:
        parser.error("--digits takes 0 or more")
    return options


def names(text: str) -> list[str]:
    """Split a comma list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def compare(options: argparse.Namespace) -> None:
    """Read, select, pair, average, sort, choose columns, and print or write."""
    form = choose_format(options.format, options.output)
    runs, shown, notes = make_table(options)
    if options.views:
        notes += write_views(compose(runs, shown, options, notes), options)
        if options.output is None and options.format is None:
            print_notes(notes)
            return
    if options.stability:
        # Imported late: only this needs torch.
        from mi_experiments.comparison.group_agreement import agreement_over

        shown = agreement_over(runs, options.paths, options.stability, notes)
    elif options.pivot:
        shown = pivot(shown, *options.pivot)
    else:
        shown = shown[choose_columns(shown, options.columns, form)]
    deliver(shown, form, options, notes)


def make_table(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the runs in order; they or their means, in order; and notes about them."""
    left_out: list[str] = []
    runs = read_runs(options.paths, left_out)
    if options.where:
        runs = select_rows(runs, options.where)
    notes = left_out + unfinished(runs) + kept_apart(runs, varying(runs))
    if options.baseline:
        runs = add_difference(runs, options.baseline)
        alone = int((runs["difference"].isna() & (runs["status"] == "completed")).sum())
        notes += [f"{alone} rows have no partner with {options.baseline}"] * bool(alone)
        keys = [part.partition("=")[0] for part in split_baseline(options.baseline)]
        notes += mixtures(runs, joined_by_pairs(runs, keys), "--baseline: differences")
    if not options.over:
        runs = sort_rows(runs, options.sort)
        return runs, runs, notes
    means = sort_rows(average_over(runs, options.over), options.sort)
    notes += mixtures(runs, joined_by_means(runs, options.over), "--over: a mean")
    # The runs have no column for what an average adds: `runs`, `excess_ci95`.
    of_runs = [key for key in options.sort if key.removeprefix("-") in {*runs, *synonyms(runs)}]
    return sort_rows(runs, of_runs), means, notes


def sort_rows(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Order the rows by columns, the first of them first; `-KEY` is descending."""
    for key in reversed(keys):
        column = find_column(frame, key.removeprefix("-"))
        rising = not key.startswith("-")
        try:
            frame = frame.sort_values(column, ascending=rising, kind="stable", ignore_index=True)
        except TypeError:  # numbers and text in one column
            shown = frame.assign(**{column: frame[column].map(show_value)})
            order = shown.sort_values(column, ascending=rising, kind="stable").index
            frame = frame.loc[order].reset_index(drop=True)
    return frame


def compose(
    runs: pd.DataFrame,
    shown: pd.DataFrame,
    options: argparse.Namespace,
    notes: list[str] | None = None,
) -> Comparison:
    """Return what the views show: the runs and, where `shown` is their means, both.

    Notes receive what cannot be read.
    """
    means = shown if options.over else None
    asked = [] if options.over else options.columns
    return Comparison(
        runs=runs,
        means=means,
        over=tuple(options.over),
        columns=page_columns(runs, asked),
        mean_columns=page_columns(shown, options.columns) if options.over else (),
        colour=choose_colour(shown, options.by),
        details=gather_details(options.paths, runs["run"], notes),
        command=options.command,
    )


def page_columns(frame: pd.DataFrame, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the page's table: those of a file, the errors as the last."""
    columns = choose_columns(frame, asked, "page")
    return tuple(sorted(columns, key=lambda name: not asked and name == "error"))


def write_views(comparison: Comparison, options: argparse.Namespace) -> list[str]:
    """Write what was asked for beside the table, and return what is to be said about it."""
    count = len(comparison.details)
    if options.html:
        write_atomically(options.html, write_page(comparison).encode())
        print(f"{options.html}: a page of {count} {'run' if count == 1 else 'runs'}")
    notes: list[str] = []
    if options.plots:
        with extra("--plots", "plots"):
            from mi_experiments.comparison.views.plots import write_plots
        drawn, notes = write_plots(comparison, options.plots)
        print(f"{options.plots}: {len(drawn)} plots as PDF and PNG")
    if options.wandb:
        with extra("--wandb", "workspaces"):
            from mi_experiments.comparison.views.workspace import publish_workspace
        print(publish_workspace(comparison, options.paths[0]))
    return notes


@contextmanager
def extra(option: str, name: str) -> Iterator[None]:
    """Say how to install what an option needs where that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        install = f"pip install 'mi-experiments[{name}]'"
        raise InputError(f"{option} needs {module}: {install}") from error


def choose_format(form: str | None, output: Path | None) -> str:
    """Return the format: as asked, by the file's suffix, or a table in the terminal."""
    if form == "parquet" and output is None:
        raise InputError("--format parquet is binary: give --output FILE")
    if form or output is None:
        return form or "table"
    if output.suffix not in SUFFIXES:
        raise InputError(f"--output {output}: give --format, or one of {', '.join(SUFFIXES)}")
    return SUFFIXES[output.suffix]


def unfinished(frame: pd.DataFrame) -> list[str]:
    """Return a line for each run that is not completed: its status and error."""
    runs = frame[frame["status"] != "completed"].drop_duplicates("run")
    return [
        f"{run} {status}" + ("" if pd.isna(error) else f": {' '.join(error.split())}")
        for run, status, error in zip(runs["run"], runs["status"], runs["error"], strict=True)
    ]


def choose_columns(frame: pd.DataFrame, asked: Sequence[str], form: str) -> list[str]:
    """Return the columns asked for; by default what varies between the rows, and the results.

    Interval and count go with a mean.
    """
    if asked == ["all"]:
        return list(frame)
    if asked:
        found = [
            find_column(frame, name) + part for name in asked for part in ("", INTERVAL, COUNT)
        ]
        return [name for name in dict.fromkeys(found) if name in frame]
    shown = ["run"]
    if (frame["status"] != "completed").any():
        # In a table the errors are lines below it.
        shown += ["status"] if form == "table" else ["status", "error"]
    shown += [*varying(frame), "runs"]
    results = averaged_columns(frame) if "runs" in frame else result_columns(frame)
    shown += [name + part for name in results for part in ("", INTERVAL, COUNT)]
    return [name for name in shown if name in frame]


def deliver(
    frame: pd.DataFrame, form: str, options: argparse.Namespace, notes: Sequence[str]
) -> None:
    """Print or write the table; notes that it has no place for go to standard error."""
    if form == "table" and options.output is None and sys.stdout.isatty():
        draw(frame, options.digits, notes, Console())
        return
    content = write_table(frame, form, options.digits, notes)
    if form != "table":
        print_notes(notes)
    if options.output is None:
        sys.stdout.write(content.decode())
    else:
        write_atomically(options.output, content)
        print(f"{options.output}: {len(frame)} rows")


def print_notes(notes: Sequence[str]) -> None:
    """Print to standard error what a file has no place for."""
    for note in notes:
        print(f"{PROGRAM}: note: {visible(note)}", file=sys.stderr)
