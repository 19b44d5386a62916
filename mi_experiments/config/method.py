"""What the method is asked to do: one plain dataclass per folder of `conf/`, with its ranges."""

import math
from dataclasses import dataclass
from enum import Enum

from mi_experiments.errors import InputError, require
from mi_experiments.method.grid import SCALE_DTYPES
from mi_experiments.method.grouping import Grouping
from mi_experiments.method.hessian import SweepOrder
from mi_experiments.method.information import Estimator
from mi_experiments.method.pruning import PARTS, Selection

UNQUANTIZED = 16
"""The width that stands for "not quantized"."""


class Allocation(Enum):
    """How widths are given to channel groups."""

    mixed = "mixed"
    uniform = "uniform"
    unquantized = "unquantized"


class Scope(Enum):
    """What shares one bit budget.

    `auto`: the model where nothing is pruned, else each linear: bits that move to linears that keep
    more of their weights are more bits to store.
    """

    auto = "auto"
    linear = "linear"
    site = "site"
    model = "model"


class Cost(Enum):
    """What a width costs.

    `distortion`: the group's output error; `relative`: divided by its linear's output energy;
    `fisher`: each output's error weighted by the Fisher information of the loss about it, which
    makes costs of different linears comparable.
    """

    distortion = "distortion"
    relative = "relative"
    fisher = "fisher"


class SparsityScope(Enum):
    """What shares one total of pruned weights: `linear`, so that all prune alike, or `model`."""

    linear = "linear"
    model = "model"


class GridFit(Enum):
    """Which weights the grids are fitted to where a linear is pruned and quantized.

    `original`: the weights as they were, pattern and codes chosen in one sweep (arXiv:2301.00774).
    `survivors`: a sweep that only prunes comes first; the grids are fitted to its compensated
    survivors, and the joint sweep keeps its pattern.
    `reached`: each scale group's when the sweep reaches it, to weights that are compensated for all
    complete mask blocks before, whether or not they will be pruned (arXiv:2210.17323). Where one
    group is the whole row, nothing comes before it: `original`.
    """

    original = "original"
    survivors = "survivors"
    reached = "reached"


