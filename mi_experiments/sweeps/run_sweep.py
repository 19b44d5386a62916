"""A sweep with Hydra: found in the command line, composed, and launched.

Hydra composes, and its launchers launch. That a sweep has one directory, leaves out what is
finished and goes on when a job fails is decided here, in the process that was started.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from mi_experiments.errors import InputError
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.sweeps.jobs import BASIC_SWEEPER, fix_directory, read_sweep
from mi_experiments.sweeps.launch import Launch, Task
from mi_experiments.sweeps.outcomes import JobEnd, lock_sweep
from mi_experiments.sweeps.preview import look_at, show_plan


def run_sweep(
    arguments: Sequence[str], conf: str, task: Task, stop: StopRequest, console: Console
) -> JobEnd | None:
    """Do the sweep that a command line asks for; returns None if it asks for none.

    Args:
        arguments: the arguments of the command line.
        conf: the folder of configs.
        task: does one job; it returns its failure, and never raises it.
        stop: a wish to stop, granted between blocks and between jobs.
        console: receives the plan, a line for each job and the table.

    Raises:
        InputError: nothing was begun: another process holds the sweep, or no job can run.
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
        with lock_sweep(sweep.directory), stop.listen(signal.SIGINT):
            return Launch(sweep, console, stop).run(task)


@contextmanager
def open_hydra(args: argparse.Namespace, conf: str) -> Iterator[Hydra]:
    """Look for configs where Hydra would."""
    version.setbase("1.3")
    path = create_automatic_config_search_path(__file__, None, args.config_path or conf)
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise InputError(f"--config-dir {folder} is no directory")
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
