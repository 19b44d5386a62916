"""mi-run: compose one run or a sweep with Hydra, do it, and print what came out."""

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from mi_experiments.atomic import write_atomically
from mi_experiments.commands.sweep import run_sweep
from mi_experiments.commands.sweep_launch import describe_failure
from mi_experiments.commands.tables import print_dry_run, print_result
from mi_experiments.composing import explain, from_hydra
from mi_experiments.config import Config
from mi_experiments.dry_run import dry_run
from mi_experiments.errors import InputError, MiError
from mi_experiments.naming import register_resolvers
from mi_experiments.progress import Progress
from mi_experiments.provenance import (
    INCIDENTAL,
    asked_config,
    scrub_argument,
    without_incidental,
)
from mi_experiments.record import RESULT, Result, read_result
from mi_experiments.resume import Commits, StopRequest, read_manifest, refuse_changes
from mi_experiments.scrubbing import scrub
from mi_experiments.shortage import map_large_pieces
from mi_experiments.stored_model import tidy
from mi_experiments.sweeps import JobEnd

STOP = StopRequest()
"""Asked of the process, and so of every job of a sweep."""
log = logging.getLogger("mi_experiments")
# Here, because a launcher's workers import this module, and compose.
register_resolvers()


def conf_directory() -> str:
    """Return the folder of configs: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return str(checkout if (checkout / "config.yaml").is_file() else package / "conf")


def main() -> None:
    """Run the command line; expected failures are one line and an exit code."""
    prepare_process()
    try:
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
        fail(f"{error.strerror}: {error.filename}", InputError.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def prepare_process() -> None:
    """Set up a process that works on runs: this one, or a launcher's worker."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    map_large_pieces()
    disable_progress_bar()  # type: ignore[no-untyped-call]


@hydra.main(version_base="1.3", config_path=conf_directory(), config_name="config")
def compose(composed: DictConfig) -> float | None:
    """Do the run that Hydra composed; returns the compressed perplexity of the first text."""
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
        with STOP.listen(signal.SIGINT):
            do_run(composed, run_dir, Path(hydra_config.sweep.dir), quiet=True)
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
        run_dir = Path(composed.resume)
        composed = recall_composition(composed, run_dir, list(HydraConfig.get().overrides.task))
    config = from_hydra(composed)
    console = open_console()
    console.quiet = quiet
    if config.dry_run:
        print_dry_run(dry_run(config), config, console)
        return None
    # Not before: a dry run and a question for help need neither Weights & Biases nor texts.
    from mi_experiments.experiment import run_experiment
    from mi_experiments.tracking import Tracker

    STOP.check()
    run_dir.mkdir(parents=True, exist_ok=True)
    with claim(run_dir, config) as finished, log_file(run_dir):
        if finished is not None:
            tidy(Commits(run_dir, {}), config.export)
            line = f"{run_dir} is complete; remove it to run again"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            print_result(finished, run_dir, sweep_dir, [], console)
            return next(iter(finished.compressed.values())).perplexity
        if read_manifest(run_dir) is None:
            save_composition(composed, run_dir)
        with Tracker.open(config, run_dir, sweep_dir=sweep_dir, job=run_dir.name) as tracker:
            result = run_experiment(config, run_dir, tracker, Progress(), STOP)
        notes = [note for note in [tracker.fallback, *tracker.commands()] if note]
        print_result(result, run_dir, sweep_dir, notes, console)
    return next(iter(result.compressed.values())).perplexity


def open_console() -> Console:
    """Return standard output, wide enough for tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def recall_composition(composed: DictConfig, run_dir: Path, overrides: list[str]) -> DictConfig:
    """Return the config that a run began with, changed by what is given beside `resume=`.

    Changes that move a number are refused later, by the fingerprint, which shows them.

    Raises:
        InputError: there is no such run, or a change is a choice of a group.
    """
    saved = run_dir / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise InputError(f"resume={run_dir}: no run was begun there ({saved} is missing)")
    config = OmegaConf.load(saved)
    assert isinstance(config, DictConfig)
    for override in overrides:
        key, _, _ = override.lstrip("+~").partition("=")
        if key == "resume":
            continue
        value = "." in key or (key in config and not OmegaConf.is_dict(config[key]))
        if not value and key not in INCIDENTAL:
            raise InputError(f"resume={run_dir} goes on with the run's own {key}: leave it out")
        OmegaConf.update(config, key, OmegaConf.select(composed, key), force_add=True)
    config.resume = None
    return config


def save_composition(composed: DictConfig, run_dir: Path) -> None:
    """Write what Hydra composed, in Hydra's own layout; its writing would precede the claim."""
    folder = run_dir / ".hydra"
    folder.mkdir(exist_ok=True)
    hydra_config = HydraConfig.get()
    parts = {
        "config": scrub(OmegaConf.to_container(composed)),
        "hydra": {"hydra": scrub(OmegaConf.to_container(hydra_config))},
        "overrides": [scrub_argument(override) for override in hydra_config.overrides.task],
    }
    for name, part in parts.items():
        write_atomically(folder / f"{name}.yaml", OmegaConf.to_yaml(part).encode())


@contextmanager
def log_file(run_dir: Path) -> Iterator[None]:
    """Write the project's log to `run.log` and its warnings to standard error."""
    file = logging.FileHandler(run_dir / "run.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    # A traceback is for the file; its line on the screen is printed where the command ends.
    screen.addFilter(lambda record: record.exc_info is None)
    screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(file)
    log.addHandler(screen)
    try:
        yield
    except MiError as error:
        log.info("%s", error)
        raise
    except Exception:
        log.exception("the run ended with an error that nobody expected")
        raise
    finally:
        log.removeHandler(file)
        log.removeHandler(screen)
        file.close()


@contextmanager
def claim(run_dir: Path, config: Config) -> Iterator[Result | None]:
    """Hold the run directory alone; yields the result of a run that is complete.

    Raises:
        InputError: another process holds it, or it holds another run.
    """
    with (run_dir / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run_dir} is in use by another run: choose another") from None
        finished = None
        if (run_dir / RESULT).exists():
            try:
                result = read_result(run_dir)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{run_dir / RESULT} is not a result of this version ({error}): "
                    "choose another directory (hydra.run.dir=DIR)"
                ) from error
            finished = result if result.status == "completed" else None
        begun = read_manifest(run_dir)
        if begun is not None:
            refuse_changes(run_dir, begun["fingerprint"]["config"], asked_config(config))
        elif finished is not None:
            refuse_changes(run_dir, without_incidental(finished.config), asked_config(config))
        yield finished


def fail(line: str, code: int) -> NoReturn:
    """Print one line to standard error and leave."""
    print(f"mi-run: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)
