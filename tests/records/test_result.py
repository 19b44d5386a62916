"""Records: what is written is what is read, and a file is there completely or not at all."""

import dataclasses
from pathlib import Path

import pytest
from evaluations import perplexity_of

from mi_experiments.records.linears import LinearReport, read_linears, write_linears
from mi_experiments.records.result import (
    Bits,
    Evaluation,
    Provenance,
    Result,
    read_result,
    total_bits,
    write_result,
)

LINEAR = LinearReport(
    block=1,
    name="model.layers.1.mlp.down_proj",
    site="model.layers.1.mlp.down_proj",
    rows=4,
    columns=96,
    bits={3: 32, 4: 64},
    average_bits=11 / 3,
    effective_bits=2.9,
    sparsity=0.5,
    output_error=0.0123,
    levels=16,
    groups=3,
    pairwise_information=None,
    information_noise=0.001,
    redundancy=0.5,
    total_correlation=12.5,
    damping=0.1,
    damping_attempts=(0.01, 0.1),
    dead_channels=2,
    tokens=1024,
    seconds=0.25,
    status="compressed",
)
EVALUATION = Evaluation(
    protocol="text", windows="joined", seqlen=64, measurements=perplexity_of(1.5),
    tokens=6300, count=100, dropped_tokens=5, tokens_sha256="ab", floor=4.2,
)  # fmt: skip
PROVENANCE = Provenance(
    numerics_version=1, versions={"torch": "2"}, commit=None, command="mi-run", started="now",
    platform="x", device="cpu", threads=1, seeds={"run": 0}, model_files={"a": "b"},
    model_revision=None, calibration_sha256="cd",
)  # fmt: skip
RESULT = Result(
    status="completed", error=None, config={"seed": 0}, provenance=PROVENANCE,
    dense={"text": EVALUATION}, compressed={"text": EVALUATION}, bits=Bits(4.0, 3.99, 3.2),
    sparsity=0.5, weights=384, coverage=1.0, memory={"host": 1}, seconds={"load": 0.5},
    resumed=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "result",
    [RESULT, dataclasses.replace(RESULT, status="failed", provenance=None, bits=None, dense={})],
)
def test_result_round_trip(result: Result, tmp_path: Path) -> None:
    write_result(result, tmp_path)
    assert read_result(tmp_path) == result


def test_linears_round_trip(tmp_path: Path) -> None:
    linears = [
        LINEAR,
        dataclasses.replace(LINEAR, name="other", block=2, bits={16: 96}, redundancy=None),
    ]
    write_linears(linears, tmp_path)
    assert read_linears(tmp_path) == linears


def test_total_bits_weighs_by_the_number_of_weights() -> None:
    large = dataclasses.replace(LINEAR, name="large", rows=12, average_bits=5.0, effective_bits=4.0)
    small = dataclasses.replace(LINEAR, average_bits=1.0, effective_bits=2.0)
    assert total_bits([small, large], 4.0) == Bits(4.0, (1 + 3 * 5) / 4, (2 + 3 * 4) / 4)


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    broken = dataclasses.replace(RESULT, sparsity=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []
