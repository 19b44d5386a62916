"""Rows of papers run end to end on a tiny random model of their architecture, without a network.

`mi-reproduce TABLE --model DIR --short` is what runs: the row as it is, its model replaced by one
that tests/fixtures/published_models.py writes, its texts from directories in the hub's format.
What is long is made short by conf/rehearsal.yaml (sequence length, calibration samples, windows).
What each row reads is read here again, from the words of the protocol, and what it stores is
counted by hand.
"""

import json
import math
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from published_models import SHAPES, corpus_rows, save_corpora, save_small_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mi_experiments.commands.reproduce import all_overrides, main, parse
from mi_experiments.config.identity import asked_config, without_incidental
from mi_experiments.records.linears import LinearReport, read_linears
from mi_experiments.records.result import Result, read_result
from mi_experiments.reproduction.rows import compose_row, find_rows, row_config
from mi_experiments.reproduction.substitution import OTHER
from mi_experiments.reproduction.verdicts import setting_changes
from mi_experiments.texts.windows import token_hash

SEQLEN, NSAMPLES, MAX_WINDOWS = 128, 4, 3
"""Of conf/rehearsal.yaml."""

TEXTS = {
    "sparsegpt": {
        "wikitext2": ("test", "\n\n", None),
        "ptb": ("test", " ", None),
        "c4": ("validation", " ", 1100),
    },
    "wanda_llama2": {"wikitext2": ("test", "\n\n", None), "c4": ("validation", " ", 1100)},
}
"""Of each protocol: which part of a corpus, what joins its rows, and how many of them."""

PROTOCOLS = {"wanda": "wanda_llama2"}
"""Of each paper, if not `sparsegpt`."""

