"""Perplexity: the exponential of the mean negative log-likelihood of a token."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy


def token_nll(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int64[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Return the nats of each target, in float32 or better: half precision would round them."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.to(logits.device), reduction="none")


def exponential(nll: float) -> float:
    """Return the perplexity of a mean in nats per token; infinite where no float is as large."""
    return math.exp(nll) if nll < 709 else math.inf
