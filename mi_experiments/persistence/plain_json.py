"""JSON of a record, which anybody may have written: read whole, or refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

from mi_experiments.errors import InputError

MOST_BYTES = 256 * 2**20
"""No record is as large."""

INTEGERS = range(-(2**63), 2**64)
"""What a table, a parquet file and another program can hold."""


class BrokenRecord(InputError, ValueError):
    """A file of a run is not what a run writes."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        BrokenRecord: it is no file, too large, not JSON, nested too deep, or holds a number that
            no record has: NaN, infinite, or an integer of more than 64 bits.
    """
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    """Return the text of a file of a record.

    Raises:
        FileNotFoundError: there is none.
        BrokenRecord: it is no file, cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BrokenRecord(f"{path} is no file")
        if size > MOST_BYTES:
            raise BrokenRecord(f"{path} has {size:,} bytes, more than any record")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise BrokenRecord(f"{path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise BrokenRecord(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: str, path: Path) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text to be parsed.
        path: where it is from, for the message.

    Raises:
        BrokenRecord: it is not JSON, is nested too deep, or holds a number that no record has.
    """
    try:
        return json.loads(text, parse_constant=number, parse_float=number, parse_int=integer)
    except RecursionError as error:
        raise BrokenRecord(f"{path} is nested too deep to be a record") from error
    except ValueError as error:
        raise BrokenRecord(f"{path} is no JSON of a record: {error}") from error


def number(text: str) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is not finite.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def integer(text: str) -> int:
    """Return an integer of 64 bits.

    Raises:
        ValueError: it has more.
    """
    if len(text) > len(str(INTEGERS.stop)) or (value := int(text)) not in INTEGERS:
        raise ValueError(f"the number {text[:20]} has more than 64 bits")
    return value
