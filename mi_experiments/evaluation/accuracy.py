"""Top-1 accuracy: how often the likeliest next token is the one that comes."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def token_hits(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int64[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Return 1 where the largest logit is the target's, else 0; NaN where it is not finite.

    Of equal logits the first counts, as for greedy decoding.
    """
    largest, likeliest = logits.max(-1)
    hits = (likeliest == targets.to(logits.device)).float()
    return torch.where(largest.isfinite(), hits, torch.nan)
