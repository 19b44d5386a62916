"""What a paper's row is asked to do is what the paper did, whatever this project's defaults are."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mi_experiments.config.compose import conf_directory, from_hydra, to_plain
from mi_experiments.reproduction.rows import compose_row, find_rows

ROOT = Path(conf_directory()) / "experiment"
ROWS = find_rows("papers", None)

PUBLISHED = {
    "sparsity.scope": "linear",
    "sparsity.mask_block": 128,
    "dataset.sampling": "published",
    "dataset.add_bos": "always",
    "dataset.allow_fewer": False,
    "dataset.on_nonfinite": "error",
    "wbits.symmetric": False,
    "wbits.tied": False,
    "recipe.damping": 0.01,
    "recipe.damping_power": 0.0,
    "recipe.dead_channels": "zero",
    "recipe.dead_diagonal": 1.0,
    "recipe.scale_bits": 32,
    "recipe.input_correction": 0.0,
    "recipe.residual_correction": 0.0,
    "recipe.refine_rounds": 0,
    "recipe.on_singular": "error",
    "recipe.safety_net": False,
    "n_groups.grouping": "contiguous",
}
"""Of every method that was published: none of what this project does better, or otherwise."""

ONE_GRID = {"n_groups.count": 1, "recipe.clip_search": False}

PRUNED = {
    **PUBLISHED,
    **ONE_GRID,
    "recipe.name": "sparsegpt",
    "recipe.grid_fit": "static",
    "recipe.selection": "threshold",
    "recipe.window_choice": "dynamic",
    "recipe.order": "natural",
    "recipe.true_sequential": False,
    "wbits.group_size": None,
    "dataset.corpus": "c4",
    "dataset.separator": None,
}
ROUNDED = {
    **PUBLISHED,
    "recipe.name": "gptq",
    "recipe.grid_fit": "dynamic",
    "recipe.selection": "exact",
    "sparsity.ratio": 0.0,
}
SLIM = {
    **ROUNDED,
    "recipe.order": "natural",
    "recipe.true_sequential": False,
    "dataset.corpus": "wikitext2",
    "dataset.separator": " ",
    "wbits.group_size": 128,
}
OWN = {"recipe.name": "default", "dataset.sampling": "published", "dataset.add_bos": "always",
       "recipe.safety_net": False, "sparsity.scope": "model", "dataset.corpus": "c4"}  # fmt: skip


def demands(row: str) -> dict[str, Any]:
    """Return what a row must be asked for, from its paper and its name."""
    _, paper, name = row.split("/")
    wanted: dict[str, Any] = {"dataset.nsamples": 128, "model.seqlen": 2048, "seed": 0}
    if paper in ("sparsegpt", "besa", "wanda"):
        wanted |= PRUNED
    elif paper == "gptq":
        llama = name.startswith("llama")
        wanted |= ROUNDED | ONE_GRID | {
            "recipe.order": "activation" if llama else "natural",
            "recipe.true_sequential": llama,
            "dataset.corpus": "c4",
            "wbits.group_size": 128 if "g128" in name else None,
        }  # fmt: skip
    elif paper == "slim_llm":
        wanted |= SLIM
        if name.endswith("gptq"):
            wanted |= ONE_GRID
        else:
            wanted |= {
                "recipe.clip_search": True,
                "wbits.allocation": "mixed",
                "wbits.scope": "linear",
                "wbits.cost": "distortion",
                "wbits.widths": [2, 3, 4] if "_w3" in name else [2, 3],
                "n_groups.count": 40 if "13b" in name else 32,
                "n_groups.multiple": 128,
            }
    else:
        wanted |= OWN
        # The recipe's best for the bar to beat; for Vicuna, what mutual information does.
        grouping = "energy" if paper == "obr" else "mutual_information"
        wanted["n_groups.grouping"] = grouping if "_w4" in name else "contiguous"
    if paper == "wanda":
        wanted["model.seqlen"] = wanted["dataset.seqlen"] = 4096
    if "_50" in name:
        wanted |= {"sparsity.ratio": 0.5, "sparsity.n": 0, "sparsity.m": 0}
    for n, m in ((2, 4), (4, 8)):
        if name.endswith(f"_{n}_{m}"):
            wanted |= {"sparsity.ratio": 0.5, "sparsity.n": n, "sparsity.m": m}
    if name.endswith("_dense"):
        # Nothing is compressed, so nothing is calibrated: one sample, for the code path.
        wanted |= {"sparsity.ratio": 0.0, "wbits.allocation": "unquantized", "dataset.nsamples": 1}
    for bits in (2, 3, 4):
        if f"_w{bits}" in name:
            wanted["wbits.average"] = bits
            mixed = paper in ("obr", "vicuna") or (paper == "slim_llm" and "gptq" not in name)
            wanted["wbits.allocation"] = "mixed" if mixed else "uniform"
    if "_w" not in name:
        wanted["wbits.allocation"] = "unquantized"
    if "nsamples" in name:
        wanted["dataset.nsamples"] = int(name.rpartition("_")[2])
    if "seed" in name:
        wanted["seed"] = wanted["dataset.seed"] = int(name.rpartition("_")[2])
    return wanted


def value_at(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def content_of(row: str) -> tuple[str, dict[str, Any]]:
    """Return the model of a row, and what its file asks beside model and expected numbers."""
    content = yaml.safe_load((ROOT / f"{row}.yaml").read_text())
    base = yaml.safe_load((ROOT / row).with_name("base.yaml").read_text())
    defaults = [base["defaults"], content.pop("defaults")]
    (*_, model) = [
        d["override /model"] for part in defaults for d in part if "override /model" in d
    ]
    content["axes"] = [d for d in defaults[1] if "override /model" not in d]
    content.pop("expected")
    return model, content


def kind_of(row: str) -> tuple[str, ...]:
    """Return a paper, a family of models and what is done; SliM-LLM's groups go by model size."""
    _, paper, name = row.split("/")
    model, _ = content_of(row)
    family = re.split(r"[_\d]", model)[0]
    return paper, family, model[-3:] if paper == "slim_llm" else "", name.removeprefix(model)


KINDS = {kind_of(row): row for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_a_kind_differ_in_their_model_alone(row: str) -> None:
    """What the next test says of one of them, it says of all."""
    assert content_of(row)[1] == content_of(KINDS[kind_of(row)])[1]


@pytest.mark.parametrize("row", KINDS.values())
def test_a_row_asks_for_what_its_paper_did(row: str) -> None:
    config = to_plain(from_hydra(compose_row(row, [])))
    wanted = demands(row)
    assert {key: value_at(config, key) for key in wanted} == wanted
    assert config["model"]["name"] == content_of(row)[0]
    protocol = "wanda_llama2" if "/wanda/" in row else "sparsegpt"
    assert config["evaluation"]["protocol"] == protocol
    for text in config["evaluation"]["datasets"].values():
        assert text["add_bos"] == "always"
        assert text["seqlen"] == config["model"]["seqlen"]


AXES = {"model", "dataset", "sparsity", "wbits", "n_groups", "recipe", "evaluation"}


@pytest.mark.parametrize("base", sorted(ROOT.glob("papers/*/base.yaml")))
def test_no_axis_is_left_to_the_default(base: Path) -> None:
    """Another default of this project, of any axis, moves no row."""
    defaults = yaml.safe_load(base.read_text())["defaults"]
    said = {key.removeprefix("override /") for each in defaults if each != "_self_" for key in each}
    assert said == AXES
