"""run_experiment: load, plan, compress, evaluate, record."""

import gc
import logging
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mi_experiments.composing import to_plain
from mi_experiments.config import Config, Export, ModelConfig
from mi_experiments.embedded import MODEL_DIRECTORY
from mi_experiments.errors import AuditError, MiError
from mi_experiments.llm.export import export_dense, verify_export
from mi_experiments.llm.inventory import block_list, take_inventory
from mi_experiments.llm.loading import ModelSource, load_model, locate_model
from mi_experiments.llm.perplexity import measure_perplexity
from mi_experiments.packed import export_packed
from mi_experiments.pipeline import compress_model
from mi_experiments.plan import Plan, plan_compression
from mi_experiments.progress import Progress
from mi_experiments.provenance import measure_provenance
from mi_experiments.record import (
    Evaluation,
    LinearReport,
    Result,
    total_bits,
    weighted_mean,
    write_linears,
    write_result,
)
from mi_experiments.scrubbing import scrub
from mi_experiments.texts import EvaluationText, calibration_sequences, evaluation_texts
from mi_experiments.tracking import Tracker

log = logging.getLogger(__name__)


class Recorder:
    """The result so far, on disk after every phase, so that nothing computed is ever lost."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.linears: list[LinearReport] = []
        self.result = Result(
            status="running",
            error=None,
            config=scrub(to_plain(config)),
            provenance=None,
            dense={},
            compressed={},
            bits=None,
            sparsity=None,
            weights=None,
            coverage=None,
            memory={},
            seconds={},
        )

    def update(self, **changes: Any) -> None:
        """Change fields of the result and write it."""
        self.result = replace(self.result, **changes, memory=peak_memory())
        write_result(self.result, self.run_dir)
        if self.linears:
            write_linears(self.linears, self.run_dir)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and record it."""
        log.info("%s", name)
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.update(seconds=self.result.seconds | {name: elapsed})


def run_experiment(config: Config, run_dir: Path, tracker: Tracker, progress: Progress) -> Result:
    """Load, plan, compress, evaluate, record.

    Args:
        config: of the run.
        run_dir: existing directory that receives the records.
        tracker: of this run.
        progress: draws the bars.

    Returns:
        What is also in `result.json`.

    Raises:
        MiError: expected failures; `result.json` says `failed` and holds what was computed.
    """
    recorder = Recorder(config, run_dir)
    recorder.update()
    try:
        with reproducible_arithmetic(config.seed):
            compute(config, recorder, tracker, progress)
        recorder.update(status="completed")
    except BaseException as error:
        line = str(error) if isinstance(error, MiError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            recorder.update(status="failed", error=scrub(line))
        raise
    finally:
        tracker.finish(recorder.result, recorder.linears)
        release_memory()
    return recorder.result


def compute(config: Config, recorder: Recorder, tracker: Tracker, progress: Progress) -> None:
    """Do the work of one run, phase by phase."""
    with recorder.phase("load"):
        source = find_model(config.model)
        model, tokenizer = load_model(
            str(source.directory),
            revision=None,
            dtype=config.model.dtype.name,
            device=choose_device(config.model.device),
            offline=True,
            attention=config.model.attention,
            allow_float16=config.model.allow_float16,
        )
        texts = evaluation_texts(tokenizer, config)
        calibration = calibration_sequences(tokenizer, config)
        recorder.update(provenance=measure_provenance(config, source, model, calibration))

    with recorder.phase("evaluate dense"):
        dense = evaluate(model, texts, config, progress, "dense")
        recorder.update(dense=dense)
    for name, evaluation in dense.items():
        tracker.log_evaluation("dense", name, evaluation)

    with recorder.phase("plan"):
        _, blocks = block_list(model, config.model.blocks)
        with progress.task("plan", total=len(blocks)) as advance:
            plan = plan_compression(model, calibration, config, advance)
        plan.save(recorder.run_dir / "plan.safetensors")

    with recorder.phase("compress"):
        with progress.task("compress", total=len(plan.linears)) as advance:

            def on_linear(report: LinearReport) -> None:
                recorder.linears.append(report)
                tracker.log_linear(report)
                advance(
                    f"block {report.block} {report.name.split('.')[-1]} "
                    f"{report.average_bits:.2f} bits, error {report.output_error:.4f}"
                )

            compressed = compress_model(model, calibration, plan, config, on_linear)
        recorder.update(**totals(recorder.linears, plan, model, config))

    with recorder.phase("evaluate compressed"):
        after = evaluate(model, texts, config, progress, "compressed")
        recorder.update(compressed=after)
    for name, evaluation in after.items():
        tracker.log_evaluation("compressed", name, evaluation)

    if config.export is Export.dense:
        with recorder.phase("export"):
            export_dense(
                model,
                tokenizer,
                recorder.run_dir,
                {
                    linear.report.name: linear.grids
                    for linear in compressed
                    if linear.report.status != "untouched"
                },
            )
            verify_export(recorder.run_dir, model)
    if config.export is Export.packed:
        with recorder.phase("export"):
            symmetric = config.wbits.symmetric
            export_packed(model, compressed, plan.sparsity, recorder.run_dir, symmetric=symmetric)


def find_model(model: ModelConfig) -> ModelSource:
    """Find the model's files: those of the package, a directory, or the hub."""
    if model.path == "embedded":
        return ModelSource(MODEL_DIRECTORY, None)
    return locate_model(model.path, revision=model.revision, offline=model.offline)


def choose_device(device: str) -> str:
    """Resolve `auto`: the accelerator where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(
    model: PreTrainedModel,
    texts: Sequence[EvaluationText],
    config: Config,
    progress: Progress,
    title: str,
) -> dict[str, Evaluation]:
    """Measure the perplexity of a model on every text."""
    evaluations = {}
    for text in texts:
        with progress.task(f"{title} {text.name}", total=len(text.windows)) as advance:
            measured = measure_perplexity(
                model,
                text.windows,
                batch_tokens=config.evaluation.batch_tokens,
                logits_chunk=config.evaluation.logits_chunk,
                on_windows=lambda count: advance(count=count),
            )
        evaluations[text.name] = Evaluation(
            protocol=config.evaluation.protocol,
            windows=text.cut,
            seqlen=text.seqlen,
            nll=measured.nll,
            perplexity=measured.perplexity,
            standard_error=measured.standard_error,
            tokens=measured.tokens,
            count=measured.windows,
            dropped_tokens=text.dropped_tokens,
            tokens_sha256=text.sha256,
            floor=text.floor,
        )
    return evaluations


def totals(
    linears: Sequence[LinearReport], plan: Plan, model: PreTrainedModel, config: Config
) -> dict[str, Any]:
    """Sum up all linears and hold the model to its budget.

    Raises:
        AuditError: the realised average is above the requested one.
    """
    bits = total_bits(linears, plan.requested)
    if round(bits.average, 12) > plan.requested:
        raise AuditError(f"average bits {bits.average} are above the requested {plan.requested}")
    return {
        "bits": bits,
        "sparsity": weighted_mean(linears, {linear.name: linear.sparsity for linear in linears}),
        "weights": sum(linear.weights for linear in linears),
        "coverage": take_inventory(
            model, ignore=config.model.ignore, path=config.model.blocks
        ).coverage,
    }


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


def peak_memory() -> dict[str, int]:
    """Return peak bytes: of the process, and of the accelerator where there is one."""
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["accelerator"] = torch.cuda.max_memory_allocated()
    return memory


def release_memory() -> None:
    """Give the accelerator's memory back, so that the next run of a sweep starts clean."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
