"""Load a causal language model and its tokenizer, from a directory or the Hugging Face hub.

Weights come from safetensors only, and no code of a repository is ever executed. What can be wrong
with what the user named is found before the weights are read where possible, and said in one line.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mi_experiments.errors import InputError, MiError
from mi_experiments.llm.checkpoint import one_line, stored_dtype, weight_files, weight_names
from mi_experiments.llm.model_config import build_config, exported_settings
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.tokenizer_files import check_tokenizer_files, explain_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)


@dataclass(frozen=True)
class ModelSource:
    """Where a model really is.

    Attributes:
        directory: Local directory with its files; a snapshot in the cache if it is from the hub.
        commit: Commit hash on the hub, None for a directory of the user.
    """

    directory: Path
    commit: str | None


def locate_model(
    path_or_id: str, *, revision: str | None, offline: bool, weights: bool = True
) -> ModelSource:
    """Find a model on disk, or bring it from the hub into the local cache.

    Args:
        path_or_id: A directory, or a hub id ``org/name``.
        revision: Branch, tag or commit on the hub; None means its main branch.
        offline: Look in the local cache only.
        weights: Bring the weights too, not only the text files.

    Raises:
        InputError: If there is no such model, or the hub does not give it.
    """
    name = f"model.path={path_or_id}"
    directory = Path(path_or_id).expanduser()
    if path_or_id and directory.is_dir():
        if revision is not None:
            raise InputError(f"model.revision={revision} is for hub ids, but {name} is a directory")
        return ModelSource(directory.resolve(), None)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id) is None:
        raise InputError(f"{name} is not a directory; a hub id looks like org/name")
    try:
        snapshot = snapshot_download(
            path_or_id,
            revision=revision,
            allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if weights else ())],
            # Subfolders and "consolidated" files hold the same weights in other formats.
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=offline,
        )
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its terms at https://huggingface.co/{path_or_id} "
            "and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a directory nor on the hub; check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"model.revision={revision} does not exist for {name}") from error
    except LocalEntryNotFoundError as error:
        reason = "model.offline=true" if offline else "the hub cannot be reached"
        at = f" at model.revision={revision}" if revision else ""
        raise InputError(
            f"{name}{at} is neither a directory nor completely in the local cache, and {reason}; "
            f"run `hf download {path_or_id}` where there is a network"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise InputError(f"{name}: the hub refused: {one_line(error)}") from error
    return ModelSource(Path(snapshot), Path(snapshot).name)


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model whose blocks hold weights only while they are worked on.

    Attributes:
        model: In eval mode, nothing trainable; everything outside the blocks is loaded.
        tokenizer: Of the model.
        weights: Loads and drops its blocks.
        settings: Config and settings for generation, as files that an export holds.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: BlockWeights
    settings: Mapping[str, bytes] = field(default_factory=dict)


def open_model(
    path_or_id: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    offline: bool,
    attention: str = "auto",
    allow_float16: bool = False,
    blocks: str | None = None,
) -> OpenModel:
    """Open a model for inference, every parameter from the checkpoint and none trainable.

    Args:
        path_or_id: A directory, or a hub id ``org/name``.
        revision: Branch, tag or commit on the hub.
        dtype: ``auto`` (that of most weights in the checkpoint), ``float32``, ``bfloat16`` or
            ``float16``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        offline: Never use the network.
        attention: ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.
        allow_float16: Accept float16 for a bfloat16 checkpoint, whose range it lacks.
        blocks: Path of the block list, see ``block_list``.

    Raises:
        InputError: If anything about the request or the files prevents exactly that.
    """
    place = _parse_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"model.dtype={dtype} is not one of auto, {', '.join(DTYPES)}")
    source = locate_model(path_or_id, revision=revision, offline=offline)
    config = _read_config(source.directory, attention)
    files = weight_files(source.directory)
    stored = stored_dtype(files)
    if stored == torch.bfloat16 and dtype == "float16" and not allow_float16:
        raise InputError(
            f"model.dtype=float16 lacks the range of the bfloat16 checkpoint {path_or_id}; "
            "use model.dtype=bfloat16, or insist with model.allow_float16=true"
        )
    tokenizer = load_tokenizer(source.directory)
    model = _build(config, attention, "eager", stored if dtype == "auto" else DTYPES[dtype])
    weights = BlockWeights.open(model, files, place, blocks)
    settings = exported_settings(model, source.directory, untied=bool(weights.untied))
    return OpenModel(model, tokenizer, weights, settings)


def load_model(
    path_or_id: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    offline: bool,
    attention: str = "auto",
    allow_float16: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model as `open_model` does, and load all its blocks; for models that fit into memory.

    Args:
        path_or_id: A directory, or a hub id ``org/name``.
        revision: Branch, tag or commit on the hub.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        offline: Never use the network.
        attention: ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.
        allow_float16: Accept float16 for a bfloat16 checkpoint.

    Returns:
        The model, in eval mode, and its tokenizer.
    """
    opened = open_model(
        path_or_id,
        revision=revision,
        dtype=dtype,
        device=device,
        offline=offline,
        attention=attention,
        allow_float16=allow_float16,
    )
    opened.weights.load_all()
    return opened.model, opened.tokenizer


