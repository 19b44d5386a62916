"""What a run is expected to give: published or pinned numbers, which move none of its own."""

from dataclasses import dataclass
from enum import Enum

from mi_experiments.errors import require


class Evidence(Enum):
    """How a number is known: `read` in its source, `second_hand`, `recalled`, or `own`: pinned."""

    read = "read"
    second_hand = "second_hand"
    recalled = "recalled"
    own = "own"


class Comparison(Enum):
    """`within`: the tolerance on both sides; `at_most`: a bar to beat, of another method."""

    within = "within"
    at_most = "at_most"


@dataclass
class NumbersConfig:
    """Perplexities of one model, dense or compressed, by evaluation text.

    `tolerance` is a share of the value, and `because` the reason for it.
    """

    where: str
    evidence: Evidence
    comparison: Comparison
    tolerance: float
    because: str
    values: dict[str, float]

    def __post_init__(self) -> None:
        """Check ranges."""
        fits = 0 <= self.tolerance < 1
        require("expected.*.tolerance", self.tolerance, fits, "a share, at least 0 and below 1")
        for text, value in self.values.items():
            require(f"expected.*.values.{text}", value, value >= 1, "a perplexity, at least 1")
        reasoned = bool(self.because) or not self.values
        require("expected.*.because", self.because, reasoned, "the reason for the tolerance")


@dataclass
class ExpectedConfig:
    """What a source says of a run; `content_hashes` holds the content hashes of a pinned one."""

    source: str
    dense: NumbersConfig
    compressed: NumbersConfig
    content_hashes: dict[str, str]
