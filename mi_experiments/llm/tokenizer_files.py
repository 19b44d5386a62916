"""What the files of a tokenizer are, where transformers can only guess why it cannot read them."""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from mi_experiments.errors import InputError, MiError
from mi_experiments.llm.checkpoint import check_present, one_line

KINDS = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja")


def check_tokenizer_files(directory: Path) -> None:
    """Raise if a file of a tokenizer is not there, or needs a library that is not there.

    Raises:
        InputError: If so.
    """
    for file in sorted({file for kind in KINDS for file in directory.glob(kind)}):
        check_present(file)
    if (directory / "tokenizer.json").is_file():
        return
    for file in sorted(directory.glob("*.model")):
        if file.stat().st_size == 0:
            raise InputError(f"{file} is empty; download the model again")
        for package in ("tiktoken",) if is_tiktoken(file) else ("sentencepiece", "google.protobuf"):
            if not has_package(package):
                name = package.rpartition(".")[2]
                raise InputError(f"{file} is read with the package {name}: pip install {name}")


def explain_tokenizer(directory: Path, error: Exception) -> str:
    """Say why transformers could not load the tokenizer of a directory."""
    if not (directory / "tokenizer.json").is_file():
        for file in sorted(directory.glob("*.model")):
            if not is_tiktoken(file) and "tiktoken" in str(error):
                # What transformers tries last of all, and asks for.
                return f"{file} is damaged: it is no sentencepiece model"
    if isinstance(error, RecursionError):
        return "a JSON file in it is nested too deep"
    return one_line(error)


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Say in one line that a tokenizer cannot be saved, which each does in its own way.

    Raises:
        InputError: If so.
    """
    try:
        yield
    except MiError:
        raise
    except Exception as error:
        raise InputError(
            f"the tokenizer can be loaded but not saved: {one_line(error)}; an export holds it, "
            "and its tokens are known by its files"
        ) from error


def is_tiktoken(file: Path) -> bool:
    """Say whether a vocabulary is of tiktoken: in each line a token in base64, and its rank."""
    with file.open("rb") as opened:
        token, _, rank = opened.readline(4096).strip().rpartition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except binascii.Error:
        return False


def has_package(name: str) -> bool:
    """Say whether a package is installed."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor what contains it
        return False
