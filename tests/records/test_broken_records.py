"""A record that is broken in any way is one line and left out; the others are compared."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_runs import make_broken_run, make_linears, make_manifest, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.errors import InputError
from mi_experiments.persistence.commits import read_manifest
from mi_experiments.records.linears import LINEARS, TIMINGS, read_linears
from mi_experiments.records.record_check import MANIFEST
from mi_experiments.records.result import RESULT
from mi_experiments.sweeps.outcomes import try_result

DEEP = "[" * 100_000 + "]" * 100_000


def swap(old: str, new: str) -> Callable[[Path], None]:
    """Return an edit of a file, which finds what it replaces."""

    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return an edit that removes a file and makes something else."""

    def edit(path: Path) -> None:
        path.unlink()
        make(path)

    return edit


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut off": lambda path: path.write_text(path.read_text()[:300]),
    "deep": lambda path: path.write_text(DEEP),
    "deep config": swap('"config": {', '"config": {"a": ' + "[" * 5000 + "]" * 5000 + ", "),
    "deep objects": lambda path: path.write_text('{"a":' * 100_000),
    "list": lambda path: path.write_text("[]"),
    "number": lambda path: path.write_text("1"),
    "null": lambda path: path.write_text("null"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "half a character": swap('"mi-run"', r'"\ud800"'),
    "NaN": swap('"mean": 1.5', '"mean": NaN'),
    "infinite": swap('"mean": 1.5', '"mean": 1e999'),
    "huge": swap('"threads": 1', '"threads": 1' + "0" * 400),
    "huge in config": swap('"nsamples": 32', '"nsamples": 1' + "0" * 5000),
    "text for a number": swap('"mean": 1.5', '"mean": "1.5"'),
    "true for a number": swap('"mean": 1.5', '"mean": true'),
    "part for a whole": swap('"threads": 1', '"threads": 1.5'),
    "list for an object": swap('"memory": {', '"memory": [], "seconds": {'),
    "missing key": swap('"resumed"', '"resumed_of_another_version"'),
    "unknown key": swap('"resumed"', '"later": 1, "resumed"'),
    "unknown key below": swap('"threads"', '"later": 1, "threads"'),
    "folder": in_its_place(Path.mkdir),
    "pipe": in_its_place(os.mkfifo),
    "link to nowhere": in_its_place(lambda path: path.symlink_to("nowhere")),
    "loop": in_its_place(lambda path: path.symlink_to(path)),
    "device": in_its_place(lambda path: path.symlink_to("/dev/zero")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_result_is_left_out_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "0", seed=0)
    make_run(tmp_path / "1", seed=1)
    BROKEN[kind](tmp_path / "1" / RESULT)
    main([str(tmp_path), "--format", "csv", "--columns", "run"])
    ended = capsys.readouterr()
    assert ended.out.split() == ["run", "0"]
    assert ended.err.startswith(f"mi-compare: note: left out: {tmp_path / '1' / RESULT}")
    assert ended.err.count("\n") == 1
    assert len(ended.err) < 1000
    assert try_result(tmp_path / "1") is None
    with pytest.raises(InputError, match=r"1/result\.json is no record of a run"):
        read_runs([tmp_path])
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "1")])
    assert left.value.code == 2
    assert "no record can be read" in capsys.readouterr().err


def parquet(**columns: pa.Array) -> Callable[[Path], None]:
    """Return an edit of a parquet file: columns that it then has."""

    def edit(path: Path) -> None:
        table = pq.read_table(path)
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(table, path)

    return edit


BROKEN_BESIDE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": (LINEARS, lambda path: path.write_bytes(b"")),
    "cut off": (LINEARS, lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "text": (LINEARS, lambda path: path.write_text("PAR1 PAR1")),
    "folder": (LINEARS, in_its_place(Path.mkdir)),
    "pipe": (LINEARS, in_its_place(os.mkfifo)),
    "other columns": (LINEARS, lambda path: pq.write_table(pa.table({"a": [1]}), path)),
    "null": (LINEARS, parquet(rows=pa.nulls(9, pa.int64()))),
    "NaN": (LINEARS, parquet(output_error=pa.array([float("nan")] * 9))),
    "text for numbers": (LINEARS, parquet(rows=pa.array(["four"] * 9))),
    "no timings": (TIMINGS, Path.unlink),
    "other timings": (TIMINGS, parquet(name=pa.array(["x"] * 9))),
    "manifest deep": (MANIFEST, lambda path: path.write_text(DEEP)),
    "manifest list": (MANIFEST, lambda path: path.write_text("[]")),
    "manifest empty": (MANIFEST, lambda path: path.write_text('{"fingerprint": 1, "files": []}')),
    "manifest files": (MANIFEST, lambda path: path.write_text(
        '{"fingerprint": {}, "files": {"linears.parquet": 1}}')),
    "manifest folder": (MANIFEST, in_its_place(Path.mkdir)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_BESIDE)
def test_a_run_with_another_broken_file_is_left_out_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, breaks = BROKEN_BESIDE[kind]
    for seed in range(2):
        make_run(tmp_path / str(seed), seed=seed)
        make_linears(tmp_path / str(seed))
        make_manifest(tmp_path / str(seed))
    breaks(tmp_path / "1" / name)
    main([str(tmp_path), "--format", "csv", "--columns", "run"])
    ended = capsys.readouterr()
    assert ended.out.split() == ["run", "0"]
    assert ended.err.count("\n") == 1
    assert str(tmp_path / "1" / name) in ended.err


def test_linears_of_a_run_that_failed_are_left_out_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "0")
    make_broken_run(tmp_path / "1", "failed", "no", seed=1)
    (tmp_path / "1" / LINEARS).write_bytes(b"PAR1")
    main([str(tmp_path), "--html", str(tmp_path / "a.html")])
    ended = capsys.readouterr()
    assert "a page of 2 runs" in ended.out
    assert f"left out: {tmp_path / '1' / LINEARS} cannot be read" in ended.err


def test_a_deep_manifest_is_damaged(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(DEEP)
    with pytest.raises(InputError, match=r"damaged .*nested too deep"):
        read_manifest(tmp_path)


def test_settings_of_any_types_are_compared(tmp_path: Path) -> None:
    """Of another version, or of another program."""
    make_run(tmp_path / "0", seed=0, wbits__widths="all")
    make_run(tmp_path / "1", seed="zero", wbits__widths=3, model=None)
    make_run(tmp_path / "2", seed=None, wbits__widths={"a": {}}, difference="x", run="y")
    path = tmp_path / "3" / RESULT
    make_run(path.parent, seed=[{}])
    swap('"evaluation": {', '"evaluation": [], "later": {')(path)
    for arguments in (
        ["--columns", "all", "--output", str(tmp_path / "a.parquet")],
        ["--sort", "seed", "--format", "csv"],
        ["--over", "seed", "--format", "json"],
        ["--html", str(tmp_path / "a.html")],
        ["--where", "seed == 0", "--format", "latex"],
    ):
        main([str(tmp_path), *arguments])


def test_linears_that_are_sound_are_read(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    make_linears(tmp_path / "0")
    assert len(read_linears(tmp_path / "0")) == 9
