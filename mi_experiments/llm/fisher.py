"""How much the loss feels each output of each linear: the diagonal of the Fisher information.

For one sequence, the loss L is the sum over its positions of the negative log-likelihood (nats) of
a label drawn from the model's own prediction at that position: the true Fisher information, not the
empirical one of the text's next tokens (arXiv:1905.12558). Per output i of a linear y,

    f_i = mean over samples and positions t of (∂L/∂y_ti)²,

the gradient of the whole sum, so with what position t does to later ones. Given the text the labels
are independent and their scores have mean zero, so that the products of different labels' gradients
vanish in expectation and f_i is unbiased for the average over t of the diagonal of the Fisher
information of y_t. To second order, errors of variance δ_i² on the outputs, independent of each
other and of the text, move the model's predictions by ½ Σ_i f_i δ_i² nats (KL) per position.
"""

import hashlib
import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from mi_experiments.errors import InputError, NumericalError
from mi_experiments.llm.inventory import Inventory, LinearView
from mi_experiments.llm.replay import hooks
from mi_experiments.llm.watching import alter

POSITIONS_CHUNK = 64
"""Positions whose probabilities exist at one time."""


def measure_fisher(
    model: PreTrainedModel,
    tokens: Int64[Tensor, "nsamples seqlen"],
    inventory: Inventory,
    *,
    seed: int,
    on_sample: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, "_rows"]]:
    """Measure the mean squared gradient of the loss on every output of the linears to compress.

    One forward and one backward pass per sample. Beside the model, memory holds what autograd keeps
    of one sample through all blocks, its logits [seqlen, vocabulary] and their gradient, both in
    the dtype of the model (1.05 GB for 2048 tokens over 128,256 words in bfloat16), and float64
    probabilities of `POSITIONS_CHUNK` positions. No parameter gets a gradient.

    The labels of a sample depend on its tokens and the seed alone, so the result does not depend on
    the order of samples, and that of a set is the mean of those of its parts, up to rounding.

    Args:
        model: A causal language model in eval mode, on its device; ambient modes of autograd
            (no_grad, inference_mode) do not matter.
        tokens: Token ids; samples are not padded.
        inventory: The model's linears.
        seed: Of the labels.
        on_sample: Called after each sample with its index.

    Returns:
        f in (nats per unit of output)² by name of the linear, never negative, in float32 (float64
        for a model in float64) on the device of the linear. A position that a linear does not read,
        as with routed experts, counts as zero, so that f is comparable over the whole model; of an
        expert that reads none it is zero.

    Raises:
        InputError: If no sample reaches one of the linears.
        NumericalError: If a sample's gradients are not finite.
        ValueError: If there is no token, or the model is in training mode.
    """
    if tokens.numel() == 0:
        raise ValueError("there is no token")
    if model.training:
        raise ValueError("the model must be in eval mode: dropout would change the gradients")
    linears = list(itertools.chain(*inventory.linears))
    sums: dict[str, Tensor] = {}
    # Tensors made in inference mode cannot enter a graph, hence the copy of the tokens.
    with torch.inference_mode(False), torch.enable_grad():
        for index, sample in enumerate(tokens.clone()):
            _add_squared_gradients(model, sample, linears, seed, sums)
            for name, total in sums.items():
                if not total.isfinite().all():
                    raise NumericalError(
                        f"sample {index}: the gradients on {name} are not finite "
                        f"({model.dtype}); try model.dtype=float32"
                    )
            if on_sample is not None:
                on_sample(index)
        # The loss does not feel an expert that no token is routed to, as long as others are called.
        called = {l.parameter_name: sums[l.name] for l in linears if l.name in sums}  # noqa: E741
        for linear in linears:
            if linear.expert is not None and linear.parameter_name in called:
                sums.setdefault(linear.name, torch.zeros_like(called[linear.parameter_name]))
        if unread := [linear.name for linear in linears if linear.name not in sums]:
            raise InputError(
                f"no sample reaches {len(unread)} linears, {unread[0]} first; "
                "match what the model does not call by a pattern of model.ignore"
            )
        dtype = torch.promote_types(model.dtype, torch.float32)
        return {linear.name: (sums[linear.name] / tokens.numel()).to(dtype) for linear in linears}


def draw_uniforms(tokens: Int64[Tensor, "seqlen"], seed: int) -> Float64[Tensor, "seqlen"]:
    """Draw a number in [0, 1) per position, always on the CPU, from the seed and the tokens."""
    digest = hashlib.blake2b(f"{seed} {tokens.tolist()}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.rand(len(tokens), dtype=torch.float64, generator=generator)


def sample_labels(
    probabilities: Float[Tensor, "positions vocabulary"], uniforms: Float64[Tensor, "positions"]
) -> Int64[Tensor, "positions"]:
    """Invert the cumulative distribution: the same labels on every device, up to rounding.

    Args:
        probabilities: Of each label; a row need not sum to exactly one.
        uniforms: In [0, 1), on any device.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    thresholds = uniforms.to(total.device)[:, None] * total
    # Strictly between: the first sum above a threshold below the total is never that of a label of
    # probability zero. The last clamp serves rows with a NaN, which point beyond the vocabulary.
    thresholds = thresholds.minimum(total.nextafter(torch.zeros_like(total)))
    labels = torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
    return labels.clamp(max=probabilities.shape[1] - 1)


def _score(
    logits: Float[Tensor, "positions vocabulary"], uniforms: Float64[Tensor, "positions"]
) -> Float[Tensor, "positions vocabulary"]:
    """Return ∂L/∂logits = p − e_label, without the float32 copies that autograd would keep."""
    gradient = torch.empty_like(logits)
    # Not in half precision: p rounds to 1 where the model is sure, and the score to 0.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for start in range(0, len(logits), POSITIONS_CHUNK):
        chunk = slice(start, start + POSITIONS_CHUNK)
        probabilities = logits[chunk].softmax(-1, dtype=dtype)
        labels = sample_labels(probabilities, uniforms[chunk])
        probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
        gradient[chunk] = probabilities
    return gradient


def _add_squared_gradients(
    model: PreTrainedModel,
    sample: Int64[Tensor, "seqlen"],
    linears: list[LinearView],
    seed: int,
    sums: dict[str, Tensor],
) -> None:
    """Add Σ_t (∂L/∂y_t)² of one sample to the sums, in float64, for each linear that it reaches."""
    entering: list[Tensor] = []

    def enter(module: nn.Module, arguments: tuple[object, ...], output: Tensor) -> Tensor:
        entering.append(output.detach().requires_grad_())
        # Not the leaf itself: some models go on in place, which autograd forbids on leaves.
        return entering[-1].clone()

    def collect(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        # Here and not in the backward pass, which does not visit outputs without influence.
        if linear.name not in sums:
            sums[linear.name] = output.new_zeros(output.shape[-1], dtype=torch.float64)

        def add(gradient: Tensor) -> None:
            exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            squares = exact.flatten(0, -2).square()
            sums[linear.name] += squares.sum(dim=0, dtype=torch.float64)

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    embedding: nn.Module = model.get_input_embeddings()
    with hooks([embedding.register_forward_hook(enter)]), alter(linears, collect):
        logits: Tensor = model(input_ids=sample[None].to(model.device), use_cache=False).logits
        with torch.no_grad():
            score = _score(logits[0], draw_uniforms(sample, seed))
        # Not backward(), which would leave gradients on whatever parameter still asks for one.
        torch.autograd.grad(logits, entering, score[None])
