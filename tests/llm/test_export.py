"""An export is the model, bit for bit, and its grids; or it is not there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mi_experiments.errors import AuditError, InputError
from mi_experiments.llm import export
from mi_experiments.llm.export import LinearGrid, export_dense, grid_tensors, verify_export

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "tied llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2
    ),
    # Experts are one tensor in memory and many on disk.
    "mixtral": MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4),
}
LINEAR = "model.layers.0.mlp.down_proj"


def build_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    ids = {"<unk>": 0} | {str(i): i for i in range(1, 40)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def build_grid(rows: int = 16, columns: int = 24) -> LinearGrid:
    """Three widths, four channel groups, two scale groups in each."""
    generator = torch.Generator().manual_seed(0)
    channel_group = torch.arange(columns, dtype=torch.int32) * 4 // columns
    return {
        "bits": torch.tensor([2, 3, 4, 16], dtype=torch.uint8)[channel_group],
        "channel_group": channel_group,
        "scale_group": torch.arange(columns, dtype=torch.int32) * 8 // columns,
        "scale": torch.rand(rows, 8, generator=generator) + 0.1,
        "zero_point": torch.randint(0, 4, (rows, 8), generator=generator).int(),
        "pruned": torch.rand(rows, columns, generator=generator) < 0.5,
    }


def entries(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(30)[None]).logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_computes_the_same_bits(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = build_model(name, dtype)
    export_dense(model, build_tokenizer(), tmp_path, {})
    verify_export(tmp_path, model)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("3 4")["input_ids"] == [3, 4]


def test_the_directory_holds_model_and_grids_and_nothing_else(tmp_path: Path) -> None:
    model, grid = build_model(), build_grid()
    export_dense(model, build_tokenizer(), tmp_path / "new" / "run", {LINEAR: grid})
    assert entries(tmp_path / "new" / "run") == {"model", "grids.safetensors"}
    with safe_open(tmp_path / "new" / "run" / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    stored = load_file(tmp_path / "new" / "run" / "grids.safetensors")
    assert stored.keys() == {f"{LINEAR}.{key}" for key in grid}
    for key, tensor in grid.items():
        assert torch.equal(stored[f"{LINEAR}.{key}"], tensor)
        assert stored[f"{LINEAR}.{key}"].dtype == tensor.dtype


def test_grids_of_one_site_may_share_tensors(tmp_path: Path) -> None:
    grid = build_grid()
    export_dense(build_model(), build_tokenizer(), tmp_path, {"q": grid, "k": grid})
    stored = load_file(tmp_path / "grids.safetensors")
    for key, tensor in grid.items():
        assert torch.equal(stored[f"q.{key}"], tensor)
        assert torch.equal(stored[f"k.{key}"], tensor)


def test_weights_can_be_rebuilt_from_grids_and_codes(tmp_path: Path) -> None:
    """The layout is enough: every kept weight has an integer code in the range of its width."""
    model, grid = build_model(), build_grid()
    scale, zero = (grid[key][:, grid["scale_group"].long()] for key in ("scale", "zero_point"))
    quantized = grid["bits"] < 16
    code = torch.randint(0, 16, (16, 24)) % (2 ** grid["bits"].long())
    weight = model.get_submodule(LINEAR).weight
    with torch.no_grad():
        weight[:, quantized] = (scale * (code - zero))[:, quantized]
        weight[grid["pruned"]] = 0
    export_dense(model, build_tokenizer(), tmp_path, {LINEAR: grid})

    stored = load_file(tmp_path / "grids.safetensors")
    read = load_file(tmp_path / "model" / "model.safetensors")[f"{LINEAR}.weight"]
    group = stored[f"{LINEAR}.scale_group"].long()
    codes = read / stored[f"{LINEAR}.scale"][:, group] + stored[f"{LINEAR}.zero_point"][:, group]
    pruned = stored[f"{LINEAR}.pruned"]
    kept = ~pruned & (stored[f"{LINEAR}.bits"] < 16)
    assert (read[pruned] == 0).all()
    assert torch.equal(codes.round().long()[kept], code[kept])
    torch.testing.assert_close(codes[kept], codes[kept].round())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = build_model("tied llama")
    export_dense(model, build_tokenizer(), tmp_path, {})
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_sampling_settings_that_the_library_refuses_go_through(tmp_path: Path) -> None:
    model = build_model()
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    settings = model.generation_config
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "refused")
    export_dense(model, build_tokenizer(), tmp_path, {})
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"]) == (0.9, 0.6)
    assert model.generation_config is settings
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.generation_config.temperature == 0.9
    verify_export(tmp_path, model)


@pytest.mark.parametrize("name", ["model", "grids.safetensors"])
def test_an_export_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"{name} exists"):
        export_dense(build_model(), build_tokenizer(), tmp_path, {})
    assert (tmp_path / name).read_text() == "precious"
    assert entries(tmp_path) == {name}


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (PreTrainedModel, "save_pretrained", FULL),
        (PreTrainedTokenizerFast, "save_pretrained", FULL),
        (export, "save_file", FULL),
        (export, "save_file", SafetensorError("I/O error: No space left on device")),
        (os, "fsync", FULL),
    ],
)
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str, error: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(place, name, fail)
    model, settings = build_model(), build_model().generation_config
    model.generation_config = settings
    with pytest.raises(InputError, match="No space left on device") as caught:
        export_dense(model, build_tokenizer(), tmp_path, {LINEAR: build_grid()})
    assert str(tmp_path) in str(caught.value)
    assert entries(tmp_path) == set()
    assert model.generation_config is settings


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rename_leaves_neither_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls, rename = [], Path.rename

    def fail(path: Path, target: Path) -> Path:
        calls.append(target.name)
        if len(calls) == failing + 1:
            raise FULL
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="cannot be written"):
        export_dense(build_model(), build_tokenizer(), tmp_path, {})
    assert entries(tmp_path) == set()


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_dense(build_model(), build_tokenizer(), tmp_path, {})
    assert entries(tmp_path) == set()


def test_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename, flush = Path.rename, export._fsync

    def note_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    def note_flush(path: Path) -> None:
        events.append(f"flush {path.name}")
        flush(path)

    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(export, "_fsync", note_flush)
    export_dense(build_model(), build_tokenizer(), tmp_path, {})
    first = events.index("rename grids.safetensors")
    assert events[first:] == ["rename grids.safetensors", "rename model", f"flush {tmp_path.name}"]
    assert {f"flush {path.name}" for path in tmp_path.rglob("*")} <= set(events[:first])


# What verification finds


def change_file(directory: Path, change) -> None:
    path = directory / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip_sign_of_zero(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.weight"][0, 0] = -0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{LINEAR}.codes": torch.zeros(2)}), "unexpected_keys.*codes"),
        (lambda t: t.pop(f"{LINEAR}.weight"), r"missing_keys.*down_proj\.weight"),
        (flip_sign_of_zero, r"down_proj\.weight on disk differs"),
        (lambda t: t[f"{LINEAR}.weight"].add_(1e-3), r"down_proj\.weight on disk differs"),
    ],
)
def test_verification_sees_every_difference(tmp_path: Path, change, message: str) -> None:
    model = build_model()
    with torch.no_grad():
        model.get_submodule(LINEAR).weight[0, 0] = 0.0
    export_dense(model, build_tokenizer(), tmp_path, {})
    verify_export(tmp_path, model)
    change_file(tmp_path, change)
    with pytest.raises(AuditError, match=message):
        verify_export(tmp_path, model)


def test_verification_sees_a_model_that_went_on_changing(tmp_path: Path) -> None:
    model = build_model()
    export_dense(model, build_tokenizer(), tmp_path, {})
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AuditError, match=r"lm_head\.weight on disk differs"):
        verify_export(tmp_path, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", torch.zeros(24)),
        ("bits", torch.zeros(23, dtype=torch.uint8)),
        ("scale_group", torch.zeros(24, dtype=torch.int32)),
        ("scale", torch.zeros(24, 8)),
        ("zero_point", torch.zeros(16, 7, dtype=torch.int32)),
        ("pruned", torch.zeros(24, 16, dtype=torch.bool)),
        ("extra", torch.zeros(1)),
    ],
)
def test_a_grid_that_does_not_fit_is_a_value_error(key: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match="grid of x"):
        grid_tensors({"x": build_grid() | {key: value}})
