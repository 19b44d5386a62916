"""The diagonal of the Fisher information about each output of each linear.

For one sequence, the loss L is the sum over its positions of the negative log-likelihood (nats) of
a label drawn from the model's own prediction at that position: the true Fisher information, not the
empirical one of the text's next tokens (arXiv:1905.12558). Per output i of a linear y,

    f_i = mean over samples and positions t of (∂L/∂y_ti)²,

the gradient of the whole sum, so with what position t does to later ones. Given the text the labels
are independent and their scores have mean zero, so that the products of different labels' gradients
vanish in expectation and f_i is unbiased for the average over t of the diagonal of the Fisher
information of y_t. To second order, errors of variance δ_i² on the outputs, independent of each
other and of the text, move the model's predictions by ½ Σ_i f_i δ_i² nats (KL) per position.

Blocks run one at a time: forward, keeping what each of them reads, and then backward, each block
again from what was kept. That is the chain rule through the hidden states and exact, because a
block reads nothing else that depends on the tokens (`replay` refuses a model where one does).
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from mi_experiments.errors import InputError, NumericalError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.logits import PROBE_TOKENS, check_tail, compute_logits
from mi_experiments.llm.matmul_hooks import replace_output
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.walker import Walker

POSITIONS_CHUNK = 64
"""Positions whose logits and probabilities exist at one time."""


Fisher = dict[str, Float[Tensor, "_rows"]]
"""Of the outputs of linears, by name."""


@dataclass(eq=False)
class Passage:
    """A block that the gradient of the loss is about to go back through.

    Attributes:
        walker: The walker of the model.
        index: Index of the block, which holds its weights.
        stream: What the block reads.
        gradients: On what it returns; None where the Fisher information is known.
        known: The Fisher information that is known.
        fisher: Of the outputs of its linears, when the gradient has gone back.
    """

    walker: Walker
    index: int
    stream: Stream
    gradients: Float[Tensor, "nsamples seqlen hidden"] | None
    known: Fisher | None
    fisher: Fisher | None = None

    def outline(self) -> Block:
        """Return the block with its sites."""
        with torch.no_grad():
            return self.walker.outline(self.index, self.stream)

    def go_back(self, read: Callable[[LinearView, Tensor], None] | None = None) -> Fisher:
        """Take the gradient back through the block, and return what its linears' outputs carry.

        Args:
            read: Gets each linear and what it reads, a sample at a time. That is computed bit for
                bit alike whether there is a gradient or not.
        """
        linears = self.walker.inventory.linears[self.index]
        sums: dict[str, Tensor] = {}
        if self.known is None or read is not None:
            module = self.walker.blocks[self.index]
            with torch.enable_grad():
                sums = _go_back(module, linears, self.stream, self.gradients, read)
        if self.known is None:
            _complete(linears, sums)
            dtype = torch.promote_types(self.walker.model.dtype, torch.float32)
            positions = self.stream.hidden[..., 0].numel()
            self.fisher = {x.name: (sums[x.name] / positions).to(dtype) for x in linears}
        else:
            self.fisher = {linear.name: self.known[linear.name] for linear in linears}
        return self.fisher


def measure_fisher(
    walker: Walker,
    tokens: Int64[Tensor, "nsamples seqlen"],
    *,
    seed: int,
    on_block: Callable[[str], None] | None = None,
    visit: Callable[[Passage], None] | None = None,
    known: Fisher | None = None,
) -> Fisher:
    """Measure the mean squared gradient of the loss on every output of the linears to compress.

    Every block runs twice on each sample, forward and then forward and backward, and is loaded as
    often; the first one once more, to see how it is called. At its peak, memory where blocks run
    holds the weights outside the blocks, one block, and what autograd keeps of one sample in it;
    between the two passes logits and float64 probabilities of `POSITIONS_CHUNK` positions. Wherever
    the walker makes room are the kept inputs of all blocks and the gradient that goes back through
    them, (blocks + 1) × nsamples × seqlen × hidden numbers in the dtype of the model; an input goes
    when its block has been passed again. No parameter gets a gradient.

    The labels of a sample depend on its tokens and the seed alone, so the result does not depend on
    the order of samples, and that of a set is the mean of those of its parts, up to rounding.

    Args:
        walker: The walker of the model; its batch size is not asked, nor do ambient modes of
            autograd (no_grad, inference_mode) matter.
        tokens: Token ids; samples are not padded.
        seed: Of the labels.
        on_block: Called with the name of each block after its forward, and after its backward pass.
        visit: Called with each block, from the last to the first; may take the gradient back.
        known: What an earlier call has returned; then no gradient is computed.

    Returns:
        f in (nats per unit of output)² by name of the linear, never negative, in float32 (float64
        for a model in float64) on the device of the linear. A position that a linear does not read,
        as with routed experts, counts as zero, so that f is comparable over the whole model; of an
        expert that reads none it is zero.

    Raises:
        InputError: If no sample reaches one of the linears, or the model cannot be run block by
            block, see `Walker.open_stream`.
        NumericalError: If a sample's hidden states or gradients are not finite.
        ValueError: If there is no token, or the model is in training mode.
    """
    if tokens.numel() == 0:
        raise ValueError("there is no token")
    inventory = walker.inventory

    def pass_back(passage: Passage) -> Fisher:
        if visit is not None:
            visit(passage)
        return passage.fisher or passage.go_back()

    indices = range(len(walker.blocks))
    # Tensors made in inference mode cannot enter a graph, hence the copy of the tokens.
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.clone()
        with walker.hold(0):
            stream = walker.open_stream(tokens, batch_size=1)
        check_tail(walker, stream, PROBE_TOKENS)
        entering: list[Stream] = []
        for index in indices:
            entering.append(stream)
            stream = stream.fork()
            walker.advance(index, stream)
            if on_block is not None:
                on_block(walker.name(index))
        if known is None:
            turn_round(walker, stream, tokens, seed)
        gradients = stream.hidden if known is None else None
        found: Fisher = {}
        for index in reversed(indices):
            with walker.hold(index):
                found |= pass_back(Passage(walker, index, entering.pop(), gradients, known))
            if on_block is not None:
                on_block(walker.name(index))
    return {linear.name: found[linear.name] for linear in itertools.chain(*inventory.linears)}


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


@torch.no_grad()
def _score(
    logits: Float[Tensor, "positions vocabulary"], uniforms: Float64[Tensor, "positions"]
) -> Float[Tensor, "positions vocabulary"]:
    """Return ∂L/∂logits = p − e_label."""
    # Not in half precision: p rounds to 1 where the model is sure, and the score to 0.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.softmax(-1, dtype=dtype)
    labels = sample_labels(probabilities, uniforms)
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities.to(logits.dtype)


def turn_round(
    walker: Walker, stream: Stream, tokens: Int64[Tensor, "nsamples seqlen"], seed: int
) -> None:
    """Put the gradient of the loss in the place of what the last block returned."""
    for index, (sample, hidden) in enumerate(zip(tokens, stream.samples(), strict=True)):
        uniforms = draw_uniforms(sample, seed)
        for start in range(0, len(sample), POSITIONS_CHUNK):
            chunk = slice(start, start + POSITIONS_CHUNK)
            leaf = hidden[chunk].detach().requires_grad_()
            logits = compute_logits(walker, stream.form, leaf)
            # Not backward(), which would leave gradients on whatever parameter still asks for one.
            (gradient,) = torch.autograd.grad(logits, leaf, _score(logits, uniforms[chunk]))
            _check_finite(gradient, stream, index, "the model's last hidden states")
            stream.hidden[index, chunk] = gradient


def _go_back(
    module: nn.Module,
    linears: Sequence[LinearView],
    stream: Stream,
    gradients: Float[Tensor, "nsamples seqlen hidden"] | None,
    read: Callable[[LinearView, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Take the gradient of the loss from a block's output to its input, overwriting it.

    Args:
        module: The block.
        linears: Its linears.
        stream: What the block reads.
        gradients: On its output; None to run it without going back.
        read: Gets each linear and what it reads.

    Returns:
        Σ over samples and positions of (∂L/∂y_t)² in float64, for each linear that is reached.
    """
    sums: dict[str, Tensor] = {}

    def collect(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        # Here and not in the backward pass, which does not visit outputs without influence.
        if linear.name not in sums:
            sums[linear.name] = output.new_zeros(output.shape[-1], dtype=torch.float64)

        def add(gradient: Tensor) -> None:
            exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            squares = exact.flatten(0, -2).square()
            sums[linear.name] += squares.sum(dim=0, dtype=torch.float64)

        if read is not None:
            read(linear, inputs.detach())
        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    for index, hidden, call in stream.batches():
        leaf = hidden.detach().requires_grad_()
        with replace_output(linears, collect):
            output = call.replay(module, leaf)
        if gradients is None:
            continue
        gradient = gradients[index : index + 1]
        gradient.copy_(torch.autograd.grad(output, leaf, gradient.to(stream.device))[0])
        # The last one that runs is where it began.
        for name, total in reversed(sums.items()):
            _check_finite(total, stream, index, name)
    return sums


def _check_finite(gradient: Tensor, stream: Stream, index: int, where: str) -> None:
    """Raise, naming the sample, if a gradient has a NaN or an infinity."""
    if not gradient.isfinite().all():
        sample, dtype = stream.finite.names[index], stream.hidden.dtype
        advice = "; try model.dtype=float32" if dtype.itemsize < 4 else ""
        raise NumericalError(f"{sample}: the gradients on {where} are not finite ({dtype}){advice}")


def _complete(linears: Sequence[LinearView], sums: dict[str, Tensor]) -> None:
    """Add zeros for the experts that no token is routed to, whose Fisher information is zero.

    Raises:
        InputError: If another linear, or all experts of a parameter, are not called.
    """
    called = {linear.parameter_name: sums[linear.name] for linear in linears if linear.name in sums}
    for linear in linears:
        if linear.expert is not None and linear.parameter_name in called:
            sums.setdefault(linear.name, torch.zeros_like(called[linear.parameter_name]))
    if unread := [linear.name for linear in linears if linear.name not in sums]:
        raise InputError(
            f"no sample reaches {len(unread)} linears, {unread[0]} first; "
            "match what the model does not call by a pattern of model.ignore"
        )
