"""The config: every YAML composes, and what does not fit is one line that teaches."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed import config_of
from omegaconf import OmegaConf
from tiny_models import build_tiny_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mi_experiments.config.compose import conf_directory, from_hydra, to_plain
from mi_experiments.config.config import Config
from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import take_inventory
from mi_experiments.method.grouping import Grouping
from mi_experiments.method.pruning import Sparsity

CONF = Path(conf_directory())
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "experiment"
}
NEEDED = {
    "model=hub": ["model.path=org/name"],
    "model=local": ["model.path=/models/x"],
    "dataset=text": ["dataset.path=/data/x.txt"],
}


@pytest.mark.parametrize("model", GROUPS["model"])
def test_every_file_of_conf_composes(model: str) -> None:
    """One of each group beside each model, so that every file has its turn."""
    assert max(map(len, GROUPS.values())) == len(GROUPS["model"])
    turn = GROUPS["model"].index(model)
    chosen = {group: names[turn % len(names)] for group, names in GROUPS.items()}
    if chosen["evaluation"] == "text":
        chosen["dataset"] = "text"
    choices = [f"{group}={name}" for group, name in chosen.items()]
    needed = {more: None for choice in choices for more in NEEDED.get(choice, [])}
    config = config_of(*choices, *needed)
    assert config.model.name
    assert config.n_groups.grouping.name == chosen["n_groups"]
    assert config.recipe.name == chosen["recipe"]


def test_the_axes_are_written_as_the_field_writes_them() -> None:
    config = config_of(
        "model=vicuna_13b_v1_5", "dataset=c4", "dataset.nsamples=128", "sparsity.ratio=0.5",
        "wbits.average=4", "n_groups.count=5",
    )  # fmt: skip
    assert config.model.path == "lmsys/vicuna-13b-v1.5"
    assert (config.dataset.corpus, config.dataset.nsamples) == ("c4", 128)
    assert (config.sparsity.ratio, config.wbits.average, config.n_groups.count) == (0.5, 4.0, 5)
    assert list(config.evaluation.datasets) == ["c4"]


def test_no_default_is_written_twice() -> None:
    for group in dataclasses.fields(Config):
        if dataclasses.is_dataclass(group.type):
            for field in dataclasses.fields(group.type):
                assert field.default is dataclasses.MISSING, field.name


def test_one_seed_drives_all_draws() -> None:
    config = config_of("seed=7")
    assert (config.dataset.seed, config.n_groups.seed) == (7, 7)


def test_seqlen_follows_the_model() -> None:
    config = config_of("model.seqlen=64")
    assert config.dataset.seqlen == 64
    assert config.evaluation.datasets["embedded"].seqlen == 64


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("wbits.average=1", ["wbits.average=1", "2 to 8"]),
        ("wbits.average=9", ["wbits.average=9", "2 to 8"]),
        ("sparsity.ratio=1.5", ["sparsity.ratio=1.5", "0 to 1"]),
        ("sparsity.ratio=-0.1", ["sparsity.ratio=-0.1", "0 to 1"]),
        ("dataset.nsamples=0", ["dataset.nsamples=0", "at least 1"]),
        ("n_groups.count=0", ["n_groups.count=0", "at least 1"]),
        ("recipe.damping=2", ["recipe.damping=2", "0 to 1"]),
        ("wbits.widths=[1,4]", ["wbits.widths=1", "2 to 8"]),
        ("wbits.average=16", ["wbits.average=16", "2 to 8", "wbits=unquantized"]),
        ("sparsity.ratio=nan", ["sparsity.ratio=nan", "a finite number"]),
        ("sparsity.mask_block=0", ["sparsity.mask_block=0", "at least 1 channel, or null"]),
        ("recipe.input_correction=2", ["recipe.input_correction=2", "from 0 to 1, or null"]),
        ("recipe.scale_bits=8", ["recipe.scale_bits=8", "16 (float16) or 32 (float32)"]),
        ("recipe.true_sequential=false", ["recipe.input_correction=null", "0 unless"]),
        ("dataset.holdout=1", ["dataset.holdout=1", "between 0 and 1"]),
        ("dataset.separator='\\\\n'", ["dataset.separator=", "without a backslash"]),
        ("memory.host=0", ["memory.host=0.0", "a size in GiB", "or null"]),
        ("tracking.init_timeout=0", ["tracking.init_timeout=0", "from 1 to 86400 seconds"]),
        ("model.path=' '", ["model.path= ", "a directory or a hub id"]),
        ("evaluation.datasets.embedded.seqlen=1", ["evaluation.datasets.embedded.seqlen=1", "2"]),
        (
            "evaluation.datasets.embedded={windows: sampled, max_windows: null}",
            ["evaluation.datasets.embedded.max_windows=null", "windows to draw"],
        ),
        ("corpora.c4.splits.train=[]", ["corpora.c4.splits.train=[]", "at least one file"]),
        ("wbits.widths=[5,6]", ["wbits.widths=[5, 6]", "wbits.average"]),
        ("wbits.grid=float4", ["wbits.grid=float4", "uniform, normal_float"]),
        (
            "wbits={grid: normal_float, symmetric: true}",
            ["wbits.symmetric=true", "false unless grid=uniform"],
        ),
        ("dataset.nsamples=many", ["dataset.nsamples", "many"]),
        ("n_groups.grouping=best", ["n_groups.grouping", "best", "mutual_information"]),
        ("dataset.corpus=pile", ["dataset.corpus=pile", "embedded, text, wikitext2, ptb, c4"]),
        ("dataset.corpus=c4", ["dataset.split=null", "train, validation"]),
        ("dataset.split=train", ["dataset.split=train", "null"]),
        ("dataset.sampling=best", ["dataset.sampling", "best", "published"]),
        ("dataset.add_bos=true", ["dataset.add_bos", "auto, always, never"]),
        ("+dataset.copus=c4", ["dataset.copus", "did you mean dataset.corpus?"]),
        ("+corpora.c4.pth=x", ["corpora.c4.pth", "did you mean corpora.c4.path?"]),
        (
            "evaluation.datasets.embedded.corpus=text",
            ["evaluation.datasets.embedded.path=null", ".txt"],
        ),
        ("model.device=tpu", ["model.device=tpu", "cuda"]),
        ("+wbits.averige=3", ["wbits.averige", "did you mean wbits.average?"]),
        ("+colour=red", ["colour"]),
    ],
)
def test_what_does_not_fit_is_one_line(override: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        config_of(override)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_uniform_widths_are_whole() -> None:
    assert config_of("wbits=uniform", "wbits.average=3").wbits.candidate_widths() == [3]
    with pytest.raises(InputError, match="whole number"):
        config_of("wbits=uniform", "wbits.average=3.5")


@pytest.mark.parametrize(
    ("average", "widths"), [(4, [3, 4, 5]), (2.5, [2, 3, 4]), (3.25, [2, 3, 4, 5]), (8, [7, 8])]
)
def test_widths_are_those_around_the_average(average: float, widths: list[int]) -> None:
    assert config_of(f"wbits.average={average}").wbits.candidate_widths() == widths


def test_n_of_m_agrees_with_its_ratio() -> None:
    config = config_of("sparsity=semistructured_2_4")
    assert (config.sparsity.n, config.sparsity.m, config.sparsity.ratio) == (2, 4, 0.5)
    with pytest.raises(InputError, match=r"\(m - n\) / m"):
        config_of("sparsity=semistructured_2_4", "sparsity.ratio=0.6")


@pytest.mark.parametrize("key", ["_target_", "_recursive_", "_convert_"])
def test_configs_are_data_not_code(key: str) -> None:
    with pytest.raises(InputError, match="data, not code"):
        config_of(f"+model.{key}=os.system")


def test_the_plain_form_is_json_and_round_trips() -> None:
    config = config_of("n_groups=redundancy")
    plain: dict[str, Any] = to_plain(config)
    assert plain["n_groups"]["grouping"] == "redundancy"
    again = from_hydra(OmegaConf.create(plain))
    assert again == config
    assert again.n_groups.grouping is Grouping.redundancy


# What a run needs follows from what is asked

BLIND = ["n_groups=random", "wbits=uniform", "sparsity.scope=linear"]
NEEDS = [
    ([], {"needs_activations", "uses_fisher", "needs_dense_pair"}),
    (BLIND, {"needs_dense_pair"}),
    ([*BLIND, "recipe=textbook"], set()),
    ([*BLIND, "recipe=textbook", "recipe.safety_net=true"], set()),
    (["recipe=textbook", "recipe.safety_net=true"],
     {"needs_activations", "uses_fisher", "has_safety_net"}),
    ([*BLIND, "recipe=textbook", "n_groups=energy"], {"needs_activations"}),
    ([*BLIND, "recipe=textbook", "n_groups=energy", "n_groups.count=1"], set()),
    ([*BLIND, "recipe=textbook", "sparsity.scope=model"], {"needs_activations", "uses_fisher"}),
    (["recipe=textbook", "wbits.cost=relative", "sparsity.cost=relative"], {"needs_activations"}),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "needs"), NEEDS, ids=lambda words: ",".join(sorted(words)))
def test_a_config_says_what_its_run_needs(overrides: list[str], needs: set[str]) -> None:
    config = config_of(*overrides)
    names = ("needs_activations", "uses_fisher", "needs_dense_pair", "has_safety_net")
    assert {name for name in names if getattr(config, name)} == needs


def test_only_blind_groupings_need_no_activations() -> None:
    blind = {rule for rule in Grouping if not rule.needs_activations}
    assert blind == {Grouping.contiguous, Grouping.random}


def test_the_pattern_is_that_of_every_linear() -> None:
    assert config_of("sparsity=semistructured_2_4").sparsity.average == Sparsity(0.5, 2, 4)
    assert config_of("sparsity=dense").sparsity.average.is_dense


# Texts


def test_a_corpus_and_a_protocol_are_data() -> None:
    corpus = (
        "{hub_id: org/pile, revision: abc, path: null, text_field: t, splits: {train: [a.txt]}}"
    )
    config = config_of(f"+corpora.pile={corpus}", "dataset.corpus=pile", "dataset.split=train")
    assert config.corpora["pile"].splits == {"train": ["a.txt"]}
    with pytest.raises(InputError, match="at least one file"):
        config_of(f"+corpora.pile={corpus}", "corpora.pile.splits.train=[]")


def test_corpora_are_pinned_to_commits_where_commits_exist() -> None:
    corpora = config_of().corpora
    pinned = {n: bool(re.fullmatch("[0-9a-f]{40}", c.revision)) for n, c in corpora.items()}
    assert pinned == {"wikitext2": True, "ptb": False, "c4": True}


@pytest.mark.parametrize("corpus", ["wikitext2", "ptb", "c4"])
@pytest.mark.parametrize("protocol", ["sparsegpt", "gptq_old", "wanda_llama2"])
def test_calibration_and_evaluation_read_different_parts(corpus: str, protocol: str) -> None:
    config = config_of(f"dataset={corpus}", f"evaluation={protocol}")
    assert config.dataset.split == "train"
    text = config.evaluation.datasets.get(corpus)
    if text is not None:
        with pytest.raises(
            InputError, match=rf"another part of {corpus} than evaluation\.datasets"
        ):
            config_of(f"dataset={corpus}", f"evaluation={protocol}", f"dataset.split={text.split}")


def test_one_directory_serves_both_purposes() -> None:
    config = config_of("dataset=c4", "evaluation=sparsegpt", "corpora.c4.path=/copy")
    assert config.dataset.path == config.evaluation.datasets["c4"].path == "/copy"
    assert config.evaluation.datasets["ptb"].path is None


# Models

CONTEXT = {
    "opt": 2048, "llama_": 2048, "llama2": 4096, "llama3_1": 131072, "vicuna": 4096,
    "mistral": 32768, "mixtral": 32768, "qwen3": 40960, "pythia": 2048, "gpt2": 1024,
}  # fmt: skip
PINNED = [name for name in GROUPS["model"] if name not in {"hub", "local", "embedded"}]


@pytest.mark.parametrize("name", PINNED)
def test_a_pinned_model_names_a_commit_and_fits_its_context(name: str) -> None:
    model = config_of(f"model={name}").model
    assert model.name == name
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.path)
    assert re.fullmatch("[0-9a-f]{40}", str(model.revision))
    (context,) = [length for family, length in CONTEXT.items() if name.startswith(family)]
    assert model.seqlen <= context
    assert "not verified on the hub" in (CONF / "model" / f"{name}.yaml").read_text()


def test_no_two_models_are_one() -> None:
    models = [config_of(f"model={name}").model for name in PINNED]
    assert len({(model.path, model.revision) for model in models}) == len(PINNED)
    assert len({model.revision for model in models}) == len(PINNED)


def build_mixtral() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("qwen3_30b_a3b", lambda: build_tiny_model("qwen3_moe")),
        ("mixtral_8x7b", build_mixtral),
    ],
)
def test_what_a_mixture_ignores_are_its_routers(
    name: str, build: Callable[[], PreTrainedModel]
) -> None:
    patterns = config_of(f"model={name}").model.ignore
    inventory = take_inventory(build(), ignore=[*patterns, "*.mlp.experts*"])
    routers = {weight for weight in inventory.ignored if ".experts" not in weight}
    assert routers == {f"model.layers.{block}.mlp.gate.weight" for block in range(2)}
    names = [linear.name for linears in inventory.linears for linear in linears]
    assert len(names) == 8
    assert all("self_attn" in each for each in names)


def test_every_choice_is_in_the_help(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mi_experiments.commands.start import run; run()"]
    done = subprocess.run(
        [*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for group, names in GROUPS.items():
        assert f"\n{group}: {', '.join(names)}\n" in done.stdout
