"""What is pruned, what bits are spent, and how channels are grouped: `conf/sparsity` and so on."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval, Predicate

from mi_experiments.config.fields import SEED_RANGE, SEEDS, About
from mi_experiments.errors import InputError, require
from mi_experiments.method.grouping import Grouping
from mi_experiments.method.information import Estimator, Pairs
from mi_experiments.method.number_formats import (
    NUMBER_FORMATS,
    SYMMETRIC,
    UNQUANTIZED,
    NumberFormat,
    find_format,
)
from mi_experiments.method.pruning import PATTERNS, Sparsity
from mi_experiments.method.pruning_costs import PARTS

WIDTH = Predicate(lambda bits: 2 <= bits <= 8 or bits == UNQUANTIZED)
"""The range of a number of bits."""


FORMAT_NAMES = ", ".join(NUMBER_FORMATS)
"""The number formats in words."""


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


@dataclass
class SparsityConfig:
    """Fraction of weights set to zero; n:m keeps n weights of every m consecutive channels."""

    pattern: Annotated[
        str | None,
        Predicate(lambda name: name is None or name in PATTERNS),
        About(
            "which weights may be zero together; null: windows where m is given, else unstructured",
            allowed=f"{', '.join(PATTERNS)}, or null",
        ),
    ]
    ratio: Annotated[float, Interval(ge=0, le=1), About("share of the weights that become zero")]
    n: Annotated[int, Ge(0), About("weights kept of every m; 0, with m=0: any weights")]
    m: Annotated[int, Ge(0), About("consecutive channels of which n weights are kept")]
    mask_block: Annotated[
        int | None,
        Ge(1),
        About(
            "channels that share one pruning decision; null: columns / 8, at most 128",
            unit="channel",
        ),
    ]
    scope: Annotated[SparsityScope, About("what shares the total of pruned weights")]
    cost: Annotated[Cost, About("of pruning, with scope=model: more goes where it costs less")]
    spread: Annotated[
        float,
        Interval(ge=0, le=1),
        About("how far a linear's ratio may be from the average, with scope=model"),
    ]

    def __post_init__(self) -> None:
        """Check what the fields say of each other."""
        if self.pattern is not None:
            windows = self.pattern == "windows"
            fits = windows == bool(self.m)
            require("pattern", self.pattern, fits, "windows with n and m, another one without")
            alone = windows or self.pattern == "unstructured" or not self.allocated
            require("scope", self.scope, alone, f"linear with pattern={self.pattern}")
        if self.n or self.m:
            fits = 0 < self.n < self.m
            require("n", self.n, fits, f"from 1 to m - 1 = {self.m - 1} (0 with m=0: off)")
            exact = math.isclose(self.ratio, (self.m - self.n) / self.m)
            require("ratio", self.ratio, exact, f"(m - n) / m for {self.n}:{self.m}")
            block = self.mask_block
            whole = block is None or block % self.m == 0
            require("mask_block", block, whole, f"a multiple of m = {self.m}")
            alike = self.scope is SparsityScope.linear
            require("scope", self.scope, alike, f"linear: {self.n}:{self.m} is fixed")
        fits = not self.allocated or self.ratio <= 1 - 1 / PARTS
        require("ratio", self.ratio, fits, f"at most {PARTS - 1}/{PARTS} with scope=model")

    @property
    def average(self) -> Sparsity:
        """The sparsity that every linear gets, or that they get on average."""
        return Sparsity(self.ratio, self.n, self.m, self.pattern or "")

    def mask_block_of(self, columns: int) -> int:
        """Return the mask block of a linear: the one asked for, or columns / 8, at most 128."""
        if self.mask_block is not None:
            return self.mask_block
        unit = 1 if self.allocated else self.average.window
        return max(unit, min(128, columns // 8) // unit * unit)

    @property
    def allocated(self) -> bool:
        """Whether linears may be pruned more or less than the average."""
        return self.scope is SparsityScope.model and 0 < self.ratio < 1


@dataclass
class WbitsConfig:
    """The bit budget and the grids that spend it."""

    allocation: Annotated[Allocation, About("how widths are given to channel groups")]
    average: Annotated[
        float,
        WIDTH,
        About(
            "bits per weight that codes may take on average; fractions allowed if mixed",
            allowed="from 2 to 8 bits; wbits=unquantized for none",
        ),
    ]
    widths: Annotated[
        list[Annotated[int, WIDTH, About(allowed="widths from 2 to 8, and 16 for unquantized")]]
        | None,
        About(
            "widths that a group may get; null: floor(average) - 1 to ceil(average) + 1",
            allowed="a list of 2 to 8, and 16 for unquantized",
        ),
    ]
    scope: Annotated[Scope, About("what shares one bit budget")]
    cost: Annotated[Cost, About("of a width: in what error its output is counted")]
    grid: Annotated[
        str,
        Predicate(NUMBER_FORMATS.__contains__),
        About("number format of the codes: which levels a width has", allowed=FORMAT_NAMES),
    ]
    symmetric: Annotated[bool, About("whether uniform grids are symmetric about zero")]
    group_size: Annotated[
        int | None,
        Ge(1),
        About("channels that share a scale inside a group; null: the whole group", unit="channel"),
    ]
    fisher_samples: Annotated[
        int,
        Ge(1),
        About(
            "calibration sequences with a backward pass, for cost=fisher here or in sparsity",
            unit="sequence",
        ),
    ]
    tied: Annotated[
        bool,
        About("one width a group for all linears that read the same, as fused kernels need"),
    ]

    def __post_init__(self) -> None:
        """Check what the fields say of each other."""
        average = self.average
        alike = not self.symmetric or self.grid == SYMMETRIC.name
        require("symmetric", self.symmetric, alike, f"false unless grid={SYMMETRIC.name}")
        if self.allocation is Allocation.unquantized:
            require("average", average, average == UNQUANTIZED, "16 (unquantized)")
            return
        grid = f"wbits.grid={self.grid}: {', '.join(map(str, self.number_format.widths))}"
        fits = average != UNQUANTIZED
        require("average", average, fits, "from 2 to 8 bits; wbits=unquantized for none")
        if self.allocation is Allocation.uniform:
            whole = average == int(average)
            require("average", average, whole, "a whole number when uniform; or wbits=mixed")
            require("average", average, int(average) in self.possible_widths, f"a width of {grid}")
        if self.widths is not None:
            known = self.possible_widths.issuperset(self.widths)
            require("widths", self.widths, known, f"widths of {grid}, and 16")
            reachable = bool(self.widths) and min(self.widths) <= average
            require("widths", self.widths, reachable, "at least one width within wbits.average")
        reachable = min(self.candidate_widths(), default=UNQUANTIZED) <= average
        require("average", average, reachable, f"no less than a width of {grid} beside it")

    @property
    def number_format(self) -> NumberFormat:
        """The number format of every grid."""
        return find_format(self.grid, symmetric=self.symmetric)

    @property
    def possible_widths(self) -> set[int]:
        """The widths that the number format has, and 16 for unquantized."""
        return {*self.number_format.widths, UNQUANTIZED}

    def candidate_widths(self) -> list[int]:
        """Widths that a group may get: those asked for, or those around the average."""
        if self.allocation is not Allocation.mixed:
            return [int(self.average)]
        if self.widths is not None:
            return sorted(set(self.widths))
        low, high = math.floor(self.average) - 1, math.ceil(self.average) + 1
        around = range(max(2, low), min(8, high) + 1)
        return [width for width in around if width in self.possible_widths]


@dataclass
class NGroupsConfig:
    """How the input channels of a site are grouped."""

    grouping: Annotated[Grouping, About("the rule by which channels are put together")]
    count: Annotated[int, Ge(1), About("groups of each site, at most")]
    adaptive: Annotated[
        bool,
        About("fewer groups where one more costs more in scales than it saves; wbits.scope=model"),
    ]
    multiple: Annotated[
        int,
        Ge(1),
        About("of which group sizes are multiples where the width allows", unit="channel"),
    ]
    information: Annotated[
        Pairs,
        About(
            "pairs of channels measured for the record: all, those of 256 channels, or none; "
            "mutual_information groups by all"
        ),
    ]
    estimator: Annotated[Estimator, About("of mutual information")]
    sample_tokens: Annotated[
        int, Ge(16), About("tokens that the estimator sees, at most", unit="tokens")
    ]
    seed: Annotated[
        int,
        SEED_RANGE,
        About("of random groups, of the clustering and of the tokens drawn", allowed=SEEDS),
    ]

    def check_count(self, columns: int, name: str) -> None:
        """Refuse more groups than a linear has channels.

        Raises:
            InputError: there are more.
        """
        if self.count > columns:
            raise InputError(
                f"n_groups.count={self.count} is more than the {columns} channels of {name}: "
                f"choose at most {columns}"
            )
