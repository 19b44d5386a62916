"""Write compressed linears in exactly the bits that `effective_bits` counts, and read them back.

`packed/BLOCK.safetensors` holds up to five byte streams a linear (`NAME.codes`, `.scales`,
`.zero_points`, `.pattern`, `.group_index`; none that is empty) and, in its header, the `Layout` of
each. Linears that were left as they are, at 16 bits a weight, are there too. It is the proof of the
accounting and the compact form for storage; no runtime of this project computes on it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from mi_experiments.compression.pipeline import CompressedBlock, CompressedLinear, LinearGrid
from mi_experiments.config.config import Config
from mi_experiments.export.format import ExportFormat
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.method.bit_count import Layout, find_layout
from mi_experiments.method.bit_packing import STREAMS, pack, unpack
from mi_experiments.method.grid import Grid
from mi_experiments.method.number_formats import (
    SYMMETRIC,
    UNIFORM,
    UNQUANTIZED,
    NumberFormat,
    find_format,
)
from mi_experiments.method.pruning import Sparsity
from mi_experiments.persistence.commits import Content

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def pack_linears(
    linears: Sequence[CompressedLinear], *, number_format: NumberFormat, scale_bits: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the streams and layouts of linears, as a safetensors file holds them.

    Args:
        linears: all of one block, whose weights the model still holds.
        number_format: which level each code stands for.
        scale_bits: 16 for float16 scales, 32 for float32.
    """
    streams: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for compressed in linears:
        name, grids = compressed.report.name, compressed.grids
        weight = compressed.linear.read_weight().cpu()
        grid = stored_grid(grids, number_format, scale_bits)
        codes = None
        if grid is not None:
            places = grid.quantized.nonzero().flatten()
            codes = torch.zeros_like(weight, dtype=torch.int16)
            codes[:, places] = grid.encode(weight[:, places], places)
        layout = layout_of(compressed, grid)
        packed = pack(weight, codes, grids["pruned"], grid, grids["channel_group"], layout)
        streams |= {f"{name}.{key}": content for key, content in packed.items() if len(content)}
        layouts[name] = describe(compressed, layout, number_format)
    return streams, as_metadata(layouts)


def lay_out(
    linears: Sequence[CompressedLinear],
    places: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    number_format: NumberFormat,
    scale_bits: int,
) -> dict[str, str]:
    """Return the layouts of linears as `pack_linears` does, for an export that holds them unpacked.

    Args:
        linears: all of one block.
        places: where the model that is exported holds each of them, see `find_places`.
        number_format: which level each code stands for.
        scale_bits: 16 for float16 scales, 32 for float32.
    """
    layouts = {}
    for compressed in linears:
        name = compressed.report.name
        grid = stored_grid(compressed.grids, number_format, scale_bits)
        layout = layout_of(compressed, grid)
        layouts[name] = describe(compressed, layout, number_format) | {"places": places[name]}
    return as_metadata(layouts)


def stored_grid(grids: LinearGrid, number_format: NumberFormat, scale_bits: int) -> Grid | None:
    """Return the levels of a linear; None if nothing is quantized."""
    if not bool((grids["bits"] < UNQUANTIZED).any()):
        return None
    bits, scale_group = grids["bits"], grids["scale_group"]
    scale, zero_point = grids["scale"], grids["zero_point"]
    return Grid(bits, scale_group, scale, zero_point, scale_bits, number_format)


def layout_of(compressed: CompressedLinear, grid: Grid | None) -> Layout:
    """Return how the bits of a linear are stored, in the type that its weights were rounded to."""
    grids, dtype = compressed.grids, compressed.report.unquantized_dtype
    return find_layout(
        grid,
        grids["pruned"],
        compressed.sparsity,
        grids["channel_group"],
        dtype=DTYPES[dtype or "float16"],
    )


def describe(
    compressed: CompressedLinear, layout: Layout, number_format: NumberFormat
) -> dict[str, Any]:
    """Return a layout as JSON, and beside it what the budget and a reader must know of the linear.

    `model_dtype` is what decoded weights are rounded to where they are computed with, and
    `planned_bits` what the plan gave a linear that was left as it was.
    """
    report = compressed.report
    return as_json(layout, number_format) | {
        "model_dtype": str(compressed.linear.dtype).removeprefix("torch."),
        "status": report.status,
        "planned_bits": report.planned_bits,
    }


def as_json(layout: Layout, number_format: NumberFormat) -> dict[str, Any]:
    """Return a layout as JSON; `grid` only where it is not uniform, as it was in earlier versions.

    Args:
        layout: how a linear is stored.
        number_format: of the run, also where nothing of this linear is quantized.
    """
    return {
        "rows": layout.rows,
        "columns": layout.columns,
        "sparsity": layout.sparsity.stored(),
        "groups": layout.groups,
        "group_size": layout.group_size,
        "symmetric": number_format == SYMMETRIC,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "scale_bits": layout.scale_bits,
        **({} if number_format.name == UNIFORM.name else {"grid": number_format.name}),
    }


def as_metadata(layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Write layouts for the header of a file: `shared`, what all have in common, and the rest."""
    first = next(iter(layouts.values()), {})
    shared = {
        key: value
        for key, value in first.items()
        if all(layout[key] == value for layout in layouts.values())
    }
    own = {
        name: {key: value for key, value in layout.items() if key not in shared}
        for name, layout in layouts.items()
    }
    # In one entry: the order of several is not always the same.
    return {"layouts": json.dumps({"shared": shared, "linears": own}, separators=(",", ":"))}


def read_packed(path: Path) -> Iterator[tuple[str, Float[Tensor, "rows columns"]]]:
    """Yield name and weights of every linear of a file in `packed/`, in the type of the model."""
    with safe_open(path, "pt") as file:
        keys, layouts = set(file.keys()), json.loads(file.metadata()["layouts"])
        for name, own in layouts["linears"].items():
            fields = layouts["shared"] | own
            held_in = DTYPES[fields.pop("model_dtype")]
            sparsity = Sparsity(**fields.pop("sparsity"))
            dtype = DTYPES[fields.pop("dtype")]
            grid, symmetric = fields.pop("grid", UNIFORM.name), fields.pop("symmetric")
            levels = find_format(grid, symmetric=symmetric)
            fields = {key: fields[key] for key in fields.keys() - {"status", "planned_bits"}}
            layout = Layout(**fields, sparsity=sparsity, dtype=dtype, number_format=levels)
            streams = {
                key: file.get_tensor(f"{name}.{key}")
                if f"{name}.{key}" in keys
                else torch.zeros(0, dtype=torch.uint8)
                for key in STREAMS
            }
            yield name, unpack(streams, layout).weight.to(held_in)


def write_block(block: CompressedBlock, weights: BlockWeights, config: Config) -> Content:
    """Return the streams of a block's linears, and in the header how they are laid out."""
    levels, scale_bits = config.wbits.number_format, config.recipe.scale_bits
    return pack_linears(block.linears, number_format=levels, scale_bits=scale_bits)


def block_bytes(weights: int, config: Config) -> int:
    """Return what the streams take at the budget, with a bit a weight for scales and indices."""
    patterns, pattern_bits = config.sparsity.average.count(1, weights)
    return int(weights * (config.wbits.average + 1) + patterns * pattern_bits) // 8


PACKED = ExportFormat(folder="packed", write_block=write_block, block_bytes=block_bytes)
