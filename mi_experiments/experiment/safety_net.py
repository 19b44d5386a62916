"""The safety net: compress by the mixed plan and by its uniform alternative, keep the better.

What says which is better is the divergence from the dense model on calibration text on which
nothing was measured. The mixed model is stored where a run without a net stores its own, the
uniform one in a folder of its own; when it wins, its blocks take the place of the others.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

from mi_experiments.compression.totals import check_budget
from mi_experiments.errors import NumericalError
from mi_experiments.evaluation.divergence import Divergence, measure_divergence
from mi_experiments.experiment.phases import Run, compress_blocks, conclude, keep
from mi_experiments.export.stored_model import CANDIDATES, StoredModel
from mi_experiments.llm.logits import plan_waves
from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import Plan
from mi_experiments.planning.uniform_baseline import uniform_alternative
from mi_experiments.records.candidates import Candidate, SafetyNet
from mi_experiments.records.linears import LinearReport
from mi_experiments.texts.windows import token_hash

UNIFORM_PLAN = "plan_uniform.safetensors"
CHOICE = f"{CANDIDATES}/safety_net.json"


def compress_safely(run: Run, plan: Plan) -> None:
    """Compress twice, and leave the run with the model that is nearer to the dense one.

    Args:
        run: the run with held-out calibration text.
        plan: the mixed plan.

    Raises:
        ValueError: there is no held-out text.
    """
    if run.held_out is None:
        raise ValueError("a safety net needs held-out calibration text")
    run.commits.bind("held_out", token_hash(run.held_out))
    uniform = uniform_alternative(plan, run.config)
    if run.commits.find(UNIFORM_PLAN) is None:
        run.commits.commit({UNIFORM_PLAN: uniform.stored()})
    folder = f"{CANDIDATES}/uniform/"
    weights = run.opened.weights.fork()
    candidates = {
        "mixed": (plan, run.stored),
        "uniform": (uniform, StoredModel(weights, run.commits, run.config, folder)),
    }
    # Once it is known, only the winner's blocks count: the others may have been overwritten.
    choice = run.commits.read_json(CHOICE)
    if choice is None:
        choice = asdict(choose(run, candidates))
        run.commits.commit({CHOICE: json.dumps(choice, indent=1).encode()})
    net = SafetyNet.from_json(choice)
    plan, stored = candidates[net.kept]
    compress_blocks(run, plan, stored, lambda report: keep(run, report), f"keep {net.kept}")
    if stored is not run.stored:
        run.stored.take_over(stored)
    run.recorder.update(safety_net=net)
    conclude(run, plan)


def choose(run: Run, candidates: Mapping[str, tuple[Plan, StoredModel]]) -> SafetyNet:
    """Compress the model by every plan, and compare the results; of equal ones, the first wins."""
    measured: dict[str, Candidate] = {}
    for name, (plan, stored) in candidates.items():
        reports: list[LinearReport] = []
        compress_blocks(run, plan, stored, reports.append, f"compress {name}")
        bits = check_budget(reports, plan)
        divergence = diverge(run, name, replace(run.walker, weights=stored.weights))
        measured[name] = Candidate(
            divergence.kl, divergence.standard_error, bits.average, bits.effective
        )
    assert run.held_out is not None
    return SafetyNet(
        kept=min(measured, key=lambda name: measured[name].kl),
        candidates=measured,
        tokens=run.held_out.numel(),
        sequences=len(run.held_out),
        tokens_sha256=token_hash(run.held_out),
    )


def diverge(run: Run, name: str, walker: Walker) -> Divergence:
    """Measure once how far a candidate is from the dense model on the held-out text."""
    assert run.held_out is not None
    committed = f"{CANDIDATES}/{name}.json"
    row = run.commits.read_json(committed)
    if row is not None:
        return Divergence(**row)
    windows = list(run.held_out)
    evaluation, wave_tokens = run.config.evaluation, run.memory.wave_tokens
    waves = len(plan_waves(windows, evaluation.batch_tokens, wave_tokens // 2))
    total = waves * len(walker.blocks)
    with run.progress.task(f"divergence of {name}", total=total) as advance:

        def on_block() -> None:
            advance()
            run.stop.check()

        try:
            divergence = measure_divergence(
                run.walker,
                walker,
                windows,
                batch_tokens=evaluation.batch_tokens,
                logits_chunk=evaluation.logits_chunk,
                wave_tokens=wave_tokens,
                on_block=on_block,
            )
        except NumericalError as error:
            raise NumericalError(f"held-out calibration text, {name}: {error}") from error
    run.commits.commit({committed: json.dumps(asdict(divergence), indent=1).encode()})
    return divergence