class WindowChoice(Enum):
    """When the patterns of n:m windows are chosen.

    `block`: those of a mask block together, at its beginning. `reached`: each when the sweep
    reaches it, as in arXiv:2301.00774.
    """

    block = "block"
    reached = "reached"


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
class SparsityConfig:
    """Fraction of weights set to zero; n:m keeps n weights of every m consecutive channels."""

    ratio: float
    n: int
    m: int
    mask_block: int | None
    scope: SparsityScope
    cost: Cost
    spread: float

    def __post_init__(self) -> None:
        """Check ranges."""
        require("sparsity.ratio", self.ratio, 0 <= self.ratio <= 1, "from 0 to 1")
        block = self.mask_block
        fits = block is None or block >= 1
        require("sparsity.mask_block", block, fits, "at least 1 channel, or null")
        if self.n or self.m:
            fits = 0 < self.n < self.m
            require("sparsity.n", self.n, fits, f"from 1 to m - 1 = {self.m - 1} (0 with m=0: off)")
            exact = math.isclose(self.ratio, (self.m - self.n) / self.m)
            require("sparsity.ratio", self.ratio, exact, f"(m - n) / m for {self.n}:{self.m}")
            whole = block is None or block % self.m == 0
            require("sparsity.mask_block", block, whole, f"a multiple of m = {self.m}")
            alike = self.scope is SparsityScope.linear
            require(
                "sparsity.scope", self.scope.value, alike, f"linear: {self.n}:{self.m} is fixed"
            )
        require("sparsity.spread", self.spread, 0 <= self.spread <= 1, "from 0 to 1")
        fits = not self.allocated or self.ratio <= 1 - 1 / PARTS
        require("sparsity.ratio", self.ratio, fits, f"at most {PARTS - 1}/{PARTS} with scope=model")

    def mask_block_of(self, columns: int) -> int:
        """Return the mask block of a linear: the one asked for, or columns / 8, at most 128."""
        if self.mask_block is not None:
            return self.mask_block
        unit = max(self.m, 1)
        return max(unit, min(128, columns // 8) // unit * unit)

    @property
    def allocated(self) -> bool:
        """Whether linears may be pruned more or less than the average."""
        return self.scope is SparsityScope.model and 0 < self.ratio < 1


@dataclass
class WbitsConfig:
    """The bit budget and the grids that spend it."""

    allocation: Allocation
    average: float
    widths: list[int] | None
    scope: Scope
    cost: Cost
    symmetric: bool
    group_size: int | None
    fisher_samples: int
    tied: bool

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.allocation is Allocation.unquantized:
            require("wbits.average", self.average, self.average == UNQUANTIZED, "16 (unquantized)")
            return
        require(
            "wbits.average",
            self.average,
            2 <= self.average <= 8,
            "from 2 to 8 bits; wbits=unquantized for none",
        )
        if self.allocation is Allocation.uniform:
            whole = self.average == int(self.average)
            require(
                "wbits.average", self.average, whole, "a whole number when uniform; or wbits=mixed"
            )
        for width in self.widths or []:
            fits = 2 <= width <= 8 or width == UNQUANTIZED
            require("wbits.widths", width, fits, "widths from 2 to 8, and 16 for unquantized")
        if self.widths is not None:
            reachable = bool(self.widths) and min(self.widths) <= self.average
            require(
                "wbits.widths", self.widths, reachable, "at least one width within wbits.average"
            )
        enough = self.fisher_samples >= 1
        require("wbits.fisher_samples", self.fisher_samples, enough, "at least 1 sequence")
        if self.group_size is not None:
            require("wbits.group_size", self.group_size, self.group_size >= 1, "at least 1 channel")

    def candidate_widths(self) -> list[int]:
        """Widths that a group may get: those asked for, or those around the average."""
        if self.allocation is not Allocation.mixed:
            return [int(self.average)]
        if self.widths is not None:
            return sorted(set(self.widths))
        low, high = math.floor(self.average) - 1, math.ceil(self.average) + 1
        return list(range(max(2, low), min(8, high) + 1))


@dataclass
class NGroupsConfig:
    """How the input channels of a site are grouped."""

    grouping: Grouping
    count: int
    adaptive: bool
    multiple: int
    estimator: Estimator
    sample_tokens: int
    seed: int

    def __post_init__(self) -> None:
        """Check ranges."""
        require("n_groups.count", self.count, self.count >= 1, "at least 1")
        require("n_groups.multiple", self.multiple, self.multiple >= 1, "at least 1 channel")
        enough = self.sample_tokens >= 16
        require("n_groups.sample_tokens", self.sample_tokens, enough, "at least 16 tokens")


@dataclass
class RecipeConfig:
    """How the sweep is run."""

    name: str
    damping: float
    damping_power: float
    order: SweepOrder
    true_sequential: bool
    grid_fit: GridFit
    clip_search: bool
    scale_bits: int
    selection: Selection
    window_choice: WindowChoice
    input_share: float | None
    residual_share: float
    refine_rounds: int
    on_singular: OnSingular
    max_escalated: float
    dead_channels: DeadChannels
    dead_diagonal: float
    min_tokens: int
    scarce_tokens: ScarceTokens
    safety_net: bool

    def __post_init__(self) -> None:
        """Check ranges."""
        require("recipe.damping", self.damping, 0 <= self.damping <= 1, "from 0 to 1")
        power = self.damping_power
        require("recipe.damping_power", power, 0 <= power <= 1, "from 0 to 1")
        known = self.scale_bits in SCALE_DTYPES
        require("recipe.scale_bits", self.scale_bits, known, "16 (float16) or 32 (float32)")
        energy = self.dead_diagonal
        require("recipe.dead_diagonal", energy, energy >= 0, "0 for none, or more")
        rounds = self.refine_rounds
        require("recipe.refine_rounds", rounds, rounds >= 0, "0 for none, or more")
        require("recipe.min_tokens", self.min_tokens, self.min_tokens >= 1, "at least 1 token")
        share = self.max_escalated
        require("recipe.max_escalated", share, 0 <= share <= 1, "from 0 to 1")
        for key in ("input_share", "residual_share"):
            share = getattr(self, key)
            allowed = (share is None and key == "input_share") or 0 <= share <= 1
            require(f"recipe.{key}", share, allowed, "from 0 to 1")
            fits = share == 0 or self.true_sequential
            require(f"recipe.{key}", share, fits, "0 unless recipe.true_sequential=true")


def check_count(columns: int, name: str, n_groups: NGroupsConfig) -> None:
    """Refuse more groups than channels."""
    if n_groups.count > columns:
        raise InputError(
            f"n_groups.count={n_groups.count} is more than the {columns} channels of {name}: "
            f"choose at most {columns}"
        )
