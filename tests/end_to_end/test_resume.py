"""A run that was ended in any way goes on with the same command, and its files do not tell.

Processes are really killed, by crash_server.py. What a killed process leaves on a disk that goes on
working is what it had written: these are no power failures.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_server import Ended
from hydra import compose, initialize_config_dir
from killed_runs import (
    BLOCKS,
    COMMAND,
    LINEARS,
    REMOVED,
    TEXTS,
    Place,
    artefacts,
    committed,
    contents,
    flip,
    open_place,
    truncate,
    work_left,
)
from seldom import seldom

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.errors import InputError, ResumableError
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.persistence.commits import Commits, differences
from mi_experiments.persistence.seals import SEAL, seal
from mi_experiments.records import recorder
from mi_experiments.records.recorder import Recorder
from mi_experiments.records.result import read_result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from open_place(tmp_path_factory.mktemp("resume"), "export=dense")


@pytest.fixture(params=["dense", "packed", "nothing"], scope="module")
def any_place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    root = tmp_path_factory.mktemp(f"resume-{request.param}")
    yield from open_place(root, f"export={request.param}")


def continue_to_the_end(place: Place, broken: str) -> Ended:
    """Continue a run; require what an unbroken one gives, and no work that was already done."""
    run_dir = place.root / "run"
    expected = work_left(run_dir)
    ended = place.run()
    assert ended.code == 0, f"{broken}: {ended.out}"
    assert artefacts(run_dir) == place.reference, broken
    assert {name: ended.counts[name] for name in expected} == expected, broken
    return ended


def kill_and_continue(place: Place, **end: Any) -> bool:
    """Kill a new run, continue it, and require what an unbroken run gives; say if it was killed."""
    place.fresh()
    killed = place.run(**end)
    assert killed.code in {-signal.SIGKILL, 0}, killed.out
    continue_to_the_end(place, f"{end}: {killed.trail[-1:]}")
    return killed.code != 0


# Kills


def test_an_unbroken_run_does_all_the_work_once(place: Place) -> None:
    """Otherwise the counts of the other tests would mean nothing."""
    counts = place.ended.counts
    assert counts["linears"] == BLOCKS * LINEARS
    assert counts["site_costs"] == BLOCKS
    assert counts["texts"] == 2 * TEXTS
    # Of each text with both models; to plan; and of both models, to compress.
    assert counts["passes"] == (2 * TEXTS + 1 + 2) * BLOCKS
    assert {name.split("/")[0] for name in place.reference} >= {"model", "grids"}
    assert not {name.split("/")[0] for name in place.reference} & set(REMOVED)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_in_a_write_or_removal_leaves_no_trace(place: Place, stride: int) -> None:
    """All states that a killed run can leave: so many files whole, and perhaps one half written.

    Every sixth one is continued, and every one where this is run by name.
    """
    stations = place.server.run("station", stations=True).counts["stations"]
    removed = sum(step.startswith("rmdir") for step in place.ended.trail)
    assert stations > place.ended.counts["writes"] + removed
    halves = 0
    for number in range(1, stations + 1):
        run_dir = place.fresh()
        (place.root / f"station@{number:03}").rename(run_dir)
        halves += any(path.suffix == ".tmp" for path in run_dir.rglob("*"))
        if number % stride == 0:
            continue_to_the_end(place, f"station {number} of {stations}")
    assert halves == place.ended.counts["writes"]


def test_a_kill_at_random_moments_leaves_no_trace(place: Place) -> None:
    moments = random.Random(0)
    kills = [
        kill_and_continue(place, seconds=moments.uniform(0, place.ended.seconds)) for _ in range(3)
    ]
    assert any(kills)


@pytest.mark.slow
def test_a_kill_before_every_step_leaves_no_trace(any_place: Place) -> None:
    """Before every mkdir, fsync, chmod, rename, unlink and rmdir of a whole run."""
    started = time.perf_counter()
    steps = any_place.ended.counts["steps"]
    for step in range(1, steps + 1):
        assert kill_and_continue(any_place, before=step)
    print(f"{steps} kills in {time.perf_counter() - started:.0f} s")


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_no_trace(any_place: Place) -> None:
    started = time.perf_counter()
    moments = random.Random(1)
    kills = attempts = 0
    while kills < 50:
        attempts += 1
        kills += kill_and_continue(any_place, seconds=moments.uniform(0, any_place.ended.seconds))
        assert attempts < 200
    print(f"{kills} kills of {attempts} runs in {time.perf_counter() - started:.0f} s")


PHASES = {
    "dense evaluation": ["passes", 2],
    "evaluation of the second text": ["passes", BLOCKS + 2],
    "plan": ["passes", TEXTS * BLOCKS + 2],
    "compression": ["linears", LINEARS + 3],
    "compressed evaluation": ["passes", (TEXTS + 1 + 2) * BLOCKS + 2],
}
"""A moment in the middle of each phase; while compressing, both models go through each block."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_the_middle_of_a_phase_leaves_no_trace(phase: str, place: Place) -> None:
    assert kill_and_continue(place, send=[[*PHASES[phase], "SIGKILL"]])


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_gets_there(place: Place) -> None:
    """Each process finishes one more part, so that every part is restored by some other process."""
    run_dir = place.fresh()
    codes = []
    while 0 not in codes:
        codes.append(place.run(manifests=1).code)
        assert codes[-1] in {-signal.SIGKILL, 0}
        assert len(codes) < 50
    assert len(codes) > 2 * TEXTS + 2 * BLOCKS
    assert artefacts(run_dir) == place.reference


