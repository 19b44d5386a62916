"""recipe=sparsegpt and recipe=gptq against a plain float64 reading of what the published code does.

The reading below shares nothing with the project. Per linear: the grid of a row from the minimum
and maximum of its weights, zero included, scales in float32; dead channels zeroed, their H_jj 1;
damping of 0.01 of the mean diagonal; the upper Cholesky factor U of the explicit inverse; then
column after column in blocks of 128, the error of each divided by U_jj and spread over its block
by U's row, and over all later blocks at the end of the block. An unstructured block prunes what
scores (w / U_jj)² up to the sorted score at ⌊ratio · n⌋; an n:m window is chosen when the loop
enters it; a group's grid is fitted when the loop enters it, to the weights as the blocks before
have left them.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from faulty_models import config_of

from mi_experiments.calibration.measure_sites import Measured
from mi_experiments.compression.compress_linear import pattern_block, solve_linear
from mi_experiments.compression.factorize_site import factorize_site
from mi_experiments.method.audit import audit_linear
from mi_experiments.method.bit_count import count_storage
from mi_experiments.method.grid import scale_groups
from mi_experiments.method.hessian import HessianAccumulator
from mi_experiments.method.pruning import Selection, Sparsity, choose_pruned
from mi_experiments.planning.plan import LinearPlan

TOLERANCE = 1e-9
SEQLEN, SAMPLES = 20, 30


@dataclass(frozen=True)
class Task:
    """What a linear is asked for."""

    columns: int = 200
    ratio: float = 0.0
    pruned_of: tuple[int, int] = (0, 0)
    bits: int = 16
    group: int = 0
    by_energy: bool = False
    dead: int = 0


def draw_problem(task, seed):
    """Weights, and tokens of coupled channels of very unequal energy, some of them dead."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, task.columns, generator=generator, dtype=torch.float64)
    tokens = torch.randn(SAMPLES * SEQLEN, task.columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(task.columns, task.columns, generator=generator, dtype=torch.float64)
    energy = torch.exp(torch.randn(task.columns, generator=generator, dtype=torch.float64) / 2)
    # Small, so that the ones of dead channels weigh in the mean of the diagonal.
    tokens = (tokens + 0.3 * tokens @ mixing / task.columns**0.5) * energy / 20
    dead = torch.randperm(task.columns, generator=generator)[: task.dead]
    tokens[:, dead] = 0
    # The widest weights of a row are on dead channels, where a grid that ignores them would differ.
    weight[:, dead] *= 3
    return weight, tokens


def grid_of(values, bits):
    top = 2**bits - 1
    least, most = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    flat = least == most
    least, most = torch.where(flat, -1.0, least), torch.where(flat, 1.0, most)
    scale = ((most - least) / top).float().double()
    return scale, torch.round(-least / scale)


def rounded(column, scale, zero, bits):
    return scale * (torch.clamp(torch.round(column / scale) + zero, 0, 2**bits - 1) - zero)


def published(weight, tokens, task, block=128):
    """Return final weights and pattern; every step as the module says."""
    rows, columns = weight.shape
    current = weight.clone()
    hessian = 2 / SAMPLES * tokens.T @ tokens
    scale, zero = grid_of(current, task.bits) if task.bits < 16 else (None, None)
    unseen = hessian.diagonal() == 0
    hessian[unseen, unseen] = 1
    current[:, unseen] = 0
    order = torch.arange(columns)
    if task.by_energy:
        order = hessian.diagonal().argsort(descending=True)
        current, hessian = current[:, order], hessian[order][:, order]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    # The upper factor U with H⁻¹ = Uᵀ U.
    spread = factor.diagonal()
    final, pattern = torch.zeros_like(weight), torch.zeros(rows, columns, dtype=torch.bool)
    out, of = task.pruned_of
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        inside = current[:, start:stop].clone()
        errors = torch.zeros_like(inside)
        chosen = torch.zeros_like(inside, dtype=torch.bool)
        if task.ratio:
            score = (inside / spread[start:stop]).square()
            limit = score.flatten().sort().values[int(score.numel() * task.ratio)]
            chosen = score <= limit
        for j in range(stop - start):
            at = start + j
            if task.group and at % task.group == 0:
                scale, zero = grid_of(current[:, at : at + task.group], task.bits)
            if of and j % of == 0:
                score = (inside[:, j : j + of] / spread[at : at + of]).square()
                least = score.argsort(1)[:, :out]
                chosen[:, j : j + of].scatter_(1, least, True)
            value = torch.where(chosen[:, j], 0.0, inside[:, j])
            if task.bits < 16:
                value = rounded(value, scale, zero, task.bits)
            errors[:, j] = (inside[:, j] - value) / spread[at]
            inside[:, j:] -= torch.outer(errors[:, j], factor[at, at:stop])
            final[:, at], pattern[:, at] = value, chosen[:, j]
        current[:, stop:] -= errors @ factor[start:stop, stop:]
    back = order.argsort()
    return final[:, back], pattern[:, back]


def ours(weight, tokens, task, config):
    """Solve the same linear as a run does, audit it, and return solution and grid."""
    rows, columns = weight.shape
    accumulator = HessianAccumulator(columns, dtype=torch.float64)
    accumulator.update(tokens)
    hessian = accumulator.finish()
    one = torch.zeros(columns, dtype=torch.int32)
    out, of = task.pruned_of
    sparsity = Sparsity.structured(of - out, of) if of else Sparsity(task.ratio)
    bits = torch.full((columns,), task.bits, dtype=torch.uint8)
    shared = scale_groups(one, task.group or None)
    plan = LinearPlan(0, "site", rows, columns, one, bits, shared, sparsity)
    measured = Measured(hessian, None, hessian.tokens)
    statistics = factorize_site(measured, [sparsity], config)
    solution = solve_linear(weight, statistics, plan, config)
    audit_linear(
        solution.swept,
        solution.grid,
        sparsity,
        original=weight,
        order=statistics.order(),
        mask_block=pattern_block(columns, sparsity, config),
        max_average_bits=float(task.bits),
        stored=solution.swept.weight,
        selection=config.recipe.selection,
    )
    return solution


CONFIGS = {
    "sparsegpt": config_of("recipe=sparsegpt", f"dataset.seqlen={SEQLEN}"),
    "gptq": config_of("recipe=gptq", f"dataset.seqlen={SEQLEN}"),
    "act-order": config_of("recipe=gptq", f"dataset.seqlen={SEQLEN}", "recipe.order=activation"),
}
SPARSEGPT = {
    "half": Task(ratio=0.5),
    "a third, ragged block": Task(columns=300, ratio=1 / 3),
    "dead channels": Task(ratio=0.5, dead=9),
    "2:4": Task(pruned_of=(2, 4)),
    "4:8": Task(columns=264, pruned_of=(4, 8), dead=5),
    "half and 4 bits": Task(columns=300, ratio=0.5, bits=4),
    "half and 3 bits, dead channels": Task(ratio=0.5, bits=3, dead=9),
    "2:4 and 4 bits": Task(pruned_of=(2, 4), bits=4),
}
GPTQ = {
    "4 bits a row": Task(bits=4),
    "2 bits a row, dead channels": Task(columns=300, bits=2, dead=11),
    "groups of 128": Task(columns=300, bits=3, group=128, dead=7),
    "groups of 32": Task(bits=4, group=32),
    "groups of 100 across blocks": Task(columns=300, bits=3, group=100),
    "groups of 256 over blocks": Task(columns=400, bits=2, group=256),
}
ACT_ORDER = {
    "4 bits a row": Task(bits=4, by_energy=True),
    "3 bits a row, dead channels": Task(columns=300, bits=3, by_energy=True, dead=7),
}
CASES = [
    pytest.param(CONFIGS[recipe], task, id=f"{recipe}: {name}")
    for recipe, tasks in (("sparsegpt", SPARSEGPT), ("gptq", GPTQ), ("act-order", ACT_ORDER))
    for name, task in tasks.items()
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("config", "task"), CASES)
def test_the_recipe_computes_what_the_published_code_does(config, task, seed):
    weight, tokens = draw_problem(task, seed)
    expected, pattern = published(weight, tokens, task)
    solution = ours(weight, tokens, task, config)
    assert torch.equal(solution.swept.pruned, pattern)
    assert (solution.swept.weight - expected).abs().max() < TOLERANCE


SWITCHES = {
    "damping": (0.1, Task(ratio=0.5)),
    "damping_power": (1.0, Task(ratio=0.5)),
    "dead_channels": ("keep", Task(ratio=0.5, bits=3, dead=9)),
    "dead_diagonal": (0.0, Task(ratio=0.5, bits=3, dead=9)),
    "order": ("activation", Task(ratio=0.5)),
    "grid_fit": ("compensated", Task(ratio=0.5, bits=3)),
    "clip_search": (True, Task(ratio=0.5, bits=3)),
    "scale_bits": (16, Task(ratio=0.5, bits=3)),
    "selection": ("exact", Task(ratio=0.5)),
    "window_choice": ("block", Task(pruned_of=(2, 4))),
    "refine_rounds": (1, Task(ratio=0.5, bits=3)),
}


@pytest.mark.parametrize("key", SWITCHES)
def test_no_switch_of_the_recipe_is_idle(key):
    """Each convention moves the result, so none of them could be left out of the YAML."""
    value, task = SWITCHES[key]
    weight, tokens = draw_problem(task, 0)
    changed = config_of("recipe=sparsegpt", f"dataset.seqlen={SEQLEN}", f"recipe.{key}={value}")
    expected, _ = published(weight, tokens, task)
    moved = ours(weight, tokens, task, changed).swept.weight - expected
    assert moved.abs().max() > 1e3 * TOLERANCE


def test_groups_on_the_fly_are_not_those_of_the_original_weights():
    task = GPTQ["groups of 32"]
    weight, tokens = draw_problem(task, 0)
    dynamic = ours(weight, tokens, task, CONFIGS["gptq"])
    config = config_of("recipe=gptq", f"dataset.seqlen={SEQLEN}", "recipe.grid_fit=static")
    static = ours(weight, tokens, task, config)
    # The groups that the first block begins with are reached before anything is compensated.
    assert torch.equal(dynamic.grid.scale[:, :4], static.grid.scale[:, :4])
    assert not torch.equal(dynamic.grid.scale[:, 4:], static.grid.scale[:, 4:])


@pytest.mark.parametrize("seed", [0, 1])
def test_survivors_have_the_grid_and_the_pattern_of_a_sweep_that_only_prunes(seed):
    task = SPARSEGPT["half and 4 bits"]
    weight, tokens = draw_problem(task, seed)
    survivors, pattern = published(weight, tokens, replace(task, bits=16))
    config = config_of(
        "recipe=sparsegpt", f"dataset.seqlen={SEQLEN}", "recipe.grid_fit=compensated"
    )
    solution = ours(weight, tokens, task, config)
    scale, zero = grid_of(survivors, task.bits)
    assert torch.equal(solution.swept.pruned, pattern)
    torch.testing.assert_close(solution.grid.scale[:, 0], scale, rtol=2e-7, atol=0)
    assert torch.equal(solution.grid.zero_point[:, 0].double(), zero)


@pytest.mark.parametrize("recipe", ["textbook", "sparsegpt"])
def test_the_scale_of_the_hessian_is_no_convention(recipe):
    """2/tokens or 2/nsamples: the sweep is the same, so there is no switch."""
    task = SPARSEGPT["half and 4 bits"]
    weight, tokens = draw_problem(task, 3)
    config = config_of(f"recipe={recipe}")
    one, other = (ours(weight, tokens * factor, task, config).swept for factor in (1, 32))
    assert torch.equal(one.pruned, other.pruned)
    assert (one.weight - other.weight).abs().max() < TOLERANCE


def test_the_threshold_prunes_one_more_than_asked_and_all_ties():
    score = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0, 2.0, 7.0, 8.0]])
    pruned = choose_pruned(score, Sparsity(0.25), Selection.threshold)
    assert torch.equal(pruned, score <= 2)
    assert choose_pruned(score, Sparsity(0.25)).sum() == 2
    distinct = torch.randperm(100).view(4, 25).double()
    for ratio in (0.01, 0.5, 0.77, 0.995):
        chosen = choose_pruned(distinct, Sparsity(ratio), Selection.threshold)
        assert chosen.sum() == int(ratio * 100) + 1
    for ratio in (0.0, 1.0):
        assert choose_pruned(distinct, Sparsity(ratio), Selection.threshold).sum() == ratio * 100


def test_float32_scales_are_counted_as_such():
    task = SPARSEGPT["half and 4 bits"]
    weight, tokens = draw_problem(task, 0)
    solution = ours(weight, tokens, task, CONFIGS["sparsegpt"])
    scale = solution.grid.scale
    assert torch.equal(scale, scale.float().double())
    assert not torch.equal(scale, scale.half().double())
    storage = count_storage(solution.grid, solution.swept.pruned, solution.sparsity, None)
    assert storage.scales == len(weight) * 32
    kept = int((~solution.swept.pruned).sum())
    assert storage.total == 4 * kept + 36 * len(weight) + weight.numel() + 4
