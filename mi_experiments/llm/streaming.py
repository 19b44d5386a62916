"""Hold one decoder block at a time: its weights come from safetensors when its turn comes, and go.

What lies outside the blocks (embeddings, final norm, head) stays; of the blocks only shapes stay.
Which stored tensors become which parameter (fused experts, renamed keys, tied weights) is the
knowledge of transformers: its own loading code is called, with the tensors of one block.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from mi_experiments.errors import InputError
from mi_experiments.llm.checkpoint import one_line, stored_shapes, tensor_files
from mi_experiments.llm.inventory import block_list

log = logging.getLogger(__name__)

META = torch.device("meta")


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """Stored weights of a model, by the block that owns them.

    Attributes:
        model: Its blocks hold weights only between `load` and `drop`.
        path: Path of the block list.
        blocks: The blocks.
        device: Where loaded weights go.
        files: The file of each stored tensor of each block; under None of those outside the blocks.
        empty: What each block holds when it is dropped: shapes.
        conversions: How the tensors of a loaded block were renamed and fused.
        untied: Weights that the config ties to others, and that are stored with values of their
            own: they are kept apart.
    """

    model: PreTrainedModel
    path: str
    blocks: nn.ModuleList
    device: torch.device
    files: dict[int | None, Mapping[str, Path]]
    empty: tuple[Mapping[str, Tensor], ...]
    conversions: dict[int | None, Any] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        files: Sequence[Path],
        device: torch.device,
        path: str | None = None,
    ) -> "BlockWeights":
        """Match stored tensors with the parameters of a model, and load those outside its blocks.

        Args:
            model: On the meta device.
            files: Safetensors files that together hold every weight.
            device: Where weights go.
            path: Path of the block list, see ``block_list``.

        Raises:
            InputError: If the files and the model do not have the same weights, in name and shape,
                or a file is damaged.
        """
        path, blocks = block_list(model, path)
        places = tensor_files(files)
        missing = _check_complete(model, path, places)
        owned: dict[int | None, dict[str, Path]] = {}
        for key, owner in _owners(model, path, places).items():
            owned.setdefault(owner, {})[key] = places[key]
        empty = tuple(dict(block.state_dict(keep_vars=True)) for block in blocks)
        weights = cls(model, path, blocks, device, {**owned}, empty)
        weights._load_rest(missing)
        return weights

    def load(self, block: int) -> None:
        """Read the weights of one block.

        Raises:
            InputError: If a file is damaged or has changed.
        """
        self._read(block)
        self.blocks[block].requires_grad_(False)

    def drop(self, block: int) -> None:
        """Forget the weights of one block; its shapes stay."""
        module = self.blocks[block]
        for name, tensor in self.empty[block].items():
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, tensor)

    def load_all(self) -> None:
        """Read the weights of every block, for a model that fits into memory."""
        for block in range(len(self.blocks)):
            self.load(block)

    def fork(self) -> "BlockWeights":
        """Copy the table of files, so that redirecting blocks leaves this one as it is."""
        return replace(self, files=dict(self.files))

    def redirect(self, block: int, file: Path) -> None:
        """Read one block from now on from a file that `stored` tensors were written to."""
        self.files[block] = dict.fromkeys(stored_shapes(file), file)

    def stored(self, block: int) -> dict[str, Tensor]:
        """Return the present weights of a loaded block as a checkpoint stores them, on the CPU.

        Fused parameters are taken apart again, so that what is written is in the format that was
        read.
        """
        prefix = f"{self.path}.{block}."
        tensors = {prefix + key: t for key, t in self.blocks[block].state_dict().items()}
        return own(self.as_stored(block, tensors))

    def as_stored(self, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take tensors apart as a checkpoint stores those of a loaded block, without a copy.

        Args:
            block: which is loaded.
            tensors: the tensors in the places of its own, by name in the model.
        """
        return self._revert(tensors, self.conversions[block])

    def stored_rest(self) -> dict[str, Tensor]:
        """Return the weights outside the blocks likewise; of tied ones, the first."""
        tied = self.model.all_tied_weights_keys
        tensors = {
            key: tensor
            for key, tensor in self.model.state_dict().items()
            if key not in tied and not tensor.is_meta
        }
        return own(self._revert(tensors, self.conversions[None]))

    def _revert(self, tensors: Mapping[str, Tensor], conversions: Any) -> dict[str, Tensor]:
        """Undo what loading did to names and shapes."""
        self.model._weight_conversions = conversions
        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return reverted

    def _read(self, owner: int | None) -> None:
        """Let transformers take the tensors of one block, or of everything else, into the model."""
        places = self.files.get(owner, {})
        try:
            with ExitStack() as stack:
                opened = {
                    # Not mapped into memory, where a file that shrinks would end the process.
                    file: stack.enter_context(safe_open(file, "pt", backend="pread"))
                    for file in sorted(set(places.values()))
                }
                tensors = {key: opened[file].get_slice(key) for key, file in places.items()}
                report = _convert(self.model, tensors, self.device)
        except (SafetensorError, OSError) as error:
            names = ", ".join(sorted({str(file) for file in places.values()}))
            raise InputError(f"{names}: cannot be read: {one_line(error)}") from error
        if report.mismatched_keys or report.conversion_errors:
            raise InputError(f"the weights of {self.path}.{owner} have changed on disk")
        self.conversions[owner] = self.model._weight_conversions

    def _load_rest(self, missing: set[str]) -> None:
        """Load everything outside the blocks, and compute what no checkpoint stores.

        Args:
            missing: Weights that no file holds; those that are tied take the value of another.
        """
        model = self.model
        self._read(None)
        # Rotary frequencies and other buffers that are not stored: by the model's own rules.
        model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)  # type: ignore[arg-type]
        model._initialize_missing_keys(False)
        self._tie(missing)
        model.requires_grad_(False)
        inside = f"{self.path}."
        outside = {k: t for k, t in model.state_dict().items() if not k.startswith(inside)}
        if lacking := sorted(key for key, tensor in outside.items() if tensor.is_meta):
            raise InputError(f"the checkpoint lacks {len(lacking)} weights, such as {lacking[0]}")

    def _tie(self, missing: set[str]) -> None:
        """Tie what the config ties, but for stored weights that differ, as transformers does."""
        tied = dict(self.model.all_tied_weights_keys)
        with _silenced("transformers.modeling_utils"):
            self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        self.untied.extend(sorted(tied.keys() - self.model.all_tied_weights_keys.keys()))
        if not self.untied:
            return
        for key in self.untied:
            log.warning(
                "%s is stored with other values than %s, although config.json ties them "
                "(tie_word_embeddings): both are used as they are stored",
                key,
                tied[key],
            )
        # One entry of the config is for all of them: what is tied in memory is written twice.
        self.model.all_tied_weights_keys.clear()
        for config in (self.model.config, self.model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keep back what another library logs, because it is said in other words."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU."""
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _convert(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Any:
    """Rename, fuse and cast stored tensors into the parameters of a model, as loading does."""
    dtype = model.dtype
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model, None, None),  # type: ignore[arg-type]
    )
    report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    return report