# Wishes to stop


@pytest.mark.parametrize(
    ("wish", "phase"),
    seldom(
        [
            ("SIGTERM", "dense evaluation"), ("SIGUSR1", "plan"), ("SIGTERM", "compression"),
            *itertools.product(["SIGUSR1"], [phase for phase in PHASES if phase != "plan"]),
            *itertools.product(["SIGTERM"], ["evaluation of the second text", "plan"]),
            ("SIGTERM", "compressed evaluation"),
        ],
        always=3,
    ),
)  # fmt: skip
def test_a_wish_to_stop_is_granted_and_the_run_goes_on(phase: str, wish: str, place: Place) -> None:
    run_dir = place.fresh()
    ended = place.run(send=[[*PHASES[phase], wish]])
    assert ended.code == 75
    assert f"stopped by {wish}" in ended.out
    result = read_result(run_dir)
    assert result.status == "interrupted"
    assert result.error is not None
    assert wish in result.error
    assert not list(run_dir.rglob("*.tmp"))
    continue_to_the_end(place, phase)
    assert read_result(run_dir).resumed == 1


def test_the_block_in_work_is_finished_before_stopping(place: Place) -> None:
    run_dir = place.fresh()
    ended = place.run(send=[["linears", LINEARS + 1, "SIGTERM"]])
    assert ended.code == 75
    assert ended.counts["linears"] == 2 * LINEARS
    assert [name for name in committed(run_dir) if name.startswith("reports")] == [
        "reports/00000.json", "reports/00001.json",
    ]  # fmt: skip
    assert continue_to_the_end(place, "stopped").counts["linears"] == LINEARS


def test_a_second_signal_ends_the_run_at_once(place: Place) -> None:
    place.fresh()
    moments = [["linears", LINEARS + 1, "SIGTERM"], ["linears", LINEARS + 2, "SIGTERM"]]
    ended = place.run(send=moments)
    assert ended.code == -signal.SIGTERM
    assert ended.counts["linears"] == LINEARS + 2
    result = read_result(place.root / "run")
    assert (result.status, result.error) == (
        "interrupted", "stopped by SIGTERM: give the same command again to continue",
    )  # fmt: skip
    continue_to_the_end(place, "ended by a second signal")


@pytest.mark.parametrize("early", [True, False])
def test_what_was_killed_does_not_say_that_it_runs(early: bool, place: Place) -> None:
    """Also where the process that was to continue it is stopped before it has done anything."""
    run_dir = place.fresh()
    assert place.run(send=[["linears", LINEARS + 1, "SIGKILL"]]).code == -signal.SIGKILL
    assert read_result(run_dir).status == "running"
    ended = place.run(stopped="SIGTERM") if early else place.run(send=[["loads", 1, "SIGTERM"]])
    assert ended.code == 75
    result = read_result(run_dir)
    assert result.status == "interrupted"
    assert result.error is not None
    assert "give the same command again to continue" in result.error
    continue_to_the_end(place, "stopped while it was loading")


