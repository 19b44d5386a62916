"""mi-run as a person types it: what it writes, and the one line that bad input gets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Ended, run_directories
from safetensors.numpy import load_file

from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import read_result


def test_a_run_leaves_its_records(mi_run: Callable[..., Ended], local: list[str]) -> None:
    ended = mi_run(*local)
    assert ended.code == 0, ended.err
    (directory,) = run_directories(Path("outputs"))
    assert {path.name for path in directory.iterdir()} >= {
        ".hydra", "run.log", "result.json", "linears.parquet", "plan.safetensors",
    }  # fmt: skip
    result, linears = read_result(directory), read_linears(directory)
    assert result.status == "completed"
    assert result.bits is not None
    assert result.bits.requested == 4.0
    weights = sum(linear.weights for linear in linears)
    average = sum(
        linear.rows * sum(bits * channels for bits, channels in linear.bits.items())
        for linear in linears
    )
    assert result.bits.average == pytest.approx(average / weights, rel=1e-12)
    assert result.bits.average <= 4.0
    assert result.sparsity == 0.5
    assert result.coverage == 1.0
    assert result.weights == weights
    for phase in ("load", "evaluate dense", "plan", "compress", "evaluate compressed"):
        assert result.seconds[phase] > 0
    assert f"{result.dense['text'].perplexity:.4f}" in ended.out
    assert str(directory.absolute()) in ended.out


def load_all(folder: Path) -> dict[str, np.ndarray]:
    """Read all tensors of the files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_one_file_for_both_is_split_whatever_its_copy_is_called(
    mi_run: Callable[..., Ended], local: list[str], text: Path
) -> None:
    copy, other = text.with_name("copy.jsonl"), text.with_name("other.jsonl")
    copy.write_bytes(text.read_bytes())
    other.write_bytes(text.read_bytes().replace(b'"text": "', b'"text": "another '))
    paths = {"same": text, "copy": copy, "other": other}
    found = {}
    for name, path in paths.items():
        arguments = [*local, f"evaluation.datasets.text.path={path}", f"hydra.run.dir={name}"]
        assert mi_run(*arguments, "sparsity=dense", "wbits=unquantized").code == 0
        result = read_result(Path(name))
        assert result.provenance is not None
        tokens = result.dense["text"].tokens_sha256
        found[name] = (result.provenance.calibration_sha256, tokens)
    assert found["same"] == found["copy"]
    # All of another text is evaluated, and all of the file may be calibrated on.
    assert found["same"][0] != found["other"][0]
    assert found["same"][1] != found["other"][1]


def test_nothing_asked_changes_nothing(
    mi_run: Callable[..., Ended], local: list[str], tiny_directory: Path
) -> None:
    ended = mi_run(*local, "sparsity=dense", "wbits=unquantized", "export=dense")
    assert ended.code == 0, ended.err
    (directory,) = run_directories(Path("outputs"))
    result = read_result(directory)
    assert result.compressed == result.dense
    before = load_file(tiny_directory / "model.safetensors")
    after = load_all(directory / "model")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    "choice",
    [
        ["wbits.average=3.25", "n_groups.multiple=1", "wbits.group_size=8"],
        ["wbits=uniform", "wbits.average=3", "sparsity=dense", "wbits.symmetric=true"],
        ["sparsity=semistructured_2_4", "n_groups=redundancy"],
        ["wbits.scope=model", "wbits.cost=relative", "n_groups=random", "sparsity.ratio=0.3"],
        ["wbits=unquantized", "sparsity.mask_block=16", "recipe=textbook"],
    ],
    ids=["fraction", "symmetric", "2:4", "model-scope", "prune-only"],
)
def test_the_bits_can_be_recomputed_from_the_export_alone(
    mi_run: Callable[..., Ended], local: list[str], choice: list[str]
) -> None:
    ended = mi_run(*local, *choice, "export=dense")
    assert ended.code == 0, ended.err
    (directory,) = run_directories(Path("outputs"))
    result = read_result(directory)
    assert result.bits is not None
    grids, weights = load_all(directory / "grids"), load_all(directory / "model")
    names = sorted(key.removesuffix(".bits") for key in grids if key.endswith(".bits"))
    assert len(names) == len(read_linears(directory))
    total = spent = zeros = 0
    for name in names:
        grid = {
            key: grids[f"{name}.{key}"]
            for key in ("bits", "channel_group", "scale_group", "scale", "zero_point", "pruned")
        }
        weight = weights[f"{name}.weight"]
        assert (weight[grid["pruned"]] == 0).all()
        scale = grid["scale"][:, grid["scale_group"]]
        zero = grid["zero_point"][:, grid["scale_group"]]
        quantized = (grid["bits"] < 16) & ~grid["pruned"]
        code = np.rint(weight / scale) + zero
        assert (np.float32(scale * (code - zero)) == weight)[quantized].all()
        top = np.broadcast_to(2.0 ** grid["bits"] - 1, weight.shape)
        assert ((code >= 0) & (code <= top))[quantized].all()
        total += weight.size
        spent += int(grid["bits"].astype(int).sum()) * len(weight)
        zeros += int(grid["pruned"].sum())
    assert spent / total == pytest.approx(result.bits.average, rel=1e-12)
    assert spent / total <= result.bits.requested
    assert zeros / total == pytest.approx(result.sparsity, rel=1e-12)


