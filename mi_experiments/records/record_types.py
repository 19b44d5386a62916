"""Records as values of their types: every key there, none unknown, every number a number."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from mi_experiments.persistence.plain_json import BrokenRecord, parse_json, read_text


@cache
def adapter(kind: Any) -> Any:
    """Return pydantic's reader of a type; made once, for that takes time."""
    return TypeAdapter(kind)


def read_as(kind: type, path: Path, rename: Callable[[Any], Any]) -> Any:
    """Return the value of a frozen dataclass that a JSON file holds.

    Args:
        kind: the kind of the dataclass.
        path: the path of the file.
        rename: gives what is in the file its names of today.

    Raises:
        FileNotFoundError: there is no file.
        BrokenRecord: it is not JSON, or not of the type: a key is missing or unknown, or a value is
            of another type.
    """
    content = parse_json(read_text(path), path)
    try:
        text = json.dumps(rename(content))
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenRecord(f"{path} is no record of this version: it has no config") from error
    try:
        return adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise BrokenRecord(f"{path} is no record of this version: {first_of(error)}") from error


def read_rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Return the rows of a parquet file.

    Raises:
        FileNotFoundError: there is no file.
        BrokenRecord: it cannot be read, has other columns or types, or a number is not finite.
    """
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if not path.is_file():
        raise BrokenRecord(f"{path} is no file")
    try:
        table = pq.read_table(path, schema=schema)
        table.validate(full=True)
        for name in schema.names:
            column = table[name].drop_null()
            if pa.types.is_floating(column.type) and not all(pc.is_finite(column).to_pylist()):
                raise BrokenRecord(f"{path} has a {name} that is not finite")
        rows: list[dict[str, Any]] = table.to_pylist()
    except BrokenRecord:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenRecord(f"{path} cannot be read: {line[:200]}") from error
    return rows


def check_rows(kind: Any, rows: Sequence[Mapping[str, Any]], path: Path) -> list[Any]:
    """Return rows as values of a frozen dataclass; maps of parquet are lists of pairs.

    Raises:
        BrokenRecord: a value is missing or of another type.
    """
    known = {
        field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
    }
    given = [
        {
            name: dict(value) if name == "bits" and value is not None else value
            for name, value in row.items()
            if value is not None or name not in known
        }
        for row in rows
    ]
    try:
        values: list[Any] = adapter(list[kind]).validate_python(given, extra="forbid")
    except ValidationError as error:
        raise BrokenRecord(f"{path} is no record of this version: {first_of(error)}") from error
    return values


def first_of(error: ValidationError) -> str:
    """Return the first thing that is wrong, in a line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def short_hash(files: Mapping[str, str]) -> str | None:
    """Return one short hash of files that are known by name and hash; None for no files."""
    if not files:
        return None
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
