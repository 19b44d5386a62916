"""The phases of a run: each takes up what was finished earlier, and commits what it does."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from jaxtyping import Int
from torch import Tensor

from mi_experiments.calibration.drop_nonfinite import drop_nonfinite
from mi_experiments.compression.pipeline import compress_model
from mi_experiments.compression.totals import totals
from mi_experiments.config.config import Config
from mi_experiments.evaluation.measure_text import measure_text
from mi_experiments.evaluation.measurements import Measurement
from mi_experiments.experiment.cache import RunCache
from mi_experiments.experiment.memory_plan import MemoryPlan
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.export.stored_model import StoredModel
from mi_experiments.llm.loading import OpenModel
from mi_experiments.llm.logits import plan_waves
from mi_experiments.llm.walker import Walker
from mi_experiments.persistence.commits import Commits
from mi_experiments.planning.plan import Plan, count_steps, plan_compression
from mi_experiments.records.linears import LINEARS, LinearReport
from mi_experiments.records.recorder import Recorder
from mi_experiments.records.result import Evaluation, read_evaluation
from mi_experiments.records.tracking import Tracker
from mi_experiments.texts.sources import EvaluationText

PLAN = "plan.safetensors"


@dataclass(frozen=True, eq=False)
class Run:
    """What a run works with.

    Attributes:
        config: the config of the run.
        opened: model, tokenizer, and the original weights by block.
        walker: how the dense model is walked.
        texts: the texts for evaluation.
        calibration: token ids.
        held_out: token ids of the same text on which nothing is measured; None without a safety
            net.
        commits: what is finished.
        stored: the compressed blocks.
        memory: what lives where.
        cache: what other jobs have computed.
        recorder: the recorder of the result.
        tracker: the tracker of the run.
        progress: draws the bars.
        stop: a wish to stop, granted between blocks.
    """

    config: Config
    opened: OpenModel
    walker: Walker
    texts: Sequence[EvaluationText]
    calibration: Int[Tensor, "nsamples seqlen"]
    held_out: Int[Tensor, "sequences seqlen"] | None
    commits: Commits
    stored: StoredModel
    memory: MemoryPlan
    cache: RunCache
    recorder: Recorder
    tracker: Tracker
    progress: Progress
    stop: StopRequest


def check_samples(run: Run) -> Run:
    """Leave out the calibration samples that are not finite in the dense model."""
    with run.progress.task("check samples", total=len(run.walker.blocks)) as advance:

        def on_block() -> None:
            advance()
            run.stop.check()

        calibration, dropped = drop_nonfinite(
            run.walker,
            run.calibration,
            commits=run.commits,
            on_block=on_block,
        )
    run.recorder.update(dropped=dropped)
    return replace(run, calibration=calibration)


def evaluate(run: Run, phase: str, walker: Walker) -> None:
    """Measure the dense or the compressed model on every text, once."""
    evaluations: dict[str, Evaluation] = {}
    for index, text in enumerate(run.texts):
        name = evaluation_file(phase, index)
        row = run.commits.read_json(name)
        if row is None:
            row = asdict(evaluate_text(run, text, walker, phase))
            run.commits.commit({name: json.dumps(row, indent=1).encode()})
        evaluations[text.name] = read_evaluation(row)
        run.tracker.log_evaluation(phase, text.name, evaluations[text.name])
        run.recorder.update(**{phase: dict(evaluations)})


def evaluation_file(phase: str, index: int) -> str:
    """Return where what was measured on a text is committed."""
    return f"evaluations/{phase}-{index:03}.json"


def evaluate_text(run: Run, text: EvaluationText, walker: Walker, phase: str) -> Evaluation:
    """Measure a model on one text; the dense one, if no other job has."""
    evaluation = run.config.evaluation
    wave_tokens = run.memory.wave_tokens
    waves = len(plan_waves(text.windows, evaluation.batch_tokens, wave_tokens))
    steps = waves * len(walker.blocks)
    with run.progress.task(f"{phase} {text.name}", total=steps) as advance:

        def on_block() -> None:
            advance()
            run.stop.check()

        def measure() -> dict[str, Measurement]:
            return measure_text(
                walker,
                text.windows,
                evaluation.measurements,
                batch_tokens=evaluation.batch_tokens,
                logits_chunk=evaluation.logits_chunk,
                wave_tokens=wave_tokens,
                on_block=on_block,
            )

        measured = (
            run.cache.measured(text.name, text.windows, wave_tokens, measure)
            if phase == "dense"
            else measure()
        )
    return Evaluation(
        protocol=evaluation.protocol,
        windows=text.cut,
        seqlen=text.seqlen,
        tokens=sum(len(window) - 1 for window in text.windows),
        count=len(text.windows),
        dropped_tokens=text.dropped_tokens,
        tokens_sha256=text.sha256,
        floor=text.floor,
        bos=text.bos,
        measurements=measured,
    )


def make_plan(run: Run) -> Plan:
    """Return the plan: the committed one, or a new one."""
    committed = run.commits.read_tensors(PLAN)
    if committed is None:
        blocks = len(run.walker.blocks)
        steps = count_steps(blocks, len(run.calibration), run.config)
        with (
            run.progress.task("plan", total=steps) as advance,
            run.cache.plan(run.commits, run.calibration, blocks) as share,
        ):

            def on_block(block: str) -> None:
                advance(block)
                share()
                run.stop.check()

            plan = plan_compression(
                run.walker, run.calibration, run.config, on_block, commits=run.commits
            )
        # Before it is written: a plan that came out differently must not take the place of one.
        run.commits.bind("plan", plan.sha256())
        run.commits.commit({PLAN: plan.stored()})
    else:
        plan = Plan.read(*committed)
        run.commits.bind("plan", plan.sha256())
    return plan


def compress(run: Run, plan: Plan) -> None:
    """Compress the model, store each block when it is finished, and record every linear."""
    compress_blocks(run, plan, run.stored, lambda report: keep(run, report))
    conclude(run, plan)


def keep(run: Run, report: LinearReport) -> None:
    """Take a linear into the records of the run."""
    run.recorder.linears.append(report)
    run.tracker.log_linear(report)


def compress_blocks(
    run: Run,
    plan: Plan,
    stored: StoredModel,
    record: Callable[[LinearReport], None],
    title: str = "compress",
) -> None:
    """Compress all blocks by a plan, but for those that are stored already.

    Args:
        run: whose model it is.
        plan: groups and widths of every linear.
        stored: receives each block when it is finished.
        record: called for each linear, in order, now or from an earlier process.
        title: the title of the bar.
    """
    count = len(run.walker.blocks)
    finished = [block for block in range(count) if stored.find(block)]
    with run.progress.task(title, total=len(plan.linears)) as advance:

        def on_linear(report: LinearReport) -> None:
            record(report)
            advance(
                f"block {report.block} {report.name.split('.')[-1]} "
                f"{report.average_bits:.2f} bits, error {report.output_error:.4f}"
            )

        def recall(block: int) -> None:
            for report in stored.reports(block):
                record(report)
                advance(f"block {block}: finished earlier")

        def restore(block: int) -> bool:
            run.stop.check()
            if block not in finished:
                return False
            stored.weights.load(block)
            recall(block)
            return True

        blocks = compress_model(
            run.walker, run.calibration, plan, run.config, on_linear, restore=restore
        )
        if len(finished) == count:
            # Then no hidden state is needed either.
            for block in finished:
                recall(block)
        else:
            for compressed in blocks:
                stored.store(compressed)


def conclude(run: Run, plan: Plan) -> None:
    """Record what all linears together are, and hold the model to its budget."""
    sha256 = run.stored.sha256()
    # What is evaluated by several processes, or after damage was mended, is one model.
    run.commits.bind("compressed", sha256)
    run.recorder.update(
        **totals(run.recorder.linears, plan),
        coverage=run.walker.inventory.coverage,
        compressed_sha256=sha256,
    )
    run.commits.adopt(LINEARS)
