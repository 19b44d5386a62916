"""Texts: every protocol reads, joins and cuts what its name says, and calibration never sees it."""

import gzip
import json
import math
import os
import random
import shutil
import socket
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import composed
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_byte_tokenizer
from torch import Tensor

from mi_experiments.config.config import Config
from mi_experiments.config.texts import Sampling
from mi_experiments.embedded import language
from mi_experiments.errors import InputError
from mi_experiments.texts import sources
from mi_experiments.texts.overlap import Overlap
from mi_experiments.texts.sequences import calibration_tokens
from mi_experiments.texts.sources import (
    calibration_sequences,
    evaluation_texts,
    find_texts,
    hold_out,
    report_overlap,
    true_perplexity,
)

TOKENIZER = build_byte_tokenizer()  # a token a byte, and one BOS where a text begins
BOS = TOKENIZER.bos_token_id


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the network, and let the libraries believe that there is one."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the network is refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def rows(corpus: str, split: str, count: int = 40) -> list[str]:
    """Return the rows that a constructed corpus has, recognisable, with an empty one among them."""
    made = [f"{corpus} {split} {i}: " + f"{i * 7919 % 9973:x} " * (i % 5 + 2) for i in range(count)]
    return [*made[:3], "", *made[3:]]


COUNTS = {("c4", "validation"): 1300}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write every published corpus in the hub's own format: DIRECTORY/CORPUS/FILE."""
    root = tmp_path_factory.mktemp("corpora")
    for name, corpus in config_of().corpora.items():
        for split, files in corpus.splits.items():
            (file,) = files
            write_rows(root / name / file, rows(name, split, COUNTS.get((name, split), 40)), corpus)
    return root


def write_rows(path: Path, texts: Sequence[str], corpus: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), corpus.text_field: texts}), path)
    else:
        lines = (json.dumps({corpus.text_field: text, "url": "x"}) for text in texts)
        path.write_bytes(gzip.compress("\n".join(lines).encode()))


def config_of(*overrides: str, corpora: Path | None = None) -> Config:
    names = ("wikitext2", "ptb", "c4") if corpora else ()
    local = [f"corpora.{name}.path={corpora}/{name}" for name in names]
    return composed.config_of(*overrides, *local)


def written(windows: Sequence[Tensor]) -> str:
    """Return the text of windows one after another, BOS as ^."""
    return TOKENIZER.decode(torch.cat(list(windows))).replace("<s>", "^")


LONG_ENOUGH = 400
"""Rows of WikiText-2 that fill several windows of 4096 tokens."""

# What each protocol says, written out.
PROTOCOLS = {
    "sparsegpt": {
        "wikitext2": "^" + "\n\n".join(rows("wikitext2", "test")),
        "ptb": "^" + " ".join(rows("ptb", "test")),
        "c4": "^" + " ".join(rows("c4", "validation", 1300)[:1100]),
    },
    "gptq_old": {
        "wikitext2": "^" + "\n\n".join(rows("wikitext2", "test")),
        "ptb": "^" + "\n\n".join(rows("ptb", "validation")),
    },
    "wanda_llama2": {
        "wikitext2": "^" + "\n\n".join(rows("wikitext2", "test", LONG_ENOUGH)),
        "c4": "^" + " ".join(rows("c4", "validation", 1300)[:1100]),
    },
}


@pytest.mark.parametrize(
    ("protocol", "name", "expected"),
    [(protocol, *item) for protocol, named in PROTOCOLS.items() for item in named.items()],
)
def test_a_protocol_joins_its_part_of_a_corpus(
    protocol: str, name: str, expected: str, corpora: Path, tmp_path: Path
) -> None:
    config = config_of(f"evaluation={protocol}", "model.seqlen=32", corpora=corpora)
    text = config.evaluation.datasets[name]
    seqlen = 4096 if protocol == "wanda_llama2" else 32
    assert (config.evaluation.protocol, text.seqlen) == (protocol, seqlen)
    if protocol == "wanda_llama2":
        corpus, long = config.corpora["wikitext2"], rows("wikitext2", "test", LONG_ENOUGH)
        write_rows(tmp_path / corpus.splits["test"][0], long, corpus)
        config.evaluation.datasets["wikitext2"].path = str(tmp_path)
    found = {each.name: each for each in evaluation_texts(TOKENIZER, config)}
    assert list(found) == list(config.evaluation.datasets)
    windows = found[name].windows
    count = len(expected) // seqlen
    if name == "c4":
        count = min(count, 256)
    assert {len(window) for window in windows} == {seqlen}
    assert len(windows) == count > 1
    assert written(windows) == expected[: count * seqlen]
    assert found[name].dropped_tokens == len(expected) - count * seqlen
    assert found[name].bos


