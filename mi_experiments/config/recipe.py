"""How the sweep is run: `conf/recipe`."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval, Predicate

from mi_experiments.config.fields import About
from mi_experiments.errors import require
from mi_experiments.method.hessian import SweepOrder
from mi_experiments.method.number_formats import SCALE_DTYPES
from mi_experiments.method.pruning import Selection


class GridFit(Enum):
    """Which weights the grids are fitted to where a linear is pruned and quantized.

    `static`: the weights as they were, pattern and codes chosen in one sweep (arXiv:2301.00774).
    `compensated`: a sweep that only prunes comes first; the grids are fitted to what it keeps, as
    it has compensated it, and the joint sweep keeps its pattern.
    `dynamic`: each scale group's when the sweep reaches it, to weights that are compensated for all
    complete mask blocks before, whether or not they will be pruned (arXiv:2210.17323). Where one
    group is the whole row, nothing comes before it: `static`.
    """

    static = "static"
    compensated = "compensated"
    dynamic = "dynamic"


class WindowChoice(Enum):
    """When the patterns of n:m windows are chosen.

    `block`: those of a mask block together, at its beginning. `dynamic`: each when the sweep
    reaches it, as in arXiv:2301.00774.
    """

    block = "block"
    dynamic = "dynamic"


class OnSingular(Enum):
    """What is done where a Hessian is not positive definite at `recipe.damping`.

    `error`: the run ends. `escalate`: ten times the damping is tried, up to 1.0; if that fails, the
    run ends. `skip`: the linears that read it stay as they are.
    """

    error = "error"
    escalate = "escalate"
    skip = "skip"


class DeadChannels(Enum):
    """What becomes of weights whose channel is zero on every calibration token.

    `keep`: they are pruned and rounded like all others. `zero`: they become zero before anything
    else, as in the published code of arXiv:2301.00774.
    """

    keep = "keep"
    zero = "zero"


class ScarceTokens(Enum):
    """What is done with an expert to which fewer than `recipe.min_tokens` tokens are routed.

    `all_tokens`: it is calibrated on all tokens that enter its module. `keep`: it stays as it is.
    `error`: the run ends.
    """

    all_tokens = "all_tokens"
    keep = "keep"
    error = "error"


@dataclass
class RecipeConfig:
    """How the sweep is run.

    Costs are in columns c and rows r of a linear, its mask block b and n calibration tokens. The
    sweep itself takes c³/3 flop once a site and r c² a linear; its Hessian n c² and 4 c² bytes.
    """

    name: Annotated[str, About("what the recipe is called in records and tables")]
    damping: Annotated[
        float,
        Interval(ge=0, le=1),
        About("share of the mean diagonal that is added to the Hessian"),
    ]
    damping_power: Annotated[
        float,
        Interval(ge=0, le=1),
        About("0: the same for every channel; 1: in proportion to its energy; or between"),
    ]
    order: Annotated[
        SweepOrder,
        About("of channels: activation, those of high energy first, takes one permuted copy, 4 c²"),
    ]
    true_sequential: Annotated[
        bool,
        About(
            "later linears of a block see the outputs of its compressed earlier ones: a forward "
            "pass of the block for each stage, 4 in a Llama, instead of one"
        ),
    ]
    grid_fit: Annotated[
        GridFit,
        About(
            "which weights grids are fitted to where a linear is pruned and quantized; "
            "compensated doubles the sweep, dynamic takes r c² more"
        ),
    ]
    clip_search: Annotated[
        bool,
        About(
            "try 30 clipping ranges and keep the one of least squared error, 30 r c; "
            "else minimum and maximum"
        ),
    ]
    scale_bits: Annotated[
        int,
        Predicate(SCALE_DTYPES.__contains__),
        About("as which a scale is stored, and counted", allowed="16 (float16) or 32 (float32)"),
    ]
    selection: Annotated[
        Selection,
        About("how many weights an unstructured mask block prunes; both select in O(r b)"),
    ]
    window_choice: Annotated[
        WindowChoice,
        About("when patterns of n:m windows are chosen: c / b small solves, or c / m if dynamic"),
    ]
    input_correction: Annotated[
        float | None,
        Interval(ge=0, le=1),
        About(
            "share of the correction for inputs that differ from the dense model's; null: 1, or "
            "0.5 at a site with no more than 16 tokens a channel. The dense model runs along: "
            "n c² and r c² more, and 4 c² bytes"
        ),
    ]
    residual_correction: Annotated[
        float,
        Interval(ge=0, le=1),
        About(
            "share of the correction for the residual stream's distance from the dense model's: "
            "n r c more for linears that write to it, and 4 r c bytes"
        ),
    ]
    refine_rounds: Annotated[
        int,
        Ge(0),
        About(
            "rounds of coordinate descent on codes and refit of scales, after the sweep: 4 r c² a "
            "round, as long as the sweep, and 4 c² bytes",
            allowed="0 for none, or more",
        ),
    ]
    on_singular: Annotated[
        OnSingular, About("what is done where a Hessian is not positive definite")
    ]
    max_escalated: Annotated[
        float,
        Interval(ge=0, le=1),
        About("share of linears that may be escalated or skipped; beyond it the run fails"),
    ]
    dead_channels: Annotated[
        DeadChannels, About("what becomes of weights of channels that calibration never sees")
    ]
    dead_diagonal: Annotated[
        float,
        Ge(0),
        About(
            "the diagonal of such channels before damping, of 2/nsamples XᵀX summed over a "
            "sequence",
            allowed="0 for none, or more",
        ),
    ]
    min_tokens: Annotated[
        int,
        Ge(1),
        About("fewer tokens routed to an expert are scarce", unit="token"),
    ]
    scarce_tokens: Annotated[
        ScarceTokens, About("what is done with an expert whose tokens are scarce")
    ]
    safety_net: Annotated[
        bool,
        About("also compress with uniform widths, and keep what is nearer to the dense model"),
    ]

    def __post_init__(self) -> None:
        """Check what the fields say of each other."""
        for key in ("input_correction", "residual_correction"):
            share = getattr(self, key)
            fits = share == 0 or self.true_sequential
            require(key, share, fits, "0 unless recipe.true_sequential=true")
