"""Names follow from what is computed, and combinations are those of Hydra."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from mi_experiments.config.compose import conf_directory
from mi_experiments.config.identity import (
    as_word,
    asked_of,
    config_hash,
    job_name,
    read_choices,
    sweep_id,
)
from mi_experiments.sweeps.jobs import JobComposer, combine


@pytest.fixture(scope="module")
def hydra() -> Iterator[Hydra]:
    """Give what composes the project's configs."""
    GlobalHydra.instance().clear()
    path = create_automatic_config_search_path(None, None, conf_directory())
    yield Hydra.create_main_hydra2("mi-run", path)
    GlobalHydra.instance().clear()


def compose(hydra: Hydra, *overrides: str) -> DictConfig:
    return hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)


SWEEPS = [
    ["seed=0,1", "wbits.average=3,4"],
    ["seed=range(0,3)", "model.seqlen=64"],
    ["n_groups=random,energy", "n_groups.count=2,3", "wbits=uniform"],
    ["n_groups=glob(*)", "sparsity=dense"],
    ["seed=1,2", "seed=3", "dataset.nsamples=4"],
    ["wbits.widths=[2,3],[3,4]", "+tracking.extra=1"],
    ["wbits.average='3',4", "model.name=a b,c"],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_combinations_are_those_of_hydra(hydra: Hydra, overrides: list[str]) -> None:
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
    ours = [list(lines.values()) for lines, _ in combine(read_choices({}, overrides, parser))]
    assert ours == batch


def test_the_command_line_wins_over_a_file() -> None:
    choices = read_choices({"seed": "0,1", "wbits.average": "3,4"}, ["seed=7", "model=local"])
    assert {key: choice.values for key, choice in choices.items()} == {
        "seed": ("7",), "wbits.average": ("3", "4"), "model": ("local",),
    }  # fmt: skip
    assert [key for key, choice in choices.items() if choice.swept] == ["wbits.average"]


EXPERIMENTS = sorted(path.stem for path in Path(conf_directory(), "experiment").glob("*.yaml"))
COMPOSED = [
    *([f"experiment={name}"] for name in EXPERIMENTS),
    *SWEEPS[:3],
    # A value below one that is replaced as a whole, before and after it.
    ["wbits.average=3,4", "wbits={average: 5}"],
    ["model=local", "model.path=a,b", "dataset=text", "dataset.path=x,y", "evaluation=text,ptb"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", COMPOSED, ids=" ".join)
def test_jobs_are_composed_as_hydra_composes_them(hydra: Hydra, overrides: list[str]) -> None:
    master = compose(hydra, "hydra.mode=MULTIRUN", *overrides)
    composer = JobComposer(hydra, master)
    jobs = [lines for lines, _ in combine(composer.choices)]
    for lines in {id(job): job for job in (jobs[0], jobs[len(jobs) // 2], jobs[-1])}.values():
        whole = hydra.config_loader.load_sweep_config(master, list(lines.values()))
        ours = composer.compose(lines)
        assert asked_of(ours) == asked_of(whole)
        assert config_hash(_root_=ours) == config_hash(_root_=whole)


def test_a_sweep_is_named_by_what_it_computes(hydra: Hydra) -> None:
    def name(*overrides: str) -> str:
        return sweep_id(_root_=compose(hydra, *overrides))

    first = name("seed=0,1", "wbits.average=3,4")
    same = [
        ["wbits.average=3,4", "seed=0,1"],
        ["seed=range(2)", "wbits.average=3,4"],
        ["seed=0,1", "wbits.average=3,4", "tracking=disabled"],
        ["seed=0,1", "wbits.average=3,4", "memory.host=2", "dry_run=true"],
        ["seed=0,1", "wbits.average=3,4", "memory.activations=host,disk"],
        ["seed=0,1", "wbits.average=3,4", "dataset.nsamples=32"],  # the default
    ]
    other = [
        ["seed=0,2", "wbits.average=3,4"],
        ["seed=0,1", "wbits.average=3,4,5"],
        ["seed=0,1", "wbits.average=3,4", "dataset.nsamples=33"],
        ["seed=0,1", "wbits.average=3,4", "n_groups=random"],
        ["seed=0,1", "wbits.average=3"],
    ]
    assert {name(*overrides) for overrides in same} == {first}
    names = [name(*overrides) for overrides in other]
    assert len({first, *names}) == 1 + len(other)
    assert first.startswith("embedded-")
    assert name("model=embedded,local").startswith("sweep-")
    assert name("experiment=nsamples_sweep").startswith("nsamples_sweep-")
    assert name("experiment=nsamples_sweep") != name("experiment=nsamples_sweep", "seed=0")
    assert name("experiment=nsamples_sweep") != name("experiment=nsamples_sweep", "model=gpt2")


def test_equal_budgets_have_equal_hashes(hydra: Hydra) -> None:
    def name(value: str) -> str:
        return config_hash(_root_=compose(hydra, f"wbits.average={value}"))

    assert name("4") == name("4.0") == config_hash(_root_=compose(hydra))
    assert name("4") != name("4.5")


def test_names_need_no_quotes() -> None:
    swept = {"model.path": "a/b c,d", "wbits.average": "3.5", "seed": "0"}
    assert job_name(swept, "0123456789") == "path_a-b-c-d-average_3.5-seed_0-0123456789"
    assert job_name({}, "0123456789") == "0123456789"
    assert len(job_name({"model.path": "x" * 300}, "0123456789")) == 71
    assert as_word("papers/table 2") == "papers-table-2"