def test_the_old_protocol_of_gptq_samples_c4_with_seed_0(corpora: Path) -> None:
    config = config_of("evaluation=gptq_old", "model.seqlen=32", "seed=5", corpora=corpora)
    (text,) = [each for each in evaluation_texts(TOKENIZER, config) if each.name == "c4"]
    documents = rows("c4", "validation", 1300)
    random.seed(0)
    expected = []
    while len(expected) < 256:
        document = "^" + documents[random.randint(0, len(documents) - 1)]
        if len(document) > 32:
            start = random.randint(0, len(document) - 32 - 1)
            expected.append(document[start : start + 32])
    assert [written([window]) for window in text.windows] == expected
    assert (text.cut, text.dropped_tokens) == ("sampled", 0)


def test_each_protocol_reads_the_texts_that_it_names() -> None:
    named = {name: list(config_of(f"evaluation={name}").evaluation.datasets) for name in PROTOCOLS}
    assert named == {
        "sparsegpt": ["wikitext2", "ptb", "c4"],
        "gptq_old": ["wikitext2", "ptb", "c4"],
        "wanda_llama2": ["wikitext2", "c4"],
    }


@pytest.mark.parametrize("corpus", ["wikitext2", "ptb"])
@pytest.mark.parametrize("separator", [" ", "\n\n"])
def test_published_calibration_on_running_text(corpus: str, separator: str, corpora: Path) -> None:
    given = [f"dataset={corpus}", "dataset.sampling=published", "dataset.nsamples=9"]
    joined = [] if separator == " " else ['dataset.separator="\n\n"']  # a space is the default
    config = config_of(*given, *joined, "model.seqlen=32", "seed=3", corpora=corpora)
    assert config.dataset.separator == separator
    text = "^" + separator.join(rows(corpus, "train"))
    random.seed(3)
    starts = [random.randint(0, len(text) - 32 - 1) for _ in range(9)]
    tokens = calibration_sequences(TOKENIZER, config)
    assert [written([window]) for window in tokens] == [text[i : i + 32] for i in starts]


def test_published_calibration_on_c4(corpora: Path) -> None:
    given = ["dataset=c4", "dataset.sampling=published", "dataset.nsamples=9", "seed=3"]
    config = config_of(*given, "model.seqlen=32", corpora=corpora)
    documents = rows("c4", "train")
    random.seed(3)
    expected = []
    while len(expected) < 9:
        document = "^" + documents[random.randint(0, len(documents) - 1)]
        if len(document) > 32:
            start = random.randint(0, len(document) - 32 - 1)
            expected.append(document[start : start + 32])
    tokens = calibration_sequences(TOKENIZER, config)
    assert [written([window]) for window in tokens] == expected


def test_our_own_sampling_is_the_default(corpora: Path) -> None:
    config = config_of("dataset=c4", "dataset.nsamples=9", "model.seqlen=32", corpora=corpora)
    sequences = [written([row]) for row in calibration_sequences(TOKENIZER, config)]
    owners = [
        [text for text in rows("c4", "train") if sequence in f"^{text}"] for sequence in sequences
    ]
    assert all(owners)
    assert len({owner[0] for owner in owners}) == 9  # no document twice
    config = config_of("dataset=ptb", "dataset.nsamples=9", "model.seqlen=32", corpora=corpora)
    text = "^" + " ".join(rows("ptb", "train"))
    starts = [text.index(written([row])) for row in calibration_sequences(TOKENIZER, config)]
    assert all(start % 32 == 0 for start in starts)
    assert len(set(starts)) == 9  # no token twice


