"""The check of exports that needs none of this project's code holds, and sees what is not so."""

import ast
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_runs import KINDS, run, save_inputs
from safetensors import safe_open
from safetensors.torch import save_file

from mi_experiments.export.packed import read_packed
from mi_experiments.persistence.atomic import file_hash

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verify_bits.py"
spec = importlib.util.spec_from_file_location("verify_bits", SCRIPT)
assert spec is not None
assert spec.loader is not None
verify_bits: Any = importlib.util.module_from_spec(spec)
sys.modules["verify_bits"] = verify_bits
spec.loader.exec_module(verify_bits)

EXPORTS = {"dense": "grids", "packed": "packed"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Run each kind of model with each export, once."""
    root = tmp_path_factory.mktemp("exported")

    def find(kind: str, export: str) -> Path:
        directory = root / f"{kind}-{export}"
        if not directory.exists():
            name, dtype, overrides = KINDS[kind]
            arguments = save_inputs(root / kind, name=name, dtype=dtype)
            run([*arguments, *overrides, f"export={export}"], directory)
        return directory

    return find


def edit(
    path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], *, seal: bool = True
) -> None:
    """Change tensors and layouts of a file, and name it in the manifest as if it had been so."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    layouts = json.loads(metadata.get("layouts", "{}"))
    change(tensors, layouts)
    if "layouts" in metadata:
        metadata["layouts"] = json.dumps(layouts)
    save_file(tensors, path, metadata)
    run_dir = path.parents[1]
    if seal:
        manifest = json.loads((run_dir / "manifest.json").read_text())
        manifest["files"][str(path.relative_to(run_dir))]["sha256"] = file_hash(path)
        (run_dir / "manifest.json").write_text(json.dumps(manifest))


def test_the_check_uses_nothing_of_the_project() -> None:
    tree = ast.parse(SCRIPT.read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"numpy", "safetensors"}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_levels_zeros_budget_and_effective_bits_follow_from_the_files(
    kind: str, export: str, exported: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = exported(kind, export)
    result = json.loads((directory / "result.json").read_text())
    verify_bits.verify(directory, 4)
    out = capsys.readouterr().out
    bits = result["bits"]
    line = f"{EXPORTS[export]}/: {bits['average']:.4f} bits, {bits['effective']:.4f} effective"
    assert line in out
    assert sum(f", {status}\n" in out for status in result["statuses"]) == len(result["statuses"])
    if kind == "qwen3_moe":
        assert result["statuses"]["kept"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_packed_form_are_the_same_numbers(kind: str, exported: Any) -> None:
    """Kept linears and unquantized channels too, which a checkpoint may hold in more bits."""
    dense = {linear.name: linear for linear in verify_bits.read_dense(exported(kind, "dense"))}
    decoded = {linear.name: linear for linear in verify_bits.read_packed(exported(kind, "packed"))}
    files = sorted((exported(kind, "packed") / "packed").glob("*.safetensors"))
    ours = dict(item for path in files for item in read_packed(path))
    assert dense.keys() == decoded.keys() == ours.keys()
    for name, linear in dense.items():
        assert np.array_equal(linear.weight, decoded[name].weight)
        assert np.array_equal(linear.weight, ours[name].double().numpy())
        assert np.array_equal(linear.pruned, decoded[name].pruned)


def first(tensors: dict[str, Any], ending: str) -> Any:
    """Return one tensor of a kind; of the last block."""
    return tensors[max(key for key in tensors if key.endswith(ending))]


def move_weight(tensors: dict[str, Any], _: Any) -> None:
    weight = first(tensors, "down_proj.weight")
    at = tuple(weight.nonzero()[5].tolist())
    weight[at] *= 1.03


def revive_weight(tensors: dict[str, Any], _: Any) -> None:
    weight = first(tensors, "down_proj.weight")
    weight[tuple((weight == 0).nonzero()[0].tolist())] = 0.5


def widen(tensors: dict[str, Any], _: Any) -> None:
    first(tensors, "down_proj.bits")[:] = 8


def forget_linear(_: Any, layouts: dict[str, Any]) -> None:
    layouts["linears"].popitem()


def hide_groups(_: Any, layouts: dict[str, Any]) -> None:
    layouts["shared"] = {key: value for key, value in layouts["shared"].items() if key != "groups"}
    for own in layouts["linears"].values():
        own["groups"] = 1


def add_scale_bits(_: Any, layouts: dict[str, Any]) -> None:
    layouts["shared"]["scale_bits"] = 32


def shorten(tensors: dict[str, Any], _: Any) -> None:
    key = next(key for key in tensors if key.endswith(".codes"))
    tensors[key] = tensors[key][:-2]


def lengthen(tensors: dict[str, Any], _: Any) -> None:
    key = next(key for key in tensors if key.endswith(".scales"))
    tensors[key] = tensors[key].repeat(2)


def break_scale(tensors: dict[str, Any], _: Any) -> None:
    first(tensors, ".scales")[:2] = 0


@pytest.mark.parametrize(
    ("export", "part", "change", "line"),
    [
        ("dense", "model", move_weight, "off its grid"),
        ("dense", "model", revive_weight, "a pruned weight is not zero"),
        ("dense", "grids", widen, "off its grid|groups?|budget|out of range|average"),
        ("dense", "grids", forget_linear, "weights, and not"),
        ("dense", "grids", hide_groups, "groups"),
        ("packed", "packed", forget_linear, "weights, and not"),
        ("packed", "packed", add_scale_bits, "too short"),
        ("packed", "packed", shorten, "too short"),
        ("packed", "packed", lengthen, "too long"),
        ("packed", "packed", break_scale, "a scale is no positive float16"),
    ],
)
def test_a_tampered_export_fails(
    export: str, part: str, change: Any, line: str, exported: Any, tmp_path: Path
) -> None:
    """Even if the manifest was made to fit."""
    shutil.copytree(exported("bfloat16", export), tmp_path / "run")
    files = sorted((tmp_path / "run" / part).glob("*.safetensors"))
    edit(files[-1], change)
    with pytest.raises(verify_bits.Broken, match=line):
        verify_bits.verify(tmp_path / "run", 4)


@pytest.mark.parametrize(("export", "part"), [("dense", "model"), ("packed", "packed")])
def test_a_flipped_byte_fails(export: str, part: str, exported: Any, tmp_path: Path) -> None:
    """A code that is changed into another one is a valid export of another model."""
    shutil.copytree(exported("float32", export), tmp_path / "run")
    path = max((tmp_path / "run" / part).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(verify_bits.Broken, match="is not what the run committed"):
        verify_bits.verify(tmp_path / "run", 4)


@pytest.mark.parametrize(("key", "value"), [("effective", 3.0), ("average", 3.5)])
def test_a_record_that_says_other_bits_fails(
    key: str, value: float, exported: Any, tmp_path: Path
) -> None:
    shutil.copytree(exported("gpt2", "packed"), tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    result["bits"][key] = value
    path.write_text(json.dumps(result))
    with pytest.raises(
        verify_bits.Broken, match=f"{key} bits are .*, and result.json says {value}"
    ):
        verify_bits.verify(tmp_path / "run", 4)


def test_more_bits_than_were_asked_fail(exported: Any) -> None:
    with pytest.raises(verify_bits.Broken, match=r"over the budget|budget of all"):
        verify_bits.verify(exported("gpt2", "dense"), 3.9)
