"""One column of a file of rows, memory-mapped through `datasets`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import datasets
import pyarrow as pa
from datasets.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.utils.logging import get_verbosity, set_verbosity

from mi_experiments.errors import InputError
from mi_experiments.llm.checkpoint import one_line
from mi_experiments.persistence.atomic import file_hash

# Not `load_dataset`, which asks the network even for a local file.
READERS: dict[str, Callable[..., datasets.Dataset]] = {
    ".parquet": datasets.Dataset.from_parquet,
    ".json.gz": datasets.Dataset.from_json,
    ".jsonl.gz": datasets.Dataset.from_json,
}


class Column(Sequence[str]):
    """The texts of a memory-mapped column, read when they are asked for."""

    def __init__(self, stored: pa.ChunkedArray) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> "str | Column":
        found = self.stored[index]
        if isinstance(index, slice):
            return Column(found)
        text: str = found.as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for chunk in self.stored.chunks:
            yield from chunk.to_pylist()


def read_column(path: Path, ending: str, text_field: str) -> Column:
    """Return one column of a file of rows, memory-mapped.

    Args:
        path: the path of the file.
        ending: one of `READERS`.
        text_field: name of the column.

    Raises:
        InputError: `datasets` cannot read the file, or not every row has text.
    """
    try:
        with _quiet_datasets():
            # By content: what it keeps of a file that was replaced is not looked at.
            directory = Path(datasets.config.HF_DATASETS_CACHE, "mi_experiments", file_hash(path))
            rows = READERS[ending](str(path), cache_dir=str(directory))
    except MemoryError:
        raise
    except Exception as error:  # of many libraries, each with its own
        reason = one_line(Exception(str(error.__cause__ or error) or type(error).__name__))
        raise InputError(
            f"{path}: cannot be read as {ending[1:]} ({reason}); if it is damaged or cut off, "
            "fetch it again"
        ) from error
    if text_field not in rows.column_names:
        fields = ", ".join(rows.column_names)
        raise InputError(f"{path}: no column '{text_field}' (there is: {fields}); set text_field")
    stored = rows.data.column(text_field)
    if str(stored.type) not in {"string", "large_string", "string_view"}:
        raise InputError(
            f"{path}: column '{text_field}' holds {stored.type} and not text; set text_field"
        )
    if len(stored) == 0:
        raise InputError(f"{path}: no rows in the file; give a file with text")
    if stored.null_count:
        row = stored.is_null().index(True).as_py() + 1
        raise InputError(
            f"{path}, row {row}: no text in column '{text_field}' (it is null); remove the row, or "
            "set text_field"
        )
    try:
        stored.validate(full=True)
    except pa.ArrowInvalid:
        row = next(i for i, text in enumerate(stored, start=1) if not _is_utf8(text))
        raise InputError(
            f"{path}, row {row}: column '{text_field}' is not UTF-8 text; convert it first"
        ) from None
    return Column(stored)


def _is_utf8(text: pa.Scalar) -> bool:
    """Say whether a stored text can be decoded."""
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the bars and the messages of `datasets` from the screen."""
    shown, level = not are_progress_bars_disabled(), get_verbosity()
    disable_progress_bars()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(level)
        if shown:
            enable_progress_bars()
