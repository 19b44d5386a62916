"""What is required of all linears together: the budget, and that few of them fell back."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mi_experiments.errors import AuditError, NumericalError
from mi_experiments.method.bit_count import average_bits
from mi_experiments.planning.plan import Plan
from mi_experiments.records.linears import LinearReport, weighted_mean
from mi_experiments.records.result import Bits, total_bits

log = logging.getLogger(__name__)

FALLEN_BACK = ("escalated", "skipped", "vanished")

SINGULAR = "their Hessian is not positive definite at recipe.damping"
SAID = {
    "escalated": SINGULAR,
    "skipped": SINGULAR,
    "vanished": "weights of them are too small for the scales that recipe.scale_bits stores",
    "kept": (
        "were kept at 16 bits a weight, because fewer than recipe.min_tokens tokens reach them"
    ),
    "dead": (
        "read nothing but zeros from calibration, and were compressed without knowing what matters"
    ),
}
"""What is said of linears by their status."""


def check_budget(linears: Sequence[LinearReport], plan: Plan) -> Bits:
    """Return the bits of all linears, and hold those that were compressed to their budget.

    A linear that was skipped or kept, or that nothing was asked of, counts what it is, 16 bits or
    more, in the average that is returned, which so may be above what was requested. The budget is
    held with the bits it was to get.

    Raises:
        AuditError: the compressed linears took more than their share of the budget.
    """
    planned = {
        linear.name: average_bits(plan.linears[linear.name].bits)
        if linear.status in ("skipped", "kept", "untouched")
        else linear.average_bits
        for linear in linears
    }
    average = weighted_mean(linears, planned)
    if round(average, 12) > plan.requested:
        raise AuditError(f"average bits {average} are above the requested {plan.requested}")
    return total_bits(linears, plan.requested)


def check_sparsity(linears: Sequence[LinearReport], plan: Plan) -> float:
    """Return the share of pruned weights, and hold the plan to what was asked of the model.

    That each linear follows the plan, to the weight in every mask block, its audit has checked.

    Raises:
        AuditError: the linears were to prune less than was asked of the model.
    """
    asked = plan.sparsity.ratio
    planned = {linear.name: plan.linears[linear.name].sparsity.ratio for linear in linears}
    if (average := weighted_mean(linears, planned)) < asked - 1e-12:
        raise AuditError(f"a share of {average} is pruned where {asked} were requested")
    return weighted_mean(linears, {linear.name: linear.sparsity for linear in linears})


def totals(linears: Sequence[LinearReport], plan: Plan) -> dict[str, Any]:
    """Sum up all linears, as fields of the result, and hold the model to its budget.

    Raises:
        AuditError: the compressed linears took more than their share of the budget.
    """
    stabilities = {x.name: x.stability for x in linears if x.stability is not None}
    grouped = [linear for linear in linears if linear.name in stabilities]
    return {
        "bits": check_budget(linears, plan),
        "sparsity": check_sparsity(linears, plan),
        "weights": sum(linear.weights for linear in linears),
        "statuses": dict(Counter(linear.status for linear in linears)),
        "stability": weighted_mean(grouped, stabilities) if grouped else None,
    }


def check_fallbacks(linears: Sequence[LinearReport], bits: Bits, max_escalated: float) -> None:
    """Refuse a run in which too many linears were not compressed as asked; warn of any.

    Raises:
        NumericalError: the share of linears that were escalated, skipped or vanished is above
            `max_escalated`.
    """
    by_status = {status: [x for x in linears if x.status == status] for status in SAID}
    cost = f"average bits {bits.average:.4f} where {bits.requested:g} were requested"
    for status in ("kept", "dead"):
        if found := by_status[status]:
            log.warning(
                "%s", f"{describe(found, linears)} {SAID[status]}, first {found[0].name}; {cost}"
            )
    fallen = [linear for linear in linears if linear.status in FALLEN_BACK]
    if not fallen:
        return
    counts = Counter(linear.status for linear in fallen)
    causes = dict.fromkeys(SAID[status] for status in FALLEN_BACK if counts[status])
    line = (
        f"{describe(fallen, linears)} were not compressed as asked, because {' or '.join(causes)}: "
        f"{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}, first "
        f"{fallen[0].name}; {cost}"
    )
    if len(fallen) / len(linears) > max_escalated:
        remedies = "calibrate on more tokens, raise recipe.damping, or allow it"
        if counts["vanished"]:
            remedies = f"set recipe.scale_bits=32, {remedies}"
        raise NumericalError(
            f"{line}. recipe.max_escalated={max_escalated:g} allows less. Everything is computed "
            f"and recorded: {remedies}"
        )
    log.warning("%s", line)


def describe(chosen: Sequence[LinearReport], linears: Sequence[LinearReport]) -> str:
    """Say how many linears they are, of all."""
    return f"{len(chosen)} of {len(linears)} linears ({len(chosen) / len(linears):.0%})"
