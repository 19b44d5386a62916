"""What jobs share: the dense model's evaluation, Fisher information, and the site costs of a plan.

Jobs of a sweep mostly agree in their model and their texts, and what follows from these alone is
computed once and read by all others (`persistence.cache`). A key holds everything that can move a
bit: the model's files, how and on what it runs, the versions of the libraries, the source of this
package, and of the config what `cost_key` lets the computation read. So a value that was read is
the one that would have been computed; the record says which were, so that times are not misread.

Where memory was short, sums were taken in another order: such values stay with their run.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mi_experiments.calibration.hessians import FISHER, FISHER_FIELDS
from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.identity import NUMERICS_VERSION, without_incidental
from mi_experiments.config.narrow import narrow
from mi_experiments.evaluation.measurements import Measurement
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.logits import plan_waves
from mi_experiments.out_of_memory import count_retries
from mi_experiments.persistence.atomic import file_hash
from mi_experiments.persistence.cache import (
    Content,
    cache_root,
    content_key,
    locked,
    read_entry,
    write_entry,
)
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.cost_key import cost_config
from mi_experiments.planning.site_costs import block_costs_name
from mi_experiments.records.recorder import Recorder
from mi_experiments.records.result import Provenance
from mi_experiments.texts.windows import token_hash

LIBRARIES = ("torch", "transformers", "numpy")
"""Libraries that compute."""

SETTINGS = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_",
            "ONEDNN_", "OPENBLAS_", "TORCH_")  # fmt: skip
"""How names of environment variables begin that may choose other kernels."""


def results_directory() -> Path:
    """Return where entries live."""
    return cache_root() / "results"


def computed_by(opened: OpenModel, provenance: Provenance, blocks: str | None) -> dict[str, Any]:
    """Return everything, beside the tokens and the config, that the dense model's numbers follow.

    Args:
        opened: the dense model.
        provenance: the provenance of the run.
        blocks: path of the list of blocks, as configured.
    """
    return {
        "numerics_version": NUMERICS_VERSION,
        "source": source_hash(),
        "versions": {name: provenance.versions[name] for name in LIBRARIES},
        "model_files": provenance.model_files,
        "dtype": str(opened.model.dtype),
        "attention": opened.model.config._attn_implementation,
        "blocks": blocks,
        "device": provenance.device,
        "threads": provenance.threads,
        "processor": processor(),
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith(SETTINGS)},
    }


@functools.cache
def source_hash() -> str:
    """Return the SHA-256 of this package's modules: no value outlives the code it came from."""
    package = Path(__file__).parents[1]
    files = {str(file.relative_to(package)): file_hash(file) for file in package.rglob("*.py")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@functools.cache
def processor() -> list[str]:
    """Name the processor, whose kernels are chosen by what it can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return [torch.backends.cpu.get_cpu_capability(), *sorted(names)]


def evaluation_key(
    computed: Mapping[str, Any],
    measurements: Sequence[str],
    windows: Sequence[Int[Tensor, "_"]],
    batch_tokens: int,
    logits_chunk: int,
    wave_tokens: int,
) -> str:
    """Return the key of what is measured of the dense model on a text.

    Args:
        computed: the value of `computed_by`.
        measurements: what is measured.
        windows: token ids.
        batch_tokens: tokens in one forward pass.
        logits_chunk: tokens whose logits exist at one time.
        wave_tokens: tokens whose hidden states exist at one time, of which only the batches that
            follow from them count.
    """
    batches = []
    for group in (
        group for wave in plan_waves(windows, batch_tokens, wave_tokens) for group in wave
    ):
        size = max(1, batch_tokens // len(windows[group[0]]))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return content_key({
        "what": list(measurements),
        "computed": computed,
        "tokens": token_hash(torch.cat(list(windows))),
        "lengths": [len(window) for window in windows],
        "batches": sorted(batches),
        "logits_chunk": logits_chunk,
    })


@dataclass
class Entry:
    """An entry that was found, or else the right to write it, which others wait for until `close`.

    Attributes:
        path: the path of the entry.
        found: its content.
        writable: whether it may be written.
        lock: the lock that is held.
    """

    path: Path
    found: Content | None
    writable: bool = False
    lock: ExitStack = field(default_factory=ExitStack)

    def close(self, computed: Content | None = None) -> None:
        """Let others have it; what was computed is written first."""
        if computed is not None and self.writable:
            write_entry(self.path, computed)
        self.lock.close()


class RunCache:
    """What one job computes for all, and reads of what others have computed.

    Args:
        config: of the run; with `cache=false` everything is computed, and nothing shared.
        computed: the value of `computed_by`.
        recorder: notes what was read and not computed, and counts shortages of memory.
        say: shows a line.
        check: raises when the job is to stop; called while it waits for another one.
    """

    def __init__(
        self,
        config: Config,
        computed: Mapping[str, Any],
        recorder: Recorder,
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self.config = config
        self.computed = computed
        self.recorder = recorder
        self.say = say
        self.check = check

    def measured(
        self,
        name: str,
        windows: Sequence[Int[Tensor, "_"]],
        wave_tokens: int,
        compute: Callable[[], dict[str, Measurement]],
    ) -> dict[str, Measurement]:
        """Return what is measured of the dense model on a text.

        Args:
            name: the name of the text.
            windows: token ids.
            wave_tokens: tokens whose hidden states exist at one time.
            compute: measures it.
        """
        if not self.config.cache:
            return compute()
        evaluation = self.config.evaluation
        key = evaluation_key(
            self.computed,
            evaluation.measurements,
            windows,
            evaluation.batch_tokens,
            evaluation.logits_chunk,
            wave_tokens,
        )
        entry = self.entry(key, "evaluate dense", name)
        with entry.lock:
            if entry.found is not None:
                found = json.loads(entry.found[1]["measurements"])
                return {name: Measurement(**number) for name, number in found.items()}
            with count_retries() as retries:
                measured = compute()
            plain = {name: asdict(number) for name, number in measured.items()}
            content: Content = ({}, {"measurements": json.dumps(plain)})
            entry.close(None if retries.count else content)
        return measured

    @contextmanager
    def plan(
        self, commits: Commits, calibration: Int[Tensor, "nsamples seqlen"], blocks: int
    ) -> Iterator[Callable[[], None]]:
        """Commit the parts of a plan that are known, and yield what shares those computed since.

        Args:
            commits: the commits of the run.
            calibration: token ids.
            blocks: number of blocks of the model.
        """
        entries: dict[str, Entry] = {}

        def share() -> None:
            for name in [name for name in entries if name in commits.files]:
                short = self.recorder.earlier_retries + self.recorder.retries.count
                entries.pop(name).close(None if short else commits.read_tensors(name))

        try:
            if self.config.cache and self.config.needs_activations:
                self.fetch(commits, calibration, blocks, entries)
            yield share
            share()
        finally:
            for entry in entries.values():
                entry.close()

    def fetch(
        self,
        commits: Commits,
        calibration: Int[Tensor, "nsamples seqlen"],
        blocks: int,
        entries: dict[str, Entry],
    ) -> None:
        """Commit what is known of a plan, and add the locked entries of what is not, by name."""
        narrowed = cost_config(self.config)
        for name in map(block_costs_name, range(blocks)):
            self.fetch_part(commits, name, narrowed, calibration, entries)
        if entries and narrowed.uses_fisher:
            sequences = calibration[: narrowed.wbits.fisher_samples]
            self.fetch_part(commits, FISHER, narrow(narrowed, FISHER_FIELDS), sequences, entries)

    def fetch_part(
        self,
        commits: Commits,
        name: str,
        config: Config,
        calibration: Int[Tensor, "nsamples seqlen"],
        entries: dict[str, Entry],
    ) -> None:
        """Commit one part of a plan if it is known; else add its locked entry."""
        if commits.find(name) is not None:
            return
        key = {
            "what": name,
            "computed": self.computed,
            "config": without_incidental(to_plain(config)),
            "calibration": token_hash(calibration),
        }
        entry = self.entry(content_key(key), "plan", name.partition(".")[0])
        if entry.found is None:
            entries[name] = entry
        else:
            commits.commit({name: entry.found})

    def entry(self, key: str, phase: str, name: str) -> Entry:
        """Read an entry, or take its lock; what another job computes is waited for, and read."""
        path = results_directory() / f"{key}.safetensors"
        entry = Entry(path, read_entry(path))
        if entry.found is None:
            entry.writable = entry.lock.enter_context(
                locked(path, lambda: self.say(f"{name}: waiting for another job"), self.check)
            )
            # Somebody else may have written it while this process waited.
            entry.found = read_entry(path)
        if entry.found is not None:
            entry.close()
            self.recorder.note_from_cache(phase, name)
        return entry
