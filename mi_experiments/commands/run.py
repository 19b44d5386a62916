"""mi-run: compose one run or a sweep with Hydra, do it, and print what came out."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from mi_experiments.commands.arguments import read_arguments
from mi_experiments.commands.run_tables import print_dry_run, print_result
from mi_experiments.config.compose import conf_directory, explain, from_hydra
from mi_experiments.config.identity import (
    register_resolvers,
)
from mi_experiments.config.secrets import scrub
from mi_experiments.config.vetted_hydra import vet_what_hydra_composes
from mi_experiments.errors import InputError, MiError, ResumableError, in_a_line
from mi_experiments.experiment.directory import (
    lock_run,
    log_file,
    recall_composition,
    save_composition,
)
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.out_of_memory import keep_small_pieces
from mi_experiments.persistence.atomic import disk_errors
from mi_experiments.persistence.commits import read_manifest
from mi_experiments.sweeps.launch import describe_failure
from mi_experiments.sweeps.launchers import leave, stop_signals, threads_of
from mi_experiments.sweeps.outcomes import JobEnd
from mi_experiments.sweeps.run_sweep import run_sweep

if TYPE_CHECKING:
    from mi_experiments.records.result import Result

STOP = StopRequest()
"""Asked of the process, and so of every job of a sweep."""
# Here, because a launcher's workers import this module, and compose.
register_resolvers()
vet_what_hydra_composes()


def main() -> None:
    """Run the command line; expected failures are one line and an exit code."""
    prepare_process()
    try:
        sys.argv[1:] = read_arguments(sys.argv[1:])
        ended = run_sweep(sys.argv[1:], conf_directory(), do_job, STOP, open_console())
        if ended is None:
            with STOP.listen():
                compose()
        elif ended.error is not None:
            fail(ended.error, ended.exit_code)
    except MiError as error:
        fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error), InputError.exit_code)
    except OSError as error:
        fail(in_a_line(error), InputError.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def prepare_process() -> None:
    """Set up a process that works on runs: this one, or a launcher's worker."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    keep_small_pieces()
    disable_progress_bar()  # type: ignore[no-untyped-call]


@hydra.main(version_base="1.3", config_path=conf_directory(), config_name="config")
def compose(composed: DictConfig) -> float | None:
    """Do the run that Hydra composed; returns what a sweeper looks for, see `objective`."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    multirun = hydra_config.mode is RunMode.MULTIRUN
    try:
        return do_run(
            composed, run_dir, Path(hydra_config.sweep.dir).absolute() if multirun else None
        )
    except MiError as error:
        # A sweep goes on with its other jobs and reports at its end; a single run ends here,
        # because Hydra would put a line of its own before ours.
        if multirun:
            raise
        fail(str(error), error.exit_code)
    finally:
        with suppress(OSError):
            run_dir.rmdir()  # only if nothing was written


def do_job(composed: DictConfig) -> JobEnd:
    """Do one job of a sweep; what it fails of is recorded and returned, never raised."""
    prepare_process()
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    try:
        with STOP.listen(*stop_signals()):
            do_run(composed, run_dir, Path(hydra_config.sweep.dir), quiet=True)
    except ResumableError as error:
        leave(STOP.received, error)
        return describe_failure(error)
    except Exception as error:  # noqa: BLE001 - one failing job stops no other
        return describe_failure(error)
    finally:
        with suppress(OSError):
            run_dir.rmdir()  # only if nothing was written
    return JobEnd()


def do_run(
    composed: DictConfig, run_dir: Path, sweep_dir: Path | None, quiet: bool = False
) -> float | None:
    """Check the config, do the run or outline it, and print what came out unless `quiet`."""
    if composed.get("resume"):
        run_dir = Path(composed.resume).expanduser()
        composed = recall_composition(composed, run_dir, list(HydraConfig.get().overrides.task))
    config = from_hydra(composed)
    console = open_console()
    console.quiet = quiet
    if config.dry_run:
        print_dry_run(dry_run(config), config, console)
        return None
    # Not before: a dry run and a question for help need neither Weights & Biases nor texts.
    from mi_experiments.experiment.finished import show_or_mend
    from mi_experiments.experiment.run_experiment import run_experiment
    from mi_experiments.experiment.unchanged import compare_sources
    from mi_experiments.records.tracking import Tracker

    if not run_dir.exists():
        STOP.check()
    with disk_errors(run_dir, "made"):
        run_dir.mkdir(parents=True, exist_ok=True)
    with lock_run(run_dir, config) as finished, log_file(run_dir):
        # Not before: what an earlier process has left says now that it is interrupted.
        STOP.check()
        if (finished := show_or_mend(finished, run_dir, config.export)) is not None:
            notes = compare_sources(config, finished, run_dir)
            line = f"{run_dir} is complete; remove it to run again"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            print_result(finished, run_dir, sweep_dir, notes, console)
            return objective(finished)
        begun = read_manifest(run_dir)
        if begun is None:
            save_composition(composed, run_dir)
        with (
            threads_of(begun),
            Tracker.open(config, run_dir, sweep_dir=sweep_dir, job=run_dir.name) as tracker,
        ):
            result = run_experiment(config, run_dir, tracker, Progress(), STOP)
        notes = [note for note in [tracker.fallback, *tracker.commands()] if note]
        print_result(result, run_dir, sweep_dir, notes, console)
    return objective(result)


def objective(result: "Result") -> float:
    """Return the compressed model's first measurement on the first text."""
    first = next(iter(result.compressed.values()))
    return next(iter(first.measurements.values())).value


def open_console() -> Console:
    """Return standard output, wide enough for tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def fail(line: str, code: int) -> NoReturn:
    """Print one line to standard error and leave."""
    print(f"mi-run: {' '.join(scrub(line).split())}", file=sys.stderr)
    sys.exit(code)
