"""Hydra, composing only what `vetting` lets pass, and saying in one line what it cannot compose."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import hydra.conf
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mi_experiments.config.renames import VALUES
from mi_experiments.config.vetting import RefusedConfig, check_yaml, first_line, vet
from mi_experiments.errors import InputError

LOGGING = ("hydra.job_logging", "hydra.hydra_logging")


def vet_what_hydra_composes() -> None:
    """Let Hydra compose through `VettedLoader`, whoever asks it: its main function or its API."""
    setattr(hydra._internal.hydra, ConfigLoaderImpl.__name__, VettedLoader)


class VettedRepository(ConfigRepository):
    """The files that Hydra composes from, each of them looked at before it is built."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Read one file.

        Raises:
            RefusedConfig: it is no YAML, or would become large or deep.
        """
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":
            file = Path(source.path, source._normalize_file_name(config_path))
            try:
                check_yaml(file.read_text(encoding="utf-8"), str(file))
                return super().load_config(config_path)
            except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
                raise RefusedConfig(f"{file} is not a config: {first_line(error)}") from error
        return super().load_config(config_path)


class VettedLoader(ConfigLoaderImpl):
    """Hydra's loader; what it returns has been vetted, before Hydra makes anything of it."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = VettedRepository(config_search_path)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a config.

        Raises:
            RefusedConfig: it would do more than configure this project, or cannot be composed for
                a reason that Hydra has no words for.
        """
        with self.in_one_line():
            self.check_choices(overrides)
            composed = super().load_configuration(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
            vet(composed, overrides)
            keep_to_itself(composed)
        return composed

    @contextmanager
    def in_one_line(self) -> Iterator[None]:
        """Turn what Hydra raises of a config that it did not expect into a line."""
        try:
            yield
        except MissingConfigException as error:
            line = self.explain_missing(error)
            if line is None:
                raise
            raise RefusedConfig(line) from error
        except RecursionError as error:
            raise RefusedConfig("the config, or an override, nests too deeply") from error
        except KeyError as error:  # of `hydra.job.env_copy`
            raise RefusedConfig(f"the config names {error}, which is not there") from error
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            if isinstance(error, InputError):
                raise
            raise RefusedConfig(f"cannot be composed: {first_line(error)}") from error

    def check_choices(self, overrides: list[str]) -> None:
        """Refuse a group that is given something else than the name of a file, with the choices."""
        for override in OverridesParser.create().parse_overrides(overrides):
            group = override.key_or_group
            if override.is_sweep_override() or not self.repository.group_exists(group):
                continue
            named = isinstance(override.value(), str | list | dict)
            if group != "experiment" if override.is_delete() else not named:
                raise RefusedConfig(
                    f"{override.input_line} is not allowed: one of {', '.join(self.choices(group))}"
                )

    def explain_missing(self, error: MissingConfigException) -> str | None:
        """Name a file that is not there, and those of its group; None if it is of no group."""
        wanted = error.missing_cfg_file or ""
        groups = [wanted[:at] for at, letter in enumerate(wanted) if letter == "/"]
        group = next((name for name in groups if error.options and self.is_of(name, error)), None)
        if group is None:
            return None
        name, choices = wanted.removeprefix(f"{group}/"), self.choices(group)
        if new := VALUES.get(f"{group}.name", {}).get(name):
            return f"{group}={name} is called {new} now: write {group}={new}"
        near = difflib.get_close_matches(name, [*choices, *self.nested(group)], n=1)
        hint = f"did you mean {near[0]}? There is " if near else "one of "
        return f"{group}={name} is not known: {hint}{', '.join(choices)}"

    def is_of(self, group: str, error: MissingConfigException) -> bool:
        """Tell whether an error lists the choices of a group."""
        return self.choices(group) == sorted(error.options or ())

    def choices(self, group: str) -> list[str]:
        """Return the names of the files of a group."""
        return self.repository.get_group_options(group, ObjectType.CONFIG)

    def nested(self, group: str) -> Iterator[str]:
        """Yield the names of the files below the folders of a group."""
        for folder in self.repository.get_group_options(group, ObjectType.GROUP):
            for name in [*self.choices(f"{group}/{folder}"), *self.nested(f"{group}/{folder}")]:
                yield f"{folder}/{name}"


def keep_to_itself(composed: DictConfig) -> None:
    """Leave to Hydra no file that it would write itself, where `scrubbing` does not reach.

    Raises:
        RefusedConfig: it is asked to log elsewhere, or in another way, than it does as it comes.
    """
    for key in LOGGING:
        if OmegaConf.to_container(OmegaConf.select(composed, key)) not in shipped(key):
            raise RefusedConfig(
                f"{key} is refused: it could write any file, or run code; "
                f"choose one of {', '.join(logging_names(key))} by {key.replace('.', '/')}=NAME"
            )
    name, folder = composed.hydra.job.name, composed.hydra.output_subdir
    if not str(name).replace("-", "").isidentifier():
        raise RefusedConfig(f"hydra.job.name={name} is not allowed: letters, digits, - and _ only")
    if folder not in (None, ".hydra"):
        raise RefusedConfig(f"hydra.output_subdir={folder} is not allowed: it is .hydra")
    with open_dict(composed.hydra):
        composed.hydra.output_subdir = None  # the run writes its own, once the directory is its own
        for part in (composed.hydra.run, composed.hydra.sweep):
            directory = str(OmegaConf.to_container(part)["dir"])  # type: ignore[call-overload,index]
            if directory.startswith("~"):
                part.dir = os.path.expanduser(directory)


def logging_files(key: str) -> list[Path]:
    """Return the ways to log that come with Hydra."""
    folder = Path(hydra.conf.__file__).parent / key.replace(".", "/")
    return sorted(folder.glob("*.yaml"))


def logging_names(key: str) -> list[str]:
    """Return their names."""
    return [file.stem for file in logging_files(key)]


@lru_cache
def shipped(key: str) -> tuple[Any, ...]:
    """Return their contents."""
    return tuple(OmegaConf.to_container(OmegaConf.load(file)) for file in logging_files(key))
