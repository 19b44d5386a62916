"""Keep the result so far on disk, so that nothing computed is ever lost."""

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
from mi_experiments.records.result import (
    LinearReport,
    Result,
    read_result,
    write_linears,
    write_result,
)

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
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            # Of an earlier process only its time counts: all else is committed, or done again.
            earlier = read_result(run_dir)
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
        write_result(self.result, self.run_dir)
        if len(self.linears) > self.written:
            write_linears(self.linears, self.run_dir)
            self.written = len(self.linears)

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


def peak_memory() -> dict[str, int]:
    """Return peak bytes: of the process, and of the accelerator where there is one."""
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["accelerator"] = torch.cuda.max_memory_allocated()
    return memory
