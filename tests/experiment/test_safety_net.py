"""The better of two candidates is kept: what is evaluated, recorded and exported is the winner."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composed
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_byte_tokenizer, build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mi_experiments.config.config import Config
from mi_experiments.embedded import find_model
from mi_experiments.errors import InputError
from mi_experiments.evaluation.divergence import Divergence, divergence
from mi_experiments.experiment import safety_net
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import run_experiment
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.plan import Plan
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import Result, read_result
from mi_experiments.records.tracking import Tracker
from mi_experiments.texts.sources import calibration_sequences, held_out_sequences

ConfigOf = Callable[..., Config]


@pytest.fixture
def config_of(tiny_directory: Path, tmp_path: Path) -> ConfigOf:
    text = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"{word * (i + 7) % 9973:x}" for word in range(1, 60))})
        for i in range(40)
    ]
    text.write_text("\n".join(lines))

    def build(*overrides: str) -> Config:
        base = [
            "model=local", f"model.path={tiny_directory}", "model.seqlen=32", "dataset=text",
            f"dataset.path={text}", "dataset.nsamples=4", "dataset.batch_size=2",
            "evaluation.datasets.text.max_windows=4", "tracking=disabled", "n_groups.count=2",
            "n_groups.multiple=8", "wbits.average=3", "recipe.safety_net=true", "export=dense",
            "cache=false",
        ]  # fmt: skip
        return composed.config_of(*overrides, base=base)

    return build


def run(config: Config, directory: Path) -> Result:
    directory.mkdir()
    tracker = Tracker.open(config, directory, sweep_dir=None, job=directory.name)
    return run_experiment(config, directory, tracker, Progress())


def prefer(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    """Let a candidate be nearer than it is, or not."""
    diverge = safety_net.diverge

    def biased(run: Any, name: str, weights: Any) -> Divergence:
        found = diverge(run, name, weights)
        return replace(found, kl=found.kl if name == winner else found.kl + 1000)

    monkeypatch.setattr(safety_net, "diverge", biased)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def assert_same(folder: Path, other: Path) -> None:
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def without_run(directory: Path) -> list[tuple[Any, ...]]:
    return [tuple(vars(replace(linear, seconds=0.0)).items()) for linear in read_linears(directory)]


def test_what_it_kept_is_nearer_and_is_what_was_exported(
    config_of: ConfigOf, tmp_path: Path
) -> None:
    config = config_of()
    result = run(config, tmp_path / "run")
    net = result.safety_net
    assert net is not None
    assert list(net.candidates) == ["mixed", "uniform"]
    assert net.candidates[net.kept].kl == min(entry.kl for entry in net.candidates.values())
    assert read_result(tmp_path / "run") == result
    # Recomputed from what lies on the disk, with whole forward passes.
    dense = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    held_out = held_out_sequences(build_byte_tokenizer(), config)
    with torch.no_grad():
        nats = divergence(dense(held_out).logits.flatten(0, 1), kept(held_out).logits.flatten(0, 1))
    assert net.candidates[net.kept].kl == pytest.approx(nats.mean().item(), rel=1e-4)
    assert (net.sequences, net.tokens) == (4, 4 * 32)
    assert result.bits is not None
    assert net.candidates[net.kept].average_bits == result.bits.average
    assert net.candidates[net.kept].effective_bits == result.bits.effective
    assert not (tmp_path / "run" / "candidates").exists()


def test_the_mixed_model_is_that_of_a_run_without_a_net(
    config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "mixed")
    with_net = run(config_of(), tmp_path / "net")
    alone = run(config_of("recipe.safety_net=false"), tmp_path / "alone")
    assert with_net.safety_net is not None
    assert with_net.safety_net.kept == "mixed"
    assert alone.safety_net is None
    assert replace(
        with_net, safety_net=None, config={}, seconds={}, memory={}, provenance=None
    ) == (replace(alone, config={}, seconds={}, memory={}, provenance=None))
    for part in ("model", "grids"):
        assert_same(tmp_path / "net" / part, tmp_path / "alone" / part)
    assert without_run(tmp_path / "net") == without_run(tmp_path / "alone")


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_the_uniform_model_is_that_of_a_uniform_run(
    export: str, config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "uniform")
    with_net = run(config_of(f"export={export}"), tmp_path / "net")
    alone = run(
        config_of(f"export={export}", "wbits=uniform", "wbits.average=3", "n_groups=contiguous",
                  "n_groups.count=2", "n_groups.multiple=8"),
        tmp_path / "alone",
    )  # fmt: skip
    assert with_net.safety_net is not None
    assert with_net.safety_net.kept == "uniform"
    assert with_net.compressed == alone.compressed
    assert with_net.bits == alone.bits
    for part in {"dense": ("model", "grids"), "packed": ("packed",)}[export]:
        assert_same(tmp_path / "net" / part, tmp_path / "alone" / part)
    kept, uniform = read_linears(tmp_path / "net"), read_linears(tmp_path / "alone")
    for report, other in zip(kept, uniform, strict=True):
        assert (report.bits, report.output_error) == (other.bits, other.output_error)
    # The plan that was kept is the one that the record names.
    commits = Commits(tmp_path / "net", json.loads(
        (tmp_path / "net" / "manifest.json").read_text())["run_identity"])  # fmt: skip
    stored = commits.read_tensors("plan_uniform.safetensors")
    assert stored is not None
    plan = Plan.read(*stored)
    assert {name: set(linear.bits.tolist()) for name, linear in plan.linears.items()} == {
        report.name: {3} for report in kept
    }


def test_held_out_text_is_not_what_was_measured_on(config_of: ConfigOf) -> None:
    embedded = composed.config_of("recipe.safety_net=true")
    for config in (config_of(), embedded):
        tokenizer = AutoTokenizer.from_pretrained(find_model(config.model.path))
        held_out = held_out_sequences(tokenizer, config)
        used = calibration_sequences(tokenizer, config)
        assert held_out.shape == (4, config.dataset.seqlen)
        assert not {tuple(row) for row in held_out.tolist()} & {tuple(r) for r in used.tolist()}


def test_too_little_text_ends_the_run_before_any_work(config_of: ConfigOf, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("word " * 40)
    with pytest.raises(InputError, match="safety_net=true needs 4 calibration sequences"):
        run(
            config_of(f"dataset.path={tmp_path}/short.txt", "dataset.holdout=0.2"), tmp_path / "run"
        )
    assert read_result(tmp_path / "run").dense == {}


def test_uniform_widths_need_no_net(config_of: ConfigOf, tmp_path: Path) -> None:
    result = run(config_of("wbits=uniform", "wbits.average=3"), tmp_path / "run")
    assert result.safety_net is None
    assert result.status == "completed"


def test_the_plan_counts_the_second_sweep(config_of: ConfigOf) -> None:
    net, alone = dry_run(config_of()), dry_run(config_of("recipe.safety_net=false"))
    blocks = build_tiny_model("llama", vocab_size=260).config.num_hidden_layers
    # To plan, two passes a block; to compress, five in each of two streams, once or twice.
    assert alone.passes == blocks * (2 + 2 * 5)
    assert net.passes == blocks * (2 + 2 * 2 * 5)
    once, twice = (outline.memory["this machine"] for outline in (alone, net))
    assert not isinstance(once, str)
    assert not isinstance(twice, str)
    # The blocks of both candidates, and once what lies outside of them.
    blocks_stored = once.needs.stored - once.needs.resident
    assert twice.needs.stored - once.needs.stored == blocks_stored > 0
    assert replace(twice.needs, stored=0) == replace(once.needs, stored=0)
