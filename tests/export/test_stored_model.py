"""What is stored is what was compressed, and an export is that, in the checkpoint's own format."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import build_byte_tokenizer, build_tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mi_experiments.compression.pipeline import CompressedBlock, CompressedLinear
from mi_experiments.config.config import Export
from mi_experiments.errors import AuditError, InputError, ResumableError
from mi_experiments.export import dense
from mi_experiments.export.dense import read_settings
from mi_experiments.export.stored_model import StoredModel, run_folders, same_bits, tidy
from mi_experiments.llm.inventory import take_inventory
from mi_experiments.llm.loading import OpenModel, open_model
from mi_experiments.method.pruning import Sparsity
from mi_experiments.persistence import commits
from mi_experiments.persistence.commits import Commits
from mi_experiments.records.linears import LinearReport

ARCHITECTURES = ["llama", "tied llama", "gpt2", "qwen3_moe", "gpt_neox"]
"""Own head and tied, Conv1D, experts that are one tensor in memory and many on disk, biases."""


def save_model(
    directory: Path, name: str, dtype: torch.dtype, shard: str = "5GB", **settings: Any
) -> None:
    """Save a tiny model, with generation settings as they are, and a tokenizer."""
    tied = name.startswith("tied ")
    model = build_tiny_model(
        name.removeprefix("tied "),
        vocab_size=260,
        **({"tie_word_embeddings": True} if tied else {}),
    )
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    build_byte_tokenizer().save_pretrained(directory)
    if settings:
        (directory / "generation_config.json").write_text(json.dumps(settings))


def open_directory(directory: Path) -> OpenModel:
    return open_model(str(directory), revision=None, dtype="auto", device="cpu", offline=True)


def open_stored(opened: OpenModel, run_dir: Path, export: str = "dense") -> StoredModel:
    run_dir.mkdir(exist_ok=True)
    config = config_of(f"export={export}")
    return StoredModel(opened.weights.fork(), Commits(run_dir, {}, run_folders()), config)


def report(name: str, block: int, rows: int, columns: int) -> LinearReport:
    return LinearReport(
        block=block, name=name, site=name, rows=rows, columns=columns, bits={4: columns},
        average_bits=4.0, effective_bits=4.5, sparsity=0.5, output_error=0.1, levels=16, groups=1,
        pairwise_information=None, information_noise=0.1, redundancy=1 / 3, total_correlation=1.0,
        damping=0.1, damping_attempts=(0.01, 0.1), dead_channels=0, tokens=64, seconds=0.25,
        status="compressed",
    )  # fmt: skip


def change_block(opened: OpenModel, index: int) -> CompressedBlock:
    """Load a block and give its linears other weights, half of them zero, of both signs."""
    opened.weights.load(index)
    generator = torch.Generator().manual_seed(index)
    linears = []
    for linear in take_inventory(opened.model).linears[index]:
        shape = (linear.rows, linear.columns)
        pruned = torch.rand(shape, generator=generator) < 0.5
        signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        weight = linear.read_weight() + torch.randn(shape, generator=generator)
        linear.write_weight(torch.where(pruned, 0.0 * signs, weight))
        grids = {
            "bits": torch.full((linear.columns,), 4, dtype=torch.uint8),
            "channel_group": torch.zeros(linear.columns, dtype=torch.int32),
            "scale_group": torch.zeros(linear.columns, dtype=torch.int32),
            "scale": (torch.rand(linear.rows, 1, generator=generator) + 0.1).half().float(),
            "zero_point": torch.zeros(linear.rows, 1, dtype=torch.int32),
            "pruned": pruned,
        }
        made = report(linear.name, index, linear.rows, linear.columns)
        linears.append(CompressedLinear(linear, made, grids, Sparsity(0.5, 0, 0)))
    return CompressedBlock(index, linears)


def store_all(opened: OpenModel, stored: StoredModel) -> dict[str, Tensor]:
    """Change and store every block as a run does, and return the weights that were in memory."""
    memory = {}
    for index in range(len(opened.weights.blocks)):
        block = change_block(opened, index)
        module = opened.weights.blocks[index]
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        stored.store(block)
        assert all(same_bits(before[key], now) for key, now in module.state_dict().items())
        memory |= {f"{opened.weights.path}.{index}.{key}": t for key, t in before.items()}
        opened.weights.drop(index)
    return memory


def stored_names(folder: Path) -> dict[str, torch.Size]:
    names = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118
    return names


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# What is stored


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_what_is_reloaded_is_what_was_in_memory(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    """By the library alone: the same bits, the same logits, no weight more and none less."""
    save_model(tmp_path / "original", name, dtype, shard)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    memory = store_all(opened, stored)
    stored.complete(opened)

    reloaded, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", experts_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values())
    assert reloaded.dtype == dtype
    now = reloaded.state_dict()
    assert memory.keys() == {key for key in now if key.startswith(f"{opened.weights.path}.")}
    for key, tensor in memory.items():
        assert same_bits(now[key], tensor), key
    outside = {k: t for k, t in opened.model.state_dict().items() if not t.is_meta}
    assert all(same_bits(now[key], tensor) for key, tensor in outside.items())
    stored.weights.load_all()
    assert torch.equal(logits(reloaded.eval()), logits(opened.model))
    original = open_directory(tmp_path / "original")
    original.weights.load_all()
    assert not torch.equal(logits(reloaded), logits(original.model))

    assert stored_names(tmp_path / "run" / "model") == stored_names(tmp_path / "original")
    text = "3 4"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(text)["input_ids"]
    assert tokens == build_byte_tokenizer()(text)["input_ids"]


def test_the_index_names_every_weight_once(tmp_path: Path) -> None:
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    store_all(opened, stored)
    stored.complete(opened)
    folder = tmp_path / "run" / "model"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }  # fmt: skip
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, file in files.items() for key in file}
    size = sum(t.numel() * t.element_size() for file in files.values() for t in file.values())
    assert index["metadata"]["total_size"] == size
    for path in folder.iterdir():
        entry = stored.commits.files[f"model/{path.name}"]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save_model(tmp_path / "original", "tied llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    store_all(opened, stored)
    stored.complete(opened)
    assert "lm_head.weight" not in stored_names(tmp_path / "run" / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_a_head_with_values_of_its_own_is_exported(tmp_path: Path) -> None:
    """Although the config that was read ties it to the embeddings."""
    save_model(tmp_path / "original", "llama", torch.float32)
    file = tmp_path / "original" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    store_all(opened, stored)
    stored.complete(opened)
    reloaded, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(loading.values())
    assert not reloaded.config.tie_word_embeddings
    stored.weights.load_all()
    assert torch.equal(logits(reloaded), logits(opened.model))
    original = load_file(tmp_path / "original" / "model.safetensors")
    assert torch.equal(reloaded.lm_head.weight, original["lm_head.weight"])


def test_what_cannot_be_saved_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")

    def refuse(*arguments: object, **options: object) -> None:
        raise NotImplementedError("no\nvocabulary")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="can be loaded but not saved: no vocabulary; an export"):
        read_settings(opened, tmp_path / "run")
    assert not list(tmp_path.rglob("*.tmp"))


def test_sampling_settings_go_through(tmp_path: Path) -> None:
    """They are read with a warning, as those of Vicuna are."""
    settings = {"temperature": 0.9, "top_p": 0.5, "eos_token_id": 1}
    save_model(tmp_path / "original", "llama", torch.float32, **settings)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    store_all(opened, stored)
    stored.complete(opened)
    written = tmp_path / "run" / "model" / "generation_config.json"
    original = tmp_path / "original" / "generation_config.json"
    assert written.read_bytes() == original.read_bytes()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert reloaded.generation_config.temperature == 0.9


@pytest.mark.parametrize(
    "content",
    [
        '{"num_return_sequences": 3, "do_sample": false}',
        '{"max_new_tokens": 0}',
        '{"cache_implementation": "nonsense"}',
        '{"early_stopping": "sometimes"}',
        "[1, 2]",
        "{",
        "[" * 100_000 + "]" * 100_000,
        "\x00\ufeff",
    ],
)
def test_settings_that_the_library_refuses_go_through(content: str, tmp_path: Path) -> None:
    """They have no part in compression; what reads them later may say what it thinks of them."""
    save_model(tmp_path / "original", "llama", torch.float32)
    (tmp_path / "original" / "generation_config.json").write_text(content)
    (tmp_path / "run").mkdir()
    written = read_settings(open_directory(tmp_path / "original"), tmp_path / "run")
    assert written["generation_config.json"] == content.encode()


@pytest.mark.parametrize(
    ("export", "folder"), [("nothing", None), ("dense", "grids"), ("packed", "packed")]
)
def test_each_block_is_committed_with_its_reports_and_what_the_export_asks_for(
    export: str, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def pack(linears: Any, **storage: Any) -> Any:
        ones = {linear.report.name: torch.ones(3, dtype=torch.uint8) for linear in linears}
        return ones, {"layouts": "{}"}

    monkeypatch.setattr("mi_experiments.export.packed.pack_linears", pack)
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run", export)
    block = change_block(opened, 1)
    stored.store(block)
    expected = {"model/model-00003-of-00003.safetensors", "reports/00001.json"}
    expected |= {f"{folder}/00001.safetensors"} if folder else set()
    assert set(stored.commits.files) == expected
    assert set(tree(tmp_path / "run")) == expected | {"manifest.json"}
    assert stored.reports(1) == [linear.report for linear in block.linears]
    if export == "dense":
        grids = load_file(tmp_path / "run" / "grids" / "00001.safetensors")
        for linear in block.linears:
            for key, tensor in linear.grids.items():
                assert same_bits(grids.pop(f"{linear.report.name}.{key}"), tensor)
        assert grids == {}


def test_what_is_untouched_has_no_grid(tmp_path: Path) -> None:
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    block = change_block(opened, 0)
    first, *others = block.linears
    vars(first.report)["status"] = "untouched"
    stored.store(block)
    grids = load_file(tmp_path / "run" / "grids" / "00000.safetensors")
    names = {key.rpartition(".")[0] for key in grids}
    assert names == {linear.report.name for linear in others}


# What is read back


@pytest.fixture
def one_block(tmp_path: Path) -> tuple[OpenModel, StoredModel, CompressedBlock]:
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    return opened, open_stored(opened, tmp_path / "run"), change_block(opened, 0)


LINEAR = "model.layers.0.mlp.down_proj.weight"


def flip_sign_of_zero(tensors: dict[str, Tensor]) -> None:
    zeros = (tensors[LINEAR] == 0).nonzero()[0].tolist()
    tensors[LINEAR][tuple(zeros)] *= -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LINEAR), r"down_proj\.weight on disk differs"),
        (lambda t: t[LINEAR].add_(1e-3), r"down_proj\.weight on disk differs"),
        (flip_sign_of_zero, r"down_proj\.weight on disk differs"),
    ],
)
def test_a_block_that_is_not_read_back_as_it_was_does_not_count(
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    one_block: tuple[OpenModel, StoredModel, CompressedBlock],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, stored, block = one_block
    save = commits.save_atomically

    def save_another(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        if path.parent.name == "model":
            change(tensors)
        save(path, tensors, metadata)

    monkeypatch.setattr(commits, "save_atomically", save_another)
    with pytest.raises(AuditError, match=message):
        stored.store(block)
    again = open_stored(opened, stored.commits.run_dir)
    assert again.commits.files == {}
    assert not again.find(0)


def test_a_restored_block_has_the_bits_and_the_reports_that_were_stored(
    one_block: tuple[OpenModel, StoredModel, CompressedBlock], tmp_path: Path
) -> None:
    _, stored, block = one_block
    stored.store(block)
    before = stored.weights.blocks[0].state_dict()
    other = open_directory(tmp_path / "original")
    again = open_stored(other, tmp_path / "run")
    assert again.find(0)
    assert not again.find(1)
    again.weights.load(0)
    now = other.weights.blocks[0].state_dict()
    assert now.keys() == before.keys()
    assert all(same_bits(now[key], before[key]) for key in before)
    assert again.reports(0) == [linear.report for linear in block.linears]
    # The dense model is still read from the original.
    other.weights.load(0)
    assert not all(
        same_bits(t, before[key]) for key, t in other.weights.blocks[0].state_dict().items()
    )


def test_bits_are_compared_and_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))


# What goes wrong


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (dense, "write_settings", FULL),
        (PreTrainedTokenizerFast, "save_pretrained", FULL),
        (PreTrainedTokenizerFast, "save_pretrained", Exception("full (os error 28)")),
        (Path, "replace", FULL),
        (PreTrainedTokenizerFast, "save_pretrained", KeyboardInterrupt()),
    ],
)
def test_settings_are_there_completely_or_not_at_all(
    place: Any,
    name: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(tmp_path / "original", "llama", torch.float32)
    opened = open_directory(tmp_path / "original")
    stored = open_stored(opened, tmp_path / "run")
    store_all(opened, stored)
    before = tree(tmp_path / "run")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ResumableError
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(kind) as caught:
            stored.complete(opened)
    if kind is ResumableError:
        assert str(caught.value).startswith(str(tmp_path / "run" / "model"))
        assert "cannot be written" in str(caught.value)
    after = tree(tmp_path / "run")
    # The rest of the weights may be there already, and counts.
    rest = "model/model-00001-of-00003.safetensors"
    assert after.keys() - before.keys() <= {rest}
    assert {n: c for n, c in after.items() if n in before and n != "manifest.json"} == {
        n: c for n, c in before.items() if n != "manifest.json"
    }
    assert not any(path.name.startswith(".") for path in (tmp_path / "run").rglob("*"))
    stored.complete(opened)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    stored.weights.load_all()
    assert torch.equal(logits(reloaded), logits(opened.model))


@pytest.mark.parametrize("name", run_folders())
def test_what_is_of_another_origin_is_neither_overwritten_nor_removed(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("x")
    with pytest.raises(InputError, match=rf"{name} exists, and no run is recorded in"):
        Commits(tmp_path, {}, run_folders())
    assert tree(tmp_path) == {f"{name}/precious": b"x"}


@pytest.mark.parametrize(
    ("export", "left"),
    [("nothing", {"grids"}), ("packed", {"packed", "grids"}), ("dense", {"grids", "model"})],
)
def test_only_what_is_wanted_stays(export: str, left: set[str], tmp_path: Path) -> None:
    commits = Commits(tmp_path, {})
    folders = ("site_costs", "evaluations", "reports", "model", "grids")
    commits.commit({f"{name}/{index}": b"x" for name in folders for index in range(2)})
    if export == "packed":
        commits.commit({"packed/0": b"x"})
    (tmp_path / "site_costs" / "0").write_text("y")
    assert commits.find("site_costs/0") is None
    commits.commit({"site_costs/0": b"x"})
    (tmp_path / "reports" / "mine").write_text("x")
    tidy(commits, Export[export])
    assert {path.name for path in tmp_path.iterdir()} == left | {"manifest.json", "reports"}
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["mine"]
    assert {name.split("/")[0] for name in Commits(tmp_path, {}).files} == left
    before = tree(tmp_path)
    tidy(Commits(tmp_path, {}), Export[export])
    assert tree(tmp_path) == before
