"""A value that is read is the one that would have been computed, and it is computed once."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config_of

from mi_experiments.calibration import fisher
from mi_experiments.experiment import cache, phases
from mi_experiments.experiment.cache import computed_by, evaluation_key, results_directory
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import run_experiment
from mi_experiments.llm.loading import content_hash, open_model
from mi_experiments.out_of_memory import note_retry
from mi_experiments.planning import plan
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import Provenance, Result, read_result
from mi_experiments.records.tracking import Tracker

BLOCKS = 2
FISHER = ("wbits.cost=fisher", "wbits.scope=model")


@pytest.fixture
def arguments(tiny_directory: Path, tmp_path: Path) -> list[str]:
    """Give the arguments of a run on a tiny model and a text of its own."""
    text = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"{word * (i + 7) % 9973:x}" for word in range(1, 60))})
        for i in range(40)
    ]
    text.write_text("\n".join(lines))
    return [
        "model=local", f"model.path={tiny_directory}", "model.seqlen=32", "dataset=text",
        f"dataset.path={text}", "dataset.nsamples=4", "dataset.batch_size=2",
        "evaluation.datasets.text.max_windows=4", "tracking=disabled",
        "n_groups.count=2", "n_groups.multiple=8",
        "sparsity.scope=linear", "wbits.cost=distortion",
    ]  # fmt: skip


@pytest.fixture
def run(arguments: list[str], tmp_path: Path) -> Callable[..., Result]:
    """Do a run in a directory below the test's."""

    def do(name: str, *overrides: str) -> Result:
        config = config_of(*overrides, base=arguments)
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        tracker = Tracker.open(config, directory, sweep_dir=None, job=name)
        return run_experiment(config, directory, tracker, Progress())

    return do


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count what takes the time of a run."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(phases, "measure_text")
    count(plan, "measure_block_costs")
    count(fisher, "turn_round")
    return counts


def numbers(directory: Path) -> dict[str, Any]:
    """Return every number of a run that is no time, and its files that hold none."""
    result = read_result(directory)
    files = {
        name: (directory / name).read_bytes() for name in ("linears.parquet", "plan.safetensors")
    }
    return files | {
        "dense": result.dense,
        "compressed": result.compressed,
        "bits": result.bits,
        "linears": [dataclasses.replace(x, seconds=0.0) for x in read_linears(directory)],
    }


def parts(*indices: int) -> list[str]:
    return [f"site_costs/{index:05}" for index in indices]


def test_a_budget_sweep_measures_costs_once_and_gets_the_same_bits(
    run: Callable[..., Result], work: dict[str, int], tmp_path: Path
) -> None:
    budgets = ("wbits.average=4", "wbits.average=2.5", "wbits.scope=site", "wbits.widths=[2,8]")
    for index, budget in enumerate(budgets):
        result = run(f"shared {index}", budget)
        everything = {"evaluate dense": ["text"], "plan": parts(*range(BLOCKS))}
        assert result.from_cache == ({} if index == 0 else everything)
        assert read_result(tmp_path / f"shared {index}").from_cache == result.from_cache
        # What the two texts have in common was looked for, and there is nothing.
        assert result.provenance is not None
        assert result.provenance.calibration_documents == 32
        assert result.provenance.calibration_shared == result.provenance.calibration_left_out == 0
    # Each job evaluates its compressed model itself.
    assert work == {"measure_block_costs": BLOCKS, "measure_text": 1 + len(budgets)}
    for index, budget in enumerate(budgets):
        assert run(f"alone {index}", budget, "cache=false").from_cache == {}
        assert numbers(tmp_path / f"shared {index}") == numbers(tmp_path / f"alone {index}")
    assert work["measure_block_costs"] == BLOCKS * (1 + len(budgets))


