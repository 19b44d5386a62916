"""What is counted at 16 bits has 16 bits: where it is evaluated, exported and packed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import run, save_inputs
from faulty_models import UNDAMPED, build_singular, compress
from safetensors.torch import load_file
from tiny_models import build_tiny_model

from mi_experiments.export.packed import read_packed
from mi_experiments.method.grid import fit_grid
from mi_experiments.method.sixteen_bits import choose_exact, choose_half, round_to_half
from mi_experiments.method.sparsegpt import Swept
from mi_experiments.records.linears import read_linears

ORDINARY = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
UNEQUAL = torch.tensor([1.0, 2.0**-22] * 4)


def with_row(value: float) -> torch.Tensor:
    weight = ORDINARY.clone()
    weight[2] *= value
    return weight


@pytest.mark.parametrize(
    ("weight", "held_in", "half"),
    [
        (ORDINARY, torch.float32, torch.float16),
        (ORDINARY, torch.bfloat16, torch.bfloat16),
        (ORDINARY * 1e6, torch.float16, torch.float16),
        # Of a bfloat16 checkpoint: float16 would round it.
        (ORDINARY.bfloat16().float() * UNEQUAL, torch.float32, torch.bfloat16),
        (with_row(1e5), torch.float32, torch.bfloat16),
        (with_row(1e-6), torch.float32, torch.bfloat16),
        (with_row(1e-30), torch.float32, torch.bfloat16),
        (with_row(0.0), torch.float32, torch.float16),
        (ORDINARY.double() * 1e-3, torch.float64, torch.float16),
    ],
)
def test_the_type_is_the_models_or_the_one_that_loses_no_row(
    weight: torch.Tensor, held_in: torch.dtype, half: torch.dtype
) -> None:
    assert choose_half(weight, held_in) is half


def test_what_is_exact_in_no_16_bits_stays_what_it_is() -> None:
    assert choose_exact(ORDINARY, torch.float32) is torch.float32
    assert choose_exact(ORDINARY.half().float(), torch.float32) is torch.float16
    assert choose_exact(ORDINARY.bfloat16().float() * 2**30, torch.float32) is torch.bfloat16


def test_only_unquantized_channels_are_rounded_and_pruned_weights_stay_zero() -> None:
    bits = torch.tensor([4, 16] * 4, dtype=torch.uint8)
    group = (bits == 16).int()
    grid = fit_grid(ORDINARY, bits, group, clip_search=False)
    pruned = ORDINARY.abs() < 0.3
    weight = ORDINARY.masked_fill(pruned, 0)
    rounded, dtype = round_to_half(Swept(weight, None, pruned, ORDINARY[:, 0]), grid, torch.float32)
    assert dtype is torch.float16
    assert torch.equal(rounded.weight[:, ::2], weight[:, ::2])
    assert torch.equal(rounded.weight[:, 1::2], weight[:, 1::2].half().float())
    assert not rounded.weight[pruned].any()


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "pruned": (lambda: build_tiny_model("llama"), ["recipe=sparsegpt", "wbits=unquantized"]),
    "skipped": (build_singular, [*UNDAMPED, "recipe.on_singular=skip", "wbits=uniform"]),
    "kept": (
        lambda: build_tiny_model("mixtral"),
        ["recipe.scarce_tokens=keep", "recipe.min_tokens=60", "wbits=uniform"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_a_float32_model_that_count_16_bits_have_16(
    case: str, tiny_tokens: Callable[..., torch.Tensor]
) -> None:
    build, overrides = CASES[case]
    found = compress(build(), tiny_tokens(4, 16), ["n_groups=contiguous", *overrides])
    checked = [linear for linear in found.values() if linear.report.unquantized_dtype]
    assert checked
    for linear in checked:
        weight = linear.linear.read_weight()
        assert torch.equal(weight, weight.half().float())
        assert linear.report.unquantized_dtype == "float16"


@pytest.mark.parametrize(
    ("overrides", "effective"),
    [
        (["recipe=sparsegpt", "wbits=unquantized"], None),
        (["wbits=unquantized", "sparsity=dense"], 32.0),
    ],
    ids=["pruned", "untouched"],
)
def test_evaluated_exported_and_packed_weights_are_the_same(
    overrides: list[str], effective: float | None, tmp_path: Path
) -> None:
    arguments = save_inputs(tmp_path / "inputs")
    dense = run([*arguments, *overrides, "export=dense"], tmp_path / "dense")
    packed = run([*arguments, *overrides, "export=packed"], tmp_path / "packed")
    # The evaluated model, which is not kept beside a packed one.
    assert packed.compressed_sha256 == dense.compressed_sha256
    files = (tmp_path / "dense" / "model").glob("*.safetensors")
    model = {key: tensor for path in files for key, tensor in load_file(path).items()}
    files = (tmp_path / "packed" / "packed").glob("*.safetensors")
    unpacked = {name: weight for path in files for name, weight in read_packed(path)}
    linears = read_linears(tmp_path / "packed")
    assert unpacked.keys() == {linear.name for linear in linears}
    for name, weight in unpacked.items():
        assert torch.equal(weight, model[f"{name}.weight"])
    assert packed.bits is not None
    if effective is not None:
        assert packed.bits.effective == effective
        assert packed.dense["text"].nll == packed.compressed["text"].nll


def test_everything_that_is_counted_is_packed(tmp_path: Path) -> None:
    """Kept experts are most of this model, and were to get 4 bits."""
    model = build_tiny_model("qwen3_moe", vocab_size=260)
    arguments = save_inputs(tmp_path / "inputs", model)
    keep = ["recipe.scarce_tokens=keep", "recipe.min_tokens=1000", "wbits=uniform"]
    result = run([*arguments, *keep, "export=packed"], tmp_path / "run")
    assert result.statuses["kept"] == 16
    files = sorted((tmp_path / "run" / "packed").glob("*.safetensors"))
    streams = sum(t.numel() for path in files for t in load_file(path).values())
    linears = read_linears(tmp_path / "run")
    assert result.bits is not None
    assert result.weights is not None
    counted = result.bits.effective * result.weights
    assert 0 <= 8 * streams - counted < 5 * 8 * len(linears)
    names = {name for path in files for name, _ in read_packed(path)}
    assert names == {linear.name for linear in linears}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bits"]["average"] > 9
