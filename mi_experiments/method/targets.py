"""Correct the target of a sweep for what the compressed model reads instead of the dense one.

A linear of the dense model computes W x; the compressed model gives it x̂, and its output is added
to a residual stream that has drifted by r = dense − compressed. The matrix that restores the dense
result best, in least squares with the damping pulling towards W, is

    W* = W + [α·W·E[(x − x̂) x̂ᵀ] + ρ·E[r x̂ᵀ]]·H′⁻¹

with α = ρ = 1 (the asymmetric calibration of GPTAQ, arXiv:2504.02692, extended by the drift).
Smaller shares shrink the correction where few tokens make its estimate noisy.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_experiments.errors import NumericalError
from mi_experiments.method.hessian import Factor

FEW_TOKENS = 16
"""Tokens per channel up to which half of the correction for inputs does better than all of it."""


@dataclass(frozen=True, eq=False)
class Drift:
    """Second moments between what has changed and what the compressed model reads.

    Attributes:
        inputs: 2/n Σ (x − x̂) x̂ᵀ, the change of the input.
        residual: 2/n Σ r x̂ᵀ, the drift of the residual stream that the linear of the site adds
            to; None where it does not.
    """

    inputs: Float[Tensor, "columns columns"]
    residual: Float[Tensor, "rows columns"] | None


class DriftAccumulator:
    """Sums of a site's drift over batches; scaled once, like a Hessian.

    Args:
        columns: number of channels.
        device: where the sums live.
        dtype: the dtype of the sums.
    """

    def __init__(
        self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._inputs = torch.zeros(columns, columns, device=device, dtype=dtype)
        self._residual: Tensor | None = None
        self._tokens = 0

    def update(
        self,
        compressed: Float[Tensor, "tokens columns"],
        dense: Float[Tensor, "tokens columns"],
        drift: Float[Tensor, "tokens rows"] | None = None,
    ) -> None:
        """Add what a site reads in both models on the same tokens, and the residual drift."""
        read = compressed.to(self._inputs.dtype)
        self._inputs.addmm_((dense.to(read.dtype) - read).T, read)
        self._tokens += len(read)
        if drift is not None:
            if self._residual is None:
                self._residual = read.new_zeros(drift.shape[1], read.shape[1])
            self._residual.addmm_(drift.to(read.dtype).T, read)

    def finish(self) -> Drift:
        """Return the drift of all tokens.

        Raises:
            NumericalError: an activation of the dense model is not finite, or a sum overflows.
        """
        for what, total in (("input", self._inputs), ("residual stream", self._residual)):
            if total is not None and (bad := int((~total.isfinite()).count_nonzero())):
                raise NumericalError(
                    f"the change of the {what} from the dense model's is not finite: {bad} of "
                    f"{total.numel()} second moments are NaN, infinite or beyond {total.dtype}"
                )
        scale = 2 / self._tokens
        residual = None if self._residual is None else self._residual * scale
        return Drift(self._inputs * scale, residual)


def choose_input_correction(tokens: int, columns: int) -> float:
    """Return the share α that suits as many tokens: half where few, else all."""
    return 0.5 if tokens <= FEW_TOKENS * columns else 1.0


def correct_target(
    weight: Float[Tensor, "rows columns"],
    factor: Factor,
    drift: Drift,
    *,
    input_correction: float,
    residual_correction: float,
) -> Float[Tensor, "rows columns"]:
    """Return W*, what a linear of the compressed model should be before it is compressed.

    Args:
        weight: W of the dense model.
        factor: the factor of the damped Hessian of what the compressed model reads.
        drift: the drift of the site.
        input_correction: α, of the correction for changed inputs, 0 to 1.
        residual_correction: ρ, of the correction for the drifted residual stream, 0 to 1.
    """
    wanted = input_correction * (weight @ drift.inputs)
    if drift.residual is not None:
        wanted += residual_correction * drift.residual
    return weight + factor.solve(wanted)
