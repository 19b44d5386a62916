"""The config: every YAML composes, and what does not fit is one line that teaches."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mi_experiments.commands.run import conf_directory
from mi_experiments.composing import from_hydra, to_plain
from mi_experiments.config import Config
from mi_experiments.errors import InputError
from mi_experiments.method.grouping import Grouping

CONF = Path(conf_directory())
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "experiment"
}
NEEDED = {
    "model=local": ["model.path=/models/x"],
    "dataset=text": ["dataset.path=/data/x.txt"],
    "evaluation=text": ["dataset=text", "dataset.path=/data/x.txt"],
}


def config_of(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group, names in GROUPS.items() for name in names]
)
def test_every_file_of_conf_composes(choice: str) -> None:
    config = config_of(choice, *NEEDED.get(choice, []))
    assert isinstance(config, Config)


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
        ("wbits.widths=[5,6]", ["wbits.widths=[5, 6]", "wbits.average"]),
        ("dataset.nsamples=many", ["dataset.nsamples", "many"]),
        ("n_groups.grouping=best", ["n_groups.grouping", "best", "mutual_information"]),
        ("dataset.corpus=pile", ["dataset.corpus=pile", "wikitext2"]),
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
