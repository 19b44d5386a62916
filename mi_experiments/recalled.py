"""Is a finished run still the run of what it read: the same files, texts and numerics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mi_experiments.config import Config
from mi_experiments.embedded import find_model
from mi_experiments.llm.loading import content_hash, load_tokenizer, locate_model
from mi_experiments.llm.windows import token_hash
from mi_experiments.provenance import NUMERICS_VERSION
from mi_experiments.record import Result
from mi_experiments.resume import differences
from mi_experiments.texts import calibration_sequences, evaluation_texts


def changed_inputs(config: Config, result: Result) -> list[str]:
    """Say which files of the model, tokens or numerics are not those that a finished run had.

    Nothing is downloaded.

    Raises:
        InputError: the model or a text is not at hand.
    """
    assert result.provenance is not None
    evaluated = {name: text.tokens_sha256 for name, text in result.dense.items()}
    read = {
        "model_files": result.provenance.model_files,
        "calibration": result.provenance.calibration_sha256,
        "evaluation": evaluated,
        "numerics_version": result.provenance.numerics_version,
    }
    return list(differences(read, read_now(config)))


def read_now(config: Config) -> Mapping[str, Any]:
    """Return the content hashes of what the same run would read now."""
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
