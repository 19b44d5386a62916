"""What may be measured of a model on a text: one table, a row a measurement.

A measurement is a mean over all predicted tokens, such as nats or hits, and a value that follows
from the mean. Its row says what is averaged and what people call it; the config, records, tables,
pages, Weights & Biases and verdicts go over names and have no list of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from mi_experiments.evaluation.accuracy import token_hits
from mi_experiments.evaluation.perplexity import exponential, token_nll

OfTokens = Callable[
    [Float[Tensor, "tokens vocabulary"], Int64[Tensor, "tokens"]], Float[Tensor, "tokens"]
]
"""Takes the logits before each token and the token that came, and returns a number a token."""

PERPLEXITY = "perplexity"
"""The measurement that published tables have, and by which runs are compared if none is named."""


@dataclass(frozen=True)
class Kind:
    """How something is measured, and what it is called.

    Attributes:
        label: words for an axis.
        unit: the unit of the mean over tokens.
        lower_is_better: whether a smaller value is a better model.
        of_tokens: measures each token, from its logits.
        of_mean: turns the mean over tokens into the value that is shown; increasing.
        smallest: the least that a mean can be.
        largest: the most that a mean can be.
    """

    label: str
    unit: str
    lower_is_better: bool
    of_tokens: OfTokens
    of_mean: Callable[[float], float] = float
    smallest: float = -math.inf
    largest: float = math.inf


MEASUREMENTS = {
    PERPLEXITY: Kind(
        "perplexity",
        unit="nats per token",
        lower_is_better=True,
        of_tokens=token_nll,
        of_mean=exponential,
        smallest=0.0,
    ),
    "accuracy": Kind(
        "next-token accuracy",
        unit="share of tokens",
        lower_is_better=False,
        of_tokens=token_hits,
        smallest=0.0,
        largest=1.0,
    ),
}
"""Measurements by name; the name is the key in configs, records, tables and curves."""


@dataclass(frozen=True)
class Measurement:
    """A number of one model on one text, which says itself how to read it.

    Attributes:
        value: what is shown and compared.
        mean: the mean over all predicted tokens that the value follows from.
        standard_error: the standard error of `mean`, over windows; None for one window.
        unit: the unit of `mean` and `standard_error`.
        lower_is_better: whether a smaller value is a better model.
    """

    value: float
    mean: float
    standard_error: float | None
    unit: str
    lower_is_better: bool


def measurement(name: str, mean: float, standard_error: float | None) -> Measurement:
    """Return the measurement of a name that has this mean over tokens."""
    kind = MEASUREMENTS[name]
    return Measurement(kind.of_mean(mean), mean, standard_error, kind.unit, kind.lower_is_better)


def average(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Return the mean over all tokens of all windows, and its standard error.

    The standard error is that of a ratio of sums over windows, so that long windows weigh as much
    as they do in the mean (Cochran, Sampling Techniques, 1977, section 6.4); for windows of equal
    length it is that of the mean of their means. None for one window.
    """
    tokens, windows = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    if windows == 1:
        return mean, None
    residuals = (total - mean * count for total, count in zip(sums, counts, strict=True))
    variance = math.fsum(residual**2 for residual in residuals) * windows / (windows - 1)
    return mean, math.sqrt(variance) / tokens
