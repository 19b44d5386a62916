"""Make room for hidden states: on the accelerator, in host memory, or in a file."""

import math
import secrets
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mi_experiments.errors import InputError

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes room for hidden states of a shape and dtype, wherever they are to live."""


class Place(Enum):
    """Where hidden states live between two blocks; `auto` is decided by the memory plan."""

    auto = "auto"
    accelerator = "accelerator"
    host = "host"
    disk = "disk"


def allocator(place: Place, device: torch.device, directory: Path) -> Allocate:
    """Return what makes room in a place.

    Args:
        place: any but `auto`.
        device: where blocks run.
        directory: for files, which have no name and vanish with the tensor, however the run ends.

    Raises:
        ValueError: the place is `auto`.
    """
    if place is Place.disk:
        return partial(_map_file, directory)
    if place is Place.auto:
        raise ValueError("the memory plan decides where activations live, before they exist")
    where = device if place is Place.accelerator else torch.device("cpu")
    return lambda shape, dtype: torch.empty(*shape, dtype=dtype, device=where)


def _map_file(directory: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor whose memory is a file, so that the system can write it out and forget it."""
    count = math.prod(shape)
    path = directory / f".activations.{secrets.token_hex(4)}.tmp"
    try:
        tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except RuntimeError as error:
        raise InputError(f"{path}: no room for {count} activations on disk: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    return tensor.view(*shape)
