"""Where documents come from: files, and published corpora at pinned revisions."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from mi_experiments.errors import InputError
from mi_experiments.llm.checkpoint import one_line
from mi_experiments.persistence.atomic import file_hash
from mi_experiments.texts.columns import READERS, read_column


def locate_corpus(
    hub_id: str,
    revision: str,
    files: Sequence[str],
    *,
    directory: str | Path | None,
    offline: bool,
) -> list[Path]:
    """Find the files of a published corpus, downloading them into the hub's cache if need be.

    Args:
        hub_id: dataset repository on the Hugging Face Hub.
        revision: commit, tag or branch.
        files: paths in the repository.
        directory: a local copy of the repository's files; None for the hub.
        offline: never touch the network; what is not in the cache is an error at once.

    Raises:
        InputError: a file is neither in the directory, the cache nor reachable.
    """
    if directory is None:
        return [_download(hub_id, revision, file, offline) for file in files]
    paths = [Path(directory).expanduser() / file for file in files]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; path={directory} must hold the files of {hub_id} under "
                "the names that they have there"
            )
    return paths


def _download(hub_id: str, revision: str, file: str, offline: bool) -> Path:
    """Return the cached copy of a hub file, downloaded if need be and allowed."""
    name = f"corpus {hub_id}"
    fetch = partial(hf_hub_download, hub_id, file, repo_type="dataset", revision=revision)
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(fetch(local_files_only=True))
        if not offline:
            # Where there is no network this says so at once; a download tries again and again.
            HfApi().dataset_info(hub_id, revision=revision, timeout=10)
            return Path(fetch())
        state = "is offline"
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its terms at https://huggingface.co/datasets/{hub_id} "
            "and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is not on the hub; check the spelling, or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no revision {revision}; see its history on the hub"
        ) from error
    except (
        LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, httpx.TransportError
    ) as error:  # fmt: skip
        state = f"cannot reach the hub ({one_line(error)})"
    except EntryNotFoundError as error:
        raise InputError(f"{name} has no file {file} at revision {revision}") from error
    except HFValidationError as error:
        raise InputError(f"{name} is no hub id, which looks like org/name") from error
    except (OSError, httpx.HTTPError) as error:
        raise InputError(f"{name}: {file} cannot be downloaded: {one_line(error)}") from error
    raise InputError(
        f"{name}: {file} is not in the local cache, and the run {state}; run `hf download {hub_id} "
        f"{file} --repo-type dataset --revision {revision}` where there is a network, or set path "
        "to a directory that holds it"
    )


def read_documents(path: str | Path, text_field: str = "text") -> Sequence[str]:
    """Read the documents of one file.

    Args:
        path: `.txt` (the whole file is one document), `.jsonl` (one JSON object a line), or
            `.parquet`, `.json.gz`, `.jsonl.gz` (rows, memory-mapped through `datasets`); in
            capitals too. A byte order mark is not part of the text.
        text_field: the field or column that holds the text; not used for `.txt`.

    Raises:
        InputError: the file is missing, empty, cut off, of another kind, not UTF-8, not valid JSON,
            or a row has no such field or no text in it.
    """
    path = existing_file(path)
    ending = kind(path)
    documents: Sequence[str]
    if ending == ".txt":
        documents = [_read_text(path)]
    elif ending == ".jsonl":
        with path.open("rb") as lines:
            documents = list(_json_lines(lines, path, text_field))
    else:
        documents = _read_rows(path, text_field)
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: no text in the file; give a file with text")
    return documents


def existing_file(path: str | Path) -> Path:
    """Return the path of a file, if it can be read and holds anything.

    Raises:
        InputError: it does not.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:  # the home of a user who does not exist
        raise InputError(f"{path}: {one_line(error)}; give the whole path") from error
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .txt, .jsonl or .parquet file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give a file with text")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: you may not read this file; change its permissions")
    return path


def kind(path: Path) -> str:
    """Return the ending of a file, in small letters, that says how its documents are read.

    Raises:
        InputError: files of this kind cannot be read.
    """
    known = (".txt", ".jsonl", *READERS)
    found = next((ending for ending in known if path.name.lower().endswith(ending)), None)
    if found is None:
        listed = ", ".join(known)
        raise InputError(f"{path}: cannot read this kind of file; give one of {listed}")
    return found


def same_content(path: Path, other: Path) -> bool:
    """Say whether two names lead to one file, or to copies of it that are read alike."""
    if path.samefile(other):
        return True
    if kind(path) != kind(other) or path.stat().st_size != other.stat().st_size:
        return False
    return file_hash(path) == file_hash(other)


def _read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark, its line ends as line feeds."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; convert it first") from None


def _json_lines(lines: Iterable[bytes], path: Path, text_field: str) -> Iterator[str]:
    """Yield the text field of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text) if text.strip() else None
        except UnicodeDecodeError:
            reason = "not UTF-8 text; convert it first"
            raise InputError(f"{path}, line {number}: {reason}") from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", one_line(error))
            raise InputError(f"{path}, line {number}: not valid JSON ({reason})") from None
        if not text.strip():
            continue
        if not isinstance(row, dict) or text_field not in row:
            fields = ", ".join(row) if isinstance(row, dict) else "not a JSON object"
            raise InputError(
                f"{path}, line {number}: no text in field '{text_field}' (there is: {fields}); "
                "set text_field"
            )
        if not isinstance(row[text_field], str):
            raise InputError(
                f"{path}, line {number}: no text in field '{text_field}' (it holds "
                f"{json.dumps(row[text_field])[:20]}); remove the line, or set text_field"
            )
        if not _is_unicode(row[text_field]):
            raise InputError(
                f"{path}, line {number}: field '{text_field}' is not valid Unicode (half of a "
                "surrogate pair); remove or correct the line"
            )
        yield row[text_field]


def _is_unicode(text: str) -> bool:
    """Say whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_rows(path: Path, text_field: str) -> Sequence[str]:
    """Return one column of a file of rows, memory-mapped; of JSON that `datasets` refuses, a list.

    Raises:
        InputError: the file is damaged, or not every row has text.
    """
    try:
        return read_column(path, kind(path), text_field)
    except InputError:
        if kind(path) == ".parquet":
            raise
    # Line by line, which names the line that is wrong.
    try:
        with gzip.open(path, "rb") as lines:
            try:
                documents = list(_json_lines(lines, path, text_field))
            except InputError:
                while lines.read(1 << 20):  # where it is damaged, that is the reason
                    pass
                raise
    except (EOFError, OSError, zlib.error) as error:
        reason = f"the file is damaged or cut off ({one_line(error)}); fetch it again"
        raise InputError(f"{path}: {reason}") from None
    if not documents:
        raise InputError(f"{path}: no rows in the file; give a file with text")
    return documents
