"""Keep the result so far on disk, so that nothing computed is ever lost."""

import json
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.secrets import scrub
from mi_experiments.out_of_memory import Retries, count_retries, shortage_in
from mi_experiments.persistence.commits import read_manifest
from mi_experiments.persistence.seals import open_seal
from mi_experiments.records.linears import LinearReport, write_linears
from mi_experiments.records.result import RESULT, Result, read_result, write_result

log = logging.getLogger(__name__)


class Recorder:
    """The result so far, on disk after every phase, so that nothing computed is ever lost.

    A record that is already there is left alone until `open` says that this run continues it.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.opened = read_manifest(run_dir) is None
        self.written = 0
        self.linears: list[LinearReport] = []
        self.retries = Retries()
        self.earlier_retries = 0
        self.stopping: str | None = None
        self.result = Result(
            status="running",
            error=None,
            config=scrub(to_plain(config)),
            provenance=None,
            dense={},
            compressed={},
            bits=None,
            sparsity=None,
            weights=None,
            coverage=None,
            memory={},
            seconds={},
            resumed=0,
        )
        with suppress(FileNotFoundError, ValueError):
            # Of an earlier process only its time counts: all else is committed, or done again.
            earlier, sealed = read_sealed(run_dir)
            if sealed is not None:
                self.result = replace(
                    self.result,
                    seconds=earlier.seconds,
                    from_cache=earlier.from_cache,
                    resumed=earlier.resumed + 1,
                )
                self.earlier_retries = earlier.retries

    def open(self) -> None:
        """Write the result from now on."""
        self.opened = True

    def update(self, **changes: Any) -> None:
        """Change fields of the result and write it."""
        retries = self.earlier_retries + self.retries.count
        changes |= {"memory": peak_memory(), "retries": retries}
        self.result = replace(self.result, **changes)
        if not self.opened:
            return
        if len(self.linears) > self.written:
            write_linears(self.linears, self.run_dir)
            self.written = len(self.linears)
        told = False
        while not told:
            # A signal may come in the middle, and this be called from within.
            stopping, shown = self.stopping, self.result
            if stopping is not None and shown.status == "running":
                shown = replace(shown, status="interrupted", error=stopping)
            write_result(shown, self.run_dir)
            told = stopping == self.stopping

    def stop(self, line: str) -> None:
        """Let the record say that the run was interrupted, for as long as it has no other end."""
        self.stopping = line
        self.update()

    def note_from_cache(self, phase: str, name: str) -> None:
        """Record at once that a part of a phase was read and not computed.

        A run that is continued finds that part among its own, and would not know.
        """
        log.info("%s: %s is read from the cache", phase, name)
        names = dict.fromkeys([*self.result.from_cache.get(phase, []), name])
        self.update(from_cache=self.result.from_cache | {phase: list(names)})

    @contextmanager
    def count_retries(self) -> Iterator[None]:
        """Count for the record how often memory is short."""
        with count_retries() as self.retries:
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and record it.

        Raises:
            MemoryShortage: in the place of whatever else says that memory ran out.
        """
        log.info("%s", name)
        started = time.perf_counter()
        try:
            with shortage_in(name):
                yield
        finally:
            elapsed = time.perf_counter() - started + self.result.seconds.get(name, 0.0)
            self.update(seconds=self.result.seconds | {name: elapsed})


def read_sealed(run_dir: Path) -> tuple[Result, dict[str, str] | None]:
    """Read `result.json`, and the hashes of files beside it; None where it carries no seal.

    Raises:
        ValueError: it is not what was written, or no result of this version.
    """
    try:
        _, beside = open_seal(json.loads((run_dir / RESULT).read_text()))
        return read_result(run_dir), beside
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def peak_memory() -> dict[str, int]:
    """Return peak bytes: of the process, and of the accelerator where there is one."""
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["accelerator"] = torch.cuda.max_memory_allocated()
    return memory
