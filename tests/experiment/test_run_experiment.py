"""A run from end to end: what it records, what it releases, and what a failure leaves."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composed
import pytest
import torch
from safetensors.torch import load_file
from small_runs import config_of, run
from transformers import PreTrainedTokenizerFast

from mi_experiments.config.config import Config
from mi_experiments.errors import InputError, NumericalError
from mi_experiments.experiment import phases
from mi_experiments.experiment import run_experiment as running
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.export.packed import read_packed
from mi_experiments.records.linears import read_linears
from mi_experiments.records.record_check import check_record
from mi_experiments.records.result import read_result

__all__ = ["config_of"]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_what_is_returned_is_what_is_written(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    result = run(config_of(), tmp_path / "run")
    assert read_result(tmp_path / "run") == result
    assert result.status == "completed"
    assert result.provenance is not None
    assert result.provenance.calibration_text_sha256 is not None
    assert check_record(tmp_path / "run", whole=True) == []


def test_nothing_of_a_run_stays_alive(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run of a sweep must find the memory of this one free, and no autograd graph."""
    models: list[weakref.ref[Any]] = []
    open_model = running.open_model

    def remember(*args: Any, **kwargs: Any) -> Any:
        opened = open_model(*args, **kwargs)
        models.append(weakref.ref(opened.model))
        return opened

    monkeypatch.setattr(running, "open_model", remember)
    gc.collect()
    before = {id(item) for item in gc.get_objects() if issubclass(type(item), torch.Tensor)}
    run(config_of(), tmp_path / "run")
    left = [
        item
        for item in gc.get_objects()
        if issubclass(type(item), torch.Tensor) and id(item) not in before
    ]
    assert [model() for model in models] == [None]
    assert sum(item.numel() for item in left) < 10_000
    assert not any(item.requires_grad for item in left)


