"""A model is loaded completely or not at all, and each fault of the user is one clear line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from huggingface_hub.errors import Response
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_experiments.errors import InputError
from mi_experiments.llm import loading
from mi_experiments.llm.loading import content_hash, load_model, load_skeleton, locate_model


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
    return message


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_directory_loads_exactly_for_inference(
    tiny_directory: Path, tiny_model: Callable[..., Any]
) -> None:
    saved = tiny_model("llama", vocab_size=260)
    model, tokenizer = load(tiny_directory)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == saved.state_dict().keys()
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    text = "Grüße, 世界\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode())
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(tiny_directory: Path, attention: str) -> None:
    model, _ = load(tiny_directory, attention=attention)
    skeleton = load_skeleton(str(tiny_directory), revision=None, offline=True, attention=attention)
    assert model.config._attn_implementation == attention
    assert skeleton.config._attn_implementation == attention
    assert fault(tiny_directory, attention="flash") == (
        "model.attention=flash is not one of auto, sdpa, eager"
    )


def test_a_skeleton_has_every_shape_and_no_weight(tiny_directory: Path) -> None:
    model, _ = load(tiny_directory)
    (tiny_directory / "model.safetensors").unlink()
    skeleton = load_skeleton(str(tiny_directory), revision=None, offline=True)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not skeleton.training
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_dtype_is_what_is_asked_and_auto_is_what_is_stored(
    tiny_directory: Path, tiny_model: Callable[..., Any]
) -> None:
    assert load(tiny_directory)[0].dtype == torch.float32
    assert load(tiny_directory, dtype="float16")[0].dtype == torch.float16
    tiny_model("llama", vocab_size=260).to(torch.bfloat16).save_pretrained(tiny_directory)
    assert load(tiny_directory)[0].dtype == torch.bfloat16
    # The config is a claim about the weights; the weights are the fact.
    edit_config(tiny_directory, dtype="float32")
    assert load(tiny_directory)[0].dtype == torch.bfloat16
    assert load(tiny_directory, dtype="float32")[0].dtype == torch.float32


def test_float16_of_a_bfloat16_checkpoint_must_be_insisted_on(
    tiny_directory: Path, tiny_model: Callable[..., Any]
) -> None:
    tiny_model("llama", vocab_size=260).to(torch.bfloat16).save_pretrained(tiny_directory)
    message = fault(tiny_directory, dtype="float16")
    assert message.startswith("model.dtype=float16 lacks the range of the bfloat16 checkpoint")
    assert "model.allow_float16=true" in message
    model, _ = load(tiny_directory, dtype="float16", allow_float16=True)
    assert model.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "model.dtype=int8 is not one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "model.device=gpu is not one of auto, cpu, cuda, cuda:N"),
        ({"device": "meta"}, "model.device=meta is not one of auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "model.device=cuda:99, but this machine has "),
        ({"revision": "main"}, "model.revision=main is for hub ids, but model.path="),
    ],
)
def test_a_request_that_cannot_be_met(
    changes: dict[str, str], message: str, tiny_directory: Path
) -> None:
    assert fault(tiny_directory, **changes).startswith(message)


@pytest.mark.parametrize("path", ["missing", "./a/b", "/a/b/c", "a/b/c", "~/nothing-here", ""])
def test_a_path_that_is_neither_directory_nor_hub_id(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fault(path) == f"model.path={path} is not a directory; a hub id looks like org/name"


def test_a_file_is_not_a_model(tiny_directory: Path) -> None:
    assert "is not a directory" in fault(tiny_directory / "config.json")


def test_a_directory_without_config(tiny_directory: Path) -> None:
    (tiny_directory / "config.json").unlink()
    assert fault(tiny_directory) == (
        f"{tiny_directory} has no config.json, so it is not a model directory"
    )


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "not a JSON object")])
def test_a_config_that_is_not_json(text: str, message: str, tiny_directory: Path) -> None:
    (tiny_directory / "config.json").write_text(text)
    assert message in fault(tiny_directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5Model"]}, "is not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is not a causal"),
        ({"model_type": "marvellous"}, "model_type=marvellous is unknown to transformers"),
        ({"model_type": None}, "model_type=None is unknown"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}, "own code, which is never run"),
        ({"hidden_size": "wide"}, "is not valid: Validation error for field 'hidden_size'"),
        ({"hidden_size": 33}, "The hidden size (33) is not a multiple"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_a_config_of_something_else(
    changes: dict[str, Any], message: str, tiny_directory: Path
) -> None:
    edit_config(tiny_directory, **changes)
    assert message in fault(tiny_directory)
    with pytest.raises(InputError):
        load_skeleton(str(tiny_directory), revision=None, offline=True)


def test_code_in_the_repository_is_never_run(tiny_directory: Path) -> None:
    trap = tiny_directory / "trap.py"
    trap.write_text(f"open({str(tiny_directory / 'ran')!r}, 'w')\n")
    edit_config(
        tiny_directory,
        auto_map={"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
    )
    load(tiny_directory)
    assert not (tiny_directory / "ran").exists()


def test_pickled_weights_are_refused(tiny_directory: Path) -> None:
    (tiny_directory / "model.safetensors").unlink()
    assert fault(tiny_directory).startswith(f"{tiny_directory} has no model.safetensors")
    (tiny_directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "only in a format that can execute code (pytorch_model.bin)" in fault(tiny_directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(keep: int, tiny_directory: Path) -> None:
    file = tiny_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert fault(tiny_directory).startswith(f"{file} is corrupt or truncated: ")


def test_shards_are_loaded_and_a_missing_one_is_named(
    tiny_directory: Path, tiny_model: Callable[..., Any]
) -> None:
    saved = tiny_model("llama", vocab_size=260)
    (tiny_directory / "model.safetensors").unlink()
    saved.save_pretrained(tiny_directory, max_shard_size="50KB")
    model, _ = load(tiny_directory)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    shard = sorted(tiny_directory.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert fault(tiny_directory).endswith(f"names shards that are missing: {shard.name}")


def test_weights_that_would_be_newly_initialised_are_refused(tiny_directory: Path) -> None:
    edit_weights(tiny_directory, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert fault(tiny_directory) == (
        f"the checkpoint in {tiny_directory} does not fit: "
        "it lacks 1 weights, such as model.layers.1.mlp.up_proj.weight"
    )


def test_weights_that_the_model_does_not_have_are_refused(tiny_directory: Path) -> None:
    edit_config(tiny_directory, num_hidden_layers=1)
    assert "it has unknown 9 weights, such as model.layers.1." in fault(tiny_directory)


def test_weights_of_another_shape_are_refused(tiny_directory: Path) -> None:
    edit_config(tiny_directory, intermediate_size=50)
    assert "it has of another shape 6 weights" in fault(tiny_directory)


def test_weights_of_another_kind_are_refused(tiny_directory: Path) -> None:
    def to_bytes(weights: dict[str, Tensor]) -> None:
        weights.update({name: weight.to(torch.uint8) for name, weight in weights.items()})

    edit_weights(tiny_directory, to_bytes)
    assert "hold U8 weights; only F32, BF16, F16 are read" in fault(tiny_directory)


def test_tied_embeddings_are_not_missing_weights(
    tiny_directory: Path, tiny_model: Callable[..., Any]
) -> None:
    tiny_model("llama", vocab_size=260, tie_word_embeddings=True).save_pretrained(tiny_directory)
    model, _ = load(tiny_directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_tokenizer(tiny_directory: Path) -> None:
    for file in tiny_directory.glob("tokenizer*"):
        file.unlink()
    assert fault(tiny_directory).startswith(f"{tiny_directory} has no usable tokenizer: ")


def test_a_corrupt_tokenizer(tiny_directory: Path) -> None:
    (tiny_directory / "tokenizer.json").write_text("{")
    assert fault(tiny_directory).startswith(f"{tiny_directory} has no usable tokenizer: ")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError, "is gated; accept its terms at https://huggingface.co/org/name"),
        (hub.RepositoryNotFoundError, "is neither a directory nor on the hub; check the spelling"),
        (hub.RevisionNotFoundError, "model.revision=v9 does not exist for model.path=org/name"),
        (hub.LocalEntryNotFoundError, "and the hub cannot be reached; run `hf download org/name`"),
        (hub.HfHubHTTPError, "the hub refused: it is the test that fails"),
        (hub.OfflineModeIsEnabled, "the hub refused: it is the test that fails"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        text = "it is the test\nthat fails"
        if issubclass(error, hub.HfHubHTTPError):
            raise error(text, response=Response(403, request=object()))
        raise error(text)

    monkeypatch.setattr(loading, "snapshot_download", refuse)
    assert message in fault("org/name", revision="v9", offline=False)


@pytest.mark.parametrize(
    ("offline", "reason"), [(True, "model.offline=true"), (False, "the hub cannot be reached")]
)
def test_without_network_a_model_that_is_not_cached_is_refused(
    offline: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = fault("no-such-organisation/no-such-model", offline=offline)
    assert message.startswith(
        "model.path=no-such-organisation/no-such-model is neither a directory"
    )
    assert reason in message


def test_a_cached_model_is_located_with_its_commit(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--org--name"
    shutil.copytree(tiny_directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = locate_model("org/name", revision=None, offline=True)
    assert source.commit == commit
    assert content_hash(source.directory) == content_hash(tiny_directory)
    assert locate_model(str(tiny_directory), revision=None, offline=True).commit is None
    model, _ = load("org/name", revision=commit)
    assert model.dtype == torch.float32


def test_content_hash_covers_what_can_change_the_numbers(tiny_directory: Path) -> None:
    hashes = content_hash(tiny_directory)
    assert list(hashes) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name, value in hashes.items():
        assert value == hashlib.sha256((tiny_directory / name).read_bytes()).hexdigest()
    weights = tiny_directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tiny_directory / "README.md").write_text("changed")
    changed = content_hash(tiny_directory)
    assert {name for name in hashes if changed[name] != hashes[name]} == {"model.safetensors"}
    with pytest.raises(InputError, match="is not a directory with the files of a model"):
        content_hash(tiny_directory / "missing")
