"""Write a compressed model: the weights as any tool reads them, and the grids that made them.

`DIRECTORY/model/` is a Hugging Face model and tokenizer. `DIRECTORY/grids.safetensors` holds the
tensors of `LinearGrid` for each compressed linear, named `NAME.bits`, `NAME.scale` and so on, where
NAME is the weight's parameter without `.weight`.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float32, Int32, UInt8
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mi_experiments.errors import AuditError, InputError

MODEL = "model"
GRIDS = "grids.safetensors"


class LinearGrid(TypedDict):
    """The grids of one linear, in the order [rows, columns] = [output, input] for every class.

    A weight that is kept is scale · (code − zero_point) with an integer code, 0 <= code < 2^bits,
    and the scale and zero point of its row and of its channel's scale group. (GPT-2's `Conv1D`
    holds its weight as [columns, rows]; its grids are in the order above all the same.)

    Attributes:
        bits: width of each channel; 16 = not quantized.
        channel_group: group of each channel.
        scale_group: scale group of each channel.
        scale: step of each row and scale group.
        zero_point: code of the weight zero.
        pruned: True where the weight is set to zero.
    """

    bits: UInt8[Tensor, "columns"]
    channel_group: Int32[Tensor, "columns"]
    scale_group: Int32[Tensor, "columns"]
    scale: Float32[Tensor, "rows scale_groups"]
    zero_point: Int32[Tensor, "rows scale_groups"]
    pruned: Bool[Tensor, "rows columns"]


GRID_DTYPES = {
    "bits": torch.uint8,
    "channel_group": torch.int32,
    "scale_group": torch.int32,
    "scale": torch.float32,
    "zero_point": torch.int32,
    "pruned": torch.bool,
}


def export_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    grids: Mapping[str, LinearGrid],
) -> None:
    """Write the model, its tokenizer and its grids; all of it or nothing.

    Everything is written and flushed under a temporary name in the directory, then renamed, the
    model last: where `model/` exists, the export is complete.

    Args:
        model: with the compressed weights in place, in its own number format.
        tokenizer: of the model.
        directory: receives `model/` and `grids.safetensors`; made where it does not exist.
        grids: by name of the linear, the six tensors of `LinearGrid`, on any device.

    Raises:
        InputError: the directory holds an export already, or the disk refuses.
        ValueError: a grid is not what `LinearGrid` says.
    """
    directory = Path(directory)
    for target in (directory / MODEL, directory / GRIDS):
        if os.path.lexists(target):
            raise InputError(f"{target} exists and is not overwritten: choose another directory")
    tensors = grid_tensors(grids)
    # In the directory itself, so that a rename never crosses a filesystem.
    temporary = directory / f".export-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        _save_model(model, temporary / MODEL)
        tokenizer.save_pretrained(temporary / MODEL)
        save_file(tensors, temporary / GRIDS)
        _flush(temporary)
        _publish(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: the export cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path) -> None:
    """Rename grids and model into the directory, both or neither."""
    (temporary / GRIDS).rename(directory / GRIDS)
    try:
        (temporary / MODEL).rename(directory / MODEL)
    except OSError:
        (directory / GRIDS).unlink()
        raise
    _fsync(directory)


def grid_tensors(grids: Mapping[str, LinearGrid]) -> dict[str, Tensor]:
    """Name every tensor of every grid, and require that they fit each other.

    Raises:
        ValueError: a tensor is missing, of another dtype or shape, or unknown.
    """
    tensors = {}
    for name, grid in grids.items():
        for key, dtype in GRID_DTYPES.items():
            if grid.keys() != GRID_DTYPES.keys() or grid[key].dtype != dtype:  # type: ignore[literal-required]
                raise ValueError(f"grid of {name}: it must have exactly {GRID_DTYPES}")
            # A copy: safetensors refuses tensors that share memory, as groups of one site may.
            tensors[f"{name}.{key}"] = grid[key].to("cpu", copy=True).contiguous()  # type: ignore[literal-required]
        rows, columns = grid["pruned"].shape
        per_channel = {grid[key].shape for key in ("bits", "channel_group", "scale_group")}
        if per_channel != {(columns,)} or grid["zero_point"].shape != grid["scale"].shape:
            raise ValueError(f"grid of {name}: shapes do not fit [{rows}, {columns}]")
        if grid["scale"].shape != (rows, int(grid["scale_group"].max()) + 1):
            raise ValueError(f"grid of {name}: scales do not fit its rows and scale groups")
    return tensors


def _save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write configuration and weights, with the generation settings as they are.

    Published checkpoints (Vicuna) carry sampling settings that the library reads with a warning and
    refuses to write; they have no part in compression and go through unchanged.
    """
    settings = model.generation_config
    if settings is None:
        model.save_pretrained(directory)
        return
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(directory)
    finally:
        model.generation_config = settings
    settings.to_json_file(directory / "generation_config.json")


def _flush(directory: Path) -> None:
    """Bring every file and folder below a directory to the disk."""
    for path in directory.rglob("*"):
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    """Bring one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_export(directory: str | Path, model: PreTrainedModel) -> None:
    """Require that the export, read back from disk, is the model in memory.

    Reads a second copy of the model into host memory.

    Args:
        directory: written by `export_dense`.
        model: that was exported, unchanged since.

    Raises:
        AuditError: a tensor is missing, too many, or differs in a single bit.
    """
    path = Path(directory) / MODEL
    loaded: Any = type(model).from_pretrained(
        path, dtype=model.dtype, local_files_only=True, output_loading_info=True
    )
    reloaded, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise AuditError(f"{path}: {kind} on reading it back: {sorted(report[kind])[:4]}")
    expected, found = model.state_dict(), reloaded.state_dict()
    if expected.keys() != found.keys():
        names = sorted(expected.keys() ^ found.keys())
        raise AuditError(f"{path}: tensors that are only in memory or only on disk: {names[:4]}")
    for name, tensor in expected.items():
        if not _same_bits(tensor, found[name]):
            raise AuditError(f"{path}: {name} on disk differs from the model in memory")


def _same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Compare dtype, shape and every bit, so that NaN equals itself and 0.0 is not -0.0."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    flat, other_flat = (t.detach().cpu().flatten().view(torch.uint8) for t in (tensor, other))
    return torch.equal(flat, other_flat)
