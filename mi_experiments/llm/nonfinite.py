"""Samples whose hidden states are not finite: named and refused, or set aside."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_experiments.errors import NumericalError


@dataclass(frozen=True, eq=False)
class FiniteCheck:
    """What happens to samples that are not finite.

    Attributes:
        names: What messages call the samples.
        dropped: Takes such samples and where they were first found, while zeros go on in their
            place; None: such a sample is an error.
    """

    names: Sequence[str]
    dropped: dict[int, str] | None = None

    def check_(
        self,
        hidden: Float[Tensor, "batch seqlen hidden"],
        first: int,
        where: str,
        source: tuple[str, nn.Module] | None = None,
    ) -> None:
        """Look at hidden states before they go on.

        Args:
            hidden: Of consecutive samples; those that are set aside become zeros.
            first: The number of the first one.
            where: In what they are, for messages.
            source: Name and module that they come from.

        Raises:
            NumericalError: If one is not finite, and such samples are not set aside.
        """
        if hidden.is_meta:
            return
        bad = ~hidden.isfinite().flatten(1).all(1)
        if not bad.any():
            return
        found = [first + index for index in bad.nonzero().flatten().tolist()]
        if self.dropped is None:
            raise NumericalError(
                f"{self.names[found[0]]} is not finite in {where} ({hidden.dtype}, {len(found)} "
                f"bad samples in this batch)" + _explain(hidden.dtype, source)
            )
        for index in found:
            self.dropped.setdefault(index, where)
        hidden.masked_fill_(bad[:, None, None], 0)


def _explain(dtype: torch.dtype, source: tuple[str, nn.Module] | None) -> str:
    """Say which weight is to blame, or what might help."""
    if source is not None:
        name, module = source
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).count_nonzero())):
                return (
                    f": {bad} of {tensor.numel()} values of {name}.{key} are not finite; the "
                    f"checkpoint is damaged, or beyond the range of {dtype}"
                )
    return "; try model.dtype=float32" if dtype.itemsize < 4 else ""