def test_a_signal_in_the_middle_of_a_record_is_not_overwritten(tmp_path: Path) -> None:
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        made = Recorder(from_hydra(compose("config")), tmp_path)
    stop = StopRequest()
    write = recorder.write_result
    to_send = [signal.SIGTERM]

    def interrupted_write(result: Any, run_dir: Path) -> None:
        if to_send:  # once: the record of the stop is written from within
            signal.raise_signal(to_send.pop())
        write(result, run_dir)

    with pytest.MonkeyPatch.context() as patch, stop.listen(), stop.telling(made.stop):
        patch.setattr(recorder, "write_result", interrupted_write)
        made.update()
        assert read_result(tmp_path).status == "interrupted"
        made.update(coverage=0.5)
        assert read_result(tmp_path).status == "interrupted"
        made.update(status="completed")
    result = read_result(tmp_path)
    assert (result.status, result.error, result.coverage) == ("completed", None, 0.5)


def test_a_wish_that_came_before_anybody_listened_is_heard() -> None:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        # To this thread: another one, of a library, may not hold it back.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        stop = StopRequest()
        with stop.listen(), pytest.raises(ResumableError, match="stopped by SIGTERM"):
            stop.check()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def test_signals_are_what_they_were_after_listening() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = StopRequest()
    with stop.listen():
        stop.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(ResumableError, match="stopped by SIGUSR1"):
            stop.check()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers


# Not twice, and not two at a time


def test_a_completed_run_given_again_shows_its_result_and_computes_nothing(place: Place) -> None:
    run_dir = place.fresh()
    assert place.run().code == 0
    before = contents(run_dir)
    ended = place.run()
    assert ended.code == 0
    assert "is complete; remove it to run again" in ended.out
    assert f"{read_result(run_dir).compressed['text'].perplexity:.4f}" in ended.out
    assert all(ended.counts[name] == 0 for name in ("writes", "linears", "site_costs", "texts"))
    assert contents(run_dir) == before


def test_a_failed_run_is_tried_again(place: Place) -> None:
    run_dir = place.fresh()
    ended = place.run(fail=["linears", LINEARS + 2])
    assert ended.code == 3
    result = read_result(run_dir)
    assert (result.status, result.error) == (
        "failed",
        "block 1, self_attn.q_proj+k_proj+v_proj (model.layers.1.self_attn.k_proj): "
        "no valid factor",
    )
    continue_to_the_end(place, "failed")


def test_a_second_process_is_refused_and_the_first_unharmed(
    place: Place, cli: Callable[..., Ended]
) -> None:
    run_dir = place.fresh()
    place.run(halt=True, send=[["linears", LINEARS + 3, "SIGSTOP"]])
    before = contents(run_dir)
    assert "model/model-00002-of-00004.safetensors" in before
    refused = cli("hydra.run.dir=run")
    assert refused.code == 2
    assert "run is in use by another run" in refused.out
    assert contents(run_dir) == before
    ended = place.run()
    assert ended.code == 0, ended.out
    assert artefacts(run_dir) == place.reference


# The same command, and resume=


