"""CPU seconds of planning and compressing decoder blocks, against the textbook's way.

The textbook's way, block by block: a forward pass that records what each linear reads, a Hessian a
linear, two factors, a sort and a column loop for each (`solver.published_recursion`), and a second
forward pass. Ours are `experiment=textbook`, the default and others, on the same random Llama
blocks and tokens. Everything runs in one process on one thread, in turn, and process time is
counted, so a busy machine matters little; the median of the repetitions counts.

    python benchmarks/blocks.py [HIDDEN MLP SAMPLES SEQLEN] [--repeat 3] [--profile]
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from solver import published_recursion
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mi_experiments.compression.pipeline import compress_model
from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.llm.walker import Walker
from mi_experiments.method.grid import fit_grid, scale_groups
from mi_experiments.method.pruning import Sparsity
from mi_experiments.out_of_memory import keep_small_pieces
from mi_experiments.planning.plan import plan_compression

BLOCKS = 2
VOCABULARY = 512
OURS = {
    "experiment=textbook": ["experiment=textbook", "wbits.average=4"],
    "default": [],
    "n_groups=mutual_information": ["n_groups=mutual_information"],
}

Spent = dict[str, float]


def main() -> None:
    """Measure every way as often as asked, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="*", type=int, default=[1024, 2816, 16, 512])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=list(OURS), help="measure this one and the textbook")
    parser.add_argument("--profile", action="store_true", help="say where the default's time goes")
    arguments = parser.parse_args()
    hidden, mlp, samples, seqlen = arguments.shape
    torch.set_num_threads(1)
    keep_small_pieces()
    tokens = torch.randint(
        0, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(1)
    )

    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=BLOCKS,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            vocab_size=VOCABULARY,
            max_position_embeddings=seqlen,
        )
        return LlamaForCausalLM(config).eval()

    print(f"hidden {hidden}, MLP {mlp}, {BLOCKS} blocks, {samples} × {seqlen} tokens")
    ways: dict[str, Callable[[], Spent]] = {"textbook": lambda: textbook(build(), tokens)}
    for name, overrides in OURS.items():
        if arguments.only in (None, name):
            ways[name] = lambda overrides=overrides: ours(build(), tokens, overrides)
    if arguments.profile:
        with cProfile.Profile(time.process_time) as profile:
            ours(build(), tokens, OURS[arguments.only or "default"])
        for order in ("cumulative", "tottime"):
            pstats.Stats(profile).sort_stats(order).print_stats(50)
        return
    runs: dict[str, list[Spent]] = {name: [] for name in ways}
    for _ in range(arguments.repeat):
        for name, measure in ways.items():
            runs[name].append(measure())
    base = None
    for name, found in runs.items():
        spent = {phase: statistics.median(run[phase] for run in found) for phase in found[0]}
        total = statistics.median(sum(run.values()) for run in found)
        base = base or total
        parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in spent.items())
        print(f"{name:<28} {total:8.2f} s   {total / base:5.2f} × textbook   ({parts})", flush=True)


def ours(model: LlamaForCausalLM, tokens: Tensor, overrides: list[str]) -> Spent:
    """Plan and compress as a run does."""
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        config = from_hydra(compose("config", overrides=overrides))
    walker = Walker(model, batch_size=config.dataset.batch_size)
    started = time.process_time()
    plan = plan_compression(walker, tokens, config)
    planned = time.process_time()
    for _ in compress_model(walker, tokens, plan, config):
        pass
    return {"plan": planned - started, "compress": time.process_time() - planned}


@torch.no_grad()
def textbook(model: LlamaForCausalLM, tokens: Tensor) -> Spent:
    """Prune to 50 % and quantize to 4 bits, linear by linear."""
    states, calls = entering(model, tokens)
    spent = dict.fromkeys(("forward and Hessians", "solve", "forward"), 0.0)
    for layer in model.model.layers:
        started = time.process_time()
        hessians = second_moments(layer, states, calls)
        measured = time.process_time()
        for module, hessian in hessians.items():
            weight = module.weight.data
            bits = torch.full((weight.shape[1],), 4, dtype=torch.uint8)
            group = scale_groups(torch.zeros(weight.shape[1], dtype=torch.int64), None)
            grid = fit_grid(weight, bits, group, clip_search=False)
            module.weight.data = published_recursion(weight, hessian, grid, Sparsity(0.5))
        solved = time.process_time()
        states = [layer(state, **call) for state, call in zip(states, calls, strict=True)]
        spent["forward and Hessians"] += measured - started
        spent["solve"] += solved - measured
        spent["forward"] += time.process_time() - solved
    return spent


def entering(model: LlamaForCausalLM, tokens: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return what the first block reads of every sample, and how it is called."""
    states: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs.pop("hidden_states"))
        calls.append(kwargs)
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for sample in tokens:
        try:
            model(sample[None])
        except StopIteration:
            continue
    handle.remove()
    return states, calls


def second_moments(
    layer: nn.Module, states: list[Tensor], calls: list[dict[str, Any]]
) -> dict[nn.Linear, Tensor]:
    """Run a block on all samples, and sum a Hessian for each of its linears."""
    hessians = {
        module: torch.zeros(module.in_features, module.in_features)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    }

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].flatten(0, -2)
        hessians[module].addmm_(inputs.T, inputs, alpha=2 / len(states))

    handles = [module.register_forward_hook(add) for module in hessians]
    for state, call in zip(states, calls, strict=True):
        layer(state, **call)
    for handle in handles:
        handle.remove()
    return hessians


if __name__ == "__main__":
    main()
