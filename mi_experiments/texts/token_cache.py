"""Tokens computed once, by the SHA-256 of everything that decides them; see `content_store`."""

import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.llm.tokenizer_files import tokenizer_errors
from mi_experiments.persistence.atomic import disk_errors, file_hash
from mi_experiments.persistence.cache import cache_root, content_key, find_or_compute

FORMAT = 3
"""Raised by every change in how documents are read, tokenized, cut or stored."""

LIBRARIES = ("tokenizers", "transformers", "datasets")
"""Whose versions are part of every key."""


def cache_directory() -> Path:
    """Return where entries live."""
    return cache_root() / "tokens"


def cache_key(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], parameters: Mapping[str, object]
) -> str:
    """Hash everything that decides what the tokens of a text will be.

    Args:
        tokenizer: hashed as the files that it saves.
        files: that the text is read from, hashed by content; their names and places do not count.
        parameters: the parameters of reading and cutting; anything that is JSON, and enums.
    """
    parts = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "tokenizer": hash_tokenizer(tokenizer),
        "files": [file_hash(file) for file in files],
        "parameters": parameters,
    }
    return content_key(parts)


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of each file that the tokenizer saves, by name.

    Raises:
        InputError: it cannot be saved.
    """
    with tempfile.TemporaryDirectory() as directory:
        with tokenizer_errors(), disk_errors(Path(directory)):
            tokenizer.save_pretrained(directory)
        return {file.name: file_hash(file) for file in sorted(Path(directory).iterdir())}


def cached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors under a key, computed once by whoever asks first.

    Args:
        key: the key of `cache_key`.
        compute: gives the tensors.
    """
    path = cache_directory() / f"{key}.safetensors"
    return dict(find_or_compute(path, lambda: (compute(), {}))[0])


def tokens_of(
    key: str, compute: Callable[[], dict[str, Tensor]], use_cache: bool
) -> dict[str, Tensor]:
    """Return tensors from their cache, or computed where nothing is to come from a cache."""
    return cached(key, compute) if use_cache else compute()
