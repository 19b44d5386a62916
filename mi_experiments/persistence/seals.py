"""Let a JSON file tell whether it is what was written: it carries the SHA-256 of what it holds.

A seal finds damage and edits, and no forger, who can seal again.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"
"""Key of a sealed value; `sha256` in it is that of all else, its other entries included."""


def seal(content: Mapping[str, Any], files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a JSON-ready value with its seal.

    Args:
        content: the content to be sealed.
        files: SHA-256 of files beside it, by name, that are to be what they are now.
    """
    entries = dict(files or {})
    return {**content, SEAL: {"sha256": _hash(content, entries), **entries}}


def open_seal(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return what was sealed, and the hashes of files beside it; None where there is no seal.

    Raises:
        ValueError: it is not what was written.
    """
    rest = dict(content)
    if SEAL not in rest:
        return rest, None
    entries = rest.pop(SEAL)
    if not isinstance(entries, dict) or entries.pop("sha256", None) != _hash(rest, entries):
        raise ValueError("it is not what was written: its seal is of another content")
    return rest, entries


def _hash(content: Mapping[str, Any], entries: Mapping[str, str]) -> str:
    """Return the SHA-256 of a value and the entries of its seal."""
    text = json.dumps([content, entries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