LINEARS = {"opt": 6, "llama": 7}
"""In a block: q, k, v, o and two or three of the MLP."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write models and corpora, and return the arguments that name them."""
    root = tmp_path_factory.mktemp("hub")
    for name in SHAPES:
        save_small_model(name, root / "models" / name)
    config = row_config("papers/sparsegpt/opt_125m_50")
    corpora = save_corpora(root / "corpora", config.corpora)
    return ["--model", str(root / "models"), *corpora, "tracking=disabled"]


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Refuse the network, let the libraries believe that there is one, and see that none asked."""
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("the network is refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield asked
    assert asked == []


def texts_of(row: str) -> dict[str, tuple[str, str, int | None]]:
    return TEXTS[PROTOCOLS.get(row.split("/")[1], "sparsegpt")]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with one beginning token before it, as the slow tokenizers gave."""
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def check_evaluation(row: str, result: Result, tokenizer: Any, seqlen: int, most: int) -> None:
    """Windows are tokens // seqlen of the joined text, and hold these very tokens."""
    assert list(result.dense) == list(result.compressed) == list(texts_of(row))
    for name, (split, joint, first) in texts_of(row).items():
        tokens = tokens_of(tokenizer, joint.join(corpus_rows(name, split)[:first]))
        count = min(len(tokens) // seqlen, 256 if name == "c4" else most, most)
        windows = torch.tensor(tokens[: count * seqlen])
        for found in (result.dense[name], result.compressed[name]):
            assert found.protocol == PROTOCOLS.get(row.split("/")[1], "sparsegpt")
            assert (found.windows, found.seqlen, found.count) == ("joined", seqlen, count)
            assert found.tokens == count * (seqlen - 1)
            assert found.bos
            assert found.tokens_sha256 == token_hash(windows)
            assert math.isfinite(found.perplexity)


def check_calibration(row: str, result: Result, tokenizer: Any, seqlen: int, nsamples: int) -> None:
    """Python's generator draws documents until one is long enough, then a start in it."""
    provenance = result.provenance
    assert provenance is not None
    draw = random.Random(result.config["seed"])
    joined = row.split("/")[1] == "slim_llm"
    rows = corpus_rows("wikitext2" if joined else "c4", "train")
    texts = [" ".join(rows)] if joined else rows
    samples: list[list[int]] = []
    while len(samples) < nsamples:
        text = texts[0] if joined else texts[draw.randint(0, len(texts) - 1)]
        tokens = tokens_of(tokenizer, text)
        if len(tokens) > seqlen:
            start = draw.randint(0, len(tokens) - seqlen - 1)
            samples.append(tokens[start : start + seqlen])
    assert provenance.calibration_samples == nsamples
    assert provenance.calibration_bos
    assert provenance.calibration_sha256 == token_hash(torch.tensor(samples))


def check_storage(row: str, linear: LinearReport, config: dict[str, Any]) -> None:
    """Zeros and bits of a linear are those that the name of the row says, counted by hand."""
    name = row.split("/")[-1]
    weights = linear.rows * linear.columns
    pruned, pattern = 0, 0.0
    if "_50" in name:  # one more than half of every 128 columns
        pruned = (linear.rows * 128 // 2 + 1) * (linear.columns // 128)
        pattern = 1.0
    elif "_2_4" in name or "_4_8" in name:
        pruned = weights // 2
        pattern = {"_2_4": 3 / 4, "_4_8": 7 / 8}[name[-4:]]
    assert linear.sparsity == pruned / weights
    bits = next((int(b) for b in "234" if f"_w{b}" in name), 16)
    if config["wbits"]["allocation"] == "mixed":
        # Each linear within its own budget, and nearer to it than half of its groups could buy.
        assert linear.bits.keys() <= set(config["wbits"]["widths"])
        assert bits - 0.5 < linear.average_bits <= bits
    else:
        assert linear.average_bits == bits
    kept = 1 - pruned / weights
    expected = kept * bits + pattern
    if bits < 16 and linear.groups == 1:
        scales = math.ceil(linear.columns / 128) if "g128" in name else 1
        # A float32 scale and a zero point for each, and 4 bits to say the width of the group.
        expected += scales * (32 + bits) / linear.columns + 4 / weights
        assert linear.effective_bits == pytest.approx(expected, rel=1e-12)
    if bits == 16 and pruned:
        assert linear.effective_bits == pytest.approx(expected, rel=1e-12)


def check_row(row: str, run_dir: Path, models: Path, *, short: bool = True) -> None:
    """Hold a run to all that its row says."""
    asked = row_config(row)
    result, linears = read_result(run_dir), read_linears(run_dir)
    assert (result.status, result.error) == ("completed", None)
    seqlen = SEQLEN if short else asked.model.seqlen
    nsamples = min(asked.dataset.nsamples, NSAMPLES) if short else asked.dataset.nsamples
    tokenizer = AutoTokenizer.from_pretrained(models / asked.model.name)
    check_evaluation(row, result, tokenizer, seqlen, MAX_WINDOWS if short else 10**9)
    check_calibration(row, result, tokenizer, seqlen, nsamples)
    kind = SHAPES[asked.model.name]["model_type"]
    assert len(linears) == 2 * LINEARS[kind]
    assert result.coverage == 1
    if "dense" in row.split("/")[-1]:
        assert {linear.status for linear in linears} == {"untouched"}
        for name, text in result.dense.items():
            assert result.compressed[name].perplexity == text.perplexity
        return
    assert {linear.status for linear in linears} == {"compressed"}
    assert all(linear.tokens == nsamples * seqlen for linear in linears)
    if row.split("/")[1] in (
        "obr",
        "vicuna",
    ):  # this project's own recipe: zeros where they cost least
        assert result.sparsity == pytest.approx(0.5, abs=0.01)
        assert len({linear.sparsity for linear in linears}) > 1
        return
    for linear in linears:
        check_storage(row, linear, result.config)


def verdicts_of(arguments: list[str], tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    """Run mi-reproduce, and return its verdicts by row."""
    main([*arguments, "--json", str(tmp_path / "v.json")])
    rows: dict[str, list[dict[str, Any]]] = {}
    for verdict in json.loads((tmp_path / "v.json").read_text()):
        rows.setdefault(verdict["row"], []).append(verdict)
    return rows


def check_verdicts(row: str, verdicts: list[dict[str, Any]]) -> None:
    """Every number was measured, on another model, and none is passed or failed."""
    assert {v["text"] for v in verdicts} == set(texts_of(row))
    assert {v["verdict"] for v in verdicts} == {OTHER}
    assert all(v["ours"] is not None and "not on" in v["why"] for v in verdicts)


def run_dir_of(row: str, arguments: list[str]) -> Path:
    """Return where a row is recorded."""
    return Path(compose_row(row, all_overrides(row, parse([row, *arguments]))).hydra.run.dir)


SOME = {
    "papers/sparsegpt": ("opt_350m_50_w4",),
    "papers/gptq": ("llama_7b_w4_g128",),
    "papers/wanda": ("llama2_7b_2_4",),
    "papers/vicuna": ("vicuna_13b_v1_5_50",),
}
"""A row for each kind of zeros and levels; the slow test runs the rows of all papers."""


@pytest.mark.parametrize(("table", "name"), [(t, n) for t, names in SOME.items() for n in names])
def test_a_row_runs_as_its_paper_says(
    table: str, name: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = f"{table}/{name}"
    verdicts = verdicts_of([table, "--only", name, "--short", *hub, "export=dense"], tmp_path)
    check_verdicts(row, verdicts[row])
    (run_dir,) = Path("outputs").iterdir()
    check_row(row, run_dir, Path(hub[1]))
    check_weights(row, run_dir)


def check_weights(row: str, run_dir: Path) -> None:
    """The exported weights have the windows, the zeros and the levels that the row says."""
    weights, grids = (read_tensors(run_dir / folder) for folder in ("model", "grids"))
    own = row.split("/")[1] in ("obr", "vicuna")
    for linear in read_linears(run_dir):
        if linear.status == "untouched":
            assert f"{linear.name}.pruned" not in grids
            continue
        weight, pruned = weights[f"{linear.name}.weight"], grids[f"{linear.name}.pruned"]
        assert not weight[pruned].any()
        assert pruned.sum() == round(linear.sparsity * linear.weights)
        for suffix, size in (("_2_4", 4), ("_4_8", 8)):
            if row.endswith(suffix):
                windows = pruned.view(linear.rows, -1, size).sum(-1)
                assert torch.equal(windows, torch.full_like(windows, size // 2))
        if "_50" in row and not own:
            # The published threshold prunes one more than half of every 128 columns.
            blocks = [int(block.sum()) for block in pruned.split(128, 1)]
            assert blocks == [linear.rows * 128 // 2 + 1] * (linear.columns // 128)
        if max(linear.bits) < 16 and linear.groups == 1:
            width = 128 if "g128" in row else linear.columns
            for part in weight.split(width, 1):
                most = max(len(values.unique()) for values in part)
                assert 2 <= most <= 2 ** max(linear.bits)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_model_that_is_not_declared_another_is_found_to_be(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape is not the row's: its wrong dense numbers stop nothing, and nothing is judged."""
    monkeypatch.chdir(tmp_path)
    row = "papers/besa/llama_7b_50"
    model = tmp_path / "mine" / "llama_7b"
    shutil.copytree(Path(hub[1]) / "llama_7b", model)
    moved = [f"model.path={model}", "model.revision=null", *hub[2:]]
    verdicts = verdicts_of([row, "--short", *moved], tmp_path)[row]
    assert {v["verdict"] for v in verdicts} == {OTHER}
    assert all("hidden_size is 256, not 4096" in v["why"] for v in verdicts)
    (run_dir,) = Path("outputs").iterdir()
    check_row(row, run_dir, model.parent)
    # The same of a run that was made elsewhere, also where its model can no longer be looked at.
    against = [row, "--against", str(run_dir)]
    assert verdicts_of(against, tmp_path)[row] == verdicts
    shutil.rmtree(model)
    gone = verdicts_of(against, tmp_path)[row]
    assert {v["verdict"] for v in gone} == {OTHER}
    assert {v["why"] for v in gone} == {f"nothing shows that {model} is huggyllama/llama-7b"}


@pytest.mark.slow
def test_every_row_runs_as_its_paper_says(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--short", *hub, "export=dense"]
    verdicts = verdicts_of(["papers", *arguments], tmp_path)
    rows = find_rows("papers", None)
    assert list(verdicts) == rows
    assert len(rows) == 83
    for row in rows:
        check_verdicts(row, verdicts[row])
        check_row(row, run_dir_of(row, arguments), Path(hub[1]))
        check_weights(row, run_dir_of(row, arguments))


@pytest.mark.slow
def test_a_row_runs_at_its_full_length(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 samples and all windows of 2048 tokens: nothing but the model is not the row's."""
    monkeypatch.chdir(tmp_path)
    row = "papers/sparsegpt/opt_125m_50"
    save_small_model("opt_125m", tmp_path / "opt", hidden_size=128, num_hidden_layers=1)
    arguments = ["--model", str(tmp_path / "opt"), *hub[2:]]
    check_verdicts(row, verdicts_of([row, *arguments], tmp_path)[row])
    changed = setting_changes(
        asked_config(row_config(row)),
        without_incidental(read_result(run_dir_of(row, arguments)).config),
    )
    assert [line.split(":")[0] for line in changed] == ["model.name"]
