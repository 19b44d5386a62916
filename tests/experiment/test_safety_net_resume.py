"""A run with a safety net that is ended at any moment goes on, and its files do not tell."""

import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from killed_runs import (
    BLOCKS,
    LINEARS,
    Place,
    artefacts,
    committed,
    open_place,
)

from mi_experiments.records.result import read_result

NET = ["export=dense", "recipe.safety_net=true"]
WINNERS = {
    "mixed": [*NET, "wbits.average=3", "wbits.scope=model", "wbits.cost=fisher"],
    "uniform": [*NET, "wbits.average=4", "wbits.widths=[2,4,8]", "wbits.scope=model"],
}
"""Settings under which each of the candidates is nearer to the tiny model."""


@pytest.fixture(params=WINNERS, scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    yield from open_place(tmp_path_factory.mktemp(request.param), *WINNERS[request.param])


def test_each_is_kept_once(place: Place) -> None:
    """Otherwise the other tests would say nothing about taking over."""
    net = read_result(place.root / "run").safety_net
    assert net is not None
    assert net.kept == place.root.name.rstrip("0123456789")
    assert place.ended.counts["linears"] == 2 * BLOCKS * LINEARS
    assert {name.split("/")[0] for name in place.reference} >= {"model", "grids"}
    assert not any(name.startswith("candidates") for name in place.reference)
    assert not (place.root / "run" / "candidates").exists()


def linears_left(place: Place) -> int:
    """Return the linears that a continued run must still compress, and no more."""
    run_dir = place.root / "run"
    names = committed(run_dir)
    known = "candidates/safety_net.json" in names or (
        (run_dir / "result.json").is_file() and read_result(run_dir).status == "completed"
    )
    reports = sum("reports" in name.split("/") for name in names)
    return 0 if known else LINEARS * (2 * BLOCKS - reports)


def kill_and_continue(place: Place, **end: Any) -> None:
    """Kill a new run, continue it, and require what an unbroken run gives."""
    run_dir = place.fresh()
    killed = place.run(**end)
    assert killed.code in {-signal.SIGKILL, 0}, killed.out
    left = linears_left(place)
    ended = place.run()
    broken = f"{end}: {killed.trail[-1:]}"
    assert ended.code == 0, f"{broken}: {ended.out}"
    assert ended.counts["linears"] == left, broken
    assert artefacts(run_dir) == place.reference, broken
    assert not list(run_dir.rglob("*.damaged")), broken


def test_kills_before_some_steps_leave_no_trace(place: Place) -> None:
    """Drawn among the steps from the first candidate on, taking over and tidying included."""
    steps = place.ended.counts["steps"]
    first = next(i for i, step in enumerate(place.ended.trail, 1) if "plan_uniform" in step)
    for step in sorted(random.Random(0).sample(range(first, steps + 1), 5)):
        kill_and_continue(place, before=step)


@pytest.mark.slow
def test_kills_before_every_step_leave_no_trace(place: Place) -> None:
    first = next(i for i, step in enumerate(place.ended.trail, 1) if "plan_uniform" in step)
    for step in range(first, place.ended.counts["steps"] + 1):
        kill_and_continue(place, before=step)


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_gets_there(place: Place) -> None:
    """Each process finishes one more part, so that every part is restored by some other process."""
    run_dir = place.fresh()
    codes = []
    while 0 not in codes:
        codes.append(place.run(manifests=1).code)
        assert codes[-1] in {-signal.SIGKILL, 0}
        assert len(codes) < 60
    assert len(codes) > 4 * BLOCKS
    assert artefacts(run_dir) == place.reference


@pytest.mark.parametrize("moment", ["passes", "linears"])
def test_a_wish_to_stop_in_the_second_sweep_is_granted(moment: str, place: Place) -> None:
    """Also while the divergence of the second candidate is measured, which is the last work."""
    run_dir = place.fresh()
    count = {
        "linears": BLOCKS * LINEARS + 3,
        "passes": place.ended.counts["passes"] - 2 * BLOCKS - 3,
    }
    ended = place.run(send=[[moment, count[moment], "SIGTERM"]])
    assert ended.code == 75
    assert read_result(run_dir).status == "interrupted"
    assert place.run().code == 0
    assert artefacts(run_dir) == place.reference


def test_a_damaged_block_of_a_candidate_is_computed_again(place: Place) -> None:
    run_dir = place.fresh()
    assert place.run(send=[["linears", BLOCKS * LINEARS + LINEARS + 3, "SIGTERM"]]).code == 75
    damaged = next((run_dir / "candidates" / "uniform" / "model").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    ended = place.run()
    assert ended.code == 0
    assert "is damaged" in ended.out
    assert ended.counts["linears"] == 2 * LINEARS  # of the damaged block and of the last
    assert artefacts(run_dir) == place.reference
