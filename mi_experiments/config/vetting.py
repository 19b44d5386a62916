"""Configs are data, not code: what a file or a command line may ask of Hydra, and what it may not.

A run directory or an experiment file may come from somebody else. Hydra makes objects of some parts
of what it composes before any line of this project runs (callbacks, logging), sets environment
variables, and reads them for whoever asks (`${oc.env:…}`). So everything that Hydra composes, and
every config that is read back, passes through here first.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mi_experiments.errors import InputError

RESOLVERS = ("config_hash", "sweep_id", "run_id", "now")
"""What may stand before the colon of `${…:…}`: the names of `naming`, and Hydra's clock."""

REFERENCE = re.compile(rf"\$\{{(?:(\.*[\w@./\[\]-]+)|(?:{'|'.join(RESOLVERS)}):[^${{}}]*)\}}")

CODE = re.compile(r"_(target|recursive|convert|partial|args)_")
"""Keys by which Hydra makes objects."""

PLUGINS = {
    "hydra.launcher._target_": {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    },
    "hydra.sweeper._target_": {"hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
}
"""The only objects that a config may ask for."""

REFUSED = {
    "hydra.callbacks": "it would run code",
    "hydra.job.env_set": "set variables in the shell",
    "hydra.job.env_copy": "set variables in the shell",
}

OWN = ("hydra.launcher.setup", "hydra.launcher.additional_parameters")
"""What a shell will run: only from the command line of the person whose shell it is."""

BYTES, DEPTH, NODES, CHARACTERS = 2**20, 50, 100_000, 1_000_000
"""Of one file: its size, how deep it nests, its nodes with every alias written out; and of all
values of a config with every reference written out."""

Leaves = Iterator[tuple[str, Any]]


class RefusedConfig(InputError, ConfigCompositionException):
    """A config asks for what configs may not ask for; Hydra knows it as an error of its own."""


def read_config(path: Path) -> DictConfig:
    """Read a config that was saved, as data.

    Raises:
        RefusedConfig: it is not a config, or asks for more than data.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, str(path))
        config = OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise RefusedConfig(f"{path} is not a config: {first_line(error)}") from error
    if not (isinstance(config, DictConfig) and config):
        raise RefusedConfig(f"{path} is not a config: it has no keys")
    vet(config)
    return config


def check_yaml(text: str, name: str) -> None:
    """Refuse a file that would become large, or deep, without building anything of it.

    Raises:
        RefusedConfig: it would.
        YAMLError: it is not YAML.
    """
    if len(text) > BYTES:
        raise RefusedConfig(f"{name} has {len(text):,} characters: a config has at most {BYTES:,}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: Counter[str] = Counter()
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            # One that stands inside of its own anchor has no size yet; OmegaConf refuses it.
            total += sizes[event.anchor] or 1
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        if len(open_nodes) > DEPTH:
            raise RefusedConfig(f"{name} nests deeper than {DEPTH} levels: no config does")
        if total > NODES:
            raise RefusedConfig(
                f"{name} has more than {NODES:,} values, aliases written out: no config has"
            )


def vet(composed: DictConfig, given: Sequence[str] = ()) -> None:
    """Refuse a config that asks for more than data.

    Args:
        composed: the composed by Hydra, with or without its own part, or read from a file.
        given: overrides of the command line.

    Raises:
        RefusedConfig: it would run code, or read or set what is not its own.
    """
    plain = OmegaConf.to_container(composed)
    assert isinstance(plain, dict)
    # Hydra's own part last: it repeats the overrides, which are better named by their key.
    parts = {key: plain[key] for key in sorted(plain, key=lambda key: key == "hydra")}
    leaves = dict(walk(parts))
    for key, value in leaves.items():
        check_key(key, value)
        if isinstance(value, str) and "${" in REFERENCE.sub("", value):
            known = ", ".join(f"${{{name}:}}" for name in RESOLVERS)
            raise RefusedConfig(
                f"{key}={value} is refused: configs are data, and refer to nothing but other keys "
                f"(${{key}}) and {known}"
            )
    check_length(parts, leaves)
    hydra = plain.get("hydra")
    if isinstance(hydra, dict):
        check_hydra(composed, leaves, given)


def walk(value: Any, path: str = "") -> Leaves:
    """Yield the path and value of everything that is neither a dictionary nor a list."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from walk(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from walk(part, f"{path}.{number}")
    else:
        yield path, value


def check_key(key: str, value: Any) -> None:
    """Refuse the keys by which Hydra makes objects, but for launchers and sweepers it knows."""
    found = next((name for name in key.split(".") if CODE.fullmatch(name)), None)
    if found is None or value in PLUGINS.get(key, ()):
        return
    if key in PLUGINS:
        group = key.removesuffix("._target_").replace(".", "/")
        raise RefusedConfig(f"{group} {value} is refused: only those that come with mi-run are run")
    raise RefusedConfig(f"{key}={value} is refused: configs are data, not code")


def check_length(parts: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Refuse values that refer to themselves, or to each other so that they grow without end."""
    lengths: dict[str, int | None] = {}

    def length(path: str) -> int:
        """Return the characters of everything at a path, references written out."""
        if path in lengths:
            known = lengths[path]
            if known is None:
                raise RefusedConfig(f"{path} refers to itself")
            return known
        lengths[path] = None
        if path in leaves:
            size = len(str(leaves[path])) + sum(map(length, references(path, leaves[path])))
        else:
            size = sum(length(f"{path}.{key}") for key in keys_at(parts, path))
        if size > CHARACTERS:
            raise RefusedConfig(
                f"{path} grows to more than {CHARACTERS:,} characters by what it refers to"
            )
        lengths[path] = size
        return size

    try:
        for path, value in leaves.items():
            if isinstance(value, str) and "${" in value:
                length(path)
    except RecursionError:
        raise RefusedConfig("values of the config refer to each other without end") from None


def references(path: str, value: Any) -> Iterator[str]:
    """Yield the paths that a value refers to."""
    for found in REFERENCE.finditer(value) if isinstance(value, str) else ():
        if key := found[1]:
            name = re.sub(r"\[(.*?)\]", r".\1", key.lstrip("."))
            ups = len(key) - len(key.lstrip("."))
            above = path.split(".")[:-ups] if ups else []
            yield ".".join([*above, name]).strip(".")


def keys_at(parts: Any, path: str) -> Sequence[Any]:
    """Return the keys of the dictionary or list at a path; none if there is none."""
    for name in path.split("."):
        if isinstance(parts, list):
            parts = parts[int(name)] if name.isdigit() and int(name) < len(parts) else None
        else:
            parts = parts.get(name) if isinstance(parts, dict) else None
    if isinstance(parts, dict):
        return list(parts)
    return range(len(parts)) if isinstance(parts, list) else ()


def check_hydra(composed: DictConfig, leaves: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse what Hydra would do beside composing and launching."""
    for key, instead in REFUSED.items():
        if OmegaConf.select(composed, key):
            raise RefusedConfig(f"{key} is refused: {instead}")
    for key in OWN:
        typed = any(override.lstrip("+").startswith(key) for override in given)
        if OmegaConf.select(composed, key) and not typed:
            raise RefusedConfig(f"{key} runs commands: give it on the command line, not in a file")
    for key, value in leaves.items():
        if key.startswith("hydra.launcher.") and isinstance(value, str) and "\n" in value:
            typed = any(override.lstrip("+").startswith("hydra.launcher.") for override in given)
            if not (typed and key.startswith(OWN)):
                raise RefusedConfig(f"{key} holds a line break, which a scheduler would run")


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, and where in its file it is."""
    mark = getattr(error, "problem_mark", None)
    at = f"line {mark.line + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    return at + str(problem).strip().splitlines()[0]
