"""How a command typed by a test ended, and what small runs are asked."""

import os
import subprocess
import sys
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


def mi_reproduce(directory: Path, *arguments: str) -> Ended:
    """Run `mi-reproduce` as a process of its own, without the checks that slow tests down."""
    program = "from mi_experiments.commands.start import reproduce; reproduce()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=directory, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)
