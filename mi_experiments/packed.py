"""Write compressed linears in exactly the bits that `effective_bits` counts, and read them back.

`packed.safetensors` holds five byte streams a linear (`NAME.codes`, `.scales`, `.zero_points`,
`.pattern`, `.group_index`) and, in its header, each linear's `Layout`. It is the proof of the
accounting and the compact form for storage; no runtime of this project computes on it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from mi_experiments.llm.inventory import view_linears
from mi_experiments.method.grid import UNQUANTIZED, Grid
from mi_experiments.method.packing import STREAMS, pack, unpack
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.storage import Layout, find_layout
from mi_experiments.pipeline import CompressedLinear
from mi_experiments.record import write_atomically

PACKED = "packed.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def export_packed(
    model: PreTrainedModel,
    linears: Sequence[CompressedLinear],
    sparsity: Sparsity,
    run_dir: Path,
    *,
    symmetric: bool,
) -> int:
    """Write `packed.safetensors` atomically.

    Args:
        model: with the compressed weights in place.
        linears: what `compress_model` returned.
        sparsity: of every linear.
        run_dir: directory of the file.
        symmetric: whether zero points follow from the widths and are not stored.

    Returns:
        Bytes of all streams.
    """
    streams: dict[str, Tensor] = {}
    layouts: dict[str, str] = {}
    views = {
        view.name: view
        for owner, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        for view in view_linears(owner, module, key)
    }
    for linear in linears:
        if linear.report.status == "untouched":
            continue
        name, grids = linear.report.name, linear.grids
        view = views[name]
        if (view.rows, view.columns) != (linear.report.rows, linear.report.columns):
            view = view.stored_as(not view.transposed)
        weight = view.read_weight().cpu()
        grid = codes = None
        if bool((grids["bits"] < UNQUANTIZED).any()):
            grid = Grid(grids["bits"], grids["scale_group"], grids["scale"], grids["zero_point"])
            places = grid.quantized.nonzero().flatten()
            codes = torch.zeros_like(weight, dtype=torch.int16)
            codes[:, places] = grid.encode(weight[:, places], places)
        group = grids["channel_group"]
        layout = find_layout(grid, grids["pruned"], sparsity, group, symmetric=symmetric)
        packed = pack(weight, codes, grids["pruned"], grid, group, layout)
        streams |= {f"{name}.{stream}": content for stream, content in packed.items()}
        layouts[name] = json.dumps(
            dataclasses.asdict(layout) | {"dtype": str(layout.dtype).removeprefix("torch.")}
        )
    write_atomically(run_dir / PACKED, save(streams, layouts))
    return sum(content.numel() for content in streams.values())


def read_packed(path: Path) -> Iterator[tuple[str, Float[Tensor, "rows columns"]]]:
    """Yield name and weights of every linear of a `packed.safetensors`."""
    with safe_open(path, "pt") as file:
        for name, header in (file.metadata() or {}).items():
            fields = json.loads(header)
            sparsity = Sparsity(**fields.pop("sparsity"))
            dtype = DTYPES[fields.pop("dtype")]
            layout = Layout(**fields, sparsity=sparsity, dtype=dtype)
            yield name, unpack({s: file.get_tensor(f"{name}.{s}") for s in STREAMS}, layout).weight
