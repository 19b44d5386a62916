"""Faults in a whole run: what the record says, what is kept, and the one line at the end."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config_of
from faulty_models import BLIND, LOUD, SINGULAR, UNDAMPED, build_overflowing, build_singular
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import build_byte_tokenizer, build_tiny_model
from transformers import AutoModelForCausalLM

from mi_experiments.compression import pipeline
from mi_experiments.errors import MemoryShortage, NumericalError
from mi_experiments.experiment import run_experiment as running
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import run_experiment
from mi_experiments.export.packed import read_packed
from mi_experiments.llm.replay import Call
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import Result, read_result
from mi_experiments.records.tracking import Tracker

SHORT = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """Save a model and a text, and give the arguments of a run on them."""
    text = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"{word * (i + 7) % 9973:x}" for word in range(1, 60))})
        for i in range(40)
    ]
    text.write_text("\n".join(lines))

    def build(model: Any, *overrides: str) -> list[str]:
        directory = tmp_path / "model"
        model.save_pretrained(directory)
        build_byte_tokenizer().save_pretrained(directory)
        return [
            "model=local", f"model.path={directory}", "model.seqlen=32", "dataset=text",
            f"dataset.path={text}", "dataset.nsamples=4", "dataset.batch_size=2",
            "evaluation.datasets.text.max_windows=4", "tracking=disabled", "n_groups.count=2",
            "cache=false",
            *overrides,
        ]  # fmt: skip

    return build


def run(arguments: list[str], directory: Path) -> Result:
    directory.mkdir(exist_ok=True)
    config = config_of(*arguments)
    tracker = Tracker.open(config, directory, sweep_dir=None, job=directory.name)
    return run_experiment(config, directory, tracker, Progress())


def draw_tokens(*loud: int) -> torch.Tensor:
    """Draw six samples, some of which hold the token that overflows."""
    tokens = torch.randint(2, 90, (6, 32), generator=torch.Generator().manual_seed(0))
    tokens[list(loud), 7] = LOUD
    return tokens


def without_times(directory: Path) -> list[Any]:
    return [dataclasses.replace(linear, seconds=0.0) for linear in read_linears(directory)]


def without_retries(directory: Path) -> list[Any]:
    return [dataclasses.replace(linear, retries=0) for linear in without_times(directory)]


def test_a_run_with_too_many_fallbacks_fails_at_its_end_and_loses_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(build_singular(vocab_size=260), *UNDAMPED, *BLIND)
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: draw_tokens())
    line = r"^1 of 14 linears \(7%\) .*: 1 escalated, first model.layers.1.mlp.down_proj; "
    with pytest.raises(NumericalError, match=line):
        run([*asked, "recipe.max_escalated=0.07"], tmp_path / "run")
    failed = read_result(tmp_path / "run")
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.startswith("1 of 14 linears")
    assert failed.statuses == {"compressed": 13, "escalated": 1}
    assert failed.bits is not None
    assert failed.compressed.keys() == failed.dense.keys() == {"text"}
    escalated = [
        linear for linear in read_linears(tmp_path / "run") if linear.status == "escalated"
    ]
    assert [(linear.name, linear.damping) for linear in escalated] == [(SINGULAR, 1e-4)]
    # To allow it moves no number, so the same directory goes on: nothing is computed again.
    monkeypatch.setattr(pipeline, "compress_linear", lambda *_: pytest.fail("compressed again"))
    allowed = run([*asked, "recipe.max_escalated=0.08"], tmp_path / "run")
    assert allowed.status == "completed"
    assert (allowed.compressed, allowed.bits) == (failed.compressed, failed.bits)


def test_a_skipped_linear_is_exported_as_it_was_and_counted_as_it_is(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_singular(vocab_size=260)
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: draw_tokens())
    asked = arguments(model, *UNDAMPED, *BLIND, "recipe.on_singular=skip", "export=dense")
    result = run(asked, tmp_path / "run")
    assert result.status == "completed"
    assert result.statuses == {"compressed": 13, "skipped": 1}
    skipped, weights = 32 * 48, result.weights
    assert weights is not None
    assert result.bits is not None
    assert result.bits.requested == 4
    assert result.bits.average == pytest.approx((16 * skipped + 4 * (weights - skipped)) / weights)
    assert "1 skipped, first model.layers.1.mlp.down_proj; average bits 5." in caplog.text
    stored = {
        k: t
        for f in (tmp_path / "run/model").glob("*.safetensors")
        for k, t in load_file(f).items()
    }
    original = model.state_dict()[f"{SINGULAR}.weight"]
    assert torch.equal(stored[f"{SINGULAR}.weight"], original.half().float())
    grids = {key for f in (tmp_path / "run/grids").glob("*.safetensors") for key in load_file(f)}
    assert not any(key.startswith(SINGULAR) for key in grids)
    assert sum(key.endswith(".bits") for key in grids) == 13


def test_samples_that_are_not_finite_are_left_out_of_everything(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is that on the other samples, to the last bit."""
    asked = arguments(build_overflowing(vocab_size=260))
    tokens = draw_tokens(3)
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: tokens)
    alike = ["wbits.cost=relative", "sparsity.scope=linear"]  # so that the plan meets it
    with pytest.raises(NumericalError, match=r"^block 0, mlp.down_proj: .* sample 3, token 7, "):
        run([*asked, *alike, "dataset.on_nonfinite=error"], tmp_path / "error")
    result = run([*asked, "dataset.on_nonfinite=drop"], tmp_path / "drop")
    assert result.dropped == {"sample 3": "the output of model.layers.0"}
    kept = tokens[[0, 1, 2, 4, 5]]
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: kept)
    clean = run([*asked, "dataset.on_nonfinite=drop"], tmp_path / "clean")
    assert clean.dropped == {}
    assert without_times(tmp_path / "drop") == without_times(tmp_path / "clean")
    assert result.compressed == clean.compressed
    assert {linear.tokens for linear in read_linears(tmp_path / "drop")} == {5 * 32}


