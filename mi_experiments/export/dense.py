"""What an export holds beside the weights: the grids that made them, and the model's settings.

`RUN_DIR/model/` is a Hugging Face model and tokenizer. `RUN_DIR/grids/BLOCK.safetensors` holds the
tensors of `LinearGrid` for each compressed linear of a block, named `NAME.bits`, `NAME.scale` and
so on, where NAME is the linear.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.compression.pipeline import LinearGrid

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
    settings: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write config, generation settings and tokenizer of a model.

    Published checkpoints carry settings that the library reads and refuses to write (Vicuna's for
    sampling); they have no part in compression and go through unchanged.

    Args:
        settings: content of the first two, by file name.
        tokenizer: the tokenizer of the model.
        directory: existing.
    """
    tokenizer.save_pretrained(directory)
    for name, content in settings.items():
        (directory / name).write_bytes(content)
