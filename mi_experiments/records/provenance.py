"""Where a run's numbers come from: versions, commit, machine, seeds and content hashes."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mi_experiments.config.config import Config
from mi_experiments.config.identity import NUMERICS_VERSION, asked_config
from mi_experiments.config.secrets import scrub
from mi_experiments.llm.loading import ModelSource, content_hash
from mi_experiments.persistence.atomic import file_hash
from mi_experiments.records.result import Provenance
from mi_experiments.texts.overlap import Overlap
from mi_experiments.texts.sources import calibration_source
from mi_experiments.texts.windows import token_hash

LIBRARIES = ("mi-experiments", "torch", "transformers", "tokenizers", "datasets", "numpy")

PROCESSOR = ("model name", "cpu family", "model")
"""Of the first processor that Linux lists."""


def measure_provenance(
    config: Config,
    source: ModelSource,
    model: nn.Module,
    calibration: Int[Tensor, "nsamples seqlen"],
    calibration_bos: bool,
    untied: Sequence[str] = (),
    *,
    overlap: Overlap | None = None,
    left_out: int = 0,
) -> Provenance:
    """Collect the provenance of a run whose model and calibration tokens are loaded.

    Args:
        config: the config of the run.
        source: the source of the model.
        model: the model that was loaded.
        calibration: token ids.
        calibration_bos: whether a beginning token was put before each document.
        untied: weights that the config ties to others and that are stored with other values.
        overlap: what the calibration text has in common with evaluation texts; None without files.
        left_out: how many documents and passages of that are left out of the calibration.
    """
    device = next(model.parameters()).device
    arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Provenance(
        numerics_version=NUMERICS_VERSION,
        versions={"python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in LIBRARIES},
        commit=checkout_commit(),
        command=" ".join(scrub_argument(argument) for argument in arguments),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        platform=f"{platform.platform()}, {name_processor()}",
        device=name,
        threads=torch.get_num_threads(),
        seeds={
            "run": config.seed,
            "dataset": config.dataset.seed,
            "n_groups": config.n_groups.seed,
        },
        model_files=content_hash(source.directory),
        model_revision=source.commit,
        calibration_sha256=token_hash(calibration),
        calibration_samples=len(calibration),
        calibration_bos=calibration_bos,
        untied=list(untied),
        calibration_documents=overlap.documents if overlap else None,
        calibration_duplicates=overlap.duplicates if overlap else None,
        calibration_shared=len(overlap.shared) if overlap else None,
        calibration_left_out=left_out if overlap else None,
        calibration_text_sha256=hash_of_calibration_text(config),
    )


def hash_of_calibration_text(config: Config) -> str | None:
    """Return one hash of the files that calibration draws from; None for the own language."""
    source = calibration_source(config)
    if source is None:
        return None
    hashes = [file_hash(path) for path in source.files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def name_processor() -> str:
    """Name the processor and the instructions that torch uses of it, which decide last bits."""
    name = platform.processor()
    with suppress(OSError):  # where Linux says it; Python does not ask there
        listed = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        found = dict(re.findall(rf"^({'|'.join(PROCESSOR)})\s*: (.+)$", listed, re.MULTILINE))
        # Virtual machines often tell no more than the maker: the numbers tell the generation.
        name = " ".join(found[key] for key in PROCESSOR if key in found) or name
    return f"{name} {torch.backends.cpu.get_cpu_capability()}".strip()


def run_identity(
    config: Config, provenance: Provenance, texts: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything that the numbers of a run depend on, for its manifest.

    Args:
        config: the config of the run.
        provenance: the provenance of the run.
        texts: content hash of each evaluation text, by name.
    """
    return {
        "config": asked_config(config),
        "model_files": provenance.model_files,
        "calibration": provenance.calibration_sha256,
        "evaluation": dict(texts),
        "numerics_version": provenance.numerics_version,
        "versions": {name: provenance.versions[name] for name in ("torch", "transformers")},
        "device": provenance.device,
        "threads": provenance.threads,
    }


def scrub_argument(argument: str) -> str:
    """Mask secrets in one argument; a pinned revision is none."""
    key, equals, value = argument.partition("=")
    if not equals or not re.fullmatch(r"[-+~\w.@/]+", key):
        return str(scrub(argument))
    return f"{scrub(key)}={scrub(value, key.rpartition('.')[2])}"


def checkout_commit() -> str | None:
    """Return the commit of the checkout that holds the package, `+` if it has local changes."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "") if commit else None
