"""The rows of published and pinned tables: their names, and what each asks for."""

import fnmatch
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.config.config import Config
from mi_experiments.errors import InputError


def find_rows(table: str, only: str | None) -> list[str]:
    """Name the rows of a table: every config of the folder but `base`, or the one that is named."""
    root = Path(conf_directory()) / "experiment"
    names = row_names(root, table)
    chosen = [name for name in names if fnmatch.fnmatchcase(name.split("/")[-1], only or "*")]
    if not chosen:
        raise InputError(
            f"no row {only or ''} in {table}: there are {', '.join(find_tables(root))}"
        )
    return chosen


def row_names(root: Path, table: str) -> list[str]:
    """Return the rows of a table, or of all tables below a folder, by name."""
    files = [root / f"{table}.yaml"] if (root / f"{table}.yaml").is_file() else []
    files = files or sorted((root / table).rglob("*.yaml"))
    return [str(f.relative_to(root).with_suffix("")) for f in files if f.stem != "base"]


def find_tables(root: Path) -> dict[str, list[str]]:
    """Return the rows of every table, by its name."""
    folders = sorted({str(file.parent.relative_to(root)) for file in root.glob("*/**/*.yaml")})
    return {folder: row_names(root, folder) for folder in folders}


def compose_row(row: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a row, with Hydra's own settings."""
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        return compose(
            "config", overrides=[f"experiment={row}", *overrides], return_hydra_config=True
        )


def read_conf(name: str) -> Any:
    """Read a file of `conf/` that is no part of a run."""
    return OmegaConf.to_container(OmegaConf.load(Path(conf_directory()) / f"{name}.yaml"))


@lru_cache
def row_config(row: str, overrides: tuple[str, ...] = ()) -> Config:
    """Return what a row asks for; a value that nobody changes."""
    return from_hydra(compose_row(row, overrides))
