"""A run directory: its lock, its log and its composed config."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mi_experiments.config.config import Config
from mi_experiments.config.identity import INCIDENTAL, asked_config, without_incidental
from mi_experiments.config.renames import ADDED
from mi_experiments.config.secrets import MASK, scrub, scrub_record
from mi_experiments.config.vetting import read_config, walk
from mi_experiments.errors import InputError, MiError
from mi_experiments.persistence.atomic import disk_errors, inside, open_plain, write_atomically
from mi_experiments.persistence.commits import MANIFEST, read_manifest, refuse_changes
from mi_experiments.persistence.locks import hold
from mi_experiments.records.provenance import scrub_argument
from mi_experiments.records.recorder import read_sealed
from mi_experiments.records.result import RESULT, Result, write_result

log = logging.getLogger("mi_experiments")


@contextmanager
def lock_run(run_dir: Path, config: Config) -> Iterator[Result | None]:
    """Hold the run directory alone; yields the result of a run that says that it is complete.

    A record that says `running` is false, as no process holds the directory: it is put right.

    Raises:
        InputError: another process holds it, it holds another run, or nothing tells what is
            finished in it.
    """
    with hold(
        run_dir / "run.lock",
        lambda holder: f"{run_dir} is in use by another run ({holder}): choose another",
    ):
        result = None
        begun = read_manifest(run_dir)
        if (run_dir / RESULT).exists():
            try:
                result, _ = read_sealed(run_dir)
            except ValueError as error:
                # Where a manifest tells what is finished, the record is made again from that.
                if begun is None:
                    raise InputError(
                        f"{run_dir / RESULT} is not a result of this version ({error}): "
                        "choose another directory (hydra.run.dir=DIR)"
                    ) from error
        finished = result if result is not None and result.status == "completed" else None
        if begun is not None:
            refuse_changes(run_dir, begun["run_identity"].get("config", {}), asked_config(config))
        elif finished is not None:
            refuse_changes(run_dir, without_incidental(finished.config), asked_config(config))
            raise InputError(
                f"{run_dir / MANIFEST} has gone, and nothing else tells what the files of a "
                f"finished run should be: remove {run_dir} to run again, or choose another "
                "directory (hydra.run.dir=DIR)"
            )
        if begun is not None and result is not None and result.status == "running":
            line = "its process ended without a word: give the same command again to continue"
            write_result(replace(result, status="interrupted", error=line), run_dir)
        yield finished


@contextmanager
def log_file(run_dir: Path) -> Iterator[None]:
    """Write the project's log to `run.log` and its warnings to standard error."""
    stream = open_plain(run_dir / "run.log", "a")
    file = logging.StreamHandler(stream)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    # A traceback is for the file; its line on the screen is printed where the command ends.
    screen.addFilter(lambda record: record.exc_info is None)
    screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(file)
    log.addHandler(screen)
    others = logging.getLogger().handlers  # of Hydra, if its logging was chosen
    handlers: list[logging.Handler] = [file, screen, *others]
    for handler in handlers:
        handler.addFilter(scrub_record)
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
        stream.close()
        for handler in others:
            handler.removeFilter(scrub_record)


def save_composition(composed: DictConfig, run_dir: Path) -> None:
    """Write what Hydra composed, in Hydra's own layout; its writing would precede the lock."""
    folder = run_dir / ".hydra"
    with disk_errors(folder, "made"):
        inside(run_dir, ".hydra/config.yaml").parent.mkdir(exist_ok=True)
    hydra_config = HydraConfig.get()
    parts = {
        "config": scrub(OmegaConf.to_container(composed)),
        "hydra": {"hydra": scrub(OmegaConf.to_container(hydra_config))},
        "overrides": [scrub_argument(override) for override in hydra_config.overrides.task],
    }
    for name, part in parts.items():
        write_atomically(folder / f"{name}.yaml", OmegaConf.to_yaml(part).encode())


def recall_composition(composed: DictConfig, run_dir: Path, overrides: list[str]) -> DictConfig:
    """Return the config that a run began with, changed by what is given beside `resume=`.

    Changes that move a number are refused later, by the run's identity, which shows them.

    Raises:
        InputError: there is no such run, a change is a choice of a group, or what was begun with
            is not known, because it was masked.
    """
    saved = run_dir / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise InputError(f"resume={run_dir}: no run was begun there ({saved} is missing)")
    config = read_config(saved)
    for override in overrides:
        key, _, _ = override.lstrip("+~").partition("=")
        if key == "resume":
            continue
        value = "." in key or (key in config and not OmegaConf.is_dict(config[key]))
        if not value and key not in INCIDENTAL:
            raise InputError(f"resume={run_dir} goes on with the run's own {key}: leave it out")
        OmegaConf.update(config, key, OmegaConf.select(composed, key), force_add=True)
    for key, before in ADDED.items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, before, force_add=True)
    config.resume = None
    masked = [key for key, value in walk(OmegaConf.to_container(config)) if MASK in str(value)]
    if masked:
        raise InputError(
            f"resume={run_dir}: {masked[0]} is masked in {saved}, since it looks like a secret: "
            f"give it beside resume=, as {masked[0]}=VALUE"
        )
    return config
