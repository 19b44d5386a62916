"""The sweeps in `conf/experiment/` compose, and their questions are answered as their files say."""

import itertools
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from synthetic_runs import CONFIG, make_run

from mi_experiments.commands.compare import main
from mi_experiments.config.compose import conf_directory, from_hydra, to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.identity import config_hash
from mi_experiments.method.grouping import Grouping
from mi_experiments.sweeps.jobs import JobComposer, combine

FILES = [
    path
    for path in sorted(Path(conf_directory(), "experiment").glob("*.yaml"))
    if "MULTIRUN" in path.read_text()
]
ELSEWHERE = [
    [],
    ["model=local", "model.path=DIR", "dataset=text", "dataset.path=FILE"],
    ["model=vicuna_13b_v1_5", "dataset=c4", "evaluation=sparsegpt"],
]


@pytest.fixture
def hydra() -> Iterator[Hydra]:
    """Give what composes the project's configs."""
    GlobalHydra.instance().clear()
    path = create_automatic_config_search_path(None, None, conf_directory())
    yield Hydra.create_main_hydra2("mi-run", path)
    GlobalHydra.instance().clear()


def comment(path: Path) -> str:
    """Return the comment at the beginning of a file, its lines joined where they go on."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return "\n".join(line.removeprefix("#") for line in lines).replace("\\\n", " ")


@pytest.mark.parametrize("most", [4, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_job_is_a_run_of_its_own(hydra: Hydra, path: Path, most: int) -> None:
    """Of the first seed; as many as the comment says, and each with what its values ask for."""
    for number, more in enumerate(ELSEWHERE):
        overrides = [f"experiment={path.stem}", *more]
        master = hydra.compose_config("config", overrides, run_mode=RunMode.MULTIRUN)
        assert master.hydra.mode is RunMode.MULTIRUN
        composer = JobComposer(hydra, master)
        counts = [len(choice.values) for choice in composer.choices.values()]
        stated = re.search(rf"mi-run experiment={path.stem}: (\d+) runs", comment(path))
        assert stated
        assert int(stated[1]) == math.prod(counts)
        jobs = [(lines, values) for lines, values in combine(composer.choices)]
        jobs = [(lines, values) for lines, values in jobs if values.get("seed") == "0"]
        # With the embedded model so many of them; with others, the first and the last.
        jobs = jobs[:: -(-len(jobs) // most)] if number == 0 else [jobs[0], jobs[-1]]
        hashes = set()
        for lines, values in jobs:
            composed = composer.compose(lines)
            hashes.add(config_hash(_root_=composed))
            config = to_plain(from_hydra(composed))
            asked = {
                "recipe": config["recipe"]["name"],
                "n_groups": config["n_groups"]["grouping"],
                "sparsity": "unstructured" if config["sparsity"]["ratio"] == 0.5 else "dense",
                "model": config["model"]["name"],
                "dataset": config["dataset"]["corpus"],
            }
            for key, value in values.items():
                if key in asked:
                    assert asked[key] == value
                elif key != "experiment" and "." in key:
                    group, last = key.split(".")
                    assert f"{config[group][last]:g}" == value if value[0].isdigit() else (
                        str(config[group][last]) == value
                    )  # fmt: skip
        assert len(hashes) == len(jobs)


COMMANDS = [
    (path.stem, line.strip())
    for path in FILES
    for line in comment(path).splitlines()
    if line.strip().startswith("mi-compare")
]


PIVOTS = {("wbits", "wbits__average"), ("n_groups", "n_groups__count")}


def test_every_file_says_how_its_question_is_answered() -> None:
    assert {name for name, _ in COMMANDS} == {path.stem for path in FILES}
    assert len(FILES) >= 6


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda part: part[:60])
def test_the_answer_can_be_had(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    axes = {
        "nsamples_sweep": {"dataset__nsamples": (8, 32)},
        "budget_sweep": {"sparsity__ratio": (0.0, 0.5), "wbits__average": (3.0, 4.0)},
        "groups_sweep": {"n_groups__count": (2, 5), "n_groups__grouping": ("random", "energy")},
        "ablation_grouping": {
            "n_groups__grouping": ("random", "energy"), "wbits__average": (3.0, 3.5),
            "sparsity__ratio": (0.0, 0.5),
        },
        "ablation_allocation": {
            "wbits__scope": ("linear", "model"), "wbits__cost": ("distortion", "fisher"),
            "wbits__average": (3.0, 3.5),
        },
        "ablation_recipe": {
            "recipe__name": ("default", "textbook"), "sparsity__ratio": (0.0, 0.5),
            "wbits__average": (3.0, 4.0),
        },
    }[name]  # fmt: skip
    monkeypatch.setitem(CONFIG["wbits"], "cost", "distortion")
    for job, values in enumerate(itertools.product(*axes.values(), (0, 1, 2))):
        changes = dict(zip([*axes, "seed"], values, strict=True))
        make_run(tmp_path / "sweeps" / f"{name}-0123456789" / str(job), 0.01 * job, **changes)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    main([word.replace("*", "0123456789") for word in words])
    out = capsys.readouterr().out
    assert "nan" not in out
    if "--pivot" not in command:
        return
    # A row for each value of what the rows are, and a column for each of the columns.
    rows, columns = command.split("--pivot ")[1].split()[:2]
    for short in (rows, columns.rpartition(".")[2]):
        key = next(key for key in axes if short in key or (short, key) in PIVOTS)
        for value in axes[key]:
            assert (f"{value:g}" if isinstance(value, float) else str(value)) in out


def test_the_baseline_is_what_was_published_with_as_many_scales(hydra: Hydra) -> None:
    def plain(*overrides: str) -> Config:
        composed = hydra.compose_config("config", [*overrides], run_mode=RunMode.RUN)
        return from_hydra(composed)

    textbook, default = plain("experiment=textbook", "wbits.average=3"), plain("wbits.average=3")
    assert textbook.recipe.name == "textbook"
    assert textbook.recipe.damping == 0.01
    assert not textbook.recipe.clip_search
    assert textbook.wbits.candidate_widths() == [3]
    assert textbook.n_groups.grouping is Grouping.contiguous
    assert not textbook.sparsity.allocated
    assert textbook.n_groups.count == default.n_groups.count
    assert textbook.wbits.group_size == default.wbits.group_size
    assert textbook.sparsity.mask_block == 128
