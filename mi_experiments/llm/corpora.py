"""Where documents come from: files, and published corpora at pinned revisions.

Corpora differ between papers in split, separator and cut far more than methods differ in quality;
`CORPORA` states as data what the published protocols take.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from mi_experiments.errors import InputError

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class CorpusPart:
    """What one purpose takes of a corpus.

    Attributes:
        files: paths in the hub repository, and under a directory that holds a copy of it.
        separator: what the published protocol puts between the rows; None where each row is a
            document of its own.
        first_rows: how many rows are taken, from the beginning; None for all.
    """

    files: tuple[str, ...]
    separator: str | None
    first_rows: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A published corpus.

    Attributes:
        hub_id: dataset repository on the Hugging Face Hub.
        revision: the commit to take; a branch only where no commit can be named.
        text_field: the column that holds the text.
        parts: what calibration and evaluation take, after SparseGPT (arXiv:2301.00774, section 4)
            and the code published with it.
    """

    hub_id: str
    revision: str
    text_field: str
    parts: dict[Purpose, CorpusPart]


CORPORA = {
    "wikitext2": Corpus(
        hub_id="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        text_field="text",
        parts={
            "calibration": CorpusPart(
                files=("wikitext-2-raw-v1/train-00000-of-00001.parquet",), separator=" "
            ),
            "evaluation": CorpusPart(
                files=("wikitext-2-raw-v1/test-00000-of-00001.parquet",), separator="\n\n"
            ),
        },
    ),
    # The repository itself holds only a loading script, which `datasets` no longer runs; the hub
    # converts it to parquet on a branch that it rewrites, so there is no commit to pin.
    "ptb": Corpus(
        hub_id="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        text_field="sentence",
        parts={
            "calibration": CorpusPart(files=("penn_treebank/train/0000.parquet",), separator=" "),
            "evaluation": CorpusPart(files=("penn_treebank/test/0000.parquet",), separator=" "),
        },
    ),
    "c4": Corpus(
        hub_id="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        text_field="text",
        parts={
            "calibration": CorpusPart(
                files=("en/c4-train.00000-of-01024.json.gz",), separator=None
            ),
            "evaluation": CorpusPart(
                files=("en/c4-validation.00000-of-00008.json.gz",), separator=" ", first_rows=1100
            ),
        },
    ),
}

ARROW_BUILDERS = {".parquet": "parquet", ".json.gz": "json", ".jsonl.gz": "json"}


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
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .txt, .jsonl or .parquet file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give a file with text")
    for ending, builder in ARROW_BUILDERS.items():
        if path.name.endswith(ending):
            return _arrow_documents(builder, path, text_field)
    if path.suffix not in {".txt", ".jsonl"}:
        known = ", ".join([".txt", ".jsonl", *ARROW_BUILDERS])
        raise InputError(f"{path}: cannot read this kind of file; give one of {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    documents = [text] if path.suffix == ".txt" else list(_json_lines(text, path, text_field))
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: no text in the file; give a file with text")
    return documents


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


def _arrow_documents(builder: str, path: Path, text_field: str) -> Sequence[str]:
    """Return one column of a file of rows, memory-mapped."""
    try:
        rows = datasets.load_dataset(builder, data_files=[str(path)], split="train")
    except StopIteration:  # what the JSON builder does with a file that unpacks to nothing
        raise InputError(f"{path}: no rows in the file; give a file with text") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read as {builder} ({reason})") from error
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


def load_hub_documents(
    name: str, purpose: Purpose, *, directory: str | Path | None = None, offline: bool = False
) -> Sequence[str]:
    """Load what one purpose takes of a published corpus.

    Rows that are pieces of one running text (WikiText, Penn Treebank) are joined for calibration,
    as SparseGPT does, so that a beginning token does not follow every sentence. Evaluation joins
    rows itself (`evaluation_windows`).

    Args:
        name: a key of `CORPORA`.
        purpose: calibration or evaluation.
        directory: a local copy of the hub repository's files; None downloads them once into the
            Hugging Face cache.
        offline: never touch the network; what is not in the cache is an error at once.

    Raises:
        InputError: unknown corpus, or a file is neither in the directory, the cache nor reachable.
    """
    if name not in CORPORA:
        raise InputError(f"corpus '{name}' is not known: one of {', '.join(CORPORA)}")
    corpus = CORPORA[name]
    part = corpus.parts[purpose]
    documents: list[Sequence[str]] = []
    for file in part.files:
        path = Path(directory, file) if directory else _download(corpus, file, offline)
        documents.append(read_documents(path, corpus.text_field))
    rows = documents[0] if len(documents) == 1 else [row for rows in documents for row in rows]
    if part.first_rows is not None:
        rows = rows[: part.first_rows]
    if purpose == "calibration" and part.separator is not None:
        return [part.separator.join(rows)]
    return rows


def _download(corpus: Corpus, file: str, offline: bool) -> Path:
    """Return the cached copy of a hub file, downloaded if need be."""
    try:
        path = hf_hub_download(
            corpus.hub_id,
            file,
            repo_type="dataset",
            revision=corpus.revision,
            local_files_only=offline,
        )
    except (OSError, HfHubHTTPError) as error:
        state = "not in the Hugging Face cache (offline)" if offline else "cannot be downloaded"
        raise InputError(
            f"{corpus.hub_id}/{file}: {state} ({type(error).__name__}); "
            "connect, or set path to a directory that holds this file"
        ) from error
    return Path(path)
