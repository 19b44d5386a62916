"""Read what the files of a checkpoint say about themselves, before any weight is loaded."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mi_experiments.errors import InputError

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def one_line(error: Exception) -> str:
    """Shorten the message of another library to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: If the file holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that hold the weights.

    Raises:
        InputError: If there are none, or a shard is missing.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [shard for shard in shards if not (directory / shard).is_file()]:
            raise InputError(f"{index} names shards that are missing: {', '.join(missing)}")
        return [directory / shard for shard in shards]
    unsafe = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth") for f in directory.glob(kind))
    if unsafe:
        raise InputError(
            f"{directory} has weights only in a format that can execute code ({unsafe[0]}); "
            "convert them to safetensors"
        )
    raise InputError(f"{directory} has no model.safetensors; no other format is read")


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
        raise InputError(f"{files} hold {stored} weights; only {', '.join(STORED_DTYPES)} are read")
    return STORED_DTYPES[stored]


def _headers(name: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a file."""
    try:
        with safe_open(name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} is corrupt or truncated: {one_line(error)}") from error
