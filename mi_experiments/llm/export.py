"""What an export holds beside the weights: the grids that made them, and the model's settings.

`RUN_DIR/model/` is a Hugging Face model and tokenizer. `RUN_DIR/grids/BLOCK.safetensors` holds the
tensors of `LinearGrid` for each compressed linear of a block, named `NAME.bits`, `NAME.scale` and
so on, where NAME is the linear.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Bool, Float32, Int32, UInt8
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write config, generation settings and tokenizer of a model.

    Published checkpoints (Vicuna) carry sampling settings that the library reads with a warning and
    refuses to write; they have no part in compression and go through unchanged.

    Args:
        model: whose weights are or will be in the directory.
        tokenizer: of the model.
        directory: existing.
    """
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)
