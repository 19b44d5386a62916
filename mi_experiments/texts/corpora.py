"""Where documents come from: files, and published corpora at pinned revisions."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
from datasets.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
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

# Not `load_dataset`, which asks the network even for a local file.
ARROW_READERS: dict[str, Callable[[str], datasets.Dataset]] = {
    ".parquet": datasets.Dataset.from_parquet,
    ".json.gz": datasets.Dataset.from_json,
    ".jsonl.gz": datasets.Dataset.from_json,
}


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
            `.parquet`, `.json.gz`, `.jsonl.gz` (rows, memory-mapped through `datasets`).
        text_field: the field or column that holds the text; not used for `.txt`.

    Raises:
        InputError: the file is missing, empty, of another kind, not UTF-8, not valid JSON, or a
            row has no such field.
    """
    path = existing_file(path)
    for ending, reader in ARROW_READERS.items():
        if path.name.endswith(ending):
            return _arrow_documents(reader, path, text_field)
    if path.suffix not in {".txt", ".jsonl"}:
        known = ", ".join([".txt", ".jsonl", *ARROW_READERS])
        raise InputError(f"{path}: cannot read this kind of file; give one of {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    documents = [text] if path.suffix == ".txt" else list(_json_lines(text, path, text_field))
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: no text in the file; give a file with text")
    return documents


def existing_file(path: str | Path) -> Path:
    """Return the path of a file, if it is there and holds anything.

    Raises:
        InputError: it does not.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .txt, .jsonl or .parquet file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give a file with text")
    return path


def _json_lines(text: str, path: Path, text_field: str) -> Iterator[str]:
    """Yield the text field of every line that is not blank."""
    # Not splitlines(), which also cuts at characters that are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            fields = ", ".join(row) if isinstance(row, dict) else "not a JSON object"
            raise InputError(
                f"{path}, line {number}: no text in field '{text_field}' (there is: {fields}); "
                "set text_field"
            )
        yield row[text_field]


def _arrow_documents(
    reader: Callable[[str], datasets.Dataset], path: Path, text_field: str
) -> Sequence[str]:
    """Return one column of a file of rows, memory-mapped."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        rows = reader(str(path))
    except StopIteration:  # what the JSON builder does with a file that unpacks to nothing
        raise InputError(f"{path}: no rows in the file; give a file with text") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        kind = "parquet" if path.suffix == ".parquet" else "json"
        raise InputError(f"{path}: cannot be read as {kind} ({reason})") from error
    finally:
        if shown:
            enable_progress_bars()
    if text_field not in rows.column_names:
        fields = ", ".join(rows.column_names)
        raise InputError(f"{path}: no column '{text_field}' (there is: {fields}); set text_field")
    if len(rows) == 0:
        raise InputError(f"{path}: no rows in the file; give a file with text")
    stored = rows.data.column(text_field)
    if str(stored.type) not in {"string", "large_string"} or stored.null_count:
        raise InputError(f"{path}: column '{text_field}' is not text in every row; set text_field")
    documents: Sequence[str] = rows[text_field]
    return documents
