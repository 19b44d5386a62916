"""The memory plan: what fits where, by hand; and it does not depend on the number of blocks."""

import json
from pathlib import Path

import pytest
from composed import config_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.errors import InputError
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.experiment.memory_plan import (
    GIB,
    LIBRARIES,
    USABLE,
    MemoryPlan,
    Needs,
    Room,
    measure_needs,
    plan_memory,
)
from mi_experiments.experiment.outline import outline_model
from mi_experiments.llm.activations import Place

NEEDS = Needs(
    resident=1 * GIB, blocks=2 * GIB, site=3 * GIB, hessian=1 * GIB, forward=2 * GIB,
    activations=10 * GIB, stored=20 * GIB,
)  # fmt: skip
WORKING = (1 + 2 + 4) * GIB
"""Two Hessians and the forward pass are more than the site."""


DEFAULTS = config_of()


def room_for(size: float) -> int:
    """Bytes of which the usable share is a number of GiB, and a little more."""
    return int(size * GIB / USABLE) + 1024


@pytest.mark.parametrize(
    ("accelerator", "host", "place"),
    [
        (17, 1, Place.accelerator),
        (16.9, 11, Place.host),
        (7, 11, Place.host),
        (7, 5, Place.disk),
        (None, 18, Place.host),
        (None, 8, Place.disk),
    ],
)
def test_hidden_states_go_where_they_fit(
    accelerator: float | None, host: float, place: Place
) -> None:
    room = Room(
        None if accelerator is None else room_for(accelerator),
        room_for(host + LIBRARIES / GIB),
        100 * GIB,
    )
    plan = plan_memory(NEEDS, room, config_of())
    assert plan.activations is place
    on_accelerator = WORKING + NEEDS.activations * (place is Place.accelerator)
    assert plan.accelerator == (None if accelerator is None else on_accelerator)
    on_host = LIBRARIES + (WORKING if accelerator is None else 0)
    assert plan.host == on_host + NEEDS.activations * (place is Place.host)
    assert plan.disk == NEEDS.stored + NEEDS.activations * (place is Place.disk)


@pytest.mark.parametrize(
    ("room", "asked", "parts"),
    [
        (Room(room_for(6.9), 64 * GIB, 100 * GIB), "auto", ["7.0 GiB of the accelerator", "7.5"]),
        (Room(None, room_for(7), 100 * GIB), "auto", ["of host memory", "one block 2.0 GiB"]),
        (Room(room_for(8), room_for(8), 30 * GIB), "auto", ["10.0 GiB", "20.0 GiB", "disk 5.0"]),
        (Room(80 * GIB, 64 * GIB, 10 * GIB), "auto", ["compressed blocks 20.0 GiB on disk"]),
        (Room(room_for(8), 64 * GIB, 100 * GIB), "accelerator", ["10.0 GiB", "accelerator 1.0"]),
    ],
)
def test_what_fits_nowhere_is_refused_with_its_numbers(
    room: Room, asked: str, parts: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        plan_memory(NEEDS, room, config_of(f"memory.activations={asked}"))
    for part in parts:
        assert part in str(refused.value)


@given(accelerator=st.integers(1, 100), host=st.integers(1, 100), disk=st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_a_plan_never_promises_more_than_there_is(accelerator: int, host: int, disk: int) -> None:
    room = Room(accelerator * GIB, host * GIB, disk * GIB)
    try:
        plan = plan_memory(NEEDS, room, DEFAULTS)
    except InputError:
        return
    assert plan.accelerator is not None
    assert plan.accelerator <= USABLE * room.accelerator
    assert plan.host <= max(LIBRARIES, USABLE * room.host)
    assert plan.disk <= room.disk
    assert plan.hessian_bytes >= NEEDS.hessian


def write_llama(directory: Path, **changes: int) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096,
        "dtype": "float16", "tie_word_embeddings": False,
    }  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | changes))
    return f"model.path={directory}"


def test_thirteen_billion_weights_are_planned_for_usual_accelerators(tmp_path: Path) -> None:
    """By hand, from the shapes of LLaMA-13B."""
    path = write_llama(tmp_path / "13b")
    alike = ["sparsity.scope=linear", "wbits.cost=distortion"]  # so without a backward pass
    config = config_of("model=local", path, "model.seqlen=2048", "dataset=c4", *alike)
    plans = dry_run(config).memory
    assert list(plans)[1:] == ["80 GiB accelerator", "24 GiB accelerator", "8 GiB accelerator"]
    places = []
    for plan in list(plans.values())[1:]:
        assert isinstance(plan, MemoryPlan)
        assert plan.needs.resident == (2 * 32000 * 5120 + 5120) * 2
        assert plan.needs.blocks == 2 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) * 2
        assert plan.needs.hessian == 13824**2 * 4
        assert plan.needs.activations == 2 * 128 * 2048 * 5120 * 2
        places.append(plan.activations)
    assert places == [Place.accelerator, Place.accelerator, Place.host]


def test_only_the_disk_feels_the_number_of_blocks(tmp_path: Path) -> None:
    needs = []
    for blocks in (2, 4):
        path = write_llama(tmp_path / str(blocks), num_hidden_layers=blocks, hidden_size=320)
        config = config_of("model=local", path, "model.seqlen=64", "dataset=c4")
        needs.append(vars(measure_needs(*outline_model(config), config)))
    assert needs[1].pop("stored") == 2 * needs[0].pop("stored")
    assert needs[0] == needs[1]