def test_one_failing_job_stops_no_other(mi_run: Callable[..., Ended], local: list[str]) -> None:
    # One sample has fewer tokens than some linears have channels: singular without damping.
    scarce = ["dataset.nsamples=1", "recipe.on_singular=error"]
    ended = mi_run("-m", *local, *scarce, "recipe.damping=0,0.2")
    assert ended.code == 3
    assert "not positive definite" in ended.err
    results = [read_result(directory) for directory in run_directories(Path("sweeps"))]
    by_damping = {result.config["recipe"]["damping"]: result for result in results}
    statuses = {damping: result.status for damping, result in by_damping.items()}
    assert statuses == {0.0: "failed", 0.2: "completed"}
    assert "not positive definite" in (by_damping[0.0].error or "")
    # What was computed before the failure is kept.
    assert by_damping[0.0].dense != {}


def test_dry_run_computes_nothing(mi_run: Callable[..., Ended], local: list[str]) -> None:
    ended = mi_run(*local, "dry_run=true", "n_groups.multiple=1")
    assert ended.code == 0, ended.err
    for part in ("self_attn.q_proj", "k_proj", "32×32", "requested bits"):
        assert part in ended.out
    assert [path for path in Path("outputs").rglob("*") if path.is_file()] == []
    assert len(list(Path("outputs").glob("*/*"))) == 0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("wbits.average=1", ["wbits.average=1", "2 to 8"]),
        ("sparsity.ratio=1.5", ["sparsity.ratio=1.5", "0 to 1"]),
        ("wbits.avarage=3", ["wbits.avarage", "did you mean wbits.average?"]),
        ("model=resnet", ["model=resnet", "embedded, ", "local"]),
        ("wbits.average=[", ["wbits.average"]),
        ("+model._target_=os.system", ["data, not code"]),
        ("model.path=/nowhere/at/all", ["model.path=/nowhere/at/all", "not a directory"]),
        ("model.path=org/model", ["model.path=org/model", "model.offline=true"]),
        ("dataset.nsamples=100000", ["100000", "tokens"]),
        ("n_groups.count=1000", ["n_groups.count=1000", "channels"]),
        ("dataset.path=/nowhere.txt", ["/nowhere.txt", "no such file"]),
        ("hydra.run.dir=/dev/null/x", ["/dev/null"]),
    ],
)
def test_bad_input_is_one_line(
    mi_run: Callable[..., Ended], local: list[str], override: str, parts: list[str]
) -> None:
    key = override.split("=", maxsplit=1)[0]
    ended = mi_run(*[given for given in local if not given.startswith(f"{key}=")], override)
    assert ended.code == 2
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    for part in parts:
        assert part in lines[0]


def test_what_a_choice_needs_is_named(mi_run: Callable[..., Ended]) -> None:
    ended = mi_run("model=local")
    assert ended.code == 2
    assert "model.path has no value" in ended.err
    assert "model.path=VALUE" in ended.err


