"""export=dense: a model that any tool loads, and beside it the grids that made its weights.

`RUN_DIR/model/` is a Hugging Face model and tokenizer. `RUN_DIR/grids/BLOCK.safetensors` holds the
tensors of `LinearGrid` for each compressed linear of a block, named `NAME.bits`, `NAME.scale` and
so on, where NAME is the linear.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.compression.pipeline import CompressedBlock, LinearGrid
from mi_experiments.config.config import Config
from mi_experiments.errors import ResumableError
from mi_experiments.export.format import MODEL, ExportFormat, model_file
from mi_experiments.export.packed import lay_out
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.places import find_places
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.tokenizer_files import tokenizer_errors
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.atomic import disk_errors, temporary_sibling
from mi_experiments.persistence.commits import Commits, Content

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


def read_settings(opened: OpenModel, run_dir: Path) -> dict[str, bytes]:
    """Let transformers write the settings of a model in a folder of their own, and read them.

    Raises:
        InputError: the tokenizer cannot be saved.
        ResumableError: the disk is full.
    """
    folder = temporary_sibling(run_dir / MODEL)
    try:
        with tokenizer_errors(), disk_errors(run_dir / MODEL):
            folder.mkdir()
            write_settings(opened.settings, opened.tokenizer, folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    finally:
        rmtree(folder, ignore_errors=True)


def write_block(block: CompressedBlock, weights: BlockWeights, config: Config) -> Content:
    """Return the grids of a block's linears, and in the header where `model/` holds each of them.

    Raises:
        InputError: a linear is stored in another way than as matrices.
    """
    grids = {x.report.name: x.grids for x in block.linears if x.report.changed}
    places = find_places(weights, block.index, [x.linear for x in block.linears])
    levels, scale_bits = config.wbits.number_format, config.recipe.scale_bits
    layouts = lay_out(block.linears, places, number_format=levels, scale_bits=scale_bits)
    return grid_tensors(grids), layouts


def block_bytes(weights: int, config: Config) -> int:
    """Return what the grids take: a byte of pattern a weight, a scale and a zero point a group."""
    return weights + 8 * weights // (config.wbits.group_size or 64)


def refuse(walker: Walker) -> None:
    """Require that the linears of the first block are stored as matrices.

    Raises:
        InputError: one is not.
    """
    if walker.weights is not None:
        with walker.hold(0):
            find_places(walker.weights, 0, walker.inventory.linears[0])


def complete(weights: BlockWeights, commits: Commits, opened: OpenModel) -> None:
    """Make `model/` a model that any tool loads: the rest of the weights, index, settings.

    Args:
        weights: the compressed model.
        commits: the commits of the run.
        opened: the original, whose settings and tokenizer these are.

    Raises:
        InputError: the tokenizer cannot be saved.
        ResumableError: the disk is full, or a block was damaged since it was written.
    """
    blocks = len(weights.blocks)
    commits.commit({model_file(0, blocks): (weights.stored_rest(), {"format": "pt"})})
    places: dict[str, str] = {}
    total = 0
    for number in range(blocks + 1):
        name = model_file(number, blocks)
        found = commits.read_tensors(name)
        if found is None:
            raise ResumableError(
                f"{name} was damaged after it was evaluated: give the same command again to "
                "compute it once more"
            )
        places |= dict.fromkeys(found[0], Path(name).name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in found[0].values())
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    settings = read_settings(opened, commits.run_dir)
    commits.commit({
        **{f"{MODEL}/{name}": content for name, content in settings.items()},
        f"{MODEL}/model.safetensors.index.json": (json.dumps(index_file, indent=2) + "\n").encode(),
    })


DENSE = ExportFormat(
    folder="grids",
    write_block=write_block,
    block_bytes=block_bytes,
    keeps_model=True,
    complete=complete,
    refuse=refuse,
)
