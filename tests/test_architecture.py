"""Arrows point one way: commands → experiment → {plan, pipeline} → {llm, method}."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mi_experiments"

FORBIDDEN = {
    "method": ("llm", "embedded", "config", "record", "plan", "pipeline", "experiment", "commands",
               "tracking", "texts", "measure", "provenance", "progress", "dry_run"),
    "llm": ("method", "embedded", "config", "record", "plan", "pipeline", "experiment", "commands",
            "tracking", "texts", "measure", "provenance", "progress", "dry_run"),
    "embedded": ("method", "config", "record", "plan", "pipeline", "experiment", "commands"),
    "record": ("config", "llm", "method", "plan", "pipeline", "experiment", "commands"),
    "config": ("record", "plan", "pipeline", "experiment", "commands", "embedded"),
    "plan": ("pipeline", "experiment", "commands", "tracking", "embedded"),
    "pipeline": ("experiment", "commands", "tracking", "embedded"),
    "tracking": ("plan", "pipeline", "experiment", "commands", "llm", "method"),
    "experiment": ("commands",),
    "views": ("plan", "pipeline", "experiment", "commands", "config", "llm", "method"),
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mi_experiments"):
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("mi_experiments.")
            }
    return names


def files(room: str) -> list[Path]:
    """Return the files of a room: a folder or one module."""
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_point_one_way(room: str) -> None:
    for path in files(room):
        wrong = imports(path) & set(FORBIDDEN[room])
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            node.module.removeprefix("mi_experiments.")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("mi_experiments.")
        }
        for path in PACKAGE.rglob("*.py")
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_mathematics_imports_torch_only() -> None:
    allowed = {"torch", "jaxtyping", "numpy", "mi_experiments"}
    standard = {"math", "dataclasses", "enum", "collections", "fractions", "itertools", "typing",
                "functools"}  # fmt: skip
    for path in files("method"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert node.module.split(".")[0] in allowed | standard, f"{path}: {node.module}"


def test_files_stay_readable() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 345} == {}


@pytest.mark.parametrize("word", ["pickle", "torch.load", "trust_remote_code=True", "_target_:"])
def test_no_code_execution_from_data(word: str) -> None:
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "conf").rglob("*.yaml")]
    assert [path for path in sources if word in path.read_text()] == []
