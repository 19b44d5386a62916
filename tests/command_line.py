"""How a command typed by a test ended, and what small runs are asked."""

from pathlib import Path
from typing import NamedTuple

SMALL = [
    "dataset.nsamples=4", "dataset.batch_size=2", "tracking=disabled", "n_groups.count=2",
    "reuse=false",  # so that two runs that are to agree are two computations
]  # fmt: skip


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_directories(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("result.json"))
