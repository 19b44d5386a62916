"""plan_memory: what a run will hold, where, and whether that fits; before anything is loaded.

Blocks are loaded one at a time, so what must be where they run does not grow with their number.
What does grow, with the calibration set, are the hidden states between two blocks, and with
`wbits.cost=fisher` those between all blocks, of fewer samples: they go to the accelerator if they
fit there, else to host memory, else to a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mi_experiments.calibration.fisher import POSITIONS_CHUNK
from mi_experiments.config.config import Config, Dtype
from mi_experiments.errors import InputError
from mi_experiments.experiment.host_memory import ROOT, available_memory, group_room
from mi_experiments.experiment.outline import outline_model
from mi_experiments.export.exports import EXPORTS
from mi_experiments.export.stored_model import run_folders
from mi_experiments.llm.activations import Place
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.loading import choose_device
from mi_experiments.persistence.atomic import free_disk, require_disk

GIB, MIB = 2**30, 2**20

FLOAT32 = 4
"""Bytes of a number of the mathematics."""

FACTORIZED = 6
"""Matrices [columns, columns] that exist while a site is factorized or its information measured:
Hessian, drift, and what they are permuted, factorized and turned into."""

SWEPT = 4
"""Matrices [columns, columns] that exist while a linear is swept and refined: Hessian, factor,
drift and the damped Hessian."""

LINEAR_MATRICES = 9
"""Matrices [rows, columns] of one linear that exist at one time in float32: the weight, its target,
the sweep's and the refinement's copies, codes and pattern."""

FORWARD_MATRICES = 4
"""Activations [tokens, width] of a block that exist at one time in a forward pass."""

GRAPH_COPIES = 2
"""What autograd keeps of a block, over what its matrices read and give: 0.8 to 1.4 for Llama,
GPT-2, Gemma-3 and Qwen3 with experts, sdpa attention; the rest is for the gradients that pass."""

SCORES = 24
"""Bytes of each logit where labels are drawn: logits, probabilities, their sums and gradients."""

LIBRARIES = 600 * MIB
"""Bytes of host memory that Python and its libraries take before any work."""

USABLE = 0.92
"""Share of free memory that a plan may use; the rest is lost between allocations."""


@dataclass(frozen=True)
class Room:
    """What a machine has, in bytes.

    Attributes:
        accelerator: free memory of the accelerator; None where blocks run on the CPU.
        host: free host memory.
        disk: free space where the run is recorded.
    """

    accelerator: int | None
    host: int
    disk: int


@dataclass(frozen=True)
class Needs:
    """What a run holds, in bytes; only `stored` and `activations` depend on the number of blocks.

    Attributes:
        resident: weights outside the blocks.
        blocks: weights of one block, and of its dense twin where targets are corrected.
        site: the most that one site's statistics and one of its linears need at a time.
        hessian: the widest Hessian.
        forward: activations inside a block, of one batch, and logits of one chunk; or if that is
            more, what one sample leaves for the backward pass through a block.
        activations: hidden states of the calibration set, in one or two streams; or if that is
            more, those between all blocks of the samples that go back through them.
        stored: compressed blocks on disk, of every candidate, while the run can be continued, and
            what the export adds to them.
        halted: what all samples hold that are halted in the middle of a block, in one or two
            streams, so that each block runs once and not once a site; see `Pieces`.
    """

    resident: int
    blocks: int
    site: int
    hessian: int
    forward: int
    activations: int
    stored: int
    halted: int = 0

    @property
    def working(self) -> int:
        """Everything that must be where blocks run."""
        return self.resident + self.blocks + max(self.site, 2 * self.hessian + self.forward)


@dataclass(frozen=True)
class MemoryPlan:
    """Where things will live.

    Attributes:
        room: the room that was planned for.
        needs: the needs of the run.
        activations: where hidden states will be.
        accelerator: bytes that will be used of the accelerator; None where blocks run on the CPU.
        host: bytes that will be used of host memory.
        disk: bytes that will be used of the disk.
        hessian_bytes: see `Walker`.
        wave_tokens: tokens of an evaluation text whose hidden states may exist at one time.
        piecewise: whether there is room for samples that are halted in the middle of a block.
    """

    room: Room
    needs: Needs
    activations: Place
    accelerator: int | None
    host: int
    disk: int
    hessian_bytes: int
    wave_tokens: int
    piecewise: bool


def plan_memory(needs: Needs, room: Room, config: Config) -> MemoryPlan:
    """Choose where hidden states live, or refuse with the numbers.

    Raises:
        InputError: what must be where blocks run, or the hidden states, fit nowhere.
    """
    work = room.host if room.accelerator is None else room.accelerator
    name = "host memory" if room.accelerator is None else "the accelerator"
    on_host = LIBRARIES + (needs.working if room.accelerator is None else 0)
    working = on_host if room.accelerator is None else needs.working
    if working > USABLE * work:
        raise InputError(
            f"the run needs {show(working)} of {name} and {show(work)} are free: "
            f"{describe(needs)}; lower dataset.batch_size, evaluation.batch_tokens or "
            "evaluation.logits_chunk, or use a larger one"
        )
    left = {
        Place.accelerator: USABLE * work - working,
        Place.host: USABLE * room.host - on_host,
        Place.disk: room.disk / 1.2 - needs.stored,
    }
    asked = config.memory.activations
    if room.accelerator is None and asked is Place.accelerator:
        asked = Place.host
    order = [Place.accelerator, Place.host, Place.disk] if asked is Place.auto else [asked]
    if room.accelerator is None and asked is Place.auto:
        order = order[1:]
    fitting = [place for place in order if needs.activations <= left[place]]
    if not fitting or left[Place.disk] < 0:
        free = ", ".join(f"{place.name} {show(max(0, int(left[place])))}" for place in order)
        raise InputError(
            f"the hidden states of {config.dataset.nsamples} × {config.dataset.seqlen} tokens need "
            f"{show(needs.activations)}, the compressed blocks {show(needs.stored)} on disk, and "
            f"what is left is: {free}, disk {show(max(0, int(left[Place.disk])))}; "
            "lower dataset.nsamples, or make room"
        )
    place = fitting[0]
    working_place = Place.host if room.accelerator is None else Place.accelerator
    beside = needs.activations if place in (working_place, Place.accelerator) else 0
    spare = max(0, int(left[working_place] - beside))
    piecewise = needs.halted <= spare
    halted = needs.halted * piecewise
    tokens = config.dataset.nsamples * config.dataset.seqlen * (1 + config.needs_dense_pair)
    return MemoryPlan(
        room=room,
        needs=needs,
        activations=place,
        accelerator=None
        if room.accelerator is None
        else needs.working + needs.activations * (place is Place.accelerator) + halted,
        host=on_host
        + needs.activations * (place is Place.host)
        + halted * (room.accelerator is None),
        disk=needs.stored + needs.activations * (place is Place.disk),
        hessian_bytes=max(needs.hessian, spare // 2),
        wave_tokens=max(tokens, config.evaluation.batch_tokens),
        piecewise=piecewise,
    )


def plan_run(config: Config, run_dir: Path) -> MemoryPlan:
    """Plan the memory of a run on this machine, from the model's config file alone.

    Args:
        config: the config of the run.
        run_dir: receives the records.

    Raises:
        InputError: it does not fit, or a linear does not fit what is asked for.
        ResumableError: it fits when there is room on the disk.
    """
    needs = measure_needs(*outline_model(config), config)
    room = find_room(choose_device(config.model.device), run_dir, config)
    require_disk(run_dir, needs.stored, room.disk)
    return plan_memory(needs, room, config)


def measure_needs(model: PreTrainedModel, blocks: Sequence[Block], config: Config) -> Needs:
    """Add up what a run on a model will hold.

    Args:
        model: the model on the meta device, in the dtype of its checkpoint.
        blocks: the blocks as `Walker.describe_blocks` lists them.
        config: the config of the run.
    """
    text = model.config.get_text_config(decoder=True)
    stored = next(model.parameters()).element_size()
    item = {Dtype.auto: stored, Dtype.float32: 4}.get(config.model.dtype, 2)
    inside = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    everything = sum(parameter.numel() for parameter in model.parameters())
    streams = 2 if config.needs_dense_pair else 1
    sites = [site for block in blocks for site in block.sites]
    linears = [linear for site in sites for linear in site.linears]
    widest = max(site.columns for site in sites)
    swept = [SWEPT * x.columns**2 + LINEAR_MATRICES * x.rows * x.columns for x in linears]
    width = max(max(linear.rows, linear.columns) for linear in linears)
    batch = max(config.dataset.batch_size * config.dataset.seqlen, config.evaluation.batch_tokens)
    samples = config.dataset.nsamples * config.dataset.seqlen
    logits = 2 * config.evaluation.logits_chunk * text.vocab_size * FLOAT32
    forward = FORWARD_MATRICES * batch * width * item + logits
    activations = streams * samples * text.hidden_size * item
    if config.uses_fisher:
        active = getattr(text, "num_experts_per_tok", None)
        kept = GRAPH_COPIES * max(traffic(block, active) for block in blocks)
        graph = kept * config.dataset.seqlen * item
        forward = max(forward, graph, SCORES * POSITIONS_CHUNK * text.vocab_size)
        samples = min(config.wbits.fisher_samples, config.dataset.nsamples) * config.dataset.seqlen
        activations = max(activations, (len(blocks) + 1) * samples * text.hidden_size * item)
    export = EXPORTS[config.export]
    compressed = sum(linear.rows * linear.columns for linear in linears)
    candidate = sum(inside) * item + export.block_bytes(compressed, config)
    resident = (everything - sum(inside)) * item
    return Needs(
        resident=resident,
        blocks=streams * max(inside) * item,
        site=max(FACTORIZED * widest**2, *swept) * FLOAT32,
        hessian=widest**2 * FLOAT32,
        forward=forward,
        activations=activations,
        stored=candidate * (2 if config.has_safety_net else 1) + resident * export.keeps_model,
        halted=max(block.halted for block in blocks)
        * config.dataset.nsamples
        * streams
        * (config.needs_dense_pair or config.recipe.true_sequential)
        * item
        // stored,
    )


def traffic(block: Block, active: int | None) -> int:
    """Return how many numbers all matrices of a block read and give for one token.

    Args:
        block: the block on the meta device.
        active: experts of a 3-D parameter that a token is routed to; None for all of them.
    """
    total = 0
    for parameter in block.module.parameters():
        if parameter.ndim == 3:
            experts = len(parameter)
            total += min(experts, active or experts) * sum(parameter.shape[1:])
        elif parameter.ndim == 2:
            total += sum(parameter.shape)
    return total


def find_room(device: str, directory: Path, config: Config) -> Room:
    """Ask the machine what is free, or take what the config says.

    Args:
        device: where blocks run.
        directory: of the records; compressed blocks that it already holds need no room.
        config: the config of the run.
    """
    accelerator = None
    if device.startswith("cuda"):
        accelerator = torch.cuda.mem_get_info(torch.device(device))[0]
    if config.memory.accelerator is not None:
        accelerator = int(config.memory.accelerator * GIB)
    host = free_host_memory()
    if config.memory.host is not None:
        host = int(config.memory.host * GIB)
    return Room(accelerator, host, free_disk(directory, *run_folders()))


def free_host_memory(root: Path = ROOT) -> int:
    """Return the bytes that this process can still take: of the host and of its control groups.

    Args:
        root: the root of the file system, `/`; another one in tests.
    """
    return min([available_memory(root), *group_room(root)])


def describe(needs: Needs) -> str:
    """List the parts that must be where blocks run."""
    parts = {
        "weights outside the blocks": needs.resident,
        "one block": needs.blocks,
        "statistics and one linear": needs.site,
        "forward pass": 2 * needs.hessian + needs.forward,
    }
    return ", ".join(f"{name} {show(size)}" for name, size in parts.items())


def show(size: int) -> str:
    """Format bytes."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / MIB:,.1f} MiB"


def in_a_line(plan: MemoryPlan) -> str:
    """Say what will live where."""
    parts = [f"host {show(plan.host)} of {show(plan.room.host)}"]
    if plan.accelerator is not None and plan.room.accelerator is not None:
        parts.insert(0, f"accelerator {show(plan.accelerator)} of {show(plan.room.accelerator)}")
    parts.append(f"disk {show(plan.disk)} of {show(plan.room.disk)}")
    hidden = f"hidden states {show(plan.needs.activations)} in {plan.activations.name}"
    passes = "once" if plan.piecewise else "anew for each site"
    return f"memory plan: {', '.join(parts)}; {hidden}; compressed blocks run {passes}"
