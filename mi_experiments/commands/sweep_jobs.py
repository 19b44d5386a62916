"""The jobs of a sweep, as Hydra composes them, each with a directory of its own."""

import argparse
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mi_experiments.composing import explain, from_hydra, to_plain
from mi_experiments.config import Export
from mi_experiments.errors import InputError
from mi_experiments.naming import Choice, as_word, config_hash, job_name, read_choices
from mi_experiments.provenance import without_incidental
from mi_experiments.scrubbing import scrub

BASIC_SWEEPER = BasicSweeperConf()._target_
SUBDIRECTORY = "${config_hash:}"
"""What `conf/config.yaml` says of a job's directory; a sweep puts what is swept before it."""


@dataclass(frozen=True)
class Job:
    """One combination of the swept values.

    Attributes:
        directory: name of its run directory.
        swept: its value of each swept key, as on the command line.
        overrides: all that Hydra needs to compose it.
        config: what it asks for, as plain values.
        export: of its config.
        refusal: why it cannot run, in one line; None if it can.
    """

    directory: str
    swept: dict[str, str]
    overrides: tuple[str, ...]
    config: dict[str, Any]
    export: Export = Export.nothing
    refusal: str | None = None

    def is_asked_in(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the config of a record asks for what this job asks for."""
        asked: dict[str, Any] = scrub(without_incidental(self.config))
        return without_incidental(config) == asked


@dataclass(frozen=True)
class Sweep:
    """A sweep that is composed, and not begun.

    Attributes:
        hydra: composes its jobs.
        master: what is composed without the swept values.
        directory: holds a run directory for each job.
        axes: values of each key that has several, as on the command line.
        jobs: each of them different.
        alike: combinations that are the same job as another one.
    """

    hydra: Hydra
    master: DictConfig
    directory: Path
    axes: dict[str, tuple[str, ...]]
    jobs: tuple[Job, ...]
    alike: int


def fix_directory(master: DictConfig) -> str:
    """Return the override by which every process sees the same sweep directory."""
    directory = str(Path(master.hydra.sweep.dir).absolute())
    return f"hydra.sweep.dir={QuotedString(directory, Quote.single).with_quotes()}"


def read_sweep(hydra: Hydra, args: argparse.Namespace, master: DictConfig) -> Sweep:
    """Compose the jobs of a sweep.

    Raises:
        InputError: no job can run, two jobs would share a directory, or jobs cannot be named.
    """
    name = args.config_name or "config"
    more = [] if master.hydra.mode is None else ["hydra.mode=MULTIRUN"]
    overrides = [*args.overrides, *more, fix_directory(master)]
    master = hydra.compose_config(name, overrides, run_mode=RunMode.MULTIRUN)
    if OmegaConf.to_container(master.hydra.sweep)["subdir"] != SUBDIRECTORY:  # type: ignore[call-overload,index]
        raise InputError("hydra.sweep.subdir is given: jobs are named by what they compute")
    if master.resume is not None:
        raise InputError("resume= continues one run; a sweep is continued by its own command")
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    choices = read_choices(
        master.hydra.sweeper.params or {}, list(master.hydra.overrides.task), parser
    )
    axes = {key: choice.values for key, choice in choices.items() if len(choice.values) > 1}
    directory = Path(master.hydra.sweep.dir)
    taken = {path.name[-10:]: path.name for path in directory.glob("*") if path.is_dir()}
    jobs: dict[str, Job] = {}
    count = 0
    for overrides_of_job, swept in combine(choices, axes):
        job = compose_job(hydra, master, overrides_of_job, swept, taken)
        count += 1
        first = jobs.setdefault(job.directory, job)
        if first.config != job.config:
            raise InputError(
                f"{show(first.swept)} and {show(job.swept)} compute the same numbers: what differs "
                "moves none of them; give each value a sweep and a hydra.sweep.dir=DIR of its own"
            )
    if all(job.refusal for job in jobs.values()):
        raise InputError(next(job.refusal for job in jobs.values() if job.refusal))
    return Sweep(hydra, master, directory, axes, tuple(jobs.values()), count - len(jobs))


def combine(
    choices: Mapping[str, Choice], axes: Mapping[str, tuple[str, ...]]
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Return the overrides and the swept values of every combination, the last key fastest."""
    pairs = [list(zip(choice.values, choice.overrides, strict=True)) for choice in choices.values()]
    return [
        (
            tuple(override for _, override in combination),
            {
                key: value
                for key, (value, _) in zip(choices, combination, strict=True)
                if key in axes
            },
        )
        for combination in itertools.product(*pairs)
    ]


def compose_job(
    hydra: Hydra,
    master: DictConfig,
    overrides: tuple[str, ...],
    swept: dict[str, str],
    taken: Mapping[str, str],
) -> Job:
    """Compose one job, and check what it asks for.

    Args:
        hydra: composes it.
        master: what is composed without the swept values.
        overrides: of the job.
        swept: its values.
        taken: directories that are there, by the hash at their end.
    """
    try:
        composed = hydra.config_loader.load_sweep_config(master, list(overrides))
        composed_hash = config_hash(_root_=composed)
    except (HydraException, OmegaConfBaseException) as error:
        directory = as_word(json.dumps(overrides))[-80:]
        return Job(directory, swept, overrides, {}, refusal=explain(error))
    directory = taken.get(composed_hash) or job_name(swept, composed)
    quoted = QuotedString(directory, Quote.single).with_quotes()
    overrides = (*overrides, f"hydra.sweep.subdir={quoted}")
    try:
        config = from_hydra(composed)
    except (InputError, OmegaConfBaseException) as error:
        refusal = str(error) if isinstance(error, InputError) else explain(error)
        plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, model_keys(composed)))
        assert isinstance(plain, dict)
        asked = {str(key): part for key, part in plain.items()}
        return Job(directory, swept, overrides, asked, refusal=refusal)
    return Job(directory, swept, overrides, to_plain(config), config.export)


def model_keys(composed: DictConfig) -> list[str]:
    """Return the keys of a composed config that are a run's."""
    return [key for key in map(str, composed) if key != "hydra"]


def show(swept: Mapping[str, str]) -> str:
    """Show swept values as on the command line."""
    return " ".join(f"{key}={value}" for key, value in swept.items()) or "the only job"