def test_what_the_loss_feels_is_shared_by_jobs_that_group_differently(
    run: Callable[..., Result], work: dict[str, int], tmp_path: Path
) -> None:
    run("first", *FISHER)
    second = run("second", *FISHER, "n_groups=random")
    assert second.from_cache["plan"] == ["site_costs/fisher"]
    assert work["turn_round"] == 1
    assert work["measure_block_costs"] == 2 * BLOCKS
    third = run("third", *FISHER, "n_groups=random", "wbits.average=3")
    assert third.from_cache["plan"] == parts(*range(BLOCKS))
    for name, choice in {"second": "wbits.average=4", "third": "wbits.average=3"}.items():
        run(f"{name} alone", *FISHER, "n_groups=random", choice, "cache=false")
        assert numbers(tmp_path / name) == numbers(tmp_path / f"{name} alone")


def test_nothing_is_kept_that_is_not_to_be_reused(
    run: Callable[..., Result], token_cache: Path
) -> None:
    run("first", "cache=false")
    assert not token_cache.exists()


def test_a_plan_without_activations_shares_nothing_but_the_evaluation(
    run: Callable[..., Result],
) -> None:
    choice = ("wbits=uniform", "n_groups=random")
    assert run("first", *choice).from_cache == {}
    assert run("second", *choice, "recipe=textbook").from_cache == {"evaluate dense": ["text"]}
    assert len(list(results_directory().glob("*.safetensors"))) == 1


def test_a_damaged_entry_is_named_and_computed_again(
    run: Callable[..., Result], work: dict[str, int], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run("first")
    sound = {path: path.read_bytes() for path in results_directory().glob("*.safetensors")}
    assert len(sound) == 1 + BLOCKS
    for path, content in sound.items():
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 8]) + content[-2:])
    work.clear()
    with caplog.at_level(logging.WARNING):
        assert run("second", "wbits.average=3").from_cache == {}
    assert work == {"measure_block_costs": BLOCKS, "measure_text": 2}
    for path, content in sound.items():
        assert any(str(path) in line and "damaged" in line for line in caplog.messages)
        assert path.read_bytes() == content
        assert path.with_suffix(".damaged").exists()
    assert run("third", "wbits.average=3").from_cache.keys() == {"evaluate dense", "plan"}
    assert numbers(tmp_path / "second") == numbers(tmp_path / "third")


