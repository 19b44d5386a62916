"""Records of runs that never ran, with results that a test can recompute by hand."""

import copy
import math
from pathlib import Path
from typing import Any

from mi_experiments.commands.compare import compose, make_table, parse
from mi_experiments.record import (
    Bits,
    Evaluation,
    LinearReport,
    Provenance,
    Result,
    write_linears,
    write_result,
)
from mi_experiments.views.data import Comparison

CONFIG: dict[str, Any] = {
    "model": {"name": "local", "path": "models/a", "seqlen": 64, "ignore": [], "offline": True},
    "dataset": {"corpus": "text", "nsamples": 32, "seqlen": 64, "seed": 0},
    "sparsity": {"ratio": 0.5, "n": 0, "m": 0},
    "wbits": {"allocation": "mixed", "average": 3.0, "scope": "linear", "symmetric": False,
              "group_size": None, "widths": None},
    "n_groups": {"grouping": "random", "count": 4, "seed": 0},
    "recipe": {"name": "default", "damping": 0.1},
    "evaluation": {"protocol": "text", "datasets": {"stories": {"corpus": "text", "seqlen": 64}}},
    "tracking": {"mode": "disabled"},
    "seed": 0,
    "export": "nothing",
}  # fmt: skip


def evaluation(nll: float, text: str) -> Evaluation:
    """Return an evaluation with a loss in nats."""
    return Evaluation(
        protocol="text", windows="joined", seqlen=64, nll=nll, perplexity=math.exp(nll),
        standard_error=0.01, tokens=630, count=10, dropped_tokens=0,
        tokens_sha256=f"hash of {text}", floor=None,
    )  # fmt: skip


def make_config(**changes: Any) -> dict[str, Any]:
    """Return the config with changes by dotted key (`wbits__average=4.0`); seeds follow `seed`."""
    config = copy.deepcopy(CONFIG)
    for key in ("dataset", "n_groups"):
        config[key]["seed"] = changes.get("seed", 0)
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def make_run(
    run_dir: Path, excess: float | dict[str, float] = 0.25, dense: float = 1.5, **changes: Any
) -> Result:
    """Write a completed run whose loss is that much above the dense one, and return its record."""
    losses = excess if isinstance(excess, dict) else {"stories": excess}
    config = make_config(**changes)
    config["evaluation"]["datasets"] = {
        text: config["evaluation"]["datasets"]["stories"] for text in losses
    }
    result = Result(
        status="completed",
        error=None,
        config=config,
        provenance=Provenance(
            numerics_version=1, versions={}, commit=None, command="mi-run", started="now",
            platform="x", device="cpu", threads=1, seeds={}, model_files={}, model_revision=None,
            calibration_sha256=None,
        ),
        dense={text: evaluation(dense, text) for text in losses},
        compressed={text: evaluation(dense + loss, text) for text, loss in losses.items()},
        bits=Bits(requested=3.0, average=2.99, effective=3.0 + next(iter(losses.values()))),
        sparsity=0.499,
        weights=384,
        coverage=1.0,
        memory={"host": 2_000_000_000, "accelerator": 3_000_000_000},
        seconds={"load": 0.5, "compress": 1.25},
        resumed=0,
    )  # fmt: skip
    run_dir.mkdir(parents=True)
    write_result(result, run_dir)
    return result


def make_broken_run(run_dir: Path, status: str, error: str | None, **changes: Any) -> None:
    """Write a run that has computed nothing yet."""
    run_dir.mkdir(parents=True)
    write_result(
        Result(
            status=status, error=error, config=make_config(**changes), provenance=None, dense={},
            compressed={}, bits=None, sparsity=None, weights=None, coverage=None, memory={},
            seconds={}, resumed=0,
        ),
        run_dir,
    )  # fmt: skip


KINDS: dict[str, tuple[str, int, int]] = {
    "attn.q_proj": ("attn.q_proj+v_proj", 64, 64),
    "attn.v_proj": ("attn.q_proj+v_proj", 32, 64),
    "mlp.down_proj": ("mlp.down_proj", 64, 96),
}
"""Name inside its block, to the site's name, rows and columns."""


def make_linears(run_dir: Path, blocks: int = 3, salt: float = 0.0, prefix: str = "model.") -> None:
    """Write linears whose numbers differ in every linear, block and run."""
    linears = []
    for block in range(blocks):
        for place, (kind, (site, rows, columns)) in enumerate(KINDS.items()):
            step = block + place / 7 + salt / 13
            wide = 0.5 + 0.25 * (block % 2)
            values = {
                "block": block, "name": f"{prefix}layers.{block}.{kind}",
                "site": f"{prefix}layers.{block}.{site}", "rows": rows, "columns": columns,
                "bits": {3: int(columns * wide), 4: columns - int(columns * wide)},
                "average_bits": 3 + step / 11, "effective_bits": 3.5 + step / 17,
                "sparsity": 0.5, "output_error": (1 + step) / 300, "levels": 16, "groups": 4,
                "pairwise_information": (1 + block) / 30, "information_noise": 1 / 7e5,
                "redundancy": 0.4 + block / 9, "total_correlation": 10 / 3 + block,
                "damping": 0.1, "damping_attempts": (0.01, 0.1), "dead_channels": 0,
                "tokens": 2048, "seconds": 0.1 + step / 3, "status": "compressed",
            }  # fmt: skip
            linears.append(LinearReport(**values))
    write_linears(linears, run_dir)


def compare_runs(*arguments: object) -> Comparison:
    """Return what `mi-compare` shows for a command line."""
    options = parse([str(argument) for argument in arguments])
    runs, shown, _ = make_table(options)
    return compose(runs, shown, options)
