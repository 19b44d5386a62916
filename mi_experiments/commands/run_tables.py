"""What a person reads in the terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mi_experiments.comparison.inert import visible
from mi_experiments.config.config import Config
from mi_experiments.config.secrets import scrub
from mi_experiments.evaluation.measurements import PERPLEXITY
from mi_experiments.experiment.dry_run import Outline
from mi_experiments.experiment.memory_plan import MemoryPlan, show
from mi_experiments.records.linears import LINEARS
from mi_experiments.records.result import RESULT, Result, by_name


def print_result(
    result: Result,
    run_dir: Path,
    sweep_dir: Path | None,
    notes: Sequence[str],
    console: Console,
) -> None:
    """Print what a run gave: what was measured, bits, sparsity, time, and where records lie."""
    for name in by_name(result.dense):
        console.print(measurement_table(result, name))
    console.print(budget_table(result))
    lines = [("records", str(run_dir)), ("", f"{RESULT}  {LINEARS}  run.log  .hydra/")]
    if sweep_dir is not None:
        lines.append(("compare", f"mi-compare {sweep_dir}"))
    lines += [("W&B", note) for note in notes]
    for title, line in lines:
        console.print(visible(f"{title:<8} {line}"), soft_wrap=True, highlight=False, markup=False)


def measurement_table(result: Result, measurement: str) -> Table:
    """Return what was measured of the dense and the compressed model, by text."""
    table = Table(title=measurement, title_justify="left")
    floors = measurement == PERPLEXITY and any(text.floor for text in result.dense.values())
    for heading in ("text", "windows", "tokens", "dense", "compressed", "change"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    if floors:
        table.add_column("floor", justify="right")
    for name, dense in result.dense.items():
        before = dense.measurements[measurement].value
        after = result.compressed[name].measurements[measurement].value
        cells: list[str | Text] = [
            Text(visible(name)),
            f"{dense.count} {dense.windows}",
            f"{dense.tokens:,}",
            show_value(before),
            show_value(after),
            f"{after / before - 1:+.2%}" if before else "",
        ]
        table.add_row(*cells, *([f"{dense.floor:.4f}" if dense.floor else ""] if floors else []))
    return table


def show_value(value: float) -> str:
    """Format what was measured."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def budget_table(result: Result) -> Table:
    """Return bits, sparsity, memory and time."""
    table = Table(title="budget and cost", title_justify="left", show_header=False)
    if result.bits:
        table.add_row("requested bits", f"{result.bits.requested:g}")
        table.add_row("average bits", f"{result.bits.average:.4f}")
        table.add_row("effective bits", f"{result.bits.effective:.4f}  (with all that is stored)")
    if net := result.safety_net:
        others = ", ".join(f"{name} {entry.kl:.5f}" for name, entry in net.candidates.items())
        table.add_row("safety net", f"kept {net.kept}  (KL to the dense model, nats: {others})")
    table.add_row("sparsity", f"{result.sparsity:.4f}")
    table.add_row("weights", f"{result.weights:,}  ({result.coverage:.1%} of the blocks')")
    if set(result.statuses) - {"compressed"}:
        counts = ", ".join(f"{count} {status}" for status, count in result.statuses.items())
        table.add_row("linears", counts)
    if result.dropped:
        table.add_row("left out", f"{len(result.dropped)} calibration samples, not finite")
    if result.retries:
        table.add_row("memory short", f"{result.retries} times: done again in smaller pieces")
    if result.from_cache:
        parts = ", ".join(f"{phase} {len(names)}" for phase, names in result.from_cache.items())
        table.add_row("from cache", f"{parts}: read, computed by another job")
    table.add_row("peak memory", f"{max(result.memory.values()) / 1e9:.2f} GB")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    table.add_row("time", f"{sum(result.seconds.values()):.1f} s  ({phases})")
    return table


def print_dry_run(outline: Outline, config: Config, console: Console) -> None:
    """Print what a run would do."""
    name = scrub(config.model.name)
    table = Table(title=f"plan of {name}: nothing is computed", title_justify="left")
    most = ", at most" if config.adapts_groups else ""
    for heading in ("blocks", "site", "linears", f"groups{most}", f"effective bits{most}", "MB"):
        left = heading == "site"
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for site in outline.sites:
        table.add_row(
            str(site.blocks),
            site.name.replace("+", " +\n  "),
            "\n".join(f"{rows}×{columns}" for rows, columns in site.shapes),
            show_sizes(site.group_sizes),
            f"{site.effective_bits:.3f}",
            f"{site.megabytes:.2f}",
        )
    console.print(table)
    summary = Table(show_header=False)
    summary.add_row("weights to compress", f"{outline.weights:,}")
    summary.add_row("requested bits", f"{config.wbits.average:g}, per {config.wbits.scope.name}")
    summary.add_row("sparsity", f"{config.sparsity.ratio:g}")
    summary.add_row("calibration", f"{config.dataset.nsamples} × {config.dataset.seqlen} tokens")
    summary.add_row("block passes", f"{outline.passes}")
    console.print(summary)
    console.print(memory_table(outline.memory))


def memory_table(plans: Mapping[str, MemoryPlan | str]) -> Table:
    """Return what will live where, for one or more machines."""
    table = Table(title="memory plan", title_justify="left")
    for heading in ("", "accelerator", "host", "disk", "hidden states"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, plan in plans.items():
        if isinstance(plan, str):
            table.add_row(name, "does not fit", "", "", plan)
            continue
        on = plan.accelerator, plan.room.accelerator
        table.add_row(
            name,
            "" if on[0] is None or on[1] is None else f"{show(on[0])} of {show(on[1])}",
            f"{show(plan.host)} of {show(plan.room.host)}",
            f"{show(plan.disk)} of {show(plan.room.disk)}",
            f"{show(plan.needs.activations)} in {plan.activations.name}",
        )
    return table


def show_sizes(sizes: tuple[int, ...]) -> str:
    """Format group sizes, equal ones together: `2×32 + 36`."""
    counts = Counter(sizes)
    return " + ".join(
        f"{count}×{size}" if count > 1 else f"{size}" for size, count in counts.items()
    )
