"""Real texts and tokenizers, where they are at hand: the counts that others have published.

Texts and models are looked for in a folder `shared` beside the checkout or above it; tokenizers of
published models in the folder that `MI_EXPERIMENTS_TOKENIZERS` names (`gpt2`, `llama2_7b`, with the
files of the hub) or in `shared/tokenizers`, else in the Hugging Face cache. What is absent is
skipped by its name.
"""

import os
import random
import re
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from composed import config_of
from tiny_models import build_byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mi_experiments.texts.corpora import read_documents
from mi_experiments.texts.sources import EvaluationText, calibration_sequences, evaluation_texts

ROWS, BYTES, WORDS = 4358, 1_305_088, 245_569
"""Of the raw test part of WikiText-2: rows and bytes as the card of Salesforce/wikitext counts them
(`num_examples`, `num_bytes`: with four for the length of each row), and words as the paper does
(arXiv:1609.07843, table 1: with one for the end of each row)."""

C4 = "c4/c4-en-train-00000-first-1000-documents.jsonl"


def find(name: str) -> Path | None:
    """Return a file or folder of `shared`, where it is at hand."""
    folders = (folder / "shared" / name for folder in Path(__file__).resolve().parents)
    return next((folder for folder in folders if folder.exists()), None)


def at_hand(name: str) -> Path:
    """Return a file or folder of `shared`, or skip."""
    return find(name) or pytest.skip(f"no shared/{name} beside this checkout")


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a published model, or skip."""
    named = configure(f"model={model}").model
    given = os.environ.get("MI_EXPERIMENTS_TOKENIZERS")
    folder = Path(given) / model if given else find(f"tokenizers/{model}")
    try:
        if folder is not None:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(
            named.path, revision=named.revision, local_files_only=True
        )
    except OSError:
        pytest.skip(
            f"the tokenizer of {named.path} is neither in MI_EXPERIMENTS_TOKENIZERS/{model} nor in "
            f"shared/tokenizers/{model} nor in the Hugging Face cache"
        )


configure = partial(config_of, base=["cache=false"])


def rows_of(text: str) -> list[str]:
    """Undo the join: a row is empty, or a line with its line break; blank lines stand between."""
    rows, place = [], 0
    while True:
        found = re.compile(r"([^\n]+\n)?(\n\n|\Z)").match(text, place)
        assert found, text[place : place + 80]
        rows.append(found[1] or "")
        place = found.end()
        if not found[2]:
            return rows


@pytest.fixture(scope="module")
def wikitext() -> str:
    return at_hand("data/wikitext2/wikitext-2-raw-test.txt").read_text(encoding="utf-8")


@pytest.fixture
def corpora(wikitext: str, tmp_path: Path) -> Path:
    """Write the rows of the test part as the hub has them."""
    file = tmp_path / configure().corpora["wikitext2"].splits["test"][0]
    file.parent.mkdir()
    pq.write_table(pa.table({"text": rows_of(wikitext)}), file)
    return tmp_path


def evaluated(tokenizer: PreTrainedTokenizerBase, corpora: Path, *given: str) -> EvaluationText:
    config = configure("evaluation=wikitext2", f"corpora.wikitext2.path={corpora}", *given)
    (text,) = evaluation_texts(tokenizer, config)
    return text


def test_wikitext2_has_the_published_rows_bytes_and_words(wikitext: str) -> None:
    rows = rows_of(wikitext)
    assert "\n\n".join(rows) == wikitext
    assert len(rows) == ROWS
    assert sum(len(row.encode()) for row in rows) + 4 * ROWS == BYTES
    assert len(wikitext.split()) + ROWS == WORDS


def test_the_protocol_joins_its_rows_to_the_same_bytes(wikitext: str, corpora: Path) -> None:
    text = evaluated(build_byte_tokenizer(), corpora, "model.seqlen=2048")
    length = 1 + len(wikitext.encode())  # BOS and a token a byte
    assert (len(text.windows), text.dropped_tokens) == divmod(length, 2048)
    decoded = build_byte_tokenizer().decode(torch.cat(list(text.windows))[1:])
    assert wikitext.startswith(decoded)


@pytest.mark.parametrize(
    ("model", "add_bos", "seqlen", "tokens", "windows"),
    [
        ("gpt2", "auto", 1024, 287_644, 280),
        # OPT has GPT-2's vocabulary, and its slow tokenizer begins with one token.
        ("gpt2", "always", 2048, 287_645, 140),
        ("llama2_7b", "auto", 2048, 341_469, 166),
        ("llama2_7b", "auto", 4096, 341_469, 83),  # as Wanda's author counts: wanda issue 52
    ],
)
def test_published_tokenizers_cut_the_published_number_of_windows(
    model: str, add_bos: str, seqlen: int, tokens: int, windows: int, corpora: Path
) -> None:
    given = [f"model.seqlen={seqlen}", f"evaluation.datasets.wikitext2.add_bos={add_bos}"]
    text = evaluated(tokenizer_of(model), corpora, *given)
    assert len(text.windows) * seqlen + text.dropped_tokens == tokens
    assert len(text.windows) == windows
    assert text.bos is (model != "gpt2" or add_bos == "always")


def test_a_real_tokenizer_and_text_give_the_published_windows(wikitext: str, corpora: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(at_hand("models/stories260K"))
    whole = tokenizer(wikitext, verbose=False)["input_ids"]
    text = evaluated(tokenizer, corpora, "model.seqlen=512")
    count = len(whole) // 512
    cut = [whole[i * 512 : (i + 1) * 512] for i in range(count)]
    assert [window.tolist() for window in text.windows] == cut
    assert text.dropped_tokens == len(whole) - count * 512


@pytest.mark.parametrize("seed", [0, 1])
def test_real_rows_of_c4_are_drawn_as_published(seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(at_hand("models/stories260K"))
    file = at_hand(f"data/{C4}")
    rows = list(read_documents(file))
    assert len(rows) == 1000
    random.seed(seed)
    drawn = []
    for _ in range(16):
        while True:
            ids = tokenizer(rows[random.randint(0, 999)], verbose=False)["input_ids"]
            if len(ids) > 512:
                break
        start = random.randint(0, len(ids) - 512 - 1)
        drawn.append(ids[start : start + 512])
    config = configure(
        "dataset=text", f"dataset.path={file}", "evaluation=embedded", "model.seqlen=512",
        "dataset.sampling=published", "dataset.nsamples=16", f"seed={seed}",
    )  # fmt: skip
    assert calibration_sequences(tokenizer, config).tolist() == drawn
