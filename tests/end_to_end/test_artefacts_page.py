"""A stranger can read our files by docs/artefacts.md: its reader runs, and it names every field."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mi_experiments.export.dense import GRID_DTYPES
from mi_experiments.export.packed import as_json
from mi_experiments.method.bit_count import Layout, find_layout
from mi_experiments.method.bit_packing import STREAMS, pack, unpack
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.information_summary import InformationSummary
from mi_experiments.method.number_formats import find_format
from mi_experiments.method.pruning import Sparsity, choose_pruned
from mi_experiments.records.candidates import Candidate, SafetyNet
from mi_experiments.records.linears import LINEAR_SCHEMA
from mi_experiments.records.result import (
    Bits,
    Evaluation,
    Provenance,
    Result,
)

PAGE = (Path(__file__).parents[2] / "docs" / "artefacts.md").read_text()
(READER,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RECORDS = (Result, Provenance, Evaluation, Bits, SafetyNet, Candidate, InformationSummary, Sparsity)
LAYOUT = as_json(Layout(1, 1, Sparsity(0.0), 0, 1, torch.float16), find_format("normal_float"))
NAMES = {field.name for record in RECORDS for field in dataclasses.fields(record)} | LAYOUT.keys()


def test_every_field_and_every_tensor_is_described() -> None:
    names = sorted(NAMES | set(LINEAR_SCHEMA.names))
    tensors = [f"NAME.{name}" for name in (*GRID_DTYPES, *STREAMS)]
    assert [name for name in [*names, *tensors] if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("sparsity", [Sparsity(0.0), Sparsity(0.5), Sparsity(0.5, 2, 4)])
@pytest.mark.parametrize(
    ("grid_name", "symmetric"), [("uniform", False), ("uniform", True), ("normal_float", False)]
)
@pytest.mark.parametrize("widths", [(3, 4, 16), (4, 4, 4), (16, 16, 16)])
@pytest.mark.parametrize(("dtype", "scale_bits"), [("float16", 16), ("bfloat16", 32)])
def test_the_reader_of_the_page_reads_what_we_pack(
    sparsity: Sparsity,
    grid_name: str,
    symmetric: bool,
    widths: tuple[int, ...],
    dtype: str,
    scale_bits: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    group = torch.randperm(24, generator=generator).remainder(3).int()
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    if not sparsity.is_dense:
        pruned = choose_pruned(weight.square(), sparsity)
    bits, grid, codes = torch.tensor(widths, dtype=torch.uint8)[group.long()], None, None
    if min(widths) < 16:
        shared = scale_groups(group, 5)
        levels = find_format(grid_name, symmetric=symmetric)
        grid = fit_grid(
            weight, bits, shared, clip_search=False, number_format=levels, scale_bits=scale_bits
        )
        places = grid.quantized.nonzero().flatten()
        codes = torch.zeros_like(weight, dtype=torch.int16)
        codes[:, places] = grid.encode(weight[:, places], places)
    half = getattr(torch, dtype)
    layout = find_layout(grid, pruned, sparsity, group, dtype=half)
    streams = pack(weight, codes, pruned, grid, group, layout)
    space: dict[str, object] = {}
    exec(compile(READER, "docs/artefacts.md", "exec"), space)
    described = as_json(layout, layout.number_format)
    read = space["read_linear"]({name: s.numpy() for name, s in streams.items()}, described)  # type: ignore[operator]
    assert np.array_equal(read, unpack(streams, layout).weight.numpy())
