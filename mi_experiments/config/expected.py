"""What a run is expected to give: published or pinned numbers, which move none of its own."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from annotated_types import Gt, Interval

from mi_experiments.config.fields import About
from mi_experiments.errors import require


class Evidence(Enum):
    """How a number is known: `read` in its source, `second_hand`, `recalled`, or `own`: pinned."""

    read = "read"
    second_hand = "second_hand"
    recalled = "recalled"
    own = "own"


class Comparison(Enum):
    """`within`: the tolerance on both sides; `at_most`: a bar to beat, of another method.

    Of a measurement of which more is better, the bar is beaten from above.
    """

    within = "within"
    at_most = "at_most"


Value = Annotated[float, Gt(0), About(allowed="a number above 0")]


@dataclass
class NumbersConfig:
    """Numbers of one model, dense or compressed, by evaluation text."""

    where: Annotated[str, About("the table or file of the source")]
    evidence: Annotated[Evidence, About("how the numbers are known")]
    comparison: Annotated[Comparison, About("what a number is held to")]
    tolerance: Annotated[
        float, Interval(ge=0, lt=1), About("a share of the value", allowed="at least 0 and below 1")
    ]
    because: Annotated[str, About("the reason for the tolerance")]
    values: Annotated[
        dict[str, Value], About("perplexities by TEXT, and other measurements by TEXT/NAME")
    ]

    def __post_init__(self) -> None:
        """Check what the fields say of each other."""
        reasoned = bool(self.because) or not self.values
        require("because", self.because, reasoned, "the reason for the tolerance")


@dataclass
class ExpectedConfig:
    """What a source says of a run."""

    source: Annotated[str, About("the paper, or the run that was pinned")]
    dense: Annotated[NumbersConfig, About("of the model as loaded")]
    compressed: Annotated[NumbersConfig, About("of the compressed model")]
    content_hashes: Annotated[dict[str, str], About("content hashes of a pinned run")]