def test_empty_text_and_broken_weights_are_one_line(
    mi_run: Callable[..., Ended], local: list[str], text: Path, tiny_directory: Path
) -> None:
    empty = text.with_name("empty.txt")
    empty.write_text("")
    ended = mi_run(*local, f"dataset.path={empty}")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1)
    assert "empty" in ended.err
    weights = tiny_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = mi_run(*local)
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1)
    assert "model.safetensors" in ended.err


@pytest.mark.parametrize("offline", ["true", "false"])
def test_a_text_that_cannot_be_had_is_one_line(
    mi_run: Callable[..., Ended], offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the network is refused")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    ended = mi_run("dataset=c4", f"dataset.offline={offline}", "tracking=disabled")
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("mi-run: corpus allenai/c4: en/c4-")
    assert "hf download allenai/c4" in line


def test_a_run_directory_is_used_for_one_run(
    mi_run: Callable[..., Ended], local: list[str]
) -> None:
    assert mi_run(*local, "hydra.run.dir=here").code == 0
    before = read_result(Path("here"))
    composed = Path("here/.hydra/config.yaml").read_bytes()
    ended = mi_run(*local, "hydra.run.dir=here", "seed=3")
    assert ended.code == 2
    assert "here was begun with something else" in ended.err
    assert "seed: 0 → 3" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert read_result(Path("here")) == before
    assert Path("here/.hydra/config.yaml").read_bytes() == composed


def test_the_same_command_is_the_same_run(mi_run: Callable[..., Ended], local: list[str]) -> None:
    """Names of runs follow from what moves a number, and from nothing else."""
    assert mi_run(*local).code == 0
    (directory,) = run_directories(Path("outputs"))
    record = (directory / "result.json").read_bytes()
    again = mi_run(*local, "memory.host=4", "tracking.project=other")
    assert again.code == 0
    assert "is complete; remove it to run again" in again.out
    assert f"{read_result(directory).compressed['text'].perplexity:.4f}" in again.out
    assert (directory / "result.json").read_bytes() == record
    assert mi_run(*local, "seed=1").code == 0
    assert len(run_directories(Path("outputs"))) == 2


def test_the_same_command_continues_an_interrupted_run(
    mi_run: Callable[..., Ended], local: list[str], interrupt_at: Callable[[int], None]
) -> None:
    interrupt_at(3)
    ended = mi_run(*local)
    assert ended.code == 75
    assert ended.err == "mi-run: stopped by SIGTERM: give the same command again to continue\n"
    (directory,) = run_directories(Path("outputs"))
    assert read_result(directory).status == "interrupted"
    assert mi_run(*local).code == 0
    assert run_directories(Path("outputs")) == [directory]
    assert mi_run(*local, "hydra.run.dir=unbroken").code == 0
    broken, unbroken = read_result(directory), read_result(Path("unbroken"))
    assert (broken.resumed, unbroken.resumed) == (1, 0)
    assert broken.compressed == unbroken.compressed
    for name in ("plan.safetensors", "linears.parquet"):
        assert (directory / name).read_bytes() == (Path("unbroken") / name).read_bytes()


def test_the_composition_reproduces_the_run(mi_run: Callable[..., Ended], local: list[str]) -> None:
    assert mi_run(*local, "hydra.run.dir=first", "wbits.average=3.5").code == 0
    folder = Path("first/.hydra").absolute()
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "hydra.yaml", "overrides.yaml",
    }  # fmt: skip
    assert "- wbits.average=3.5" in (folder / "overrides.yaml").read_text()
    # In a process of its own: with a config that names no logging, Hydra sets up its own.
    command = [sys.executable, "-c", "from mi_experiments.commands.start import run; run()"]
    given = [f"--config-path={folder}", "--config-name=config", "hydra.run.dir=second"]
    subprocess.run([*command, *given], check=True, capture_output=True)
    assert read_result(Path("second")).compressed == read_result(Path("first")).compressed


def test_the_installed_command_works_from_anywhere(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("mi-run")
    if not command.exists():
        pytest.skip(f"{command} is not installed: pip install -e . puts it there")
    done = subprocess.run(
        [command, "--cfg", "job", "wbits.average=3.25"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert "average: 3.25" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_axes(mi_run: Callable[..., Ended]) -> None:
    ended = mi_run("--help")
    for word in ("n_groups:", "mutual_information", "wbits.average=4", "-sc install=bash"):
        assert word in ended.out
