"""The compressed model of a run, on disk from its first finished block on.

`model/` fills with the compressed blocks in the format of the checkpoint, one file a block, as they
are finished; the compressed model is evaluated from these files, and an export is the same files
with the rest of the model beside them. What is stored is what is evaluated.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor

from mi_experiments.compression.pipeline import CompressedBlock
from mi_experiments.config.config import Config, Export
from mi_experiments.errors import AuditError, ResumableError
from mi_experiments.export.dense import grid_tensors, write_settings
from mi_experiments.export.packed import lay_out, pack_linears
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.places import find_places
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.tokenizer_files import tokenizer_errors
from mi_experiments.persistence.atomic import disk_errors, temporary_sibling
from mi_experiments.persistence.commits import Commits, Content
from mi_experiments.records.linears import LinearReport

MODEL = "model"
GRIDS = "grids"
PACKED = "packed"
REPORTS = "reports"
CANDIDATES = "candidates"
SCAFFOLDING = ("site_costs", "evaluations", REPORTS, CANDIDATES)
"""Folders of what only serves to continue the run."""

PARTS = (MODEL, GRIDS, PACKED, *SCAFFOLDING)
"""Folders that belong to the run."""


@dataclass(frozen=True, eq=False)
class StoredModel:
    """The compressed blocks of a run.

    Attributes:
        weights: read finished blocks from `model/`, all others from the original checkpoint.
        commits: the commits of the run.
        config: the config of the run.
        folder: of a candidate that may not be kept, with a slash; empty for the model of the run.
    """

    weights: BlockWeights
    commits: Commits
    config: Config
    folder: str = ""

    def find(self, block: int) -> bool:
        """Say whether a block was finished earlier; if so, it is read from there from now on."""
        found = self.commits.find_all(*self._names(block))
        if found is None:
            return False
        self.weights.redirect(block, found[0])
        return True

    def store(self, block: CompressedBlock) -> None:
        """Write a block that the model holds, and let the model go on with what was written.

        Raises:
            AuditError: what is read back is not what was written; then the block does not count.
            ResumableError: the disk is full.
        """
        names = self._names(block.index)
        tensors = self.weights.stored(block.index)
        linears = [asdict(linear.report) for linear in block.linears]
        files: dict[str, Content] = {
            names[0]: (tensors, {"format": "pt"}),
            names[1]: (json.dumps(linears, indent=1) + "\n").encode(),
        }
        levels, scale_bits = self.config.wbits.number_format, self.config.recipe.scale_bits
        if self.config.export is Export.dense:
            grids = {x.report.name: x.grids for x in block.linears if x.report.changed}
            places = find_places(self.weights, block.index, [x.linear for x in block.linears])
            layouts = lay_out(block.linears, places, number_format=levels, scale_bits=scale_bits)
            files[names[2]] = grid_tensors(grids), layouts
        if self.config.export is Export.packed:
            files[names[2]] = pack_linears(
                block.linears, number_format=levels, scale_bits=scale_bits
            )
        self.commits.place(files)
        self._read_back(block.index, names[0])
        self.commits.adopt(*files)

    def reports(self, block: int) -> list[LinearReport]:
        """Return the reports of a finished block."""
        rows = self.commits.read_json(self._names(block)[1]) or []
        return [LinearReport.from_json(row) for row in rows]

    def take_over(self, candidate: "StoredModel") -> None:
        """Put the finished blocks of a candidate into the place of those of the run.

        A process that is killed in between does this again, and nothing else.

        Raises:
            ResumableError: the disk is full, or a block was damaged since it was written.
        """
        for block in range(len(self.weights.blocks)):
            names = self._names(block)
            for name, source in zip(names, candidate._names(block), strict=True):
                wanted = self.commits.files[source]["sha256"]
                there = self.commits.files.get(name, {}).get("sha256") == wanted
                if there and self.commits.find(name) is not None:
                    continue
                path = self.commits.find(source)
                if path is None:
                    raise ResumableError(
                        f"{source} was damaged after it was chosen: give the same command again to "
                        "compute it once more"
                    )
                self.commits.commit({name: path.read_bytes()})
            self.weights.redirect(block, self.commits.run_dir / names[0])

    def sha256(self) -> str:
        """Return one hash of the weights of all compressed blocks."""
        names = [self._file(block + 1) for block in range(len(self.weights.blocks))]
        hashes = [self.commits.files[name]["sha256"] for name in names]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def complete(self, opened: OpenModel) -> None:
        """Make `model/` a model that any tool loads: the rest of the weights, index, settings.

        Args:
            opened: the original, whose settings and tokenizer these are.

        Raises:
            InputError: the tokenizer cannot be saved.
            ResumableError: the disk is full, or a block was damaged since it was written.
        """
        rest = self.weights.stored_rest()
        self.commits.commit({self._file(0): (rest, {"format": "pt"})})
        places: dict[str, str] = {}
        total = 0
        for index in range(len(self.weights.blocks) + 1):
            name = self._file(index)
            found = self.commits.read_tensors(name)
            if found is None:
                raise ResumableError(
                    f"{name} was damaged after it was evaluated: give the same command again to "
                    "compute it once more"
                )
            places |= dict.fromkeys(found[0], Path(name).name)
            total += sum(tensor.numel() * tensor.element_size() for tensor in found[0].values())
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        settings = read_settings(opened, self.commits.run_dir)
        self.commits.commit({
            **{f"{MODEL}/{name}": content for name, content in settings.items()},
            f"{MODEL}/model.safetensors.index.json": (
                json.dumps(index_file, indent=2) + "\n"
            ).encode(),
        })

    def _names(self, block: int) -> list[str]:
        """Return the files of a block: weights, reports, and what the export asks for."""
        names = [self._file(block + 1), f"{self.folder}{reports_file(block)}"]
        part = {Export.dense: GRIDS, Export.packed: PACKED}.get(self.config.export)
        return names if part is None else [*names, f"{self.folder}{part}/{block:05}.safetensors"]

    def _file(self, number: int) -> str:
        """Return a file of the model: 0 is what lies outside the blocks."""
        count = len(self.weights.blocks) + 1
        return f"{self.folder}{MODEL}/model-{number + 1:05}-of-{count:05}.safetensors"

    def _read_back(self, block: int, name: str) -> None:
        """Take a block's weights from what was written, and require that not a bit differs."""
        module = self.weights.blocks[block]
        before = dict(module.state_dict())
        # So that what the file lacks is not there.
        self.weights.drop(block)
        self.weights.redirect(block, self.commits.run_dir / name)
        self.weights.load(block)
        for key, tensor in module.state_dict().items():
            if tensor.is_meta or not same_bits(tensor, before[key]):
                raise AuditError(f"{name}: {key} on disk differs from what was compressed")


