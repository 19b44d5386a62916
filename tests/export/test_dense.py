"""What an export says of the grids is all that is needed to rebuild the weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_byte_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mi_experiments.compression.pipeline import LinearGrid
from mi_experiments.export.dense import grid_tensors, write_settings


def build_grid(rows: int = 16, columns: int = 24) -> LinearGrid:
    """Three widths, four channel groups, two scale groups in each."""
    generator = torch.Generator().manual_seed(0)
    channel_group = torch.arange(columns, dtype=torch.int32) * 4 // columns
    return {
        "bits": torch.tensor([2, 3, 4, 16], dtype=torch.uint8)[channel_group],
        "channel_group": channel_group,
        "scale_group": torch.arange(columns, dtype=torch.int32) * 8 // columns,
        "scale": torch.rand(rows, 8, generator=generator) + 0.1,
        "zero_point": torch.randint(0, 4, (rows, 8), generator=generator).int(),
        "pruned": torch.rand(rows, columns, generator=generator) < 0.5,
    }


def test_every_tensor_of_every_grid_is_named_and_nothing_else(tmp_path: Path) -> None:
    """Also where the grids of one site share tensors, which safetensors would refuse."""
    grid = build_grid()
    save_file(grid_tensors({"q": grid, "k": grid}), tmp_path / "grids")
    stored = load_file(tmp_path / "grids")
    assert stored.keys() == {f"{name}.{key}" for name in "qk" for key in grid}
    for name in "qk":
        for key, tensor in grid.items():
            assert torch.equal(stored[f"{name}.{key}"], tensor)
            assert stored[f"{name}.{key}"].dtype == tensor.dtype


def test_weights_can_be_rebuilt_from_grids_and_codes() -> None:
    """The layout is enough: every kept weight has an integer code in the range of its width."""
    grid = build_grid()
    scale, zero = (grid[key][:, grid["scale_group"].long()] for key in ("scale", "zero_point"))
    quantized = grid["bits"] < 16
    code = torch.randint(0, 16, (16, 24)) % (2 ** grid["bits"].long())
    weight = torch.randn(16, 24)
    weight[:, quantized] = (scale * (code - zero))[:, quantized]
    weight[grid["pruned"]] = 0

    stored = grid_tensors({"x": grid})
    group = stored["x.scale_group"].long()
    codes = weight / stored["x.scale"][:, group] + stored["x.zero_point"][:, group]
    pruned = stored["x.pruned"]
    kept = ~pruned & (stored["x.bits"] < 16)
    assert (weight[pruned] == 0).all()
    assert torch.equal(codes.round().long()[kept], code[kept])
    torch.testing.assert_close(codes[kept], codes[kept].round())


def test_settings_go_through_unchanged(tmp_path: Path) -> None:
    settings = {"config.json": b"{}\n", "generation_config.json": b'{"top_p": 0.6, "odd": []}'}
    write_settings(settings, build_byte_tokenizer(), tmp_path)
    for name, content in settings.items():
        assert (tmp_path / name).read_bytes() == content
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path)("3 4")["input_ids"]
    assert tokens == build_byte_tokenizer()("3 4")["input_ids"]
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", torch.zeros(24)),
        ("bits", torch.zeros(23, dtype=torch.uint8)),
        ("scale_group", torch.zeros(24, dtype=torch.int32)),
        ("scale", torch.zeros(24, 8)),
        ("zero_point", torch.zeros(16, 7, dtype=torch.int32)),
        ("pruned", torch.zeros(24, 16, dtype=torch.bool)),
        ("extra", torch.zeros(1)),
    ],
)
def test_a_grid_that_does_not_fit_is_a_value_error(key: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match="grid of x"):
        grid_tensors({"x": build_grid() | {key: value}})
