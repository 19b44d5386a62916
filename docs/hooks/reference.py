"""Give MkDocs a page of reference for every folder of the package, without importing it."""

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "mi_experiments"


def folders() -> dict[str, list[str]]:
    """Return the modules of each folder; those beside the folders are `package`."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] not in {"__init__", "__main__"}:
            found.setdefault(parts[0] if len(parts) > 1 else "package", []).append(".".join(parts))
    return found


def page(folder: str, modules: list[str]) -> str:
    """Return the Markdown of one folder."""
    home = PACKAGE if folder == "package" else PACKAGE / folder
    first = (ast.get_docstring(ast.parse((home / "__init__.py").read_text())) or "").split("\n")[0]
    lines = [f"# {folder}", first]
    for module in modules:
        lines += [f"## {module}", f"::: mi_experiments.{module}"]
    return "\n\n".join(lines) + "\n"


def on_config(config: Any) -> Any:
    """Put the pages at the end of the navigation."""
    config.nav.append({"Reference": [f"reference/{folder}.md" for folder in folders()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for folder, modules in folders().items():
        content = page(folder, modules)
        files.append(File.generated(config, f"reference/{folder}.md", content=content))
    return files
