"""What a run has finished, so that a killed run continues where it was.

A commit is one or more files that count all at once: each appears whole (`atomic.place`), and only
then are they named in `manifest.json`, with their SHA-256. The manifest also holds the run_identity
of everything that the numbers depend on; a run directory with another one is refused. It is sealed,
and a name in it that leads out of the run directory is refused before anything is touched.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mi_experiments.errors import InputError
from mi_experiments.persistence.atomic import (
    disk_errors,
    file_hash,
    inside,
    remove_temporaries,
    save_atomically,
    write_atomically,
)
from mi_experiments.persistence.plain_json import read_json
from mi_experiments.persistence.seals import open_seal, seal

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

Content = bytes | tuple[Mapping[str, Tensor], Mapping[str, str]]
"""Content of a file: bytes, or tensors and metadata of a safetensors file."""


class Commits:
    """The finished parts of one run.

    Args:
        run_dir: the directory of the run; held by this process alone.
        run_identity: everything that the numbers depend on, as JSON-ready values.
        own: names in the run directory that only commits may have.

    Raises:
        InputError: the directory was begun with another identity, or its manifest is damaged, or it
            holds something of another origin under one of the run's own names.
    """

    def __init__(
        self, run_dir: Path, run_identity: Mapping[str, Any], own: Sequence[str] = ()
    ) -> None:
        self.run_dir = run_dir
        self.run_identity: dict[str, Any] = json.loads(json.dumps(run_identity))
        self.files: dict[str, dict[str, Any]] = {}
        begun = read_manifest(run_dir)
        if begun is not None:
            refuse_changes(run_dir, begun["run_identity"], self.run_identity)
            self.run_identity = begun["run_identity"]
            self.files = begun["files"]
        elif foreign := [name for name in own if (run_dir / name).exists()]:
            raise InputError(
                f"{run_dir / foreign[0]} exists, and no run is recorded in {run_dir}: choose "
                "another directory (hydra.run.dir=DIR)"
            )
        remove_temporaries(run_dir)
        if begun is None:
            self._write_manifest()

    def bind(self, key: str, value: Any) -> None:
        """Add what is known only now to the run_identity.

        Raises:
            InputError: the run was begun with another value.
        """
        if key in self.run_identity:
            refuse_changes(self.run_dir, self.run_identity, {key: value})
        else:
            self.run_identity[key] = value
            self._write_manifest()

    def seal(self, key: str, value: Any) -> None:
        """Keep what is known only at the end beside the identity; an earlier value gives way."""
        if self.run_identity.get(key) != value:
            self.run_identity[key] = value
            self._write_manifest()

    def commit(self, files: Mapping[str, Content]) -> None:
        """Let files appear, and count, all at once.

        Args:
            files: the files by path below the run directory.

        Raises:
            ResumableError: the disk is full; earlier commits are as they were.
        """
        self.place(files)
        self.adopt(*files)

    def place(self, files: Mapping[str, Content]) -> None:
        """Let files appear that do not count yet; `adopt` ends what this begins.

        Args:
            files: the files by path below the run directory.

        Raises:
            ResumableError: the disk is full; earlier commits are as they were.
            InputError: a folder is a link, or the disk refuses for another reason.
        """
        for name, content in files.items():
            path = inside(self.run_dir, name)
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                write_atomically(path, content)
            else:
                save_atomically(path, *content)

    def adopt(self, *names: str) -> None:
        """Let files that are already there count."""
        before = dict(self.files)
        for name in names:
            path = inside(self.run_dir, name)
            self.files[name] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
        if self.files != before:
            self._write_manifest()

    def find(self, name: str) -> Path | None:
        """Return a committed file after checking its content, or None if there is none.

        A file whose content is not what was committed is set aside under another name and no longer
        counts, so that its part of the run is computed again.
        """
        if name not in self.files:
            return None
        path = inside(self.run_dir, name)
        if is_sound(path, self.files[name]):
            return path
        if path.is_file():
            path.rename(damaged_sibling(path))
            log.warning("%s is damaged: set aside as %s.damaged, computed again", path, path.name)
        else:
            log.warning("%s has gone: computed again", path)
        del self.files[name]
        self._write_manifest()
        return None

    def find_all(self, *names: str) -> list[Path] | None:
        """Return several files that were committed together, or None if one does not count."""
        paths = [self.find(name) for name in names]
        return None if None in paths else [path for path in paths if path is not None]

    def read_json(self, name: str) -> Any | None:
        """Return the content of a committed JSON file, or None if there is none."""
        path = self.find(name)
        return None if path is None else json.loads(path.read_text())

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return tensors and metadata of a committed safetensors file, or None if there is none."""
        path = self.find(name)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}

    def discard(self, *folders: str) -> None:
        """Remove and forget the committed files of folders that served only to continue the run."""
        kept = {n: entry for n, entry in self.files.items() if n.split("/")[0] not in folders}
        if kept == self.files:
            return
        for path in [inside(self.run_dir, name) for name in self.files.keys() - kept.keys()]:
            path.unlink(missing_ok=True)
            damaged_sibling(path).unlink(missing_ok=True)
        emptied = {
            Path(*parts[:depth])
            for parts in (Path(name).parts for name in self.files.keys() - kept.keys())
            for depth in range(1, len(parts))
        }
        for folder in sorted(emptied, key=lambda folder: (-len(folder.parts), folder)):
            # One that holds anything else stays.
            with suppress(OSError):
                (self.run_dir / folder).rmdir()
        # Last, so that a process that is killed before leaves a list of what is still to go.
        self.files = kept
        self._write_manifest()

    def _write_manifest(self) -> None:
        content = {"run_identity": self.run_identity, "files": dict(sorted(self.files.items()))}
        text = json.dumps(seal(content), indent=1) + "\n"
        write_atomically(self.run_dir / MANIFEST, text.encode())


def is_sound(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there and is what was committed."""
    return path.is_file() and file_hash(path) == entry["sha256"]


def damaged_sibling(path: Path) -> Path:
    """Return where a file is set aside that is not what was committed."""
    return path.with_name(f"{path.name}.damaged")


def refuse_changes(run_dir: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Require that a run goes on as it was begun.

    Args:
        run_dir: the directory of the run.
        begun: everything that its numbers depend on.
        now: what is known of that now.

    Raises:
        InputError: something differs; the line shows it.
    """
    if changes := list(differences({key: begun.get(key) for key in now}, dict(now))):
        shown = "; ".join(changes[:5]) + ("; …" if len(changes) > 5 else "")
        raise InputError(
            f"{run_dir} was begun with something else: {shown}. Choose another directory "
            "(hydra.run.dir=DIR), or remove this one"
        )


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """Return the manifest of a run directory, or None if it has none.

    Raises:
        InputError: it cannot be read, is not what was written, or names a file that is not below
            the run directory.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return None
    try:
        content, _ = open_seal(read_json(path))
        content["run_identity"].keys()
        for entry in content["files"].values():
            if not isinstance(entry["sha256"], str):
                raise TypeError("a hash is no text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}), and nothing else tells what is finished: remove "
            f"{run_dir} to begin again, or choose another directory (hydra.run.dir=DIR)"
        ) from error
    for name in content["files"]:
        inside(run_dir, name)
    return content


def differences(begun: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield what differs between two JSON-ready values: `wbits.average: 4.0 → 3.0`."""
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in sorted(begun.keys() | now.keys()):
            yield from differences(begun.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif begun != now:
        yield f"{path}: {shorten(begun)} → {shorten(now)}"


def shorten(value: Any) -> str:
    """Show a value in a line; of a hash, the first characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
