"""Write compressed linears in exactly the bits that `effective_bits` counts, and read them back.

`packed/BLOCK.safetensors` holds five byte streams a linear (`NAME.codes`, `.scales`,
`.zero_points`, `.pattern`, `.group_index`) and, in its header, the `Layout` of each. It is the
proof of the accounting and the compact form for storage; no runtime of this project computes on it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from mi_experiments.compression.pipeline import CompressedLinear
from mi_experiments.method.bit_count import Layout, find_layout
from mi_experiments.method.bit_packing import STREAMS, pack, unpack
from mi_experiments.method.grid import UNQUANTIZED, Grid
from mi_experiments.method.pruning import Sparsity

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def pack_linears(
    linears: Sequence[CompressedLinear], *, symmetric: bool, scale_bits: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the streams and layouts of linears, as a safetensors file holds them.

    Args:
        linears: of one block, whose weights the model still holds.
        symmetric: whether zero points follow from the widths and are not stored.
        scale_bits: 16 for float16 scales, 32 for float32.
    """
    streams: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for compressed in linears:
        name, grids = compressed.report.name, compressed.grids
        weight = compressed.linear.read_weight().cpu()
        grid = codes = None
        if bool((grids["bits"] < UNQUANTIZED).any()):
            grid = Grid(
                grids["bits"],
                grids["scale_group"],
                grids["scale"],
                grids["zero_point"],
                scale_bits,
            )
            places = grid.quantized.nonzero().flatten()
            codes = torch.zeros_like(weight, dtype=torch.int16)
            codes[:, places] = grid.encode(weight[:, places], places)
        group = grids["channel_group"]
        layout = find_layout(grid, grids["pruned"], compressed.sparsity, group, symmetric=symmetric)
        packed = pack(weight, codes, grids["pruned"], grid, group, layout)
        streams |= {f"{name}.{stream}": content for stream, content in packed.items()}
        dtype = str(layout.dtype).removeprefix("torch.")
        layouts[name] = dataclasses.asdict(layout) | {"dtype": dtype}
    return streams, {"layouts": json.dumps(layouts)}


def read_packed(path: Path) -> Iterator[tuple[str, Float[Tensor, "rows columns"]]]:
    """Yield name and weights of every linear of a file in `packed/`."""
    with safe_open(path, "pt") as file:
        for name, fields in json.loads(file.metadata()["layouts"]).items():
            sparsity = Sparsity(**fields.pop("sparsity"))
            dtype = DTYPES[fields.pop("dtype")]
            layout = Layout(**fields, sparsity=sparsity, dtype=dtype)
            yield name, unpack({s: file.get_tensor(f"{name}.{s}") for s in STREAMS}, layout).weight
