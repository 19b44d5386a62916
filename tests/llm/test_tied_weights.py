"""A stored weight is used as it is stored; what is not stored is tied, on whichever side it is."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_byte_tokenizer, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mi_experiments.errors import InputError
from mi_experiments.llm.loading import OpenModel, open_model
from mi_experiments.llm.streaming import BlockWeights

TIES = {
    "llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    "mixtral": ("lm_head.weight", "model.embed_tokens.weight"),
}
"""Of each architecture, the head and what its config ties it to."""


def save_both(
    directory: Path,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    change: Callable[[dict[str, Tensor]], object] = lambda weights: None,
) -> None:
    """Write a model whose head and embeddings are stored apart, and a config that ties them."""
    model = build_tiny_model(name, vocab_size=260, tie_word_embeddings=False)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    build_byte_tokenizer().save_pretrained(directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    for file in directory.glob("*.safetensors"):
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})


def open_whole(directory: Path, **changes: Any) -> OpenModel:
    request = {"revision": None, "dtype": "auto", "device": "cpu", "offline": True, **changes}
    opened = open_model(str(directory), **request)
    opened.weights.load_all()
    return opened


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


def copy_to(target: str, source: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({target: weights[source].clone()})


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        ("llama", torch.float32, "5GB"),
        ("llama", torch.bfloat16, "20KB"),
        ("gpt2", torch.float32, "20KB"),
        ("opt", torch.bfloat16, "5GB"),
        ("mixtral", torch.float32, "5GB"),
    ],
)
def test_a_head_with_values_of_its_own_is_kept(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The logits are those of transformers, which says of it that it does not tie."""
    save_both(tmp_path, name, dtype, shard)
    with caplog.at_level(logging.WARNING, "mi_experiments"):
        opened = open_whole(tmp_path)
    head, source = TIES[name]
    assert opened.weights.untied == [head]
    (record,) = [r for r in caplog.records if r.name.startswith("mi_experiments")]
    assert record.getMessage() == (
        f"{head} is stored with other values than {source}, although config.json ties them "
        "(tie_word_embeddings): both are used as they are stored"
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    torch.testing.assert_close(logits(opened.model), logits(whole), rtol=0, atol=0)
    parameters = dict(opened.model.named_parameters())
    assert not torch.equal(parameters[head], parameters[source])
    assert {head, source} <= opened.weights.stored_rest().keys()
    assert json.loads(opened.settings["config.json"])["tie_word_embeddings"] is False


def test_a_difference_of_one_value_is_a_difference(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        head = weights["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        weights["lm_head.weight"] = head

    save_both(tmp_path, change=change)
    opened = open_whole(tmp_path)
    assert opened.weights.untied == ["lm_head.weight"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened.model), logits(whole))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_copies_stay_tied(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head, source = TIES[name]
    save_both(tmp_path, name, change=copy_to(head, source))
    with caplog.at_level(logging.WARNING, "mi_experiments"):
        opened = open_whole(tmp_path)
    assert not caplog.records
    assert opened.weights.untied == []
    parameters = dict(opened.model.named_parameters(remove_duplicate=False))
    assert parameters[head] is parameters[source]
    assert head not in opened.weights.stored_rest()
    assert json.loads(opened.settings["config.json"])["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("side", [0, 1])
def test_one_stored_side_is_enough(name: str, side: int, tmp_path: Path) -> None:
    """Whichever of the two is not stored takes the values of the other, as in transformers."""
    pair = TIES[name]
    save_both(tmp_path, name, change=lambda weights: weights.pop(pair[side]))
    opened = open_whole(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")[pair[1 - side]]
    parameters = dict(opened.model.named_parameters(remove_duplicate=False))
    assert torch.equal(parameters[pair[0]], stored)
    assert parameters[pair[0]] is parameters[pair[1]]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(logits(opened.model), logits(whole))
    assert opened.weights.stored_rest().keys() & set(pair) == {pair[1]}


def test_no_stored_side_is_a_missing_weight(tmp_path: Path) -> None:
    save_both(tmp_path, change=lambda weights: [weights.pop(key) for key in TIES["llama"]])
    with pytest.raises(InputError, match=r"it lacks 2 weights, such as lm_head\.weight"):
        open_whole(tmp_path)


def test_a_missing_head_that_nothing_is_tied_to_is_missing(tmp_path: Path) -> None:
    save_both(tmp_path, change=lambda weights: weights.pop("lm_head.weight"))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('embeddings": true', 'embeddings": false'))
    with pytest.raises(InputError, match=r"it lacks 1 weights, such as lm_head\.weight"):
        open_whole(tmp_path)


def test_blocks_that_share_a_weight_are_refused(tmp_path: Path) -> None:
    """One block is in memory at a time, so none can take its values from another."""
    first, second = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
    save_both(tmp_path, change=lambda weights: weights.pop(second))
    model = build_tiny_model("llama", vocab_size=260, device="meta")
    model.all_tied_weights_keys = {second: first}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is tied to another"):
        BlockWeights.open(model, [tmp_path / "model.safetensors"], torch.device("cpu"))
