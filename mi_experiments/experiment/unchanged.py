"""Is a finished run still the run of what it read: the same files, texts and numerics."""

import dataclasses
from pathlib import Path
from typing import Any

from mi_experiments.config.config import Config
from mi_experiments.config.identity import NUMERICS_VERSION
from mi_experiments.embedded import find_model
from mi_experiments.errors import InputError
from mi_experiments.llm.loading import content_hash, load_tokenizer, locate_model
from mi_experiments.persistence.commits import differences
from mi_experiments.records.result import Result
from mi_experiments.texts.sources import calibration_sequences, evaluation_texts
from mi_experiments.texts.windows import token_hash


def changed_since(config: Config, finished: Result, run_dir: Path) -> tuple[list[str], str]:
    """Say in what a finished run would read something else now, or that this is not known.

    Args:
        config: the config of the run.
        finished: its record.
        run_dir: where that is.

    Returns:
        A line a file of the model, text, or change of numerics; and a note where the model or a
        text is not at hand. Nothing is downloaded.
    """
    if finished.provenance is None:
        return [f"provenance: not in the record of {run_dir}: remove it to run again"], ""
    read = {
        "model_files": finished.provenance.model_files,
        "calibration": finished.provenance.calibration_sha256,
        "evaluation": {name: text.tokens_sha256 for name, text in finished.dense.items()},
        "numerics_version": finished.provenance.numerics_version,
    }
    try:
        now = read_now(config)
    except InputError as error:
        return [], f"recalled from {run_dir}, and what it read is not at hand: {error}"
    changed = differences(read, now)
    return [f"{line} since {run_dir} was run: remove it to run again" for line in changed], ""


def compare_sources(config: Config, finished: Result, run_dir: Path) -> list[str]:
    """Refuse to show a finished run for a model or a text that is another one now.

    Returns:
        What is to be said beside its numbers: where that cannot be compared, or where this version
        would compute other numbers.

    Raises:
        InputError: a file of the model or a text is not what the run has read.
    """
    changed, note = changed_since(config, finished, run_dir)
    sources = [line for line in changed if not line.startswith("numerics_version")]
    if sources:
        more = f" (and {len(sources) - 1} more)" if len(sources) > 1 else ""
        raise InputError(f"{sources[0]}, or choose another directory (hydra.run.dir=DIR){more}")
    return [note] * bool(note) + changed


def read_now(config: Config) -> dict[str, Any]:
    """Return the content hashes of what the same run would read now, without a network."""
    offline = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, offline=True))
    source = locate_model(
        find_model(config.model.path), revision=config.model.revision, offline=True
    )
    tokenizer = load_tokenizer(source.directory)
    return {
        "model_files": content_hash(source.directory),
        "calibration": token_hash(calibration_sequences(tokenizer, offline)),
        "evaluation": {text.name: text.sha256 for text in evaluation_texts(tokenizer, offline)},
        "numerics_version": NUMERICS_VERSION,
    }