def test_one_shard_of_several_is_data(corpora: Path) -> None:
    given = ["dataset=c4", "dataset.nsamples=4", "model.seqlen=32", "evaluation=embedded"]
    other = "corpora.c4.splits.train=[en/c4-validation.00000-of-00008.json.gz]"
    config = config_of(*given, other, corpora=corpora)
    assert all("c4 validation" in "".join(rows("c4", "validation")) for _ in find_texts(config))
    both = config_of(
        *given, "corpora.c4.splits.train=[en/c4-train.00000-of-01024.json.gz,"
        "en/c4-validation.00000-of-00008.json.gz]", corpora=corpora,
    )  # fmt: skip
    source = sources.calibration_source(both)
    assert source is not None
    assert list(source.read()) == rows("c4", "train") + rows("c4", "validation", 1300)
    source = sources.calibration_source(config)
    assert source is not None
    assert list(source.read()) == rows("c4", "validation", 1300)


def test_fewer_sequences_where_that_is_allowed(corpora: Path) -> None:
    given = ["dataset=wikitext2", "dataset.nsamples=1000", "model.seqlen=32"]
    available = len("^" + " ".join(rows("wikitext2", "train")))
    with pytest.raises(InputError, match=rf"= 32000 tokens, and the text has {available}: "):
        calibration_sequences(TOKENIZER, config_of(*given, corpora=corpora))
    allowed = config_of(*given, "dataset.allow_fewer=true", corpora=corpora)
    assert calibration_sequences(TOKENIZER, allowed).shape == (available // 32, 32)


@pytest.mark.parametrize(("policy", "begins"), [("auto", 1), ("always", 1), ("never", 0)])
def test_the_beginning_token_is_recorded(policy: str, begins: int, corpora: Path) -> None:
    config = config_of(
        "evaluation=wikitext2", "model.seqlen=32", f"dataset.add_bos={policy}", "dataset=wikitext2",
        f"evaluation.datasets.wikitext2.add_bos={policy}", "dataset.nsamples=4", corpora=corpora,
    )  # fmt: skip
    (text,) = evaluation_texts(TOKENIZER, config)
    assert text.bos is bool(begins)
    assert (torch.cat(list(text.windows)) == BOS).sum() == begins
    everything = config_of(
        "dataset=wikitext2", f"dataset.add_bos={policy}", "dataset.nsamples=100000",
        "model.seqlen=2", "dataset.allow_fewer=true", corpora=corpora,
    )  # fmt: skip
    assert (calibration_sequences(TOKENIZER, everything) == BOS).sum() == begins


# Found before anything is loaded


def test_every_file_is_found_first(corpora: Path) -> None:
    found = find_texts(config_of("dataset=c4", "evaluation=sparsegpt", corpora=corpora))
    assert [path.relative_to(corpora).parts[0] for path in found] == [
        "c4",
        "wikitext2",
        "ptb",
        "c4",
    ]
    assert find_texts(config_of()) == []


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_a_missing_text_is_one_line(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = config_of("dataset=ptb", f"dataset.offline={str(offline).lower()}")
    with pytest.raises(InputError) as caught:
        find_texts(config)
    line = str(caught.value)
    assert "\n" not in line
    assert "penn_treebank/train/0000.parquet is not in the local cache" in line
    assert ("is offline" if offline else "cannot reach the hub") in line
    assert "--repo-type dataset --revision refs/convert/parquet" in line


def test_offline_follows_the_model_unless_said_otherwise() -> None:
    assert config_of("model=opt_125m").dataset.offline is False
    assert config_of("model=opt_125m", "model.offline=true").dataset.offline is True
    assert config_of("dataset.offline=false").dataset.offline is False


# The cache


def test_what_was_tokenized_is_neither_read_nor_tokenized_again(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["dataset=c4", "dataset.nsamples=4", "model.seqlen=32", "evaluation=sparsegpt"]
    config = config_of(*given, corpora=corpora)
    calibration = calibration_sequences(TOKENIZER, config)
    evaluation = evaluation_texts(TOKENIZER, config)

    def refuse(*arguments: object, **options: object) -> Any:
        raise AssertionError("it is in the cache")

    for name in ("read_documents", "calibration_tokens", "evaluation_windows"):
        monkeypatch.setattr(sources, name, refuse)
    assert torch.equal(calibration_sequences(TOKENIZER, config), calibration)
    for before, after in zip(evaluation, evaluation_texts(TOKENIZER, config), strict=True):
        assert (before.sha256, before.dropped_tokens) == (after.sha256, after.dropped_tokens)
        assert [w.tolist() for w in before.windows] == [w.tolist() for w in after.windows]
    with pytest.raises(AssertionError, match="it is in the cache"):
        calibration_sequences(TOKENIZER, config_of(*given, "seed=1", corpora=corpora))


def test_changed_text_and_changed_part_are_read_again(tmp_path: Path) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one two three " * 20)
    other.write_text("four five six " * 20)
    given = ["dataset=text", f"dataset.path={file}", "model.seqlen=16", "dataset.nsamples=2"]
    shared = config_of(*given)
    apart = config_of(*given, f"evaluation.datasets.text.path={other}")
    seen = {written(calibration_sequences(TOKENIZER, shared))}
    assert len({written(calibration_sequences(TOKENIZER, each)) for each in (shared, apart)}) == 2
    file.write_text("one two threE " * 20)
    assert written(calibration_sequences(TOKENIZER, shared)) not in seen


def test_the_embedded_language_needs_no_cache(token_cache: Path) -> None:
    config = config_of("evaluation.datasets.embedded.max_windows=5", "dataset.nsamples=1")
    calibration_sequences(TOKENIZER, config)
    assert evaluation_texts(TOKENIZER, config)[0].floor is not None
    assert not token_cache.exists()


# Held out


@given(count=st.integers(2, 50), share=st.floats(0.05, 0.9))
def test_documents_are_split_once_and_in_order(count: int, share: float) -> None:
    documents = [f"document {number}" for number in range(count)]
    if math.ceil(share * count) == count:
        with pytest.raises(InputError, match=r"dataset\.holdout"):
            hold_out(documents, share)
        return
    kept, held = hold_out(documents, share)
    assert [*kept, *held] == documents
    assert len(held) == math.ceil(share * count)


@given(words=st.lists(st.text("abc", min_size=1, max_size=5), min_size=10, max_size=40))
def test_one_document_is_cut_between_words(words: list[str]) -> None:
    text = " ".join(words)
    (kept,), (held,) = hold_out([text], 0.2)
    assert kept + held == text
    assert kept.split() + held.split() == words
    assert len(held) >= 0.2 * len(text) - 1


def test_a_single_word_cannot_be_split() -> None:
    with pytest.raises(InputError, match="leaves no text on one side"):
        hold_out(["word"], 0.2)


@given(
    first=st.lists(st.integers(0, 12), min_size=8, max_size=40),
    share=st.floats(0.05, 0.6),
)
def test_equal_documents_are_held_out_together(first: list[int], share: float) -> None:
    """Documents are equal whatever their white space is."""
    documents = [f"document number {name}" + " \n" * (i % 3) for i, name in enumerate(first)]
    different = list(dict.fromkeys(first))
    held = different[len(different) - math.ceil(share * len(different)) :]
    if len(held) == len(different):
        with pytest.raises(InputError, match=r"dataset\.holdout"):
            hold_out(documents, share)
        return
    sides = hold_out(documents, share)
    for side, part in enumerate(sides):
        expected = [text for text, name in zip(documents, first, strict=True)
                    if (name in held) == bool(side)]  # fmt: skip
        assert list(part) == expected


def test_one_document_many_times_cannot_be_split() -> None:
    with pytest.raises(InputError, match="leaves no text on one side"):
        hold_out(["the same text"] * 9, 0.2)


# Nothing of the evaluation in the calibration

STORIES = [
    " ".join(f"{word * 7919 % 99991:x}" for word in range(i * 40, i * 40 + 20)) + "\n"
    + " ".join(f"{word * 7919 % 99991:x}" for word in range(i * 40 + 20, i * 40 + 40))
    for i in range(60)
]  # fmt: skip
"""Documents of two lines in which no word occurs twice."""


def write_text(path: Path, texts: Sequence[str], ending: str = "\n") -> Path:
    """Write documents as the name says; those of a .txt stand one below the other."""
    lines = [text if path.suffix == ".txt" else json.dumps({"text": text}) for text in texts]
    content = "".join(line.replace("\n", ending) + ending for line in lines).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@cache
def plain_config() -> Config:
    """Compose a run on two files once; tests put in what they need."""
    given = ["dataset=text", "dataset.path=?", "evaluation.datasets.text.path=?", "model.seqlen=16"]
    return config_of(*given, "dataset.nsamples=100000", "dataset.allow_fewer=true")


def config_on(
    calibration: Path, evaluation: Path, first_rows: int | None = None, **dataset: Any
) -> Config:
    """Return the config of a run on two files."""
    plain = plain_config()
    text = replace(plain.evaluation.datasets["text"], path=str(evaluation), first_rows=first_rows)
    return replace(
        plain,
        dataset=replace(plain.dataset, path=str(calibration), **dataset),
        evaluation=replace(plain.evaluation, datasets={"text": text}),
    )


def drawn_of(config: Config) -> tuple[set[int], set[int]]:
    """Return of which stories the calibration and the evaluation have words."""
    (text,) = evaluation_texts(TOKENIZER, config)
    found = []
    for windows in (list(calibration_sequences(TOKENIZER, config)), text.windows):
        words = set(written(windows).replace("^", " ").split())
        found.append({i for i, story in enumerate(STORIES) if len(words & set(story.split())) > 9})
    return found[0], found[1]


def test_rows_are_taken_after_the_share_is_held_out(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES)
    config = config_on(file, file, first_rows=5)
    used, evaluated = drawn_of(config)
    assert evaluated == set(range(48, 53))
    assert used == set(range(48))
    assert report_overlap(config) == (Overlap(48, 0, ()), 0)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.jsonl", "hard link"),
        ("a.txt", "copy"),
        ("a.JSONL.gz", "symbolic link"),
        ("a.parquet", "other directory"),
    ],
)
def test_a_file_under_another_name_is_the_same_file(name: str, way: str, tmp_path: Path) -> None:
    file = write_text(tmp_path / name.lower(), STORIES)
    other = tmp_path / f"b-{name}"
    if way == "hard link":
        os.link(file, other)
    elif way == "symbolic link":
        other.symlink_to(file)
    elif way == "other directory":
        (tmp_path / "c").mkdir()
        other = shutil.copy(file, tmp_path / "c")
    else:
        shutil.copy(file, other)
    config = config_on(file, other)
    used, evaluated = drawn_of(config)
    assert not used & evaluated
    assert min(len(used), len(evaluated)) >= 11
    assert len(used | evaluated) >= 59
    assert report_overlap(config)[1] == 0


@pytest.mark.parametrize(
    ("calibration", "name", "ending"),
    [
        ("a.jsonl", "b.jsonl", "\r\n"),
        ("a.jsonl", "b.txt", "\n"),
        ("a.txt", "b.txt", "\r\n"),
        ("a.txt", "b.jsonl.gz", "\n"),
        ("a.txt", "b.parquet", "\n"),
    ],
)
def test_what_evaluation_has_too_is_left_out(
    calibration: str, name: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_text(tmp_path / calibration, STORIES[:40])
    other = write_text(tmp_path / name, [f"\ufeff{text}  " for text in STORIES[25:]], ending)
    config = config_on(file, other)
    used, evaluated = drawn_of(config)
    assert (used, evaluated) == (set(range(25)), set(range(25, 60)))
    count = 1 if calibration == "a.txt" else 15
    overlap, left_out = report_overlap(config)
    assert overlap is not None
    assert (overlap.documents, left_out) == (1 if calibration == "a.txt" else 40, count)
    assert f"evaluation has {count} documents or passages too; they are left out" in caplog.text


def test_wrapped_lines_are_the_same_text(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:40])
    wrapped = textwrap.fill(" ".join(STORIES[25:]), 60)
    (tmp_path / "b.txt").write_text(wrapped)
    used, evaluated = drawn_of(config_on(file, tmp_path / "b.txt"))
    assert (used, evaluated) == (set(range(25)), set(range(25, 60)))


def test_text_that_repeats_itself_is_not_on_both_sides(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:30] * 3)
    config = config_on(file, file)
    used, evaluated = drawn_of(config)
    assert (used, evaluated) == (set(range(24)), set(range(24, 30)))
    assert report_overlap(config) == (Overlap(72, 48, ()), 0)
    running = write_text(tmp_path / "a.txt", STORIES[:30] * 2)
    config = config_on(running, running)
    used, evaluated = drawn_of(config)
    assert not used & evaluated
    assert len(evaluated) == 12
    assert report_overlap(config)[1] == 1


