"""A vocabulary alone is a tokenizer: its tokens are those of the library that it is of."""

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from mi_experiments.errors import InputError
from mi_experiments.export.dense import write_settings
from mi_experiments.llm import tokenizer_files
from mi_experiments.llm.loading import load_tokenizer

TEXTS = (
    "the calibration of a channel",
    "two  spaces, and a tab\there ",
    "line\nbreak\n\nand more",
    "Grüße, 世界 🎉",
    "numbers 3.14159 and (signs)!",
    "",
)


@pytest.fixture
def sentencepiece_directory(tiny_directory: Path) -> Path:
    """Give the tiny model a vocabulary as Llama's, in the one file that Llama's is in."""
    for file in tiny_directory.glob("tokenizer*"):
        file.unlink()
    words = [
        "the",
        "a",
        "of",
        "channel",
        "block",
        "linear",
        "calibration",
        "group",
        "width",
        "grid",
    ]
    corpus = [" ".join(words[(i * j + j) % len(words)] for j in range(12)) for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tiny_directory / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tiny_directory / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # fmt: skip
    (tiny_directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tiny_directory


def test_a_sentencepiece_model_alone_gives_its_own_tokens(
    sentencepiece_directory: Path, tmp_path: Path
) -> None:
    """Also when it has gone through an export."""
    vocabulary = str(sentencepiece_directory / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
    tokenizer = load_tokenizer(sentencepiece_directory)
    assert len(tokenizer) == library.vocab_size()
    (tmp_path / "export").mkdir()
    write_settings({}, tokenizer, tmp_path / "export")
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")
    for text in TEXTS:
        tokens = library.encode(text)
        assert tokenizer(text)["input_ids"] == [library.bos_id(), *tokens]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens
        assert exported(text, add_special_tokens=False)["input_ids"] == tokens


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_the_package_that_is_missing_is_named(
    missing: str, sentencepiece_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        return None if name == missing else importlib.util.find_spec(name)

    monkeypatch.setattr(tokenizer_files, "find_spec", find)
    name = missing.rpartition(".")[2]
    with pytest.raises(InputError) as caught:
        load_tokenizer(sentencepiece_directory)
    assert str(caught.value) == (
        f"{sentencepiece_directory / 'tokenizer.model'} is read with the package {name}: "
        f"pip install {name}"
    )


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff\xff\xff" * 40, b"<html>\n" * 9])
def test_a_damaged_vocabulary_is_not_one_of_tiktoken(
    content: bytes, sentencepiece_directory: Path
) -> None:
    file = sentencepiece_directory / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(sentencepiece_directory)
    assert "\n" not in str(caught.value)
    assert "tiktoken" not in str(caught.value)


def test_a_vocabulary_of_tiktoken_needs_tiktoken(
    sentencepiece_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original files of Llama 3 are, under the same name."""
    lines = [base64.b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(256)]
    file = sentencepiece_directory / "tokenizer.model"
    file.write_text("".join(lines))
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="is read with the package tiktoken: pip install tiktoken"):
        load_tokenizer(sentencepiece_directory)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 5}', "null", "\x00"])
def test_a_damaged_tokenizer_is_one_line(content: str, tiny_directory: Path) -> None:
    (tiny_directory / "tokenizer.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tiny_directory)
    assert str(caught.value).startswith(f"{tiny_directory} has no usable tokenizer: ")
    assert "\n" not in str(caught.value)
