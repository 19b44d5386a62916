"""A run that is finished, given again: shown only if it is what it was, and mended where it is not.

What is damaged is computed again from what is intact. For that, a finished run gets back what only
served to continue it and was removed at its end, as far as its record and `linears.parquet` hold
the same; from there on it is an interrupted run.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from mi_experiments.config.config import Export
from mi_experiments.errors import InputError
from mi_experiments.experiment.phases import evaluation_file
from mi_experiments.experiment.safety_net import CHOICE
from mi_experiments.export.exports import EXPORTS
from mi_experiments.export.stored_model import folders_to_tidy, reports_file, tidy
from mi_experiments.persistence.commits import (
    Commits,
    Content,
    damaged_sibling,
    is_sound,
    read_manifest,
)
from mi_experiments.records.linears import LINEARS, TIMINGS, read_linears
from mi_experiments.records.record_check import NUMBERS, check_record
from mi_experiments.records.recorder import read_sealed
from mi_experiments.records.result import RESULT, Result

log = logging.getLogger(__name__)


def show_or_mend(finished: Result | None, run_dir: Path, export: Export) -> Result | None:
    """Return the record of a finished run, or None if some of its files must be computed again.

    Args:
        finished: what its record says; None for a run that is not finished.
        run_dir: the directory of the run.
        export: the export of its config.

    Raises:
        InputError: its files are what was written, and contradict each other.
    """
    if finished is None:
        return None
    if damaged := find_damage(run_dir, export):
        shown = ", ".join(damaged[:5]) + (", …" if len(damaged) > 5 else "")
        log.warning(
            "%s was complete, and of its files %d are not what it left: %s; what they held is "
            "computed again", run_dir, len(damaged), shown,
        )  # fmt: skip
        return None
    if lies := check_record(run_dir):
        raise InputError(
            f"{run_dir} contradicts itself: {'; '.join(lies[:3])}. Remove it to run again, or "
            "choose another directory (hydra.run.dir=DIR)"
        )
    tidy(Commits(run_dir, {}), export)
    return finished


def is_intact(run_dir: Path, export: Export) -> bool:
    """Whether a finished run has all its files, as they were, and none contradicts another."""
    try:
        return not find_damage(run_dir, export) and not check_record(run_dir)
    except InputError:
        return False


def find_damage(run_dir: Path, export: Export) -> list[str]:
    """Return the files of a finished run that are not what it left; reads all, changes nothing.

    What a finished run removes may be gone, or still there: its process was killed meanwhile.

    Raises:
        InputError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        raise InputError(f"{run_dir} has no manifest.json: nothing tells what its files should be")
    passing = folders_to_tidy(export)
    files = {n: entry for n, entry in manifest["files"].items() if n.split("/")[0] not in passing}
    damaged = [name for name, entry in files.items() if not is_sound(run_dir / name, entry)]
    if LINEARS not in files:
        damaged.append(LINEARS)
    try:
        _, beside = read_sealed(run_dir)
    except ValueError:
        return [*damaged, RESULT]
    timings = (beside or {}).get(TIMINGS)
    if timings is not None and not is_sound(run_dir / TIMINGS, {"sha256": timings}):
        damaged.append(TIMINGS)
    return damaged


def reopen(commits: Commits, export: Export, blocks: int) -> None:
    """Give a finished run back what it needs to go on; a record that is damaged is set aside.

    Args:
        commits: the commits of the run, whose run_identity agrees.
        export: the export of its config.
        blocks: number of blocks of the model.
    """
    run_dir = commits.run_dir
    path = run_dir / RESULT
    try:
        result, beside = read_sealed(run_dir)
    except FileNotFoundError:
        if NUMBERS in commits.run_identity:
            log.warning("%s has gone, of a run that was complete: it is made again", path)
        return
    except ValueError as error:
        path.rename(damaged_sibling(path))
        log.warning("%s is damaged (%s): set aside as %s.damaged", path, error, path.name)
        return
    if result.status != "completed":
        return
    files: dict[str, Content] = {}
    for phase, texts in (("dense", result.dense), ("compressed", result.compressed)):
        if list(texts) == list(commits.run_identity.get("evaluation", {})):
            for index, row in enumerate(texts.values()):
                files[evaluation_file(phase, index)] = json.dumps(asdict(row), indent=1).encode()
    if result.safety_net is not None:
        files[CHOICE] = json.dumps(asdict(result.safety_net), indent=1).encode()
    if result.compressed_sha256 is not None:
        commits.bind("compressed", result.compressed_sha256)
    timings = (beside or {}).get(TIMINGS)
    sound = (
        (LINEARS, commits.files.get(LINEARS)),
        (TIMINGS, {"sha256": timings} if timings else None),
    )
    if EXPORTS[export].keeps_model and all(e and is_sound(run_dir / name, e) for name, e in sound):
        files |= reports(run_dir, blocks)
    commits.commit(files)


def reports(run_dir: Path, blocks: int) -> dict[str, Content]:
    """Return the reports of every block, from the tables of all linears."""
    try:
        linears = read_linears(run_dir)
    except (pa.ArrowException, ValueError, KeyError, TypeError):
        return {}
    rows: dict[int, Sequence[dict[str, object]]] = dict.fromkeys(range(blocks), ())
    for block, members in groupby(linears, lambda linear: linear.block):
        rows[block] = [asdict(linear) for linear in members]
    return {
        reports_file(block): (json.dumps(list(of_block), indent=1) + "\n").encode()
        for block, of_block in rows.items()
    }


def set_aside(commits: Commits) -> None:
    """Set aside every committed file that is not what it was, by name, so that it is made again."""
    for name in list(commits.files):
        commits.find(name)
