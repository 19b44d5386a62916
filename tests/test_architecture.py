"""Folders are in one order, and imports point only downwards in it."""

import ast
import re
from pathlib import Path

import pytest
from import_order import FOLDERS, PACKAGE, STRANGERS, files, imports

WRITES = {"write_text", "write_bytes", "tofile", "touch", "dump", "savez",
          "save", "save_file", "save_model", "save_pretrained", "to_json_file", "to_parquet",
          "to_csv", "to_json", "to_pickle", "to_excel", "write_table", "FileHandler", "from_file",
          "open_plain",
          "savefig", "copy2", "copyfile", "copytree"}  # fmt: skip
"""Calls that may write a file; so may `open` with a mode."""

MAY_WRITE = {
    "persistence/atomic.py": {"write_bytes", "save_file", "touch"},
    # Into memory; the bytes go through atomic.
    "records/linears.py": {"write_table"},
    "comparison/formats.py": {"to_parquet", "to_csv"},
    "commands/compare.py": {"write_table"},
    # Into the folder that it is given, which stored_model makes, reads and removes.
    "export/dense.py": {"save_pretrained", "write_bytes"},
    # Into a temporary folder, to be hashed.
    "texts/token_cache.py": {"save_pretrained"},
    # Who has a lock, into the lock.
    "persistence/locks.py": {"open_plain"},
    # Memory that the system may write out; the file has no name while it is used.
    "llm/activations.py": {"from_file"},
    # The log, which only grows.
    "experiment/directory.py": {"open_plain"},
    # Figures, into a folder that the user names, drawn again in seconds.
    "comparison/views/plots.py": {"savefig"},
    # To the server of Weights & Biases.
    "comparison/views/workspace.py": {"save"},
    # Rebuilds the model that the package carries, by hand.
    "embedded/train.py": {"save_pretrained"},
}
"""Where else they are, and why; everything in a run directory appears whole or not at all."""


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == set(FOLDERS)


@pytest.mark.parametrize("place", range(len(FOLDERS)), ids=FOLDERS)
def test_arrows_point_one_way(place: int) -> None:
    folder = FOLDERS[place]
    allowed = set(FOLDERS[place:]) - STRANGERS.get(folder, set())
    for path in files(folder):
        wrong = imports(path) - allowed
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


@pytest.mark.parametrize("folder", [name for name in FOLDERS if (PACKAGE / name).is_dir()])
def test_a_folder_says_its_one_job_in_a_line(folder: str) -> None:
    first = (PACKAGE / folder / "__init__.py").read_text().splitlines()[0]
    assert re.fullmatch(r'"""[A-Z].*\.(""")?', first)


def writes(path: Path) -> set[str]:
    """Return the names of the calls in a file that may write files."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        texts = [
            part.value
            for part in [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        if name in {"open", "fdopen"} and any(
            re.fullmatch("[rbt]*[wax+][wax+bt]*", t) for t in texts
        ):
            found.add("open")
        if name in WRITES:
            found.add(name)
    return found


def test_files_are_written_in_one_place() -> None:
    found = {str(path.relative_to(PACKAGE)): writes(path) for path in PACKAGE.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == MAY_WRITE


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('open("a", "w")', {"open"}),
        ('path.open("ab")', {"open"}),
        ('path.open(mode="r+")', {"open"}),
        ('path.open("rb")', set()),
        ("path.write_text(text)", {"write_text"}),
        ("torch.save(x, path)", {"save"}),
        ("frame.to_parquet(path)", {"to_parquet"}),
        ("write_atomically(path, text)", set()),
    ],
)
def test_a_write_is_seen(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert writes(tmp_path / "module.py") == expected


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


def test_the_mathematics_imports_numerical_libraries_only() -> None:
    allowed = {"torch", "jaxtyping", "numpy", "scipy", "mi_experiments"}
    standard = {"math", "dataclasses", "enum", "collections", "fractions", "itertools", "typing",
                "functools", "abc"}  # fmt: skip
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
