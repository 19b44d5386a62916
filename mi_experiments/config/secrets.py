"""Secrets never reach records, logs or Weights & Biases."""

import re
from typing import Any

TOKEN = re.compile(r"\bhf_\w{8,}|\bsk-[\w-]{8,}|\bwandb_v\d_\w+|(?<=://)[^/@\s]+(?=@)")
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")


def scrub(value: Any, key: str = "") -> Any:
    """Mask tokens, API keys and the user part of addresses in plain data.

    A `revision` may be a commit, which looks like an API key and is none.
    """
    if isinstance(value, dict):
        return {name: scrub(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    value = TOKEN.sub("***", value)
    return value if key == "revision" else HEX_KEY.sub("***", value)
