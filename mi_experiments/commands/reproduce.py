"""mi-reproduce: run the rows of a published or pinned table, and judge them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mi_experiments.commands.arguments import quote_home
from mi_experiments.commands.run import STOP, prepare_process
from mi_experiments.comparison.inert import escape_markdown, visible
from mi_experiments.config.compose import conf_directory, explain, from_hydra
from mi_experiments.config.identity import asked_config, without_incidental
from mi_experiments.config.secrets import scrub
from mi_experiments.errors import InputError, MiError, ResumableError, VerdictError, in_a_line
from mi_experiments.experiment.directory import lock_run, log_file, save_composition
from mi_experiments.experiment.progress import Progress
from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.records.record_check import check_record
from mi_experiments.records.result import RESULT, Evaluation, Result, read_result
from mi_experiments.reproduction.pin import pin
from mi_experiments.reproduction.preview import plan_job, plan_table, summary
from mi_experiments.reproduction.rows import (
    compose_row,
    find_rows,
    find_tables,
    read_conf,
    row_config,
)
from mi_experiments.reproduction.status import status_table
from mi_experiments.reproduction.substitution import (
    other_model,
    set_aside,
    shorten,
    substitute,
    unproved,
)
from mi_experiments.reproduction.verdicts import FAIL, NOT_RUN, Judgement, judge, setting_changes

PROGRAM = "mi-reproduce"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; expected failures are one line and an exit code."""
    prepare_process()
    try:
        with STOP.listen():
            reproduce(parse(list(sys.argv[1:] if arguments is None else arguments)))
    except MiError as error:
        fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error), InputError.exit_code)
    except OSError as error:
        fail(in_a_line(error), InputError.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(line: str, code: int) -> None:
    """Print one line to standard error and leave."""
    print(f"{PROGRAM}: {visible(' '.join(scrub(line).split()))}", file=sys.stderr)
    sys.exit(code)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("table", nargs="?", help="papers/sparsegpt, papers/sparsegpt/opt_125m_50, pinned, …")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="changes of every row, as for mi-run")
    add("--only", metavar="ROW", help="these rows of the table alone: a name, or a pattern")
    add("--model", type=Path, metavar="DIR", help="rehearse: on this model, with no verdict")
    add("--short", action="store_true", help="rehearse: with the short texts of rehearsal.yaml")
    add("--plan", action="store_true", help="show jobs, downloads, memory and hours; run nothing")
    add("--against", type=Path, metavar="RUN_DIR", help="judge a finished run; run nothing")
    add("--judge", action="store_true", help="judge what is in outputs/; run nothing")
    add("--markdown", type=Path, metavar="FILE", help="write the verdicts as Markdown")
    add("--json", type=Path, metavar="FILE", help="write the verdicts as JSON")
    add("--status", type=Path, metavar="DIR", help="every table, and its verdicts in DIR")
    add("--pin", nargs=2, metavar=("RUN_DIR", "NAME"), help="write experiment/pinned/NAME.yaml")
    options = parser.parse_intermixed_args(arguments)  # options may stand between overrides
    options.overrides = [quote_home(override) for override in options.overrides]
    if not (options.pin or options.status or options.table):
        parser.error("name a table, or --pin RUN_DIR NAME, or --status DIR")
    return options


def reproduce(options: argparse.Namespace) -> None:
    """Pin a run, show the plan, or run and judge the rows."""
    if options.pin:
        path = pin(Path(options.pin[0]), options.pin[1], Path(conf_directory()))
        print(path)
        return
    if options.status:
        root = Path(conf_directory()) / "experiment"
        print(status_table(find_tables(root), root, options.status), end="")
        return
    rows = find_rows(options.table, options.only)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options.plan:
        rates = read_conf("estimates")
        jobs = []
        for row in rows:
            composed = compose_row(row, all_overrides(row, options))
            config = from_hydra(composed)
            jobs.append(plan_job(row, composed.hydra.run.dir, config, read_conf("shapes"), rates))
        console.print(plan_table(jobs))
        console.print(summary(jobs, rates), soft_wrap=True, highlight=False, markup=False)
        return
    judgements: list[Judgement] = []
    content: list[dict[str, Any]] = []
    wrong: dict[str, str] = {}
    for row in rows:
        found, result = judge_row(row, options, wrong)
        judgements += found
        content += [dataclasses.asdict(judgement) | run_on(result) for judgement in found]
    console.print(verdict_table(judgements))
    if options.markdown:
        write_atomically(options.markdown, markdown(judgements).encode())
    if options.json:
        write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())
    failed = sum(judgement.verdict == FAIL for judgement in judgements)
    for judgement in judgements:
        if judgement.verdict in (FAIL, NOT_RUN) and judgement.why:
            line = f"{judgement.row} {judgement.phase} {judgement.text}: {judgement.why}"
            print(visible(line))
    if failed:
        raise VerdictError(f"{failed} of {len(judgements)} numbers are not as expected")


def all_overrides(row: str, options: argparse.Namespace) -> list[str]:
    """Return what the command line changes of a row: its overrides, and those of a rehearsal."""
    overrides = list(options.overrides)
    if options.model or options.short:
        config = row_config(row, tuple(overrides))
        overrides += substitute(options.model, config.model.name) if options.model else []
        overrides += shorten(config, read_conf("rehearsal")) if options.short else []
    return overrides


