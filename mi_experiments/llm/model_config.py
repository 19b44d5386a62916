"""config.json of a model: what is read of it, and what an export writes.

Training leaves flags in it that have no part in compression (what a forward pass returns, where to
attend with which kernel, how to generate). The model is built without them, and an export holds
the file that was read, changed only where the weights are others.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mi_experiments.errors import InputError
from mi_experiments.llm.checkpoint import check_present, one_line, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"

RETURNED = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""What a forward pass is to return, whatever the file says."""


def build_config(directory: Path) -> PreTrainedConfig:
    """Let transformers read the config of a causal language model, without `RETURNED`.

    Raises:
        InputError: If there is none, or of another kind, or transformers refuses it.
    """
    file = directory / CONFIG
    check_present(file)
    if not file.is_file():
        raise InputError(f"{directory} has no config.json, so it is not a model directory")
    raw = read_json(file)
    kind = str(raw.get("model_type"))
    if kind not in CONFIG_MAPPING:
        advice = "it needs its own code, which is never run" if "auto_map" in raw else "update it?"
        raise InputError(f"{file}: model_type={kind} is unknown to transformers; {advice}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    architectures = raw.get("architectures") or [causal]
    if not isinstance(architectures, list):
        raise InputError(f"{file}: architectures={architectures} is not a list of names")
    if causal is None or causal not in architectures:
        raise InputError(
            f"{file}: {kind} with architectures={architectures} is not a causal language model"
        )
    if raw.get("quantization_config") is not None:
        raise InputError(f"{file}: the weights are already quantized; use the original checkpoint")
    changes = {key: value for key, value in RETURNED.items() if key in raw}
    if any(key in raw for key in ("dtype", "torch_dtype")):
        changes["dtype"] = named_dtype(raw.get("dtype") or raw.get("torch_dtype"))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True, **changes
        )
    except Exception as error:  # each architecture checks its config as it likes
        raise InputError(f"{file} is not valid: {one_line(error)}") from error
    text = config.get_text_config(decoder=True)
    for key in RETURNED.keys() & vars(text).keys():
        setattr(text, key, RETURNED[key])
    return config


def named_dtype(claimed: Any) -> Any:
    """Return the dtype that a config claims by its plain name, float32 if there is none of it.

    Only shapes are ever planned with it: the dtype of weights is that of the files.
    """
    if claimed is None or isinstance(claimed, dict):
        return claimed
    name = str(claimed).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return name if known else "float32"


def exported_settings(model: PreTrainedModel, directory: Path, untied: bool) -> dict[str, bytes]:
    """Return the settings of a loaded model as files: as they were read, but for the weights.

    Args:
        model: What was loaded, or has the same config.
        directory: Where from.
        untied: Whether weights are apart that the config ties.

    Returns:
        Content by file name. Settings for generation go through byte by byte.
    """
    raw = read_json(directory / CONFIG)
    for key in ("torch_dtype", "auto_map"):
        raw.pop(key, None)
    if raw.get("quantization_config", 0) is None:
        del raw["quantization_config"]
    raw |= {
        "model_type": model.config.model_type,
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if untied:
        nested = [part for part in raw.values() if isinstance(part, dict)]
        for part in [raw, *(part for part in nested if "tie_word_embeddings" in part)]:
            part["tie_word_embeddings"] = False
    files = {CONFIG: (json.dumps(raw, indent=2) + "\n").encode()}
    if (directory / GENERATION).is_file():
        files[GENERATION] = (directory / GENERATION).read_bytes()
    return files