def reports_file(block: int) -> str:
    """Return where the reports of a block are committed."""
    return f"{REPORTS}/{block:05}.json"


def read_settings(opened: OpenModel, run_dir: Path) -> dict[str, bytes]:
    """Let transformers write the settings of a model in a folder of their own, and read them.

    Raises:
        InputError: the tokenizer cannot be saved.
        ResumableError: the disk is full.
    """
    folder = temporary_sibling(run_dir / MODEL)
    try:
        with tokenizer_errors(), disk_errors(run_dir / MODEL):
            folder.mkdir()
            write_settings(opened.settings, opened.tokenizer, folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    finally:
        rmtree(folder, ignore_errors=True)


def tidy(commits: Commits, export: Export) -> None:
    """Remove what only served to continue the run, and the compressed model if nobody wants it."""
    commits.discard(*folders_to_tidy(export))


def folders_to_tidy(export: Export) -> tuple[str, ...]:
    """Return the folders that a finished run has no more; one killed at its end has some left."""
    return SCAFFOLDING if export is Export.dense else (*SCAFFOLDING, MODEL)


def same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Compare dtype, shape and every bit, so that NaN equals itself and 0.0 is not -0.0."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    flat, other_flat = (t.detach().flatten().view(torch.uint8) for t in (tensor, other))
    return torch.equal(flat, other_flat)