def judge_row(
    row: str, options: argparse.Namespace, wrong: dict[str, str]
) -> tuple[list[Judgement], Result | None]:
    """Run a row, unless it was run or only its verdict is asked, and judge it."""
    asked = row_config(row)
    if asked.expected is None:
        raise InputError(f"{row} expects nothing: give a row of papers or pinned")
    composed = compose_row(row, all_overrides(row, options))
    ran = asked_config(from_hydra(composed))
    run_dir = options.against or Path(composed.hydra.run.dir)
    result: Result | None = None
    note = ""
    if options.against or (options.judge and (run_dir / RESULT).exists()):
        result = recorded(run_dir)
        ran = without_incidental(result.config)
    signatures, shapes = read_conf("signatures"), read_conf("shapes")
    changes = setting_changes(asked_config(asked), ran)
    other = other_model(asked.model, ran["model"], shapes)
    if not (options.against or options.judge):
        key = json.dumps([ran["model"], ran["evaluation"]])
        if key in wrong:
            note = f"the dense model is wrong already in {wrong[key]}"
        else:
            result, note = run_row(row, composed, run_dir, changes, other, signatures)
            if note.startswith("dense: "):
                wrong[key] = row
    lies = check_record(run_dir, whole=True) if result and result.status == "completed" else []
    judgements = judge(
        row, asked.model.name, asked.expected, result, changes, signatures, note, lies
    )
    if not (other or asked.expected.content_hashes):
        other = unproved(asked.model, ran["model"], judgements, shapes)
    return set_aside(judgements, other), result


def run_on(result: Result | None) -> dict[str, Any]:
    """Return what a verdict was measured on, and by which numerics."""
    known = result.provenance if result else None
    return {
        "device": known.device if known else None,
        "numerics_version": known.numerics_version if known else None,
    }


def recorded(run_dir: Path) -> Result:
    """Read the result of a run.

    Raises:
        InputError: there is none, or it cannot be read (`BrokenRecord`).
    """
    try:
        return read_result(run_dir)
    except FileNotFoundError:
        raise InputError(f"{run_dir}: no run is recorded there (no result.json)") from None


def run_row(
    row: str,
    composed: DictConfig,
    run_dir: Path,
    changes: list[str],
    other: str,
    signatures: list[Any],
) -> tuple[Result | None, str]:
    """Run a row, or continue or recall it; a wrong dense model ends it before it is compressed."""
    from mi_experiments.experiment.finished import show_or_mend
    from mi_experiments.experiment.run_experiment import run_experiment
    from mi_experiments.experiment.unchanged import changed_since
    from mi_experiments.records.tracking import Tracker

    config = from_hydra(composed)
    HydraConfig.instance().set_config(composed)
    STOP.check()
    run_dir.mkdir(parents=True, exist_ok=True)
    note = ""

    def on_dense(dense: Mapping[str, Evaluation]) -> None:
        assert config.expected is not None
        same = not other and not any(line.startswith(("model.", "evaluation.")) for line in changes)
        partial = dataclasses.replace(read_result(run_dir), dense=dict(dense))
        # A row that is not run as it is fails by what was changed, and here by its number alone.
        prints = {} if changes else config.expected.content_hashes
        expected = dataclasses.replace(config.expected, content_hashes=prints)
        judged = judge(row, config.model.name, expected, partial, [], signatures)
        bad = [j for j in judged if j.phase == "dense" and j.verdict == FAIL]
        if same and bad:
            raise VerdictError(f"dense: {bad[0].text} {bad[0].ours:.4f}: {bad[0].why}")

    with lock_run(run_dir, config) as finished, log_file(run_dir):
        if (finished := show_or_mend(finished, run_dir, config.export)) is not None:
            since, note = changed_since(config, finished, run_dir)
            changes += since
            return finished, note
        earlier = recorded_bytes(run_dir)
        save_composition(composed, run_dir)
        try:
            with Tracker.open(config, run_dir, sweep_dir=None, job=run_dir.name) as tracker:
                return run_experiment(config, run_dir, tracker, Progress(), STOP, on_dense), ""
        except ResumableError:
            raise
        except MiError as error:
            note = str(error)
    # A directory that refused the run has the record of what was begun there.
    refused = earlier is not None and earlier == recorded_bytes(run_dir)
    return None if refused else read_result(run_dir), note


def recorded_bytes(run_dir: Path) -> bytes | None:
    """Return the record of a run as it stands; None if there is none."""
    path = run_dir / RESULT
    return path.read_bytes() if path.is_file() else None


HEADINGS = (
    "row", "model", "text", "expected", "ours", "difference", "tolerance", "verdict", "mismatch",
)  # fmt: skip


def cells(judgement: Judgement) -> tuple[str, ...]:
    """Return one verdict as the cells of a table."""
    value, ours = judgement.expected, judgement.ours
    return (
        judgement.row,
        judgement.phase,
        judgement.text,
        "none" if value is None else f"{value:g}",
        "" if ours is None else f"{ours:.4f}",
        "" if value is None or ours is None else f"{ours - value:+.4f}",
        "" if judgement.tolerance is None else f"{judgement.tolerance:.3g}",
        judgement.verdict,
        judgement.mismatch,
    )


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """Return the verdicts for the terminal."""
    table = Table(title="reproduction", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for judgement in judgements:
        table.add_row(*(Text(visible(cell)) for cell in cells(judgement)))
    return table


def markdown(judgements: Sequence[Judgement]) -> str:
    """Return the verdicts as a Markdown table, with source and reason."""
    rows = [[*HEADINGS, "why", "source"], ["---"] * (len(HEADINGS) + 2)]
    rows += [
        [escape_markdown(cell) for cell in (*cells(judgement), judgement.why, judgement.source)]
        for judgement in judgements
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