@pytest.mark.parametrize("rows", [None, 3])
def test_only_rows_that_are_evaluated_are_left_out(rows: int | None, tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:40])
    other = write_text(tmp_path / "b.jsonl", STORIES[30:])
    used, _ = drawn_of(config_on(file, other, first_rows=rows))
    assert used == set(range(30 if rows is None else 40)) - {30, 31, 32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.jsonl.gz", "evaluation has all of its 40 documents, and none is left"),
        ("b.txt", "evaluation has all of its 40 documents, and none is left"),
        ("same.txt", "both read this file; give another split or file"),
    ],
)
def test_where_nothing_is_left_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:40])
    if name == "same.txt":  # the same bytes, read in another way
        other = Path(shutil.copy(file, tmp_path / name))
    else:
        other = write_text(tmp_path / name, STORIES)
    with pytest.raises(InputError, match=message) as caught:
        drawn_of(config_on(file, other))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampling", list(Sampling))
def test_text_without_overlap_is_drawn_as_if_there_were_no_evaluation(
    sampling: Sampling, tmp_path: Path
) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:40])
    other = write_text(tmp_path / "b.jsonl", STORIES[40:])
    beside = config_on(file, other, sampling=sampling, nsamples=20)
    dataset = beside.dataset
    alone = calibration_tokens(
        TOKENIZER, STORIES[:40], nsamples=20, seqlen=16, seed=dataset.seed, sampling=sampling,
        allow_fewer=True, add_bos=dataset.add_bos,
    )  # fmt: skip
    assert torch.equal(calibration_sequences(TOKENIZER, beside), alone)


