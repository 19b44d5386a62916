"""Fisher information is measured once a run, with one block in memory, and planned for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import composed
import pytest
import torch
from torch import Tensor

from mi_experiments.calibration import hessians
from mi_experiments.errors import ResumableError
from mi_experiments.experiment.memory_plan import (
    GRAPH_COPIES,
    Room,
    measure_needs,
    plan_memory,
    traffic,
)
from mi_experiments.llm.activations import Place, allocator
from mi_experiments.llm.loading import load_model, open_model
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.plan import Plan, count_steps, plan_compression

REQUEST: dict[str, Any] = {"revision": None, "dtype": "auto", "device": "cpu", "offline": True}
FISHER = (
    "wbits.cost=fisher", "wbits.scope=model", "wbits.fisher_samples=3", "wbits.average=3",
    "n_groups.count=2", "n_groups.multiple=1",
    "sparsity.scope=linear",
)  # fmt: skip


config_of = partial(composed.config_of, base=FISHER)


@pytest.fixture
def dense(tiny_directory: Path) -> Any:
    return load_model(str(tiny_directory), **REQUEST)[0]


def test_a_streamed_plan_is_the_resident_one(
    dense: Any, tiny_directory: Path, tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    tokens, config = tiny_tokens(6, 16), config_of()
    resident = plan_compression(Walker(dense), tokens, config)
    opened = open_model(str(tiny_directory), **REQUEST)
    seen: list[str] = []
    streamed = plan_compression(
        Walker(
            opened.model,
            weights=opened.weights,
            allocate=allocator(Place.disk, torch.device("cpu"), tmp_path),
        ),
        tokens,
        config,
        seen.append,
        commits=Commits(tmp_path, {}),
    )
    assert streamed.sha256() == resident.sha256()
    assert len(seen) == count_steps(2, 6, config) == 6
    assert all(p.is_meta for p in opened.weights.blocks.parameters())
    # The loss has had its say: by output error alone the same budget is spent otherwise.
    other = plan_compression(Walker(dense), tokens, config_of("wbits.cost=distortion"))
    assert other.sha256() != resident.sha256()
    widths = {int(width) for linear in resident.linears.values() for width in linear.bits}
    assert len(widths) > 1


def test_a_resumed_plan_does_not_measure_the_loss_again(
    dense: Any,
    tiny_tokens: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, config = tiny_tokens(6, 16), config_of()
    expected = plan_compression(Walker(dense), tokens, config)
    measured: list[int] = []
    real = hessians.measure_fisher

    def count(*args: Any, **options: Any) -> dict[str, Tensor]:
        measured.append(1)
        return real(*args, **options)

    monkeypatch.setattr(hessians, "measure_fisher", count)
    seen: list[str] = []

    def plan(stop_at: int | None = None) -> Plan:
        def stop(name: str) -> None:
            seen.append(name)
            if len(seen) == stop_at:
                raise ResumableError("stopped")

        return plan_compression(Walker(dense), tokens, config, stop, commits=Commits(tmp_path, {}))

    # In the middle of it nothing is kept; after it, and after the costs of a block, everything.
    for stop_at, times in ((2, 1), (2 + 5, 2)):
        with pytest.raises(ResumableError):
            plan(stop_at)
        assert len(measured) == times
    assert plan().sha256() == expected.sha256()
    assert len(measured) == 2
    # Nor is anything kept where the loss is not asked.
    other = tmp_path / "other"
    other.mkdir()
    commits = Commits(other, {})
    plan_compression(Walker(dense), tokens, config_of("wbits.cost=distortion"), commits=commits)
    assert not (other / hessians.FISHER).exists()
    assert (tmp_path / hessians.FISHER).exists()
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        # Four blocks: what each reads, and the gradient; or one stream, or two.
        (["wbits.fisher_samples=3"], 5 * 3),
        (["wbits.fisher_samples=1"], 6),
        (["wbits.fisher_samples=1", "recipe=default"], 12),
        (["wbits.fisher_samples=100"], 5 * 6),
        (["wbits.cost=distortion"], 6),
        (["wbits=uniform"], 6),
    ],
)
def test_planned_memory_holds_the_larger_of_both_phases(
    choice: list[str], kept: int, tiny_model: Callable[..., Any]
) -> None:
    config = config_of(
        "recipe=textbook", "dataset.nsamples=6", "dataset.seqlen=16", "model.dtype=float32", *choice
    )
    model = tiny_model("gemma3", device="meta")
    needs = measure_needs(model, Walker(model).describe_blocks(16), config)
    assert needs.activations == kept * 16 * 32 * 4


def test_the_planned_room_for_a_backward_pass_is_enough(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    """What autograd keeps of one block is counted: the plan has room for it, but not for four."""
    seqlen = 64
    for name, active in (("llama", None), ("gpt2", None), ("gemma3", None), ("qwen3_moe", 2)):
        model = tiny_model(name, hidden_size=128, intermediate_size=384)
        blocks = Walker(
            tiny_model(name, device="meta", hidden_size=128, intermediate_size=384)
        ).describe_blocks(seqlen)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, parameters: Any = parameters, kept: Any = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        stream = Walker(model).open_stream(tiny_tokens(1, seqlen))
        _, hidden, call = next(stream.batches())
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = call.replay(Walker(model).blocks[0], hidden.detach().requires_grad_())
        assert output.requires_grad
        planned = GRAPH_COPIES * traffic(blocks[0], active) * seqlen * 4
        assert planned / 4 < sum(kept.values()) < planned, name


def test_kept_inputs_go_where_there_is_room(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", device="meta")
    blocks = Walker(model).describe_blocks(16)
    size = ("dataset.nsamples=240000", "dataset.seqlen=16", "wbits.fisher_samples=240000")
    places = {}
    for cost in ("distortion", "fisher"):
        config = config_of(*size, "recipe=textbook", f"wbits.cost={cost}")
        needs = measure_needs(model, blocks, config)
        room = Room(accelerator=None, host=2 * 2**30, disk=2**40)
        places[cost] = plan_memory(needs, room, config).activations
    assert places == {"distortion": Place.host, "fisher": Place.disk}
