"""An export is one row of a table: what a run writes, keeps, refuses and plans follows from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config_of, run

from mi_experiments.compression.pipeline import CompressedBlock
from mi_experiments.config.config import Config, Export
from mi_experiments.errors import InputError
from mi_experiments.experiment.finished import find_damage, is_intact
from mi_experiments.experiment.memory_plan import measure_needs
from mi_experiments.experiment.outline import outline_model
from mi_experiments.export.exports import EXPORTS
from mi_experiments.export.format import ExportFormat
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Content
from mi_experiments.records.result import read_result

__all__ = ["config_of"]

UNIFORM = ("wbits=uniform", "wbits.average=4", "model.dtype=float32")


def write_codes(block: CompressedBlock, weights: BlockWeights, config: Config) -> Content:
    """Return the codes of each linear as bytes."""
    codes = {}
    for compressed in block.linears:
        grid, weight = compressed.grids, compressed.linear.read_weight()
        group = grid["scale_group"].long()
        code = weight / grid["scale"][:, group] + grid["zero_point"][:, group]
        codes[compressed.report.name] = code.round().to(torch.int8)
    return codes, {"format": "codes"}


CODES = ExportFormat(
    folder="codes", write_block=write_codes, block_bytes=lambda weights, config: weights
)


def register(monkeypatch: pytest.MonkeyPatch, name: str, export: ExportFormat) -> None:
    """Add a member to the enum and a row to the table, as a file of its own would."""
    member = object.__new__(Export)
    member._name_ = member._value_ = name
    monkeypatch.setitem(Export._member_map_, name, member)
    monkeypatch.setitem(Export._value2member_map_, name, member)
    monkeypatch.setitem(EXPORTS, member, export)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def test_every_choice_has_a_row() -> None:
    assert list(EXPORTS) == list(Export)


def test_a_run_writes_an_export_that_it_was_never_told_of(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "codes", CODES)
    config = config_of("export=codes", *UNIFORM)
    result = run(config, tmp_path / "run")
    assert result.status == "completed"
    assert result.config["export"] == "codes"
    assert "export" not in result.seconds
    files = [f"codes/{block:05}.safetensors" for block in range(2)]
    committed = json.loads((tmp_path / "run" / "manifest.json").read_text())["files"]
    assert [name for name in committed if "/" in name] == files
    assert not (tmp_path / "run" / "model").exists()
    # They are the codes of what was compressed: another export holds the grids to read them by.
    assert run(config_of("export=dense", *UNIFORM), tmp_path / "dense").status == "completed"
    weights, grids = (load_all(tmp_path / "dense" / part) for part in ("model", "grids"))
    codes = load_all(tmp_path / "run" / "codes")
    assert len(codes) == 14
    for name, code in codes.items():
        group = grids[f"{name}.scale_group"].long()
        scale, zero = (grids[f"{name}.{key}"][:, group] for key in ("scale", "zero_point"))
        decoded = torch.where(grids[f"{name}.pruned"], 0, scale * (code - zero))
        assert torch.equal(decoded, weights[f"{name}.weight"])
    # And they belong to the run as everything else does.
    assert is_intact(tmp_path / "run", config.export)
    (tmp_path / "run" / files[1]).unlink()
    assert find_damage(tmp_path / "run", config.export) == [files[1]]


def test_what_cannot_be_exported_is_refused_before_anything_is_computed(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(walker: Walker) -> None:
        raise InputError(f"{len(walker.blocks)} blocks are too many for this format")

    register(monkeypatch, "picky", ExportFormat(refuse=refuse))
    with pytest.raises(InputError, match="2 blocks are too many"):
        run(config_of("export=picky"), tmp_path / "run")
    result = read_result(tmp_path / "run")
    assert (result.status, result.dense) == ("failed", {})


def test_the_disk_is_planned_with_what_an_export_adds(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "codes", CODES)
    config = config_of()
    model, blocks = outline_model(config)
    weights = sum(linear.rows * linear.columns for block in blocks for linear in block.linears)
    for net, candidates in (False, 1), (True, 2):
        config.recipe.safety_net = net
        needs = {}
        for config.export in EXPORTS:
            needs[config.export.value] = measure_needs(model, blocks, config)
        nothing, codes, dense = (needs[export] for export in ("nothing", "codes", "dense"))
        assert codes.stored == nothing.stored + candidates * weights
        grids = EXPORTS[Export.dense].block_bytes(weights, config)
        assert dense.stored == nothing.stored + candidates * grids + nothing.resident
