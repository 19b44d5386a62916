"""Secrets never reach records, logs or Weights & Biases.

What leaves the process passes `scrub`: it masks what looks like a key or token, what stands in an
address to log in with, and the values of environment variables that are named like secrets. What
exists as a file or folder here is the name of that and no secret, or a run on it could not be told
from others, nor go on.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

MASK = "***"

# Not by \b: to that, the underscore of a directory's name belongs to the token after it.
START, END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"

TOKEN = re.compile(
    rf"{START}(?:hf_\w{{8,}}|sk-[\w-]{{8,}}|wandb_v\d_\w+|gh[pousr]_\w{{16,}}|github_pat_\w{{16,}}"
    rf"|glpat-[\w-]{{16,}}|xox[a-z]-[\w-]{{10,}}|AKIA[0-9A-Z]{{16}}|AIza[\w-]{{30,}}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
HEX_KEY = re.compile(rf"(?<!revision[= ]){START}[0-9a-f]{{40}}{END}")
"""A `revision` may be a commit, which looks like an API key and is none."""

USER = re.compile(r"(?<=://)(?:[^/\s]+|[^/\s:@]+:(?!\d+(?:/|$))\S*)(?=@)")
"""Of an address, before its host; a password may hold anything but blanks."""

QUERY = re.compile(
    r"(?i)([?&;#][\w.-]*(?:token|key|secret|pass|pwd|sig|auth|cred)[\w.-]*=)[^&\s#'\"]+"
)
"""Of an address, what its query logs in with."""

SECRET_NAME = re.compile(r"(?i)(key|token|secret|passw(or)?d|passphrase|credentials?)s?$|secret")
"""Of an environment variable whose value is a secret."""

SHORTEST = 6
SWITCHES = {"default", "disabled", "embedded", "enabled", "offline", "online"}
"""Values in the environment that are none: shorter ones, and words that configs are made of."""

AROUND = r"""\s'"=,:;()<>\[\]{}"""
"""What is no part of a path in a line."""


def scrub(value: Any, key: str = "") -> Any:
    """Mask secrets in plain data, whatever its depth.

    Args:
        value: a text, or dictionaries and lists of texts and other things.
        key: the name of the value.
    """
    return _scrub(value, key, environment_secrets(os.environ))


def _scrub(value: Any, key: str, secrets: re.Pattern[str] | None) -> Any:
    """Do what `scrub` does, with the secrets of the environment at hand."""
    if isinstance(value, dict):
        return {
            _scrub(name, "", None): _scrub(item, str(name), secrets) for name, item in value.items()
        }
    if isinstance(value, list):
        return [_scrub(item, "", secrets) for item in value]
    if not isinstance(value, str):
        return value
    if secrets is not None:
        value = secrets.sub(MASK, value)
    value = QUERY.sub(rf"\1{MASK}", USER.sub(MASK, value))
    patterns = (TOKEN,) if key == "revision" else (TOKEN, HEX_KEY)
    for pattern in patterns:
        value = pattern.sub(mask_unless_path, value)
    return value


def mask_unless_path(found: re.Match[str]) -> str:
    """Mask what was found, unless it is part of the path of something that exists."""
    text, (start, end) = found.string, found.span()
    before = re.search(rf"[^{AROUND}]*$", text[:start])
    after = re.match(rf"[^{AROUND}]*", text[end:])
    assert before is not None
    assert after is not None
    # A blank may be part of a path, but then nothing else is in the text.
    rest = after[0].rstrip(".…")
    paths = (text, before[0] + found[0] + rest, before[0] + found[0] + rest.split("/")[0])
    return found[0] if any(map(exists, paths)) else MASK


def exists(path: str) -> bool:
    """Tell whether a text is the path of something here."""
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def environment_secrets(environment: Mapping[str, str]) -> re.Pattern[str] | None:
    """Return a pattern of the secrets in environment variables; None if there are none."""
    values = {
        value
        for name, given in environment.items()
        if SECRET_NAME.search(name)
        and (value := given.strip())
        and len(value) >= SHORTEST
        and value not in SWITCHES
        and not exists(value)
    }
    written = values | {quote(value, safe="") for value in values}
    longest_first = sorted(written, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def scrub_record(record: logging.LogRecord) -> bool:
    """Mask secrets in a record of a log; a filter, which lets every record pass."""
    record.msg, record.args = scrub(record.getMessage()), ()
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    record.exc_text = scrub(record.exc_text)
    return True
