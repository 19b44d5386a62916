"""run_experiment: load, plan, compress, evaluate, record."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from mi_experiments.compression.totals import check_fallbacks
from mi_experiments.config.config import Config
from mi_experiments.config.secrets import scrub
from mi_experiments.config.texts import OnNonfinite
from mi_experiments.embedded import find_model
from mi_experiments.errors import MiError, ResumableError
from mi_experiments.experiment.cache import RunCache, computed_by
from mi_experiments.experiment.finished import reopen, set_aside
from mi_experiments.experiment.memory_plan import in_a_line, plan_run
from mi_experiments.experiment.phases import PLAN, Run, check_samples, compress, evaluate, make_plan
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.safety_net import UNIFORM_PLAN, compress_safely
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.export.exports import EXPORTS
from mi_experiments.export.stored_model import StoredModel, run_folders, tidy
from mi_experiments.llm.activations import allocator
from mi_experiments.llm.loading import choose_device, locate_model, open_model
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Commits
from mi_experiments.records.provenance import measure_provenance, run_identity
from mi_experiments.records.record_check import NUMBERS, hash_of_numbers
from mi_experiments.records.recorder import Recorder
from mi_experiments.records.result import Evaluation, Result
from mi_experiments.records.tracking import Tracker
from mi_experiments.texts.sources import (
    calibration_sequences,
    evaluation_texts,
    find_texts,
    held_out_sequences,
    report_overlap,
)
from mi_experiments.texts.windows import adds_bos

JudgeDense = Callable[[Mapping[str, Evaluation]], None]


def run_experiment(
    config: Config,
    run_dir: Path,
    tracker: Tracker,
    progress: Progress,
    stop: StopRequest | None = None,
    on_dense: JudgeDense | None = None,
) -> Result:
    """Load, plan, compress, evaluate, record; or continue where an earlier process stopped.

    Args:
        config: the config of the run.
        run_dir: existing directory that receives the records.
        tracker: the tracker of this run.
        progress: draws the bars.
        stop: a wish to stop, granted between blocks.
        on_dense: judges the dense model before hours are spent; what it raises ends the run.

    Returns:
        What is also in `result.json`.

    Raises:
        MiError: expected failures; `result.json` says `failed`, or `interrupted` if the same
            command continues the run, and holds what was computed.
    """
    recorder = Recorder(config, run_dir)
    recorder.update()
    try:
        stop = stop or StopRequest()
        with (
            reproducible_arithmetic(config.seed),
            recorder.count_retries(),
            stop.telling(recorder.stop),
        ):
            run = compute(config, recorder, tracker, progress, stop, on_dense)
        if recorder.result.bits is not None:
            check_fallbacks(recorder.linears, recorder.result.bits, config.recipe.max_escalated)
        # Before it is complete: a process that is killed in between does both again.
        run.commits.seal(NUMBERS, hash_of_numbers(recorder.result))
        recorder.update(status="completed")
        tidy(run.commits, config.export)
    except BaseException as error:
        line = str(error) if isinstance(error, MiError) else f"{type(error).__name__}: {error}"
        resumable = isinstance(error, ResumableError | KeyboardInterrupt)
        with suppress(OSError, MiError):
            recorder.update(status="interrupted" if resumable else "failed", error=scrub(line))
        raise
    finally:
        tracker.finish(recorder.result, recorder.linears)
        release_memory()
    return recorder.result


def compute(
    config: Config,
    recorder: Recorder,
    tracker: Tracker,
    progress: Progress,
    stop: StopRequest,
    on_dense: JudgeDense | None = None,
) -> Run:
    """Do the work of one run, phase by phase."""
    with recorder.phase("load"):
        run = open_run(config, recorder, tracker, progress, stop)
    if config.dataset.on_nonfinite is OnNonfinite.drop:
        with recorder.phase("check samples"):
            run = check_samples(run)
    with recorder.phase("evaluate dense"):
        evaluate(run, "dense", run.walker)
    if on_dense is not None:
        on_dense(recorder.result.dense)
    with recorder.phase("plan"):
        plan = make_plan(run)
    with recorder.phase("compress"):
        (compress_safely if config.has_safety_net else compress)(run, plan)
    with recorder.phase("evaluate compressed"):
        evaluate(run, "compressed", replace(run.walker, weights=run.stored.weights))
    if run.stored.export.complete is not None:
        with recorder.phase("export"):
            run.stored.complete(run.opened)
    return run


def open_run(
    config: Config, recorder: Recorder, tracker: Tracker, progress: Progress, stop: StopRequest
) -> Run:
    """Find the model and the texts, and what an earlier process finished of the same run."""
    memory = plan_run(config, recorder.run_dir)
    progress.say(in_a_line(memory))
    find_texts(config)
    overlap, left_out = report_overlap(config)
    source = locate_model(
        find_model(config.model.path),
        revision=config.model.revision,
        offline=config.model.offline,
    )
    device = choose_device(config.model.device)
    opened = open_model(
        str(source.directory),
        revision=None,
        dtype=config.model.dtype.name,
        device=device,
        offline=True,
        attention=config.model.attention,
        allow_float16=config.model.allow_float16,
        blocks=config.model.blocks,
    )
    texts = evaluation_texts(opened.tokenizer, config)
    calibration = calibration_sequences(opened.tokenizer, config)
    held_out = held_out_sequences(opened.tokenizer, config) if config.has_safety_net else None
    bos = adds_bos(opened.tokenizer, config.dataset.add_bos)
    provenance = measure_provenance(
        config,
        source,
        opened.model,
        calibration,
        bos,
        opened.weights.untied,
        overlap=overlap,
        left_out=left_out,
    )
    hashes = {text.name: text.sha256 for text in texts}
    begun = run_identity(config, provenance, hashes)
    commits = Commits(recorder.run_dir, begun, (PLAN, UNIFORM_PLAN, *run_folders()))
    reopen(commits, config.export, len(opened.weights.blocks))
    recorder.open()
    recorder.update(provenance=provenance)
    set_aside(commits)
    computed = computed_by(opened, provenance, config.model.blocks)
    walker = Walker(
        opened.model,
        weights=opened.weights,
        path=config.model.blocks,
        ignore=tuple(config.model.ignore),
        batch_size=config.dataset.batch_size,
        allocate=allocator(memory.activations, torch.device(device), recorder.run_dir),
        hessian_bytes=memory.hessian_bytes,
        piecewise=memory.piecewise,
    )
    EXPORTS[config.export].refuse(walker)
    return Run(
        config=config,
        opened=opened,
        walker=walker,
        texts=texts,
        calibration=calibration,
        held_out=held_out,
        commits=commits,
        stored=StoredModel(opened.weights.fork(), commits, config),
        memory=memory,
        cache=RunCache(config, computed, recorder, progress.say, stop.check),
        recorder=recorder,
        tracker=tracker,
        progress=progress,
        stop=stop,
    )


@contextmanager
def reproducible_arithmetic(seed: int) -> Iterator[None]:
    """Full float32, deterministic kernels and a fixed seed; what was set before is restored."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


def release_memory() -> None:
    """Give the accelerator's memory back, so that the next run of a sweep starts clean."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
