"""Read what the files of a checkpoint say about themselves, before any weight is loaded."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mi_experiments.errors import InputError

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"

DEEPEST = 100
"""Lists and objects that may contain each other in JSON; models have about five."""


def one_line(error: Exception) -> str:
    """Shorten the message of another library to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: If the file holds anything else.
    """
    check_present(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_deep(content):
            raise RecursionError  # which libraries would meet later
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{file} is nested more than {DEEPEST} deep") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content


def is_deep(content: Any) -> bool:
    """Say whether more than `DEEPEST` lists and objects contain each other."""
    layer = [content]
    for _ in range(DEEPEST + 1):
        nested = [part for part in layer if isinstance(part, dict | list)]
        layer = []
        for part in nested:
            layer += part.values() if isinstance(part, dict) else part
    return bool(nested)


def check_present(file: Path) -> None:
    """Raise if only a placeholder stands where a file should be.

    Raises:
        InputError: If the file is a link to nothing, or a pointer of Git LFS.
    """
    if file.is_symlink() and not file.exists():
        raise InputError(
            f"{file} is a link to {os.readlink(file)}, which is missing: the download is not "
            "complete, or its cache was cleaned; download the model again"
        )
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                    f"{file.parent}"
                )


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that hold the weights.

    Raises:
        InputError: If there are none, or a shard is missing or outside the directory.
    """
    names = weight_names(directory)
    for name in names:
        check_present(directory / name)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise InputError(f"{directory / INDEX} names shards that are missing: {', '.join(missing)}")
    if names:
        return [directory / name for name in names]
    check_present(directory / SINGLE)
    check_present(directory / INDEX)
    unsafe = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth") for f in directory.glob(kind))
    if unsafe:
        raise InputError(
            f"{directory} has weights only in a format that can execute code ({unsafe[0]}); "
            "convert them to safetensors"
        )
    raise InputError(f"{directory} has no model.safetensors; no other format is read")


def weight_names(directory: Path) -> list[str]:
    """Name the files in a directory that should hold the weights; none if it does not say.

    Raises:
        InputError: If the index does not name files within the directory.
    """
    if (directory / SINGLE).is_file():
        return [SINGLE]
    index = directory / INDEX
    if not index.is_file():
        return []
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise InputError(f"{index} has no weight_map, which names the file of every weight")
    for weight, name in named.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise InputError(f"{index}: the file of {weight} is {name!r}, which is no safetensors")
        # A link to elsewhere is the user's own doing; its content is hashed like any other.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{index}: {name} is outside the model directory; move it inside")
    return sorted({Path(name).as_posix() for name in named.values()})


def tensor_files(files: Sequence[Path]) -> dict[str, Path]:
    """Return the file of every stored tensor.

    Raises:
        InputError: If two files hold different values of one tensor, or a file is damaged.
    """
    places: dict[str, Path] = {}
    for file in files:
        for key in stored_shapes(file):
            if key in places and not _equal_in(key, places[key], file):
                raise InputError(
                    f"{key} has different values in {places[key]} and {file}: remove one of them"
                )
            places[key] = file
    return places


def _equal_in(key: str, file: Path, other: Path) -> bool:
    """Say whether a tensor has the same bits in two files."""
    with safe_open(file, "pt") as first, safe_open(other, "pt") as second:
        one, two = first.get_tensor(key), second.get_tensor(key)
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a safetensors file, having checked the file's length.

    Raises:
        InputError: If the file is damaged.
    """
    return {name: shape for name, (_, shape) in _headers(file).items()}


def stored_dtype(files: list[Path]) -> torch.dtype:
    """Return the dtype of most weights, having opened every file and checked its length.

    Raises:
        InputError: If a file is damaged, or most weights are not floating-point numbers.
    """
    weights: Counter[str] = Counter()
    for file in files:
        for dtype, shape in _headers(file).values():
            weights[dtype] += torch.Size(shape).numel()
    stored = weights.most_common(1)[0][0] if weights else None
    if stored not in STORED_DTYPES:
        directory = Path(os.path.commonpath([file.parent for file in files]))
        raise InputError(
            f"the weight files in {directory} hold {stored or 'no'} weights; only "
            f"{', '.join(STORED_DTYPES)} are read: convert them, or take the original checkpoint"
        )
    return STORED_DTYPES[stored]


def _headers(name: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a file."""
    check_present(name)
    try:
        with safe_open(name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} is corrupt or truncated: {one_line(error)}") from error
