"""What README.md and the pages of docs/ tell a person to type works, and what they name exists."""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from composed import config_of
from import_order import PACKAGE, folder_map, import_order
from synthetic_runs import make_run

from mi_experiments.commands import compare, reproduce
from mi_experiments.config.compose import conf_directory
from mi_experiments.config.config import Config
from mi_experiments.reproduction.rows import find_rows

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
README = PAGES["README.md"]
GROUPS = "model|dataset|sparsity|wbits|n_groups|recipe|evaluation|tracking|memory|corpora"


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return the lines of the shell of a page, continued ones joined, without comments."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for raw in text.splitlines() if (line := raw.split(" #")[0].strip())]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def typed(program: str) -> list[str]:
    """Return the commands that begin with a program."""
    return [line for line in COMMANDS if line.split()[0] == program]


def test_every_command_is_of_a_program_that_a_test_knows() -> None:
    known = {"mi-run", "mi-compare", "mi-reproduce", "make", "python", "wandb"}
    others = [line for line in COMMANDS if line.split()[0] not in known]
    assert others == ["source .venv/bin/activate"]
    assert len(typed("mi-run")) >= 30
    assert len(typed("mi-compare")) >= 10
    assert len(typed("mi-reproduce")) >= 8


@pytest.mark.parametrize("command", typed("mi-run"))
def test_every_run_composes(command: str) -> None:
    # A sweep's first job: the first value of each comma list.
    words = shlex.split(command)[1:]
    overrides = [word.split(",")[0] for word in words if not word.startswith("-")]
    config_of(*overrides)


@pytest.mark.parametrize("command", typed("mi-compare"))
def test_every_comparison_works(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in range(8):
        make_run(tmp_path / "sweeps" / str(job), 0.1 + job, seed=job % 2,
                 n_groups__grouping=("random", "energy")[job // 4],
                 dataset__nsamples=(8, 32)[job // 2 % 2])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    if {"--plots", "--wandb", "--stability"} & {*words}:
        compare.parse(words)  # their own tests run them
    else:
        compare.main(words)


@pytest.mark.parametrize("command", typed("mi-reproduce"))
def test_every_reproduction_parses(command: str) -> None:
    options = reproduce.parse(shlex.split(command)[1:])
    assert options.pin or options.status or find_rows(options.table, options.only)


@pytest.mark.parametrize("target", sorted({line.split()[1] for line in typed("make")}))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", typed("python"))
def test_every_program_exists(command: str) -> None:
    first, *rest = command.split()[1:]
    if first == "-m":
        assert importlib.util.find_spec(rest[0])
    else:
        ast.parse((ROOT / first).read_text())


def test_every_wandb_command_exists() -> None:
    from wandb.cli.cli import cli

    assert {line.split()[1] for line in typed("wandb")} <= set(cli.commands)


def is_key(key: str) -> bool:
    """Tell whether the schema of a run has a key."""
    node: Any = Config
    for name in key.split("."):
        kinds = [kind for kind in get_args(node) if kind is not type(None)]
        if kinds and not dataclasses.is_dataclass(node):
            node = kinds[-1]  # of a dictionary: whatever the key; or what is not null
        else:
            node = get_type_hints(node).get(name) if dataclasses.is_dataclass(node) else None
    return node is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_is_named_is_of_the_config(page: str) -> None:
    named = re.findall(rf"(?<![\w./])(?:{GROUPS})\.[a-zA-Z_0-9.]*\w", PAGES[page])
    # Names of weights and of files begin like keys.
    other = re.compile(r"model\.(layers|safetensors)|.*\.(py|yaml|md|jsonl)$")
    keys = sorted({key for key in named if not other.match(key)})
    assert [key for key in keys if not is_key(key)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    named = re.findall(r"`((?:[a-z_\d]+/)*[a-z_\d]+\.(?:py|yaml|csv))`", PAGES[page])
    places = (ROOT, PACKAGE, ROOT / "conf")
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", PAGES[page])
    home = (ROOT / page).parent
    assert [link for link in links if "://" not in link and not (home / link).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_finds_what_it_imports(page: str) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mi_exp"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_mathematics_of_the_page_runs() -> None:
    exec(compile(blocks("docs/python.md", "python")[-1], "docs/python.md", "exec"), {})


@pytest.mark.slow
def test_the_page_of_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks("docs/python.md", "python"):
        exec(compile(block, "docs/python.md", "exec"), space)


def run(command: str, directory: Path) -> str:
    """Type a command of ours, and return what it prints."""
    program, *words = shlex.split(command)
    start = {"mi-run": "run", "mi-compare": "compare"}[program]
    code = f"from mi_experiments.commands.start import {start}; {start}()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *(["tracking=disabled"] * (program == "mi-run"))],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_the_tutorial_begins_with_a_plan(tmp_path: Path) -> None:
    first = next(line for line in commands("docs/tutorial.md") if line.startswith("mi-run"))
    assert "nothing is computed" in run(first, tmp_path)
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands("docs/tutorial.md"):
        if line.startswith("mi-"):
            run(line, tmp_path)
    assert (tmp_path / "page.html").is_file()
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("docs/tutorial.md", "python")
    exec(compile(snippet, "docs/tutorial.md", "exec"), {})


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "s")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from_elsewhere = re.compile(r"<(?:script[^>]* src|link[^>]* href|img[^>]* src)=.?https?:")
    pages = list((tmp_path / "s").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    assert [page for page in pages if from_elsewhere.search(page.read_text())] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_readme_has_the_map_of_the_folders() -> None:
    """Else: python tests/fixtures/import_order.py, and put it there."""
    assert f"```text\n{folder_map()}\n```" in README


def test_the_order_of_imports_is_that_of_the_code() -> None:
    """Else: python tests/fixtures/import_order.py, and put it there."""
    assert f"```text\n{import_order()}\n```" in PAGES["docs/architecture.md"]


def test_a_calibration_tensor_walks_through_few_files() -> None:
    walk = PAGES["docs/architecture.md"].split("## The walk of a calibration")[1].split("\n## ")[0]
    assert 10 <= len(set(re.findall(r"`(\w+/\w+\.py)`", walk))) <= 20


@pytest.mark.parametrize("picture", ["groupings", "storage"])
def test_a_picture_is_of_the_results_as_they_are(picture: str) -> None:
    """Else: python benchmarks/draw_pictures.py RUN_DIR."""
    text = (ROOT / "docs" / "pictures" / f"{picture}.svg").read_text()
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in (ROOT / "results").glob("*.csv")]
    assert any(digest in text for digest in digests)


TABLE = README.split("## The axes")[1].split("\n## ")[0]
AXES = re.findall(r"^\| `(\w+)` \| (.*?) \|", TABLE, re.MULTILINE)


@pytest.mark.parametrize(("axis", "choices"), AXES)
def test_every_documented_choice_is_a_file(axis: str, choices: str) -> None:
    names = re.findall(r"`(\w+)`", choices)
    assert names
    for name in names:
        assert (Path(conf_directory()) / axis / f"{name}.yaml").is_file(), f"{axis}={name}"