def test_what_was_summed_in_pieces_is_not_shared(
    run: Callable[..., Result], work: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory was short, the order of sums is another one."""
    for module, name in ((phases, "measure_text"), (plan, "measure_block_costs")):
        real = getattr(module, name)

        def short(*arguments: Any, real: Any = real, **options: Any) -> Any:
            note_retry("half of it", "a test")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, short)
            run(name)
    assert run("third", "recipe.refine_rounds=1").from_cache == {"evaluate dense": ["text"]}


def test_a_continued_run_still_says_what_it_has_read(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("first")
    with monkeypatch.context() as patch:
        patch.setattr(phases, "compress_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("second", "wbits.average=3")
    everything = {"evaluate dense": ["text"], "plan": parts(*range(BLOCKS))}
    assert read_result(tmp_path / "second").from_cache == everything
    again = run("second", "wbits.average=3")
    assert (again.resumed, again.from_cache) == (1, everything)


# Jobs at the same time


def start(arguments: list[str], *overrides: str, before: str = "") -> subprocess.Popen[str]:
    """Start mi-run in a process of its own, after some lines of Python."""
    code = f"import sys\n{before}\nfrom mi_experiments.commands.run import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def await_line(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait until a log has a text."""
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_two_jobs_at_once_compute_every_part_once(
    arguments: list[str], run: Callable[..., Result], tmp_path: Path
) -> None:
    jobs = [
        start(arguments, f"hydra.run.dir={tmp_path / f'at once {b}'}", f"wbits.average={b}")
        for b in (3, 4)
    ]
    for job in jobs:
        out, _ = job.communicate(timeout=300)
        assert job.returncode == 0, out
    found = [read_result(tmp_path / f"at once {b}").from_cache for b in (3, 4)]
    # Whoever was first with a part, the other one has read it.
    read = [part for names in found for part in names.get("plan", [])]
    assert sorted(read) == parts(*range(BLOCKS))
    assert [text for names in found for text in names.get("evaluate dense", [])] == ["text"]
    for b in (3, 4):
        assert run(f"alone {b}", f"wbits.average={b}", "cache=false").from_cache == {}
        assert numbers(tmp_path / f"at once {b}") == numbers(tmp_path / f"alone {b}")


STUCK = """
import time
from mi_experiments.planning import plan
real = plan.measure_block_costs
def measure_block_costs(block, *rest):
    if block.index == 1:
        time.sleep(600)
    return real(block, *rest)
plan.measure_block_costs = measure_block_costs
"""


@pytest.mark.slow
def test_a_job_goes_on_where_a_killed_one_held_the_lock(
    arguments: list[str], run: Callable[..., Result], tmp_path: Path
) -> None:
    holder = start(arguments, f"hydra.run.dir={tmp_path / 'holder'}", before=STUCK)
    waiting: list[subprocess.Popen[str]] = [holder]
    try:
        stored = tmp_path / "holder" / "site_costs" / "00000.safetensors"
        while not stored.exists() or len(list(results_directory().glob("*.safetensors"))) < 2:
            assert holder.poll() is None, holder.communicate()[0]
            time.sleep(0.05)
        waiter = start(arguments, f"hydra.run.dir={tmp_path / 'waiter'}", "wbits.average=3")
        waiting.append(waiter)
        log = tmp_path / "waiter" / "run.log"
        await_line(log, "site_costs/00001: waiting for another job", waiter)
        holder.send_signal(signal.SIGKILL)
        out, _ = waiter.communicate(timeout=300)
        assert waiter.returncode == 0, out
    finally:
        for process in waiting:
            process.kill()
            process.communicate()
    from_cache = read_result(tmp_path / "waiter").from_cache
    assert from_cache == {"evaluate dense": ["text"], "plan": parts(0)}
    run("alone", "wbits.average=3", "cache=false")
    assert numbers(tmp_path / "waiter") == numbers(tmp_path / "alone")


def test_a_job_that_waits_can_be_stopped(arguments: list[str], tmp_path: Path) -> None:
    holder = start(arguments, f"hydra.run.dir={tmp_path / 'holder'}", before=STUCK)
    waiting: list[subprocess.Popen[str]] = [holder]
    try:
        while not (tmp_path / "holder" / "site_costs" / "00000.safetensors").exists():
            assert holder.poll() is None, holder.communicate()[0]
            time.sleep(0.05)
        waiter = start(arguments, f"hydra.run.dir={tmp_path / 'waiter'}", "wbits.average=3")
        waiting.append(waiter)
        await_line(tmp_path / "waiter" / "run.log", ": waiting for another job", waiter)
        waiter.send_signal(signal.SIGTERM)
        out, _ = waiter.communicate(timeout=300)
        assert waiter.returncode == 75, out
        assert "stopped by SIGTERM" in out
    finally:
        for process in waiting:
            process.kill()
            process.communicate()
    assert read_result(tmp_path / "waiter").status == "interrupted"


# Keys


@pytest.fixture
def provenance(tiny_directory: Path) -> Provenance:
    return Provenance(
        numerics_version=1,
        versions={"python": "3", "torch": "2", "transformers": "5", "numpy": "2", "datasets": "5"},
        commit="c0ffee",
        command="mi-run",
        started="now",
        platform="Linux",
        device="cpu",
        threads=1,
        seeds={"run": 0},
        model_files=content_hash(tiny_directory),
        model_revision=None,
        calibration_sha256="0" * 64,
    )


def test_the_key_has_everything_that_the_dense_models_numbers_follow(
    tiny_directory: Path, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**changes: Any) -> str:
        dtype, attention = changes.pop("dtype", "float32"), changes.pop("attention", "sdpa")
        blocks = changes.pop("blocks", None)
        opened = open_model(
            str(tiny_directory), revision=None, dtype=dtype, device="cpu", offline=True,
            attention=attention,
        )  # fmt: skip
        computed = computed_by(opened, dataclasses.replace(provenance, **changes), blocks)
        windows = [torch.arange(8), torch.arange(8, 16)]
        return evaluation_key(computed, ["perplexity"], windows, 16, 32, 16)

    same = key()
    versions = provenance.versions
    for unread in (
        {"command": "other"}, {"started": "later"}, {"seeds": {"run": 1}}, {"platform": "other"},
        {"calibration_sha256": "1" * 64}, {"versions": versions | {"datasets": "6"}},
        {"model_revision": "c0ffee"}, {"commit": None}, {"attention": "auto"}, {"dtype": "auto"},
    ):  # fmt: skip
        assert key(**unread) == same, unread
    files = provenance.model_files
    others = [
        key(dtype="bfloat16"),
        key(attention="eager"),
        key(blocks="model.layers"),
        key(device="NVIDIA H100"),
        key(threads=2),
        key(versions=versions | {"torch": "3"}),
        key(versions=versions | {"transformers": "6"}),
        key(versions=versions | {"numpy": "3"}),
        key(model_files=files | {"model.safetensors": "0" * 64}),
    ]
    for module, name, value in (
        (cache, "source_hash", lambda: "0" * 64),
        (cache, "processor", lambda: ["AVX512", "another one"]),
        (cache, "NUMERICS_VERSION", 10**6),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            others.append(key())
    for variable in ("MKL_CBWR", "OMP_DYNAMIC", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "a test")
            others.append(key())
    assert len({same, *others}) == 1 + len(others)
    monkeypatch.setenv("HOME", "/elsewhere")
    assert key() == same


def test_a_weight_of_the_model_and_a_line_of_the_code_change_the_hashes(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = content_hash(tiny_directory)
    weights = tiny_directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert content_hash(tiny_directory) != before

    def hash_of(line: str) -> str:
        (tmp_path / "package" / "llm").mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / "llm" / "module.py").write_text(line)
        place = tmp_path / "package" / "experiment" / "cache.py"
        monkeypatch.setattr(cache, "__file__", str(place))
        return cache.source_hash.__wrapped__()

    assert hash_of("x = 1") == hash_of("x = 1") != hash_of("x = 2")


def test_the_key_of_a_text_is_its_windows_and_batches() -> None:
    windows = [torch.arange(8) + 8 * i for i in range(6)]
    same = evaluation_key({}, ["perplexity"], windows, 16, 32, 48)
    # Waves of whole batches are the same batches, one after another.
    assert evaluation_key({}, ["perplexity"], windows, 16, 32, 16) == same
    assert evaluation_key({}, ["perplexity"], windows, 23, 32, 10**6) == same
    cut = torch.cat(windows)
    others = [
        evaluation_key({}, ["perplexity"], windows[:5], 16, 32, 48),
        evaluation_key({}, ["perplexity"], [*windows[:5], windows[5] + 1], 16, 32, 48),
        evaluation_key({}, ["perplexity"], [cut[:6], cut[6:16], *windows[2:]], 16, 32, 48),
        evaluation_key({}, ["perplexity"], windows[::-1], 16, 32, 48),
        evaluation_key({}, ["perplexity"], windows, 24, 32, 48),
        evaluation_key({}, ["perplexity"], windows, 16, 4, 48),
        evaluation_key({"model": 1}, ["perplexity"], windows, 16, 32, 48),
        evaluation_key({}, ["perplexity", "accuracy"], windows, 16, 32, 48),
    ]
    assert len({same, *others}) == 1 + len(others)
