"""What a safety net records: how far each candidate is from the dense model, and which is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One way to compress the model within the budget.

    Attributes:
        kl: mean KL(dense ‖ compressed) of the next token on held-out calibration text, nats.
        standard_error: the standard error of `kl`, over sequences, nats.
        average_bits: the average bits of the codes.
        effective_bits: everything stored, per weight.
    """

    kl: float
    standard_error: float | None
    average_bits: float
    effective_bits: float


@dataclass(frozen=True)
class SafetyNet:
    """The choice between the mixed plan and the uniform alternative.

    Attributes:
        kept: name of the candidate that is evaluated, recorded and exported.
        candidates: the candidates by name: `mixed` and `uniform`.
        tokens: the tokens of the held-out text.
        sequences: the sequences of it.
        tokens_sha256: content hash of it.
    """

    kept: str
    candidates: dict[str, Candidate]
    tokens: int
    sequences: int
    tokens_sha256: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "SafetyNet":
        """Return the value that `dataclasses.asdict` and JSON turned into an entry."""
        candidates = {name: Candidate(**row) for name, row in entry["candidates"].items()}
        return cls(**{**entry, "candidates": candidates})