def load_skeleton(
    path_or_id: str, *, revision: str | None, offline: bool, attention: str = "auto"
) -> PreTrainedModel:
    """Build a model on the meta device from its config alone: shapes and names, no weights.

    Args:
        path_or_id: A directory, or a hub id ``org/name``.
        revision: Branch, tag or commit on the hub.
        offline: Never use the network.
        attention: ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.

    Returns:
        The model, in eval mode.
    """
    source = locate_model(path_or_id, revision=revision, offline=offline, weights=False)
    config = _read_config(source.directory, attention)
    # Of the ways to run fused experts, the one whose shapes do not depend on the routing.
    return _build(config, attention, "batched_mm", None)


def _build(
    config: PreTrainedConfig, attention: str, experts: str, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Build a model on the meta device."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attention == "auto":
        attention = "sdpa" if kind._supports_sdpa else "eager"
    if attention == "sdpa" and not kind._supports_sdpa:
        raise InputError(f"model.attention=sdpa is nothing that {kind.__name__} has; use eager")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                attn_implementation=attention,
                experts_implementation=experts,
                trust_remote_code=False,
                **({} if dtype is None else {"dtype": dtype}),
            )
    except Exception as error:  # each architecture meets what makes no sense in its own way
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"config.json describes no {kind.__name__}: {reason}") from error
    model.train(False)
    model.requires_grad_(False)
    return model


def choose_device(device: str) -> str:
    """Resolve `auto`: the accelerator where there is one.

    Raises:
        InputError: If this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(_parse_device(device))


def content_hash(directory: str | Path) -> dict[str, str]:
    """Hash every file of a model that can influence its numbers.

    Args:
        directory: Local directory with config, weights and tokenizer.

    Returns:
        SHA-256 in hexadecimal by file name, sorted by name; of weights in folders inside, by path.

    Raises:
        InputError: If the directory is missing or has no such file, or its index is none.
    """
    folder = Path(directory)
    found = {file for kind in TEXT_FILES + WEIGHT_FILES for file in folder.glob(kind)}
    found |= {folder / name for name in weight_names(folder)}
    names = sorted(file for file in found if file.is_file())
    if not names:
        raise InputError(f"{directory} is not a directory with the files of a model")
    hashes = {}
    for name in names:
        with name.open("rb") as file:
            key = name.relative_to(folder).as_posix()
            hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _parse_device(device: str) -> torch.device:
    """Return the device if it is one that this machine has."""
    match = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", device)
    if match is None:
        raise InputError(f"model.device={device} is not one of auto, cpu, cuda, cuda:N")
    if device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise InputError(
            f"model.device={device}, but this machine has {torch.cuda.device_count()} GPUs that "
            f"torch {torch.__version__} can use; use model.device=cpu"
        )
    return torch.device(device)


def _read_config(directory: Path, attention: str) -> PreTrainedConfig:
    """Read the config of a model that can be loaded as a causal language model."""
    if attention not in {"auto", "sdpa", "eager"}:
        raise InputError(f"model.attention={attention} is not one of auto, sdpa, eager")
    return build_config(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        InputError: If the directory has none that can be used.
    """
    check_tokenizer_files(directory)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory,
            config=build_config(directory),
            trust_remote_code=False,
            local_files_only=True,
        )
    except MiError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower one
        reason = explain_tokenizer(directory, error)
        raise InputError(f"{directory} has no usable tokenizer: {reason}") from error
    return tokenizer