def _check_complete(model: PreTrainedModel, path: str, places: Mapping[str, Path]) -> set[str]:
    """Raise unless the files and the model have the same weights; reads shapes only.

    Args:
        model: On the meta device.
        path: Path of its block list.
        places: The file of each stored tensor.

    Returns:
        Weights of the model that are not stored: tied to one that is, or computed.
    """
    shapes = {
        key: shape for file in set(places.values()) for key, shape in stored_shapes(file).items()
    }
    tensors = {k: torch.empty(shape, dtype=model.dtype, device=META) for k, shape in shapes.items()}
    report = _convert(model, tensors, META)
    missing = set(report.missing_keys)
    model._adjust_missing_and_unexpected_keys(report)
    tied = _tied_to_stored(model, missing)
    found = {
        "lacks": sorted(report.missing_keys - tied),
        "has unknown": sorted(report.unexpected_keys),
        "has of another shape": sorted(key for key, *_ in report.mismatched_keys),
        "cannot fuse": sorted(report.conversion_errors),
    }
    if faults := [
        f"{verb} {len(keys)} weights, such as {keys[0]}" for verb, keys in found.items() if keys
    ]:
        folder = min(places.values()).parent
        raise InputError(f"the checkpoint in {folder} does not fit: it {'; it '.join(faults)}")
    if shared := sorted(key for key in tied if key.startswith(f"{path}.")):
        raise InputError(
            f"{shared[0]} is tied to another weight: blocks that share weights cannot be loaded "
            "one at a time"
        )
    return missing


def _tied_to_stored(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Return the missing weights that are tied to one that is stored, on whichever side."""
    groups: dict[str, set[str]] = {}
    for key, source in model.all_tied_weights_keys.items():
        while source in model.all_tied_weights_keys:
            source = model.all_tied_weights_keys[source]
        groups.setdefault(source, {source}).add(key)
    return {key for group in groups.values() if group - missing for key in group & missing}


def _owners(model: PreTrainedModel, path: str, keys: Iterable[str]) -> dict[str, int | None]:
    """Say of each stored tensor that the model takes which block it belongs to."""
    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    owners: dict[str, int | None] = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name = key
        if name in parameters:
            block = name.removeprefix(f"{path}.").partition(".")[0]
            owners[key] = int(block) if name.startswith(f"{path}.") else None
    return owners