@pytest.fixture
def cli(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run `mi-run` in this process, with the arguments of the place and some more."""
    from mi_experiments.commands.run import main

    monkeypatch.chdir(place.root)

    def run(*arguments: str) -> Ended:
        given = [] if any(a.startswith("resume=") for a in arguments) else COMMAND
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mi-run", *given, "export=dense", *arguments])
        if not given:
            sys.argv.remove("export=dense")
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capfd.readouterr()
        return Ended(code, captured.out + captured.err, 0.0)

    return run


def without_command(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out how the last process was started."""
    record = json.loads(json.dumps(found["result.json"]))
    del record["provenance"]["command"]
    record["config"]["tracking"] = None
    return found | {"result.json": record}


def interrupt(place: Place) -> Path:
    """Leave a run with one finished block."""
    run_dir = place.fresh()
    assert place.run(send=[["linears", LINEARS - 1, "SIGTERM"]]).code == 75
    return run_dir


@pytest.mark.parametrize("changes", [[], ["tracking=offline", "memory.host=2"]])
def test_resume_continues_a_run_by_its_directory(
    changes: list[str], place: Place, cli: Callable[..., Ended]
) -> None:
    run_dir = interrupt(place)
    composed = contents(run_dir / ".hydra")
    ended = cli("resume=run", *changes)
    assert ended.code == 0, ended.out
    shutil.rmtree(run_dir / "wandb", ignore_errors=True)
    found = artefacts(run_dir)
    assert without_command(found)["result.json"]["config"]["resume"] is None
    asked = found["result.json"]["config"]
    assert asked["tracking"]["mode"] == ("offline" if changes else "disabled")
    assert asked["memory"].pop("host") == (2 if changes else None)
    found["result.json"]["config"]["memory"]["host"] = None
    assert without_command(found) == without_command(place.reference)
    # The composition is that of the command which began the run.
    assert contents(run_dir / ".hydra") == composed


REFUSED = {
    "wbits.average=3": "wbits.average: 4.0 → 3.0",
    "seed=1": "dataset.seed: 0 → 1; n_groups.seed: 0 → 1; seed: 0 → 1",
    "dataset.nsamples=3": "dataset.nsamples: 2 → 3",
    "export=packed": "export: dense → packed",
    "recipe.order=natural": "recipe.order: activation → natural",
    "wbits=uniform": "goes on with the run's own wbits: leave it out",
}


@pytest.mark.parametrize("completed", [False, True])
def test_a_changed_value_is_refused_and_shown(
    completed: bool, place: Place, cli: Callable[..., Ended]
) -> None:
    run_dir = interrupt(place)
    if completed:
        assert place.run().code == 0
    before = contents(run_dir)
    for change, shown in REFUSED.items():
        ended = cli("resume=run", change)
        assert ended.code == 2
        assert shown in ended.out
        assert len(ended.out.strip().splitlines()) == 1
        assert contents(run_dir) == before
    ended = cli("hydra.run.dir=run", "wbits.average=3")
    assert ended.code == 2
    assert "wbits.average: 4.0 → 3.0" in ended.out
    assert contents(run_dir) == before
    assert cli("resume=run").code == 0
    assert without_command(artefacts(run_dir)) == without_command(place.reference)


def test_resume_of_nothing_is_one_line(cli: Callable[..., Ended]) -> None:
    ended = cli("resume=nowhere")
    assert ended.code == 2
    assert ended.out.startswith("mi-run: resume=nowhere: no run was begun there")
    assert len(ended.out.splitlines()) == 1


# What the numbers depend on


@pytest.fixture
def restored(place: Place) -> Iterator[None]:
    """Put model and texts back afterwards."""
    kept = place.root / "kept"
    shutil.copytree(place.root / "tiny", kept / "tiny")
    for name in ("text.jsonl", "other.txt"):
        shutil.copy(place.root / name, kept / name)
    yield
    for path in kept.rglob("*"):
        if path.is_file():
            shutil.copy(path, place.root / path.relative_to(kept))
    shutil.rmtree(kept)


def flip_every_line(path: Path) -> None:
    """Change a letter of every document, so that every sample is another one."""
    path.write_text(path.read_text().replace('"text": "1', '"text": "2').replace(" 1", " 2"))


@pytest.mark.parametrize(
    ("name", "damage", "shown"),
    [
        ("tiny/model.safetensors", flip, "model_files.model.safetensors: "),
        ("tiny/model.safetensors", truncate, "tiny/model.safetensors is corrupt or truncated"),
        ("tiny/generation_config.json", lambda path: path.write_text("{}"), "model_files.gener"),
        ("text.jsonl", flip_every_line, "calibration: "),
        ("other.txt", lambda path: flip(path, 0.01), "evaluation.other: "),
    ],
)
def test_changed_sources_are_refused_and_nothing_is_lost(
    name: str, damage: Callable[[Path], object], shown: str, place: Place, restored: None
) -> None:
    run_dir = interrupt(place)
    before = contents(run_dir)
    sources = {path: path.read_bytes() for path in (place.root / name).parent.glob("*.*")}
    damage(place.root / name)
    ended = place.run()
    assert ended.code == 2
    assert shown in ended.out
    assert ended.counts["linears"] == ended.counts["site_costs"] == ended.counts["texts"] == 0
    assert contents(run_dir) == before
    for path, content in sources.items():
        if path.is_file() and path.name != "run.out":
            path.write_bytes(content)
    continue_to_the_end(place, name)


def test_a_plan_that_comes_out_differently_is_refused(place: Place) -> None:
    """Blocks of two bit allocations must never be in one model."""
    run_dir = interrupt(place)
    flip(run_dir / "plan.safetensors")
    ended = place.run(other_plan=True)
    assert ended.code == 2
    assert "run was begun with something else: plan: " in ended.out
    assert ended.counts["linears"] == 0
    assert "reports/00000.json" in committed(run_dir)
    continue_to_the_end(place, "another plan")


def test_one_changed_bit_of_the_allocation_is_refused(place: Place) -> None:
    """Also where the manifest was changed with it, and sealed again."""
    run_dir = interrupt(place)
    path, manifest = run_dir / "plan.safetensors", run_dir / "manifest.json"
    plan = path.read_bytes()
    header = int.from_bytes(plan[:8], "little")
    entry = json.loads(plan[8 : 8 + header])["model.layers.2.mlp.up_proj.bits"]
    at = 8 + header + entry["data_offsets"][0]
    changed = plan[:at] + bytes([plan[at] ^ 1]) + plan[at + 1 :]
    old, new = (hashlib.sha256(content).hexdigest() for content in (plan, changed))
    whole = manifest.read_text()
    path.write_bytes(changed)
    edited = json.loads(whole.replace(old, new))
    del edited[SEAL]
    manifest.write_text(json.dumps(seal(edited)))
    before = contents(run_dir)
    ended = place.run()
    assert ended.code == 2
    assert "run was begun with something else: plan: " in ended.out
    after = contents(run_dir)
    assert after.pop("result.json") != before.pop("result.json")
    assert after == before
    path.write_bytes(plan)
    manifest.write_text(whole)
    continue_to_the_end(place, "one bit")


@pytest.mark.parametrize(
    "name",
    [
        "model/model-00002-of-00004.safetensors", "grids/00000.safetensors", "reports/00000.json",
        "plan.safetensors", "evaluations/dense-001.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_part_is_set_aside_and_computed_again(
    name: str, damage: Callable[[Path], object], place: Place
) -> None:
    run_dir = interrupt(place)
    damage(run_dir / name)
    damaged = (run_dir / name).read_bytes() if (run_dir / name).exists() else None
    ended = place.run()
    assert ended.code == 0, ended.out
    assert artefacts(run_dir) == place.reference
    part = name.split("/")[0]
    block = part in {"model", "grids", "reports"}
    assert ended.counts["linears"] == (BLOCKS if block else BLOCKS - 1) * LINEARS
    assert ended.counts["texts"] == TEXTS + (part == "evaluations")
    word = "has gone" if damaged is None else f"set aside as {Path(name).name}.damaged"
    assert f"WARNING: run/{name} " in ended.out
    assert word in ended.out
    if damaged is not None and part not in REMOVED:
        assert (run_dir / f"{name}.damaged").read_bytes() == damaged


def test_an_early_block_is_computed_again_between_finished_ones(place: Place) -> None:
    """With the same record as ever, in the order of the model."""
    run_dir = place.fresh()
    assert place.run(send=[["texts", TEXTS + 1, "SIGKILL"]]).code == -signal.SIGKILL
    flip(run_dir / "model" / "model-00003-of-00004.safetensors")
    ended = place.run()
    assert (ended.code, ended.counts["linears"]) == (0, LINEARS)
    assert artefacts(run_dir) == place.reference


def test_no_block_is_replayed_when_all_are_finished(place: Place) -> None:
    place.fresh()
    assert place.run(send=[["texts", TEXTS + 2, "SIGKILL"]]).code == -signal.SIGKILL
    ended = continue_to_the_end(place, "one text left")
    assert ended.counts["passes"] == BLOCKS


def test_damaged_costs_are_measured_again(place: Place) -> None:
    run_dir = place.fresh()
    assert place.run(send=[["site_costs", 2, "SIGKILL"]]).code == -signal.SIGKILL
    flip(run_dir / "site_costs" / "00000.safetensors")
    ended = place.run()
    assert ended.code == 0, ended.out
    assert ended.counts["site_costs"] == BLOCKS
    assert artefacts(run_dir) == place.reference


def test_an_export_is_not_completed_without_a_block_that_was_damaged(place: Place) -> None:
    """Between its evaluation and the index: the run stops, and the next one computes the block."""
    run_dir = place.fresh()
    number = next(at for at, step in enumerate(place.ended.trail, 1) if "model-00001-of" in step)
    assert place.run(before=number).code == -signal.SIGKILL
    victim = run_dir / "model" / "model-00003-of-00004.safetensors"
    ended = place.run(spoil=["model/.model-00001", str(victim)])
    assert ended.code == 75
    assert "model-00003-of-00004.safetensors was damaged" in ended.out
    ended = place.run()
    assert (ended.code, ended.counts["linears"]) == (0, LINEARS)
    assert artefacts(run_dir) == place.reference


def test_a_damaged_manifest_is_named(place: Place) -> None:
    run_dir = interrupt(place)
    truncate(run_dir / "manifest.json")
    before = contents(run_dir)
    ended = place.run()
    assert ended.code == 2
    assert "manifest.json is damaged" in ended.out
    assert contents(run_dir) == before


# A full disk


@pytest.mark.parametrize(
    ("begun", "name"),
    [
        (False, ".hydra/hydra.yaml"),
        (False, "plan.safetensors"),
        (True, "model/model-00003-of-00004.safetensors"),
        (False, "model/model-00001-of-00004.safetensors"),
    ],
)
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    begun: bool, name: str, place: Place
) -> None:
    run_dir = interrupt(place) if begun else place.fresh()
    kept = committed(run_dir)
    ended = place.run(limit=int(0.9 * place.sizes[name]))
    assert ended.code == 75
    assert len(ended.out.splitlines()) == 1
    assert ended.out.startswith(f"mi-run: run/{name} cannot be written: ")
    assert "File too large" in ended.out
    assert "make room, then give the same command again" in ended.out
    assert not list(run_dir.rglob("*.tmp"))
    assert set(committed(run_dir)) >= set(kept)
    for part in committed(run_dir):
        entry = json.loads((run_dir / "manifest.json").read_text())["files"][part]
        assert hashlib.sha256((run_dir / part).read_bytes()).hexdigest() == entry["sha256"]
    continue_to_the_end(place, name)


def test_no_room_for_temporary_files_is_one_line_too(place: Place) -> None:
    """Where the tokenizer is written to be hashed, by a library with exceptions of its own."""
    run_dir = interrupt(place)
    before = contents(run_dir)
    ended = place.run(limit=place.sizes["model/tokenizer.json"] // 2)
    assert ended.code == 75
    assert len(ended.out.splitlines()) == 1
    assert ended.out.startswith(f"mi-run: {tempfile.gettempdir()}")
    assert "cannot be written: File too large (os error 27)" in ended.out
    assert contents(run_dir) == before
    continue_to_the_end(place, "no room for temporary files")


# The pieces


def test_differences_are_shown_by_their_path() -> None:
    begun = {"a": {"b": 1, "c": "x" * 64}, "d": [1]}
    now = {"a": {"b": 2, "c": "y" * 64}, "e": None}
    assert list(differences(begun, now)) == [
        "a.b: 1 → 2", f"a.c: {'x' * 12}… → {'y' * 12}…", "d: [1] → None",
    ]  # fmt: skip
    assert list(differences(begun, json.loads(json.dumps(begun)))) == []


def test_a_commit_counts_all_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Commits(tmp_path, {"seed": 0})
    commits.commit({"one": b"1"})
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if Path(target).name == "b":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ResumableError, match="No space left on device"):
        commits.commit({"a": b"a", "b": b"b"})
    again = Commits(tmp_path, {"seed": 0})
    assert again.find("one") == tmp_path / "one"
    assert again.find_all("one", "a") is None
    assert again.find("a") is again.find("b") is None


def test_bound_values_are_part_of_the_identity(tmp_path: Path) -> None:
    Commits(tmp_path, {"seed": 0}).bind("plan", "abc")
    commits = Commits(tmp_path, {"seed": 0})
    commits.bind("plan", "abc")
    with pytest.raises(InputError, match="plan: abc → abd"):
        commits.bind("plan", "abd")
    with pytest.raises(InputError, match="seed: 0 → 1"):
        Commits(tmp_path, {"seed": 1})


def test_half_written_files_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    kept = ["a.tmp", ".a.tmp", "sub/.b.0123456x.tmp", "sub/c", ".d.01234567.tmpx"]
    halves = [".a.01234567.tmp", "sub/.b.c.89abcdef.tmp"]
    for name in kept + halves:
        (tmp_path / name).write_text("x")
    (tmp_path / ".model.01234567.tmp").mkdir()
    (tmp_path / ".model.01234567.tmp" / "config.json").write_text("x")
    # A link is no folder, wherever it leads; and nothing is looked for behind one.
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / ".a.01234567.tmp").write_text("x")
    (tmp_path / ".x.12345678.tmp").symlink_to(elsewhere)
    (tmp_path / ".y.12345678.tmp").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked").symlink_to(elsewhere)
    Commits(tmp_path, {})
    assert (elsewhere / ".a.01234567.tmp").exists()
    assert not any(path.name.endswith(".12345678.tmp") for path in tmp_path.iterdir())
    (tmp_path / "linked").unlink()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)) for path in left} == {*kept, "manifest.json"}
    assert not (tmp_path / ".model.01234567.tmp").exists()