def test_a_failure_keeps_what_was_computed(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = phases.compress_model

    def fail_at_the_fifth(*args: Any, **options: Any) -> Any:
        *given, on_linear = args
        reports: list[Any] = []

        def counting(report: Any) -> None:
            on_linear(report)
            reports.append(report)
            if len(reports) == 5:
                raise NumericalError("block 0, mlp.gate_proj: no valid factor")

        return real(*given, counting, **options)

    monkeypatch.setattr(phases, "compress_model", fail_at_the_fifth)
    with pytest.raises(NumericalError):
        run(config_of(), tmp_path / "run")
    result = read_result(tmp_path / "run")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.endswith("block 0, mlp.gate_proj: no valid factor")
    assert result.dense["text"].perplexity > 1
    assert result.compressed == {}
    assert len(read_linears(tmp_path / "run")) == 5


def test_an_export_is_what_was_evaluated(config_of: Callable[..., Config], tmp_path: Path) -> None:
    result = run(config_of("export=dense"), tmp_path / "run")
    again = config_of(
        f"model.path={tmp_path / 'run' / 'model'}", "sparsity=dense", "wbits=unquantized"
    )
    reloaded = run(again, tmp_path / "again")
    assert reloaded.dense["text"].nll == result.compressed["text"].nll


@pytest.mark.parametrize(
    "choice",
    [
        ["wbits.average=3.25", "n_groups.multiple=1"],
        ["sparsity=semistructured_2_4", "wbits=uniform", "wbits.symmetric=true"],
        ["wbits=normal_float", "wbits.average=3", "wbits.group_size=8"],
        ["sparsity=dense", "wbits.widths=[2,4,16]", "n_groups.count=4", "n_groups.multiple=1"],
    ],
)
def test_the_packed_file_has_the_effective_bits_and_the_same_weights(
    choice: list[str], config_of: Callable[..., Config], tmp_path: Path
) -> None:
    dense = run(config_of(*choice, "export=dense", "model.dtype=float32"), tmp_path / "dense")
    result = run(config_of(*choice, "export=packed", "model.dtype=float32"), tmp_path / "packed")
    assert result.bits == dense.bits
    assert result.bits is not None
    for export in ("dense", "packed"):
        assert check_record(tmp_path / export, whole=True) == []
    files = sorted((tmp_path / "packed" / "packed").iterdir())
    assert [path.name for path in files] == ["00000.safetensors", "00001.safetensors"]
    packed = sum(stream.numel() for path in files for stream in load_file(path).values())
    counted = {
        linear.name: linear.effective_bits * linear.weights
        for linear in read_linears(tmp_path / "packed")
    }
    # Each of the five streams of a linear ends with a partly filled byte.
    assert 0 <= packed * 8 - sum(counted.values()) < 5 * 8 * len(counted)
    assert not (tmp_path / "packed" / "model").exists()
    weights = load_all(tmp_path / "dense" / "model")
    unpacked = [linear for path in files for linear in read_packed(path)]
    assert [name for name, _ in unpacked] == list(counted)
    for name, weight in unpacked:
        assert torch.equal(weight, weights[f"{name}.weight"])


def test_several_texts_in_one_run(config_of: Callable[..., Config], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(str(number) for number in range(3000)))
    settings = "corpus: text, text_field: text, separator: '', seqlen: 16, max_windows: 3"
    result = run(
        config_of(
            f"+evaluation.datasets.other={{{settings}, path: {other}, windows: joined, "
            "split: null, first_rows: null, seed: 0, add_bos: auto}"
        ),
        tmp_path / "run",
    )
    assert {name: text.count for name, text in result.dense.items()} == {"text": 4, "other": 3}
    assert result.compressed["other"].tokens == 3 * 15


@pytest.mark.parametrize(
    ("choice", "least", "most"),
    [
        (["sparsity=dense", "wbits.average=8"], 0.997, 1.003),
        (["sparsity=dense", "wbits.average=3"], 1.03, 1.5),
        (["wbits=unquantized", "sparsity.ratio=0.5"], 1.03, 1.5),
    ],
    ids=["8 bits", "3 bits", "half pruned"],
)
def test_the_embedded_model_knows_its_floor_and_feels_compression(
    choice: list[str], least: float, most: float, tmp_path: Path
) -> None:
    base = [
        "wbits=uniform", "n_groups=contiguous", "n_groups.count=1", "recipe=textbook",
        "evaluation.datasets.embedded.max_windows=60", "tracking=disabled", "dataset.nsamples=32",
    ]  # fmt: skip
    config = composed.config_of(*choice, base=base)
    result = run(config, tmp_path / "run")
    dense, compressed = result.dense["embedded"], result.compressed["embedded"]
    assert dense.floor is not None
    assert 0.97 * dense.floor < dense.perplexity < 1.10 * dense.floor
    assert compressed.floor == dense.floor
    assert least < compressed.perplexity / dense.perplexity < most


@pytest.mark.parametrize(
    "choice",
    [
        [],
        ["wbits.symmetric=true", "sparsity=dense", "n_groups.multiple=1"],
        ["sparsity=semistructured_2_4", "wbits.group_size=8", "n_groups.multiple=8"],
        ["wbits=unquantized"],
    ],
)
def test_a_dry_run_foretells_what_is_stored(
    choice: list[str], config_of: Callable[..., Config], tmp_path: Path
) -> None:
    # Uniform widths: with mixed ones the widths of the surviving codes are known only afterwards.
    quantized = "wbits=unquantized" not in choice
    config = config_of(*(["wbits=uniform"] if quantized else []), *choice)
    outline = dry_run(config)
    result = run(config, tmp_path / "run")
    assert outline.weights == result.weights
    assert result.bits is not None
    foretold = sum(site.megabytes for site in outline.sites) * 8e6 / outline.weights
    assert foretold == pytest.approx(result.bits.effective, rel=1e-9)


def test_more_groups_than_channels_is_refused_before_loading(
    config_of: Callable[..., Config],
) -> None:
    with pytest.raises(InputError, match=r"n_groups.count=40 is more than the 32 channels"):
        dry_run(config_of("n_groups.count=40"))


def test_what_cannot_be_exported_is_said_before_anything_is_computed(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("no such vocabulary")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    monkeypatch.setattr(running, "evaluate", lambda *arguments: pytest.fail("computed"))
    with pytest.raises(InputError, match="but not saved: no such vocabulary"):
        run(config_of("export=dense"), tmp_path / "run")
    assert read_result(tmp_path / "run").status == "failed"
