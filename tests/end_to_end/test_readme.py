"""What the README tells a person to type exists and composes."""

import re
import shlex
from pathlib import Path

import pytest
from composed import config_of
from synthetic_runs import make_run

from mi_experiments.commands.compare import main, parse
from mi_experiments.config.compose import conf_directory

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
COMPARISONS = [line for line in COMMANDS if re.match(r"(\.venv/bin/)?mi-compare\b", line)]
RUNS = [command for command in COMMANDS if re.match(r"(\.venv/bin/)?mi-run\b", command)]


@pytest.mark.parametrize("command", RUNS)
def test_every_run_composes(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    # A sweep's first job: the first value of each comma list.
    overrides = [word.split(",")[0] for word in words if not word.startswith("-")]
    config_of(*overrides)


@pytest.mark.parametrize("command", COMPARISONS)
def test_every_comparison_works(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in range(8):
        make_run(tmp_path / "sweeps" / str(job), 0.1 + job, seed=job % 2,
                 n_groups__grouping=("random", "energy")[job // 4],
                 dataset__nsamples=(8, 32)[job // 2 % 2])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    if {"--plots", "--wandb"} & {*words}:
        parse(words)  # their own tests run them
    else:
        main(words)


def test_commands_were_found() -> None:
    assert len(RUNS) >= 4
    assert len(COMPARISONS) >= 8


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README))))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bmi-[a-z]+\b", README))))
def test_every_command_is_installed(command: str) -> None:
    assert f'\n{command} = "mi_experiments.commands.' in (ROOT / "pyproject.toml").read_text()


TABLE = README.split("## The axes")[1].split("\n## ")[0]
AXES = re.findall(r"^\| `(\w+)` \| (.*?) \|", TABLE, re.MULTILINE)


@pytest.mark.parametrize(("axis", "choices"), AXES)
def test_every_documented_choice_is_a_file(axis: str, choices: str) -> None:
    names = re.findall(r"`(\w+)`", choices)
    assert names
    for name in names:
        assert (Path(conf_directory()) / axis / f"{name}.yaml").is_file(), f"{axis}={name}"


def test_the_map_names_every_module() -> None:
    tree = README.split("## Map")[1].split("## Extend it")[0]
    for path in (ROOT / "mi_experiments").rglob("*.py"):
        if path.parent.name not in {"embedded", "commands"} and path.name != "__init__.py":
            assert path.name in tree, path.name
