"""Whatever is read of a model is hashed, inside its directory, and what it seems to be."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.errors import InputError
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.experiment.memory_plan import plan_run
from mi_experiments.llm.checkpoint import DEEPEST, read_json
from mi_experiments.llm.loading import (
    choose_device,
    content_hash,
    load_model,
    load_skeleton,
    open_model,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(path: Path | str, **changes: Any) -> Any:
    request = {"revision": None, "dtype": "auto", "device": "cpu", "offline": True, **changes}
    return load_model(str(path), **request)


def fault(path: Path | str, **changes: Any) -> str:
    """Return the message of the InputError that loading raises, which must be one short line."""
    with pytest.raises(InputError) as caught:
        load(path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "Path(" not in message
    return message


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def move_weights(directory: Path, name: str) -> Path:
    """Move the weights to another file, and let an index name it."""
    moved = directory / name
    moved.parent.mkdir(parents=True, exist_ok=True)
    keys = load_file(directory / SINGLE).keys()
    (directory / SINGLE).rename(moved)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    return moved


# Where weights are


@pytest.mark.parametrize("name", ["weights/w.safetensors", "a/b/c.safetensors", "./w.safetensors"])
def test_weights_inside_the_directory_are_loaded_and_hashed(
    name: str, tiny_directory: Path
) -> None:
    head = load(tiny_directory)[0].lm_head.weight.clone()
    moved = move_weights(tiny_directory, name)
    assert torch.equal(load(tiny_directory)[0].lm_head.weight, head)
    before = content_hash(tiny_directory)
    key = moved.relative_to(tiny_directory).as_posix()
    assert before[key] == hashlib.sha256(moved.read_bytes()).hexdigest()
    weights = load_file(moved)
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(weights, moved)
    after = content_hash(tiny_directory)
    assert {name for name in before if before[name] != after[name]} == {key}


@pytest.mark.parametrize("absolute", [True, False])
def test_weights_outside_the_directory_are_refused(absolute: bool, tiny_directory: Path) -> None:
    outside = tiny_directory.parent / "elsewhere.safetensors"
    name = str(outside) if absolute else "../elsewhere.safetensors"
    move_weights(tiny_directory, name)
    assert outside.is_file()
    line = f"{tiny_directory / INDEX}: {name} is outside the model directory; move it inside"
    assert fault(tiny_directory) == line
    with pytest.raises(InputError, match="is outside the model directory"):
        content_hash(tiny_directory)


def test_a_detour_is_refused(tiny_directory: Path) -> None:
    move_weights(tiny_directory, "w.safetensors")
    index = tiny_directory / INDEX
    index.write_text(index.read_text().replace("w.s", "sub/../w.s"))
    assert "sub/../w.safetensors is outside the model directory" in fault(tiny_directory)


def to_cache(directory: Path, root: Path) -> Path:
    """Lay a directory out as the cache of the hub does, with links to content."""
    repository = root / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in directory.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_snapshot_of_the_cache_is_loaded(tiny_directory: Path, tmp_path: Path) -> None:
    snapshot = to_cache(tiny_directory, tmp_path)
    assert content_hash(snapshot) == content_hash(tiny_directory)
    model, _ = load(snapshot)
    assert torch.equal(model.lm_head.weight, load(tiny_directory)[0].lm_head.weight)


def test_a_linked_weight_is_hashed_by_content(tiny_directory: Path, tmp_path: Path) -> None:
    """A link is made by whoever keeps the weights elsewhere; a change of those is seen."""
    before = content_hash(tiny_directory)
    other = tmp_path / "store.safetensors"
    (tiny_directory / SINGLE).rename(other)
    (tiny_directory / SINGLE).symlink_to(other)
    load(tiny_directory)
    assert content_hash(tiny_directory) == before
    other.write_bytes(other.read_bytes()[:-1] + b"\x01")
    assert content_hash(tiny_directory)[SINGLE] != before[SINGLE]


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_a_link_to_nothing_is_named(name: str, tiny_directory: Path, tmp_path: Path) -> None:
    snapshot = to_cache(tiny_directory, tmp_path)
    blob = (snapshot / name).resolve()
    blob.unlink()
    message = fault(snapshot)
    assert message.startswith(f"{snapshot / name} is a link to ../../blobs/{blob.name}, which is")
    assert message.endswith("download the model again")


def test_a_shard_that_links_to_nothing_is_named(tiny_directory: Path) -> None:
    moved = move_weights(tiny_directory, "w.safetensors")
    moved.unlink()
    moved.symlink_to("gone")
    assert fault(tiny_directory).startswith(f"{moved} is a link to gone, which is missing")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, tiny_directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123\n"
    (tiny_directory / name).write_text(pointer)
    assert fault(tiny_directory) == (
        f"{tiny_directory / name} is a Git LFS pointer, not the file itself: "
        f"run `git lfs pull` in {tiny_directory}"
    )


# What the index says


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": null}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["w.safetensors"]}', "has no weight_map"),
        ('{"weight_map": "w.safetensors"}', "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": null}}', "the file of lm_head.weight is None"),
        ('{"weight_map": {"lm_head.weight": ["w"]}}', "the file of lm_head.weight is ['w']"),
        ('{"weight_map": {"lm_head.weight": "w.bin"}}', "is 'w.bin', which is no safetensors"),
        ('{"weight_map": {"lm_head.weight": "x.safetensors"}}', "are missing: x.safetensors"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_an_index_that_lacks_what_it_must_hold(
    content: str, message: str, tiny_directory: Path
) -> None:
    move_weights(tiny_directory, "w.safetensors")
    (tiny_directory / INDEX).write_text(content)
    line = fault(tiny_directory)
    assert line.startswith(str(tiny_directory / INDEX))
    assert message in line


def split_weights(directory: Path, change: Callable[[torch.Tensor], object]) -> list[Path]:
    """Write the weights into two shards, the head into both."""
    weights = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    files = [directory / f"{name}.safetensors" for name in "ab"]
    head = weights["lm_head.weight"].clone()
    save_file(weights, files[0])
    change(head)
    save_file({"lm_head.weight": head}, files[1])
    named = dict.fromkeys(weights, files[0].name) | {"x": files[1].name}
    (directory / INDEX).write_text(json.dumps({"weight_map": named}))
    return files


def test_a_weight_that_two_shards_hold_alike_is_loaded(tiny_directory: Path) -> None:
    head = load(tiny_directory)[0].lm_head.weight.clone()
    split_weights(tiny_directory, lambda weight: None)
    assert torch.equal(load(tiny_directory)[0].lm_head.weight, head)


def test_a_weight_that_two_shards_hold_differently_is_refused(tiny_directory: Path) -> None:
    first, second = split_weights(tiny_directory, lambda weight: weight.neg_())
    assert fault(tiny_directory) == (
        f"lm_head.weight has different values in {first} and {second}: remove one of them"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_weights_of_a_format_that_is_not_read(dtype: torch.dtype, tiny_directory: Path) -> None:
    weights = load_file(tiny_directory / SINGLE)
    save_file({key: weight.to(dtype) for key, weight in weights.items()}, tiny_directory / SINGLE)
    name = {torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}[dtype]
    assert fault(tiny_directory) == (
        f"the weight files in {tiny_directory} hold {name} weights; only F32, BF16, F16 are read: "
        "convert them, or take the original checkpoint"
    )


def test_a_file_without_weights(tiny_directory: Path) -> None:
    save_file({}, tiny_directory / SINGLE, {"format": "pt"})
    assert "hold no weights" in fault(tiny_directory)


# What is nested


@pytest.mark.parametrize("depth", [3000, 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("brackets", ["[]", '{"a": }'])
def test_json_that_is_nested_too_deep(
    brackets: str, name: str, depth: int, tiny_directory: Path
) -> None:
    if name == INDEX:
        move_weights(tiny_directory, "w.safetensors")
    file = tiny_directory / name
    deep = brackets[:-1] * depth + "1" + brackets[-1] * depth
    content = file.read_text().rstrip()
    file.write_text(f'{content[:-1]}, "deep": {deep}}}')
    assert "nested" in fault(tiny_directory)


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a": ', "}")])
def test_nesting_is_counted(brackets: tuple[str, str], tmp_path: Path) -> None:
    def write(depth: int) -> Path:
        """Write a file of so many lists or objects, the outermost one included."""
        inner = brackets[0] * (depth - 1) + "1" + brackets[1] * (depth - 1)
        (tmp_path / "x.json").write_text(f'{{"a": {inner}}}')
        return tmp_path / "x.json"

    assert read_json(write(DEEPEST)).keys() == {"a"}
    with pytest.raises(InputError, match=r"x\.json is nested more than 100 deep"):
        read_json(write(DEEPEST + 1))


# Flags that have no part in compression


@pytest.mark.parametrize(
    "flags",
    [
        {"output_attentions": True},
        {"output_attentions": True, "attn_implementation": "sdpa"},
        {"output_hidden_states": True, "use_cache": False},
        {"return_dict": False},
        {"torch_dtype": "auto", "dtype": None},
        {"torch_dtype": "torch.float32", "dtype": None},
        {"dtype": "auto"},
        {"dtype": "int8"},
        {"dtype": 16},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"gradient_checkpointing": True, "pretraining_tp": 2, "attention_dropout": 0.5},
        {"num_return_sequences": 3, "temperature": 0.5, "do_sample": False},
        {"quantization_config": None},
        {"architectures": None},
    ],
)
def test_flags_change_nothing_and_are_exported(flags: dict[str, Any], tiny_directory: Path) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(40)[None]).logits

    expected = logits(load(tiny_directory)[0])
    edit(tiny_directory / "config.json", **flags)
    opened_model, _ = load(tiny_directory)
    assert torch.equal(logits(opened_model), expected)
    load_skeleton(str(tiny_directory), revision=None, offline=True)
    request = {"revision": None, "dtype": "auto", "device": "cpu", "offline": True}
    opened = open_model(str(tiny_directory), **request)
    written = json.loads(opened.settings["config.json"])
    was = json.loads((tiny_directory / "config.json").read_text())
    was.pop("torch_dtype", None)
    if flags.keys() == {"quantization_config"}:
        del was["quantization_config"]
    assert written == was | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures=LlamaForCausalLM is not a list"),
        ({"architectures": 5}, "architectures=5 is not a list of names"),
        ({"num_attention_heads": 0}, "is not valid: "),
        ({"hidden_act": "wobble"}, "config.json describes no LlamaForCausalLM: KeyError: 'wobble'"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"id2label": {"x": "y"}}, "is not valid: "),
    ],
)
def test_a_config_that_makes_no_sense(
    changes: dict[str, Any], message: str, tiny_directory: Path
) -> None:
    edit(tiny_directory / "config.json", **changes)
    assert message in fault(tiny_directory)
    with pytest.raises(InputError):
        load_skeleton(str(tiny_directory), revision=None, offline=True)


# Devices


NO_GPU = "but this machine has 0 GPUs that torch"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", f"model.device=cuda, {NO_GPU}"),
        ("cuda:7", f"model.device=cuda:7, {NO_GPU}"),
        ("cuda:99999999999999999999", f"model.device=cuda:99999999999999999999, {NO_GPU}"),
        ("cuda:01", "model.device=cuda:01 is not one of auto, cpu, cuda, cuda:N"),
        ("cuda:٣", "model.device=cuda:٣ is not one of auto, cpu, cuda, cuda:N"),
        ("mps", "model.device=mps is not one of auto, cpu, cuda, cuda:N"),
        ("nonsense", "model.device=nonsense is not one of auto, cpu, cuda, cuda:N"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError) as caught:
        choose_device(device)
    assert str(caught.value).startswith(message)


def test_a_device_that_is_not_there_is_said_by_plan_and_dry_run(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    overrides = ["model=local", f"model.path={tiny_directory}", "model.seqlen=32", "dataset=text",
                 "dataset.path=x.txt", "n_groups.count=2", "model.device=cuda"]  # fmt: skip
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        config = from_hydra(compose("config", overrides=overrides))
    for plan in (lambda: plan_run(config, tiny_directory), lambda: dry_run(config)):
        with pytest.raises(InputError, match=f"model.device=cuda, {NO_GPU}"):
            plan()


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda", "cpu", "cuda", "cuda:1",
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