@pytest.mark.parametrize("loud", [(0, 1, 2), (0, 2, 3, 5)])
def test_at_most_half_of_the_samples_may_be_left_out(
    loud: tuple[int, ...],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = arguments(build_overflowing(vocab_size=260), "dataset.on_nonfinite=drop", *BLIND)
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: draw_tokens(*loud))
    if 2 * len(loud) <= 6:
        assert len(run(asked, tmp_path / "run").dropped) == len(loud)
        return
    line = (
        r"^4 of 6 calibration samples .*, the first sample 0 in the output of model.layers.0: more"
    )
    with pytest.raises(NumericalError, match=line):
        run(asked, tmp_path / "run")


def test_screening_is_not_repeated_when_a_run_goes_on(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(build_overflowing(vocab_size=260), "dataset.on_nonfinite=drop", *BLIND)
    monkeypatch.setattr(running, "calibration_sequences", lambda *_: draw_tokens(3))
    with monkeypatch.context() as patch:
        patch.setattr(running, "make_plan", lambda *_: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            run(asked, tmp_path / "run")
    monkeypatch.setattr(
        "mi_experiments.calibration.drop_nonfinite.find_nonfinite",
        lambda *_, **__: pytest.fail("again"),
    )
    assert run(asked, tmp_path / "run").dropped == {"sample 3": "the output of model.layers.0"}


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_everything_can_be_pruned_and_stored(
    export: str, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = build_tiny_model("llama", vocab_size=260)
    result = run(arguments(model, "sparsity.ratio=1", f"export={export}"), tmp_path / "run")
    assert (result.status, result.sparsity) == ("completed", 1.0)
    assert result.statuses == {"compressed": 14}
    assert result.bits is not None
    assert result.bits.average <= 4
    if export == "dense":
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        weights = {k: t for k, t in reloaded.state_dict().items() if "_proj" in k}
    else:
        files = (tmp_path / "run/packed").glob("*.safetensors")
        weights = dict(item for file in files for item in read_packed(file))
    assert len(weights) == 14
    assert not any(weight.any() for weight in weights.values())


def test_tied_embeddings_come_back_tied_with_every_bit(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = build_tiny_model("llama3", vocab_size=260)
    result = run(arguments(model, "export=dense"), tmp_path / "run")
    assert result.status == "completed"
    stored: dict[str, bytes] = {}
    for file in (tmp_path / "run/model").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            stored |= {k: opened.get_tensor(k).numpy().tobytes() for k in opened.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in stored
    embedding = model.get_input_embeddings().weight
    assert stored["model.embed_tokens.weight"] == embedding.numpy().tobytes()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert torch.equal(reloaded.get_input_embeddings().weight, embedding)


# --- short memory -------------------------------------------------------------------------------


def let_calls_fail(
    monkeypatch: pytest.MonkeyPatch, chosen: Callable[[int], bool]
) -> list[tuple[int, int]]:
    """Let blocks run out of memory on chosen batch sizes; returns what was tried, and what ran."""
    replay = Call.replay
    tried: list[tuple[int, int]] = []

    def attempt(call: Call, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        tried.append((len(hidden), hidden.shape[1]))
        if chosen(len(hidden)):
            raise RuntimeError(SHORT)
        return replay(call, block, hidden)

    monkeypatch.setattr(Call, "replay", attempt)
    return tried


@pytest.mark.parametrize("recipe", ["default", "textbook"])
def test_a_run_short_of_memory_goes_on_in_smaller_batches_and_says_so(
    recipe: str,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It becomes the run with those batches, to the last bit."""
    asked = arguments(build_tiny_model("llama", vocab_size=260), f"recipe={recipe}")
    single = [*asked, "dataset.batch_size=1", "evaluation.batch_tokens=1"]
    expected = run(single, tmp_path / "single")
    assert expected.retries == 0
    let_calls_fail(monkeypatch, lambda samples: samples > 1)
    result = run([*asked, "dataset.batch_size=4"], tmp_path / "short")
    assert result.status == "completed"
    assert result.retries > 0
    assert read_result(tmp_path / "short").retries == result.retries
    assert "memory is short: going on with batches of 1 samples" in caplog.text
    assert without_retries(tmp_path / "short") == without_retries(tmp_path / "single")
    assert result.compressed == expected.compressed


def test_a_run_without_memory_for_one_sample_ends_in_one_line_and_goes_on_later(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(build_tiny_model("llama", vocab_size=260), *BLIND)
    sizes = iter(range(10_000))
    with monkeypatch.context() as patch:
        let_calls_fail(patch, lambda _: next(sizes) > 14)
        with pytest.raises(MemoryShortage, match=r"no memory for one sample at a time") as caught:
            run(asked, tmp_path / "run")
    assert "memory.activations=disk" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = read_result(tmp_path / "run")
    assert kept.status == "interrupted"
    assert kept.dense
    result = run(asked, tmp_path / "run")
    assert (result.status, result.dense) == ("completed", kept.dense)
    assert result.retries >= kept.retries > 0


def test_a_shortage_that_nothing_can_be_done_about_names_the_phase(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("mi_experiments.calibration.hessians.measure_fisher", short)
    asked = arguments(build_tiny_model("llama", vocab_size=260), "wbits.cost=fisher")
    with pytest.raises(MemoryShortage, match=r"^plan: out of memory \(MemoryError\): what was"):
        run(asked, tmp_path / "run")
    assert read_result(tmp_path / "run").status == "interrupted"


CAGE = """
import resource, sys
import torch
from mi_experiments.experiment import run_experiment as running
from mi_experiments.commands.run import main
torch.set_num_threads(1)
room = int(sys.argv.pop(1))
evaluate = running.evaluate

def evaluate_in_a_cage(*arguments):
    # Not earlier: the tokenizer's library ends the process when it gets no memory.
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    return evaluate(*arguments)

running.evaluate = evaluate_in_a_cage
main()
"""


@pytest.mark.parametrize("megabytes", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_that_may_not_have_the_memory_ends_in_one_line(
    megabytes: int, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    asked = arguments(
        build_tiny_model("llama", vocab_size=260, max_position_embeddings=4096),
        "model.seqlen=4096", "dataset.nsamples=64", "dataset.batch_size=64",
        "hydra.run.dir=caged",
    )  # fmt: skip
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join([text.read_text()] * 40))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, "-c", CAGE, str(megabytes * 2**20), *asked],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    lines = [
        line for line in ended.stderr.splitlines() if not line.startswith("WARNING: memory is")
    ]
    assert "Traceback" not in ended.stderr
    assert [line for line in lines if line.startswith("mi-run: ")] == lines, ended.stderr
    assert len(lines) == 1
    assert "memory" in lines[0]
    assert ended.returncode == 75
