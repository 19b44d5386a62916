"""A finished run is shown as it was or not at all; what is damaged is made again from the rest."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import EXPORTS, Damage, count, damaging
from killed_runs import BLOCKS, LINEARS, TEXTS, artefacts, flip, truncate

from mi_experiments.persistence.seals import open_seal, seal
from mi_experiments.records.result import read_result


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damage]:
    with damaging(tmp_path_factory.mktemp("damage"), "dense") as damage:
        yield damage


def exchange(path: Path) -> None:
    """Give a file the content of its neighbour, and the other way round."""
    other = path.with_name("model-00003-of-00004.safetensors")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def resealed(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Change a sealed file, and seal it again."""
    content, beside = open_seal(json.loads(path.read_text()))
    change(content)
    path.write_text(json.dumps(seal(content, beside)))


@pytest.mark.parametrize(
    ("name", "harm", "linears", "site_costs", "texts"),
    [
        ("model/model-00002-of-00004.safetensors", flip, 1, 0, 0),
        ("model/model-00002-of-00004.safetensors", exchange, 2, 0, 0),
        ("model/model-00001-of-00004.safetensors", truncate, 0, 0, 0),
        ("model/tokenizer.json", Path.unlink, 0, 0, 0),
        ("model/config.json", flip, 0, 0, 0),
        ("grids/00002.safetensors", flip, 1, 0, 0),
        ("plan.safetensors", flip, 0, BLOCKS, 0),
        ("linears.parquet", flip, BLOCKS, 0, 0),
        ("timings.parquet", truncate, BLOCKS, 0, 0),
        ("result.json", truncate, BLOCKS, 0, 2 * TEXTS),
        ("result.json", Path.unlink, BLOCKS, 0, 2 * TEXTS),
    ],
)
def test_what_is_damaged_is_named_and_made_again_from_what_is_intact(
    name: str,
    harm: Callable[[Path], object],
    linears: int,
    site_costs: int,
    texts: int,
    damage: Damage,
) -> None:
    """With all other parts left as they are, and in the end the bytes of a run never touched."""
    run_dir = damage.place.fresh()
    shutil.copytree(damage.states["finished"], run_dir)
    harm(run_dir / name)
    ended = damage.place.run()
    assert ended.code == 0, ended.out
    assert name in next(line for line in ended.out.splitlines() if line.startswith("WARNING"))
    assert "is complete;" not in ended.out
    assert artefacts(run_dir) == damage.place.reference
    counts = {key: ended.counts[key] for key in ("linears", "site_costs", "texts")}
    assert counts == {"linears": linears * LINEARS, "site_costs": site_costs, "texts": texts}
    again = damage.place.run()
    assert "is complete;" in again.out
    assert "WARNING" not in again.out


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        (
            "tiny/model.safetensors",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "model_files.model.safetensors: ",
        ),
        ("text.jsonl", lambda b: b.replace(b'"text": "', b'"text": "7 '), "calibration: "),
    ],
)
def test_a_finished_run_is_not_shown_for_another_model_or_text(
    name: str, change: Callable[[bytes], bytes], shown: str, damage: Damage
) -> None:
    run_dir = damage.place.fresh()
    shutil.copytree(damage.states["finished"], run_dir)
    path = damage.place.root / name
    before, kept = path.read_bytes(), {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    path.write_bytes(change(before))
    ended = damage.place.run()
    path.write_bytes(before)
    assert ended.code == 2
    (line,) = ended.out.strip().splitlines()
    assert shown in line
    assert "remove it to run again" in line
    changed = [
        p for p, content in kept.items() if p.name != "run.log" and p.read_bytes() != content
    ]
    assert changed == []
    assert "is complete;" in damage.place.run().out


def perplexity_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of the dense model."""
    measured: dict[str, Any] = record["dense"]["text"]["measurements"]["perplexity"]
    return measured


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("result.json", lambda c: perplexity_of(c).update(value=1.65), "dense"),
        ("result.json", lambda c: c["bits"].update(effective=1.0), "bits"),
    ],
)
def test_a_record_that_contradicts_itself_is_not_shown(
    name: str,
    change: Callable[[dict], object],
    said: str,
    damage: Damage,  # type: ignore[type-arg]
) -> None:
    """Nor is it computed away: all files are what somebody wrote on purpose."""
    run_dir = damage.place.fresh()
    shutil.copytree(damage.states["finished"], run_dir)
    resealed(run_dir / name, change)
    ended = damage.place.run()
    assert ended.code == 2
    (line,) = ended.out.strip().splitlines()
    assert line.startswith("mi-run: run contradicts itself: ")
    assert name in line
    assert said in line
    assert "Remove it to run again" in line


@pytest.mark.parametrize("name", ["manifest.json"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_without_a_sound_manifest_nothing_is_shown(
    name: str, harm: Callable[[Path], object], damage: Damage
) -> None:
    run_dir = damage.place.fresh()
    shutil.copytree(damage.states["finished"], run_dir)
    harm(run_dir / name)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    ended = damage.place.run()
    assert ended.code == 2
    (line,) = ended.out.strip().splitlines()
    assert line.startswith(f"mi-run: run/{name} ")
    assert "choose another directory" in line
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_that_is_not_finished_cannot_be_called_so(damage: Damage) -> None:
    """By an edit of its status; whatever is missing is computed."""
    run_dir = damage.place.fresh()
    shutil.copytree(damage.states["stopped"], run_dir)
    path = run_dir / "result.json"
    path.write_text(path.read_text().replace('"interrupted"', '"completed"', 1))
    ended = damage.place.run()
    assert ended.code == 0
    assert "result.json is damaged" in ended.out
    assert artefacts(run_dir) == damage.place.reference
    assert read_result(run_dir).status == "completed"


def test_random_edits_change_no_number(damage: Damage) -> None:
    counts = count(damage, 6, random.Random(0), verbose=False)
    assert not {name: n for name, n in counts.items() if "WRONG" in name}
    assert any("mended" in name for name in counts)


@pytest.mark.slow
@pytest.mark.parametrize("export", EXPORTS)
def test_many_random_edits_change_no_number(export: str, tmp_path: Path) -> None:
    with damaging(tmp_path, export) as damage:
        counts = count(damage, 67, random.Random(f"0 {export}"), verbose=False)
    print(export, dict(counts))
    assert not {name: n for name, n in counts.items() if "WRONG" in name}
