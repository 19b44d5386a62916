"""What an export is: what it writes of the compressed model, block by block and at the end."""

from collections.abc import Callable
from dataclasses import dataclass

from mi_experiments.compression.pipeline import CompressedBlock
from mi_experiments.config.config import Config
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Commits, Content

MODEL = "model"
"""Folder of the compressed blocks in the format of the checkpoint; a run is evaluated from it."""


@dataclass(frozen=True)
class ExportFormat:
    """An export: one row of `EXPORTS`. By default it writes nothing and refuses nothing.

    Attributes:
        folder: Folder that gets a safetensors file of each block; None if there is none.
        write_block: Returns the content of that file, for a block that the model holds; None if
            there is no folder.
        block_bytes: Returns how many bytes those files take, by the number of weights in them.
        keeps_model: Whether `model/` stays when the run is finished.
        complete: Commits what is still missing when all blocks are there; None if nothing is.
        refuse: Raises an InputError before anything is computed, for a model that it cannot hold.
    """

    folder: str | None = None
    write_block: Callable[[CompressedBlock, BlockWeights, Config], Content] | None = None
    block_bytes: Callable[[int, Config], int] = lambda weights, config: 0
    keeps_model: bool = False
    complete: Callable[[BlockWeights, Commits, OpenModel], None] | None = None
    refuse: Callable[[Walker], None] = lambda walker: None

    def file(self, block: int) -> str | None:
        """Return the file of a block, relative to the run directory."""
        return None if self.folder is None else f"{self.folder}/{block:05}.safetensors"


def model_file(number: int, blocks: int) -> str:
    """Return a file of `model/`: 0 is what lies outside the blocks, the others are the blocks."""
    return f"{MODEL}/model-{number + 1:05}-of-{blocks + 1:05}.safetensors"
