"""What is required of all linears together: the budget, and that few of them fell back."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mi_experiments.errors import AuditError, NumericalError
from mi_experiments.method.bit_count import average_bits
from mi_experiments.planning.plan import Plan
from mi_experiments.records.result import Bits, LinearReport, total_bits, weighted_mean

log = logging.getLogger(__name__)

FALLEN_BACK = ("escalated", "skipped")


def check_budget(linears: Sequence[LinearReport], plan: Plan) -> Bits:
    """Return the bits of all linears, and hold those that were compressed to their budget.

    A linear that was skipped or kept counts what it is, 16 bits, in the average that is returned,
    which so may be above what was requested. The budget is held with the bits it was to get.

    Raises:
        AuditError: the compressed linears took more than their share of the budget.
    """
    planned = {
        linear.name: average_bits(plan.linears[linear.name].bits)
        if linear.status in ("skipped", "kept")
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
        NumericalError: the share of linears that were escalated or skipped is above
            `max_escalated`.
    """
    fallen = [linear for linear in linears if linear.status in FALLEN_BACK]
    if not fallen:
        return
    counts = Counter(linear.status for linear in fallen)
    share = len(fallen) / len(linears)
    line = (
        f"{len(fallen)} of {len(linears)} linears ({share:.0%}) were not compressed as asked, "
        f"because their Hessian is not positive definite at recipe.damping: "
        f"{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}, first "
        f"{fallen[0].name}; average bits {bits.average:.4f} where {bits.requested:g} were requested"
    )
    if share > max_escalated:
        raise NumericalError(
            f"{line}. recipe.max_escalated={max_escalated:g} allows less. Everything is computed "
            "and recorded: calibrate on more tokens, raise recipe.damping, or allow it"
        )
    log.warning("%s", line)