def test_a_change_of_the_evaluation_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.jsonl", STORIES[:40])
    other = write_text(tmp_path / "b.jsonl", STORIES[40:])
    assert drawn_of(config_on(file, other))[0] == set(range(40))
    write_text(other, STORIES[30:])
    assert drawn_of(config_on(file, other))[0] == set(range(30))


@pytest.mark.parametrize("sampling", ["packed", "published"])
def test_a_published_draw_is_kept_and_its_overlap_counted(
    sampling: str, corpora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = config_of(corpora=corpora).corpora["c4"]
    train = [f"{text}\n{'long enough ' * 20}{i}" for i, text in enumerate(rows("c4", "train"))]
    for split, texts_of in (
        ("train", train),
        ("validation", [*train[5:7], "short", *rows("c4", "x")]),
    ):
        write_rows(tmp_path / published.splits[split][0], texts_of, published)
    given = [
        "dataset=c4", "evaluation=c4", f"dataset.sampling={sampling}", "model.seqlen=32",
        "dataset.nsamples=9", f"corpora.c4.path={tmp_path}",
    ]  # fmt: skip
    config = config_of(*given)
    alone = config_of(*given, "evaluation=embedded", "cache=false")
    overlap, left_out = report_overlap(config)
    assert overlap is not None
    assert [index for index, _, _ in overlap.shared] == [5, 6]
    kept = torch.equal(*(calibration_sequences(TOKENIZER, each) for each in (config, alone)))
    assert (left_out, kept) == ((0, True) if sampling == "published" else (2, False))
    said = "they stay, as the draw is the published" if kept else "they are left out"
    assert said in caplog.text


def test_phrases_are_no_documents_of_a_published_corpus(corpora: Path, tmp_path: Path) -> None:
    """Headings and stock sentences are in every part of WikiText and of the Penn Treebank."""
    published = config_of().corpora["ptb"]
    for split in ("train", "test"):
        sentences = ["the company declined to comment", *rows("ptb", split)]
        write_rows(tmp_path / published.splits[split][0], sentences, published)
    config = config_of("dataset=ptb", "evaluation=ptb", f"corpora.ptb.path={tmp_path}")
    assert report_overlap(config) == (Overlap(42, 0, ()), 0)


def test_the_floor_is_the_true_likelihood_of_the_same_tokens() -> None:
    documents = language.documents("evaluation", 5)
    losses = [language.true_nll(document) for document in documents]
    assert true_perplexity(documents, 10_000) == pytest.approx(
        math.exp(float(torch.cat(losses).mean()))
    )
    cut = [loss[:9] for loss in losses]
    assert true_perplexity(documents, 10) == pytest.approx(math.exp(float(torch.cat(cut).mean())))
