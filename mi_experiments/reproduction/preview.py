"""What mi-reproduce --plan shows: jobs, downloads, memory and hours; nothing is done."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from mi_experiments.config.config import Config
from mi_experiments.config.texts import CorpusConfig, DatasetConfig
from mi_experiments.errors import InputError
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.experiment.memory_plan import MemoryPlan, show
from mi_experiments.llm.loading import load_skeleton, locate_model
from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.reproduction.estimate import HALF, Rates, count_work
from mi_experiments.reproduction.substitution import Shapes
from mi_experiments.texts.corpora import locate_corpus

ROOM = "80 GiB accelerator"


@dataclass(frozen=True)
class Job:
    """One run of a plan.

    Attributes:
        row: the row of the table.
        run_dir: where it is recorded; rows that are the same run share it.
        model: path and revision.
        texts: the corpora that it reads.
        downloads: bytes of the model and of every file of the texts, by name; 0 where it is on this
            machine, None where the size is not known.
        memory: the memory of an accelerator of 80 GiB, or why that is not known.
        hours: estimated; None where the shapes of the model are not known.
    """

    row: str
    run_dir: str
    model: str
    texts: Sequence[str]
    downloads: Mapping[str, float | None]
    memory: str
    hours: float | None


def plan_job(row: str, run_dir: str, config: Config, shapes: Shapes, rates: Rates) -> Job:
    """Outline one row, from the shapes of its model alone."""
    model = f"{config.model.path}@{(config.model.revision or '-')[:12]}"
    size: float | None = None
    memory, hours = "", None
    try:
        with described(config, shapes) as outlined:
            outline = dry_run(outlined)
            skeleton = load_skeleton(outlined.model.path, revision=None, offline=True)
            size = float(HALF * sum(weight.numel() for weight in skeleton.parameters()))
        plan = outline.memory[ROOM]
        memory = show(plan.accelerator or 0) if isinstance(plan, MemoryPlan) else plan
        hours = count_work(outline, config, rates).seconds(rates) / 3600
    except InputError as error:
        memory = f"unknown: {error}"
    downloads: dict[str, float | None] = {model: 0.0 if is_here(config) else size}
    read = {config.dataset.corpus, *(t.corpus for t in config.evaluation.datasets.values())}
    downloads |= text_files(config, rates)
    return Job(row, run_dir, model, sorted(read), downloads, memory, hours)


@contextmanager
def described(config: Config, shapes: Shapes) -> Iterator[Config]:
    """Give a config whose model has the shapes of the row's, where they are known.

    A model from elsewhere, and one whose shapes are not known, is looked up itself.
    """
    own = config.model.name in shapes and not Path(config.model.path).expanduser().is_dir()
    if not own:
        yield replace(config, model=replace(config.model, offline=True))
        return
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps(dict(shapes[config.model.name])).encode()
        write_atomically(Path(folder) / "config.json", content)
        yield replace(config, model=replace(config.model, path=folder, revision=None))


def is_here(config: Config) -> bool:
    """Say whether the weights of a model are on this machine."""
    try:
        locate_model(config.model.path, revision=config.model.revision, offline=True)
    except InputError:
        return False
    return True


def text_files(config: Config, rates: Rates) -> dict[str, float | None]:
    """Return the files of the published texts that a run reads, and their bytes to download."""
    known: Mapping[str, float] = rates["downloads"]
    found: dict[str, float | None] = {}
    read: list[DatasetConfig | CorpusConfig] = [config.dataset]
    for text in [*read, *config.evaluation.datasets.values()]:
        corpus = config.corpora.get(text.corpus)
        if corpus is None:
            continue
        for file in corpus.splits[str(text.split)]:
            try:
                locate_corpus(corpus.hub_id, corpus.revision, [file], directory=text.path,
                              offline=True)  # fmt: skip
                size: float | None = 0.0
            except InputError:
                size = known.get(file)
            found[f"{corpus.hub_id}@{corpus.revision[:12]}/{file}"] = size
    return found


def plan_table(jobs: Sequence[Job]) -> Table:
    """Return the plan for the terminal; a row that is the same run as an earlier one says so."""
    table = Table(title="what a reproduction would do", title_justify="left")
    for heading in ("row", "model", "texts", "download", f"of {ROOM}", "hours (estimate)"):
        table.add_column(heading, overflow="fold")
    first: dict[str, Job] = {}
    for job in jobs:
        same = first.setdefault(job.run_dir, job)
        hours = "unknown" if job.hours is None else f"{job.hours:.2f}"
        if same is not job:
            hours = f"none: the run of {same.row.rpartition('/')[2]}"
        download = amount([job.downloads])
        table.add_row(job.row, job.model, ", ".join(job.texts), download, job.memory, hours)
    return table


def summary(jobs: Sequence[Job], rates: Rates) -> str:
    """Say what all of it takes, each run and file once, and what the hours are made of."""
    runs = {job.run_dir: job for job in reversed(jobs)}
    known = [job.hours for job in runs.values() if job.hours is not None]
    hidden = f", and {len(runs) - len(known)} unknown" if len(known) < len(runs) else ""
    share = f"{rates['tensor_share']:.0%} of {rates['tensor_flops'] / 1e12:g} Tflop/s"
    models = {job.model for job in jobs}
    files = {name: job.downloads for job in jobs for name in job.downloads if name not in models}
    texts = "".join(f"{name}: {amount([{name: files[name][name]}])}\n" for name in sorted(files))
    single = f"{rates['float32_share']:.0%} of {rates['float32_flops'] / 1e12:g} Tflop/s"
    return texts + (
        f"{len(jobs)} rows are {len(runs)} runs; to download: "
        f"{amount([job.downloads for job in jobs])}; about {sum(known):.1f} hours{hidden}.\n"
        f"Hours are an estimate, no measurement: operations counted, on {rates['accelerator']}; "
        f"forward passes and Hessians at {share}, factors and sweeps in float32 at {single}, "
        f"{rates['column_seconds'] * 1e6:g} µs for every column of a linear, weights read at "
        f"{rates['read_bytes'] / 1e9:g} GB/s. Finding groups, costs of widths and clipping ranges "
        "are not in it. Weights are counted as float16; conf/estimates.yaml has the sources."
    )


def amount(downloads: Sequence[Mapping[str, float | None]]) -> str:
    """Add up bytes, every name once, and say how many have no known size."""
    sizes: dict[str, Any] = {}
    for each in downloads:
        sizes |= each
    known = [size for size in sizes.values() if size is not None]
    unknown = len(sizes) - len(known)
    parts = [show(int(sum(known)))] if known else []
    return " and ".join([*parts, f"{unknown} of unknown size"] if unknown else parts)
