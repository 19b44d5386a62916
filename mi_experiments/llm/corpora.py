"""Text to token windows: where documents come from, and how they become calibration and evaluation.

Corpora differ between papers in split, separator and cut far more than methods differ in quality;
`CORPORA` states as data what the published protocols take.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

import datasets
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mi_experiments.errors import InputError

Purpose = Literal["calibration", "evaluation"]


class Sampling(Enum):
    """How calibration sequences are drawn: from documents joined, or each from a long document."""

    packed = "packed"
    document = "document"


class Windows(Enum):
    """How evaluation text is cut: one joined text, or each document on its own."""

    joined = "joined"
    documents = "documents"


class BosPolicy(Enum):
    """Whether a text begins with the beginning token; `auto` is what the tokenizer itself does."""

    auto = "auto"
    always = "always"
    never = "never"


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


def adds_bos(tokenizer: PreTrainedTokenizerBase, add_bos: BosPolicy) -> bool:
    """Say whether texts will begin with the beginning token.

    Raises:
        InputError: it is always wanted, and the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if add_bos is BosPolicy.always and bos is None:
        raise InputError("add_bos=always: this tokenizer has no beginning token; use add_bos=auto")
    if add_bos is BosPolicy.auto:
        # Asked of its output: flags such as `add_bos_token` do not always say what happens.
        return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return add_bos is BosPolicy.always


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, bos: bool) -> Int64[Tensor, "tokens"]:
    """Tokenize one text, with or without one beginning token before it.

    Where it is added, beginning tokens that the text itself starts with are not repeated. A text
    that holds nothing gives no tokens, not even the beginning token.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if bos:
        start = next((i for i, token in enumerate(ids) if token != tokenizer.bos_token_id), None)
        ids = [] if start is None else [tokenizer.bos_token_id, *ids[start:]]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    sampling: Sampling,
    add_bos: BosPolicy,
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw calibration sequences; none overlaps another, and there is no padding.

    `packed`: documents in a random order, each tokenized on its own, joined until there is enough,
    cut into windows, of which `nsamples` are drawn. `document`: one random window from each of
    `nsamples` random documents that are longer than seqlen (the convention for C4 in GPTQ,
    arXiv:2210.17323, and SparseGPT, arXiv:2301.00774).

    Raises:
        InputError: there is not enough text; never fewer samples than asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = {Sampling.packed: _draw_packed, Sampling.document: _draw_from_documents}[sampling]
    order = torch.randperm(len(documents), generator=generator).tolist()
    bos = adds_bos(tokenizer, add_bos)
    texts = (tokenize(tokenizer, documents[i], bos) for i in order)
    return draw(texts, nsamples, seqlen, generator)


def _draw_packed(
    texts: Iterator[Int64[Tensor, "_"]], nsamples: int, seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw windows of the joined texts, reading no more texts than needed."""
    needed, available, read = nsamples * seqlen, 0, []
    for text in texts:
        read.append(text)
        available += len(text)
        if available >= needed:
            break
    if available < needed:
        raise InputError(
            f"calibration needs nsamples={nsamples} x seqlen={seqlen} = {needed} tokens, and the "
            f"text has {available}: lower nsamples or seqlen, or give more text"
        )
    count = available // seqlen
    windows = torch.cat(read)[: count * seqlen].view(count, seqlen)
    return windows[torch.randperm(count, generator=generator)[:nsamples]]


def _draw_from_documents(
    texts: Iterator[Int64[Tensor, "_"]], nsamples: int, seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "nsamples seqlen"]:
    """Draw one window from each of the first texts that are longer than seqlen."""
    windows: list[Tensor] = []
    tokens = longest = 0
    for text in texts:
        tokens, longest = tokens + len(text), max(longest, len(text))
        if len(text) > seqlen:
            starts = len(text) - seqlen + 1
            start = int(torch.randint(starts, (), generator=generator))
            windows.append(text[start : start + seqlen])
        if len(windows) == nsamples:
            return torch.stack(windows)
    raise InputError(
        f"sampling=document needs {nsamples} documents longer than seqlen={seqlen} tokens, and "
        f"there are {len(windows)} ({tokens} tokens in all, the longest has {longest}): use "
        "sampling=packed, lower nsamples or seqlen, or give more text"
    )


@dataclass(frozen=True)
class EvaluationWindows:
    """What a model is evaluated on, and what of the text is not in it.

    Attributes:
        windows: token ids; nothing is padded, so lengths may differ.
        tokens: their number over all windows.
        dropped_tokens: tokenized but in no window: the tail, what was cut from long documents, and
            what a joined text has beyond `max_windows`.
        skipped_documents: with fewer than two tokens, so that nothing can be predicted.
        bos: whether a beginning token was put before each text.
    """

    windows: list[Int64[Tensor, "_"]]
    tokens: int
    dropped_tokens: int
    skipped_documents: int
    bos: bool


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    windows: Windows,
    separator: str,
    seqlen: int,
    max_windows: int | None,
    add_bos: BosPolicy,
) -> EvaluationWindows:
    r"""Cut evaluation text into windows that do not overlap.

    Args:
        tokenizer: of the model.
        documents: rows of the text, in order.
        windows: `joined`: the documents joined with the separator, tokenized once, cut at every
            seqlen tokens, the tail dropped (the protocol of arXiv:2210.17323 and 2301.00774: one
            beginning token for the whole text). `documents`: each document on its own, cut off
            after seqlen tokens, one forward pass a document.
        separator: what `joined` puts between documents: "\n\n" for WikiText-2.
        seqlen: tokens in a window, at most; at least 2.
        max_windows: take only the first ones; None for all.
        add_bos: whether a text begins with the beginning token.

    Raises:
        InputError: the text does not fill a single window.
    """
    bos = adds_bos(tokenizer, add_bos)
    cut: list[Tensor] = []
    tokenized = skipped = 0
    if windows is Windows.joined:
        text = tokenize(tokenizer, separator.join(documents), bos)
        tokenized = len(text)
        count = tokenized // seqlen
        cut = list(text[: count * seqlen].view(count, seqlen)[:max_windows])
    else:
        for document in documents:
            if len(cut) == max_windows:
                break
            text = tokenize(tokenizer, document, bos)
            tokenized += len(text)
            if len(text) < 2:
                skipped += 1
            else:
                cut.append(text[:seqlen])
    if not cut:
        raise InputError(
            f"the evaluation text has {tokenized} tokens in {len(documents)} documents and fills "
            f"no window of seqlen={seqlen} tokens (windows={windows.value}): give more text"
        )
    tokens = sum(len(window) for window in cut)
    return EvaluationWindows(
        windows=cut,
        tokens=tokens,
        dropped_tokens=tokenized - tokens,
        skipped_documents=skipped,
        bos=bos,
    )


def token_hash(tokens: Int64[Tensor, "..."]) -> str:
    """Return the SHA-256 of the shape and the token ids, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
