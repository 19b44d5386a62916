"""What mi-reproduce --status shows: every table, where its numbers are from, and what was run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mi_experiments.config.identity import NUMERICS_VERSION
from mi_experiments.errors import InputError
from mi_experiments.persistence.plain_json import read_json
from mi_experiments.reproduction.verdicts import NOT_RUN

HEADER = "| table | rows | run | numbers from |\n|---|---:|---|---|\n"


def status_table(tables: Mapping[str, Sequence[str]], root: Path, verdicts: Path) -> str:
    """Return a Markdown table of what every table is, and what its recorded verdicts say.

    Args:
        tables: rows of each table, by its name.
        root: `conf/experiment`.
        verdicts: a folder with what `--json` wrote for each table that was run, by its name.

    Raises:
        InputError: there is no such folder, or a file cannot be read, or is of rows or numerics
            that are no longer so.
    """
    if not verdicts.is_dir():
        raise InputError(f"--status {verdicts}: no such folder")
    lines = []
    for table, rows in tables.items():
        file = verdicts / f"{table.replace('/', '-')}.json"
        run = describe(read_verdicts(file, rows), rows) if file.is_file() else NOT_RUN
        lines.append(f"| `{table}` | {len(rows)} | {run} | {source_of(root, table, rows)} |\n")
    return HEADER + "".join(lines)


def source_of(root: Path, table: str, rows: Sequence[str]) -> str:
    """Return where a table's numbers are from, and how many of its rows no source can judge."""
    file = root / table / "base.yaml"
    base = OmegaConf.load(file).expected if file.is_file() else OmegaConf.create()
    every = [OmegaConf.merge(base, OmegaConf.load(root / f"{row}.yaml").expected) for row in rows]
    if all(each.compressed.evidence == "own" for each in every):
        return "its own runs"
    first = base or every[0]
    second = sum(each.compressed.evidence == "second_hand" for each in every)
    unknown = sum(not (each.dense["values"] or each.compressed["values"]) for each in every)
    parts = [": ".join(part for part in (first.source, first.compressed.where) if part)]
    parts += [f"{second} second-hand"] if second else []
    parts += [f"{unknown} without a number"] if unknown else []
    return "; ".join(parts)


def read_verdicts(file: Path, rows: Sequence[str]) -> list[dict[str, Any]]:
    """Read what `--json` wrote, and refuse what is no longer of this table.

    Raises:
        InputError: it cannot be read, or is of another table or version.
    """
    try:
        entries: list[dict[str, Any]] = read_json(file)
        strange = {entry["row"] for entry in entries} - set(rows)
        versions = {entry["numerics_version"] for entry in entries} - {None, NUMERICS_VERSION}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no file of mi-reproduce --json: {error!r}") from error
    if strange or versions:
        raise InputError(
            f"{file} is stale: {', '.join(map(str, sorted(strange | versions)))} is not of this "
            "table or NUMERICS_VERSION; run the table again with --json"
        )
    return entries


def describe(entries: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> str:
    """Say how many rows have which verdict, and on what they ran."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        found.setdefault(entry["row"], set()).add(entry["verdict"])
    counts: dict[str, int] = {}
    for row in rows:
        verdict = " and ".join(sorted(found.get(row, {NOT_RUN})))
        counts[verdict] = counts.get(verdict, 0) + 1
    devices = sorted({entry["device"] for entry in entries if entry["device"]})
    where = f", on {', '.join(devices)}" if devices else ""
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + where
