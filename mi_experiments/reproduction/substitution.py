"""Another model in the place of a row's, and how it is told from the row's own.

A row on another model is a rehearsal: texts, protocol and method are those of the row, and no
number of it says anything about the published one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mi_experiments.config.config import Config, ModelConfig
from mi_experiments.errors import InputError
from mi_experiments.llm.checkpoint import read_json
from mi_experiments.reproduction.verdicts import FAIL, PASS, Judgement

OTHER = "OTHER MODEL"
"""The verdict on a number of another model than the row's: neither passed nor failed."""

UNTOLD = ("dtype", "max_position_embeddings")
"""Entries of a shape that a copy of the same model may write in another way."""

Shapes = Mapping[str, Mapping[str, Any]]
"""By the name of a model, what its config.json holds of shapes: `conf/shapes.yaml`."""


def substitute(models: Path, name: str) -> list[str]:
    """Return the overrides that put another model in the place of a row's; all else stays.

    Args:
        models: its directory, or a folder of directories with the names in `conf/model/`.
        name: the name of the row's model.

    Raises:
        InputError: there is no model.
    """
    chosen = next((d for d in (models, models / name) if (d / "config.json").is_file()), None)
    if chosen is None:
        raise InputError(
            f"--model {models}: no config.json, there or in {models / name}; give the directory "
            "of a model, or one with a directory for each model of the table"
        )
    path = str(chosen.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [
        f"model.path='{path}'",
        "model.revision=null",
        "model.offline=true",
        f"model.name=substitute_for_{name}",
    ]


def shorten(config: Config, limits: Mapping[str, int]) -> list[str]:
    """Return the overrides that make the texts of a row short; nothing gets longer.

    Args:
        config: the config of the row.
        limits: `conf/rehearsal.yaml`.
    """
    overrides = [
        f"model.seqlen={min(config.model.seqlen, limits['seqlen'])}",
        f"dataset.seqlen={min(config.dataset.seqlen, limits['seqlen'])}",
        f"dataset.nsamples={min(config.dataset.nsamples, limits['nsamples'])}",
    ]
    for name, text in config.evaluation.datasets.items():
        windows = min(text.max_windows or limits["max_windows"], limits["max_windows"])
        overrides += [
            f"evaluation.datasets.{name}.seqlen={min(text.seqlen, limits['seqlen'])}",
            f"evaluation.datasets.{name}.max_windows={windows}",
        ]
    return overrides


def other_model(asked: ModelConfig, ran: Mapping[str, Any], shapes: Shapes) -> str:
    """Say why the model of a run is not that of the row; nothing if there is no sign of that.

    Args:
        asked: the config of the row.
        ran: the part `model` of what the run was asked.
        shapes: the shapes of the models that are known.
    """
    if ran["name"] != asked.name:
        return f"run on {ran['path']}, not on {asked.path}"
    if ran["path"] == asked.path or not shows_shape(asked, ran, shapes):
        return ""
    found = read_json(Path(ran["path"]).expanduser() / "config.json")
    wrong = [
        f"{key} is {found[key]}, not {value}"
        for key, value in shapes[asked.name].items()
        if key not in UNTOLD and found.get(key, value) != value
    ]
    return f"{ran['path']} is not {asked.path}: {', '.join(wrong)}" if wrong else ""


def shows_shape(asked: ModelConfig, ran: Mapping[str, Any], shapes: Shapes) -> bool:
    """Say whether the shape of the model that ran, and of the row's, can be looked up."""
    return asked.name in shapes and (Path(ran["path"]).expanduser() / "config.json").is_file()


def unproved(
    asked: ModelConfig, ran: Mapping[str, Any], judgements: Sequence[Judgement], shapes: Shapes
) -> str:
    """Say that nothing shows a model from elsewhere to be the row's, if that is so.

    Its dense numbers show it; where they are wrong, its shape must, so that they are held against
    the row and not against some other model.

    Args:
        asked: the config of the row.
        ran: the part `model` of what the run was asked.
        judgements: the judgements of the run.
        shapes: the shapes of the models that are known.
    """
    dense = {j.verdict for j in judgements if j.phase == "dense" and j.expected is not None}
    shown = PASS in dense or (FAIL in dense and shows_shape(asked, ran, shapes))
    moved = ran["path"] != asked.path
    return f"nothing shows that {ran['path']} is {asked.path}" if moved and not shown else ""


def set_aside(judgements: Sequence[Judgement], reason: str) -> list[Judgement]:
    """Take back every verdict on another model, if there is a reason; what was not run stays so."""
    return [
        replace(j, verdict=OTHER, why=reason) if reason and j.ours is not None else j
        for j in judgements
    ]
