"""Every key of a config as a page: `python -m mi_experiments.config.reference`.

Types, ranges and words come from the dataclasses, defaults from `conf/`; nothing is written twice.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mi_experiments.config.compose import conf_directory
from mi_experiments.config.config import Config
from mi_experiments.config.fields import about, allowed, fields_below, take_apart
from mi_experiments.config.identity import register_resolvers

HEAD = """# Configuration

Every key of a run, with what it may be and what it is if nothing is said. A key is given as
`mi-run KEY=VALUE`, a whole file of `conf/` as `mi-run GROUP=NAME`; what does not fit is refused in
one line. `${KEY}` is the value of another key, and `???` has to be given.

This page is made by `make reference`, from the dataclasses in `mi_experiments/config/` and from
`conf/`.
"""
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}


def page() -> str:
    """Return the page in Markdown."""
    return "\n".join([HEAD, *sections(Config, "", composed())])


def composed() -> dict[str, Any]:
    """Return the defaults of a run as they are written, and those of any evaluation text."""
    register_resolvers()
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        values = plain(compose("config"))
    values["evaluation"]["datasets"] = plain(OmegaConf.load(folder() / "evaluation_text.yaml"))
    return values | {"corpora": {}}


def sections(part: Any, path: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a dataclass, the files of its group, and the tables below it."""
    rows, below, meanings = [], [], []
    for name, hint in fields_below(part):
        key = f"{path}{name}"
        base, _, _ = take_apart(hint)
        inner = get_args(base)[-1] if get_origin(base) is dict else base
        if is_dataclass(inner):
            place = key if inner is base else f"{key}.NAME"
            below += list(section(inner, place, defaults.get(name) or {}))
            if is_dataclass(base) and not about(hint).words:
                continue
        rows.append((
            f"`{key}`",
            kind(base),
            allowed(hint),
            shown(name, defaults),
            about(hint).words,
        ))
        if isinstance(base, type) and issubclass(base, Enum) and "`" in (base.__doc__ or ""):
            meanings.append(f"- `{key}`: {one_line(base.__doc__)}")
    yield from table(("key", "type", "allowed", "default", "meaning"), rows)
    yield from ([*meanings, ""] if meanings else [])
    yield from below


def section(part: Any, path: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the part of the page about one dataclass."""
    yield f"## `{path}`\n"
    yield inspect.cleandoc(part.__doc__ or "") + "\n"
    files = sorted((folder() / path).glob("*.yaml"))
    yield from table(("file", "what it says"), [(f"`{path}={f.stem}`", said(f)) for f in files])
    yield from sections(part, f"{path}.", defaults)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; none if it has no rows."""
    for row in [heads, ["---"] * len(heads), *rows] if rows else []:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield from [""] if rows else []


def kind(base: Any) -> str:
    """Name a type in words."""
    if get_origin(base) is list:
        return f"list of {kind(take_apart(get_args(base)[0])[0])}"
    if get_origin(base) is dict or is_dataclass(base):
        return "entries"
    return NAMES.get(base, "choice")


def shown(name: str, defaults: Mapping[str, Any]) -> str:
    """Write a default as YAML does; a dash where there is none."""
    if name not in defaults or isinstance(defaults[name], dict):
        return "-"
    value = defaults[name]
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def said(file: Path) -> str:
    """Return the comment at the head of a file of `conf/`."""
    head = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return one_line(" ".join(line.removeprefix("#") for line in head))


def one_line(text: str | None) -> str:
    """Put a text on one line."""
    return " ".join((text or "").split())


def plain(values: Any) -> dict[str, Any]:
    """Return a config as it is written, interpolations and all."""
    container = OmegaConf.to_container(values)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def folder() -> Path:
    """Return the folder of configs."""
    return Path(conf_directory())


if __name__ == "__main__":
    sys.stdout.write(page())
