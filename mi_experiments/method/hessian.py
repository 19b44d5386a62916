"""Accumulate the Hessian of a site and factorise it for the sweep.

One `Hessian` serves every linear of a site, and one `Factor` serves every bit width of every one
of them. The factor is a single Cholesky decomposition H′ = R·Rᵀ with R upper triangular: R[j, j]²
is the variance that channel j keeps when all later channels are known, which is what the
recursions of GPTQ (arXiv:2210.17323) and SparseGPT (arXiv:2301.00774) read from a factor of the
inverse, without inverting anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mi_experiments.errors import NumericalError, SingularError
from mi_experiments.method.damping import damp, ladder
from mi_experiments.method.gram import add_gram_, mirror_
from mi_experiments.out_of_memory import in_pieces

_SOLVE_PANEL = 512
_PHASE_STEP = 2654435769  # 2³² divided by the golden ratio, made odd
_PHASES = 2**32


class SweepOrder(Enum):
    """In which order the sweep visits the channels."""

    natural = "natural"
    activation = "activation"


@dataclass(frozen=True, eq=False)
class Hessian:
    """What the calibration tokens say about the input of a site.

    Attributes:
        matrix: 2/n XᵀX, in squared units of the activations; exactly symmetric.
        mean: mean activation of each channel.
        tokens: the number n of tokens seen.
        sample: some of those tokens, in the order in which they were seen, for rank statistics.
    """

    matrix: Float[Tensor, "columns columns"]
    mean: Float[Tensor, "columns"]
    tokens: int
    sample: Float[Tensor, "sample columns"]

    @property
    def diagonal(self) -> Float[Tensor, "columns"]:
        """Return twice the mean energy of each channel."""
        return self.matrix.diagonal()

    @property
    def dead(self) -> Bool[Tensor, "columns"]:
        """Mark the channels that were zero on every token."""
        return self.diagonal == 0

    @property
    def is_dead(self) -> bool:
        """Whether every channel was zero on every token."""
        return self.tokens > 0 and not bool(self.diagonal.any())

    def covariance(self) -> Float[Tensor, "columns columns"]:
        """Return the centred covariance, matrix/2 − mean·meanᵀ, exactly symmetric.

        A variance that the subtraction cannot tell from rounding error is 0, with its row and
        column, so that a constant channel stays constant instead of becoming noise.
        """
        covariance = torch.addr(self.matrix, self.mean, self.mean, beta=0.5, alpha=-1)
        resolution = 256 * torch.finfo(covariance.dtype).eps * (self.diagonal / 2)
        constant = covariance.diagonal() <= resolution
        covariance[constant, :] = 0
        covariance[:, constant] = 0
        return covariance


class HessianAccumulator:
    """Sum the second moments of a stream of activations, and keep a sample of its tokens.

    Raw sums are scaled once, in `finish`. Products of float16 or bfloat16 activations on CUDA are
    exact in float32, so there they enter the tensor cores as they are.

    The sample keeps the tokens t with the smallest phases frac(t/φ), φ the golden ratio. Like
    every stride-th token they are spread evenly over the stream, and the choice depends on t
    alone, not on how the stream was cut into updates; unlike a stride, the phase cannot fall in
    step with the sequence length and pick the first token of every sequence.

    Args:
        columns: number of channels.
        sample_tokens: the most tokens to keep in the sample.
        device: where the sums live; the CPU by default.
        dtype: the dtype of the sums and of the sample.
        name_token: what messages call a token, given its number in the stream.
    """

    def __init__(
        self,
        columns: int,
        *,
        sample_tokens: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        name_token: Callable[[int], str] = "token {}".format,
    ) -> None:
        self._name_token = name_token
        self._largest = torch.zeros((), device=device, dtype=dtype)
        self._products = torch.zeros(columns, columns, device=device, dtype=dtype)
        self._sums = torch.zeros(columns, device=device, dtype=dtype)
        self._tokens = 0
        self._sample_tokens = sample_tokens
        self._sample = torch.empty(0, columns, device=device, dtype=dtype)
        self._sampled = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def update(self, inputs: Float[Tensor, "tokens columns"]) -> None:
        """Add the next tokens of the stream; fewer at a time where memory is short.

        Args:
            inputs: activations that the linears of the site read.

        Raises:
            MemoryShortage: there is no room for the products of a single token.
            NumericalError: a value is NaN or infinite, or the sums overflow; the sums are then
                unchanged.
            ValueError: the number of channels is not the one announced.
        """
        if inputs.shape[1] != len(self._sums):
            raise ValueError(f"got {inputs.shape[1]} channels, expected {len(self._sums)}")
        if len(inputs):
            in_pieces(lambda start, stop: self._add(inputs[start:stop]), len(inputs), "tokens")

    def _add(self, inputs: Float[Tensor, "tokens columns"]) -> None:
        # What may run out of memory comes before anything is changed; `add_gram_` sees to itself.
        inputs = inputs.detach().to(self._sums.device)
        if not (inputs.is_cuda and self._sums.dtype == torch.float32 and inputs.itemsize == 2):
            inputs = inputs.to(self._sums.dtype)
        sums = inputs.sum(0, dtype=self._sums.dtype)
        least, most = inputs.aminmax()
        largest = torch.maximum(-least, most).to(self._sums.dtype)
        if not (torch.isfinite(sums).all() & torch.isfinite(largest)):
            raise NumericalError(self._describe_non_finite(inputs))
        self._update_sample(inputs)
        self._largest = torch.maximum(self._largest, largest)
        self._sums += sums
        self._tokens += len(inputs)
        add_gram_(self._products, inputs)

    def finish(self) -> Hessian:
        """Return the statistics of all tokens so far; more may follow.

        Raises:
            NumericalError: the sum of squares of a channel overflows, or all of them underflow.
        """
        if self._largest > 0 and not self._products.diagonal().any():
            raise NumericalError(
                f"the second moments underflow {self._products.dtype}: "
                f"largest activation {self._largest.item():.3g}"
            )
        if not torch.isfinite(self._products.diagonal()).all():
            raise NumericalError(
                f"the second moments overflow {self._products.dtype}: "
                f"largest activation {self._largest.item():.3g}"
            )
        scale = 1 / max(self._tokens, 1)
        return Hessian(
            matrix=mirror_(self._products * (2 * scale)),
            mean=self._sums * scale,
            tokens=self._tokens,
            sample=self._sample,
        )

    def _update_sample(self, inputs: Float[Tensor, "tokens columns"]) -> None:
        arrived = torch.arange(self._tokens, self._tokens + len(inputs))
        indices = torch.cat((self._sampled, arrived))
        phases = (indices * _PHASE_STEP) % _PHASES
        count = min(self._sample_tokens, len(indices))
        kept = phases.topk(count, largest=False, sorted=False).indices.sort().values
        held = len(self._sampled)
        old, new = kept[kept < held], kept[kept >= held] - held
        if len(new) == 0:
            return
        self._sampled = indices[kept]
        self._sample = torch.cat((
            self._sample[old.to(self._sample.device)],
            inputs[new.to(inputs.device)].to(self._sample.dtype),
        ))

    def _describe_non_finite(self, inputs: Float[Tensor, "tokens columns"]) -> str:
        bad = ~torch.isfinite(inputs)
        if not bad.any():
            return f"the sums of the activations overflow {self._sums.dtype}"
        token, channel = bad.nonzero()[0].tolist()
        return (
            f"{int(bad.sum())} activations are not finite, "
            f"the first at {self._name_token(self._tokens + token)}, channel {channel}"
        )


@dataclass(frozen=True, eq=False)
class Factor:
    """Triangular factor of a damped Hessian, in the order of the sweep.

    Attributes:
        upper: R, upper triangular with positive diagonal, such that
            R·Rᵀ = H[order][:, order] with its diagonal damped.
        order: the channel at each position of the sweep.
        damping: the fraction of the mean diagonal that was finally added.
        attempts: every damping that was tried; the last is `damping`.
        power: the power of a channel's energy in what was added to it.
    """

    upper: Float[Tensor, "columns columns"]
    order: Int64[Tensor, "columns"]
    damping: float
    attempts: tuple[float, ...]
    power: float = 0.0

    def diagonal(self) -> Float[Tensor, "columns"]:
        """Return diag H′, the damped diagonal, by channel."""
        return self._by_channel(self.upper.square().sum(1))

    def inverse_diagonal(self) -> Float[Tensor, "columns"]:
        """Return diag H′⁻¹ by channel, computed once: callers must not change it."""
        return self._inverse_diagonal

    @cached_property
    def _inverse_diagonal(self) -> Float[Tensor, "columns"]:
        """Squared column norms of R⁻¹, a panel at a time."""
        columns = len(self.order)
        norms = torch.empty_like(self.upper[0])
        for start in range(0, columns, _SOLVE_PANEL):
            stop = min(start + _SOLVE_PANEL, columns)
            # R⁻¹ is upper triangular too: rows from `stop` on are zero in these columns.
            unit = torch.zeros_like(self.upper[:stop, start:stop])
            unit[start:].fill_diagonal_(1)
            inverse = torch.linalg.solve_triangular(self.upper[:stop, :stop], unit, upper=True)
            norms[start:stop] = inverse.square().sum(0)
        return self._by_channel(norms)

    def solve(self, right: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return right·H′⁻¹ by two triangular solves; both sides are in channel order."""
        permuted = right[:, self.order]
        half = torch.linalg.solve_triangular(self.upper.T, permuted, upper=False, left=False)
        whole = torch.linalg.solve_triangular(self.upper, half, upper=True, left=False)
        return torch.empty_like(whole).index_copy_(1, self.order, whole)

    def _by_channel(self, values: Float[Tensor, "columns"]) -> Float[Tensor, "columns"]:
        return torch.empty_like(values).index_copy_(0, self.order, values)


def factorize(
    hessian: Hessian | Float[Tensor, "columns columns"],
    *,
    damping: float = 0.01,
    power: float = 0.0,
    order: Int64[Tensor, "columns"] | None = None,
    escalate: bool = True,
) -> Factor:
    """Factorise `H′ = H[order][:, order]`, its diagonal damped, into R·Rᵀ.

    A matrix that is not positive definite to working precision is tried again with ten times the
    damping, up to 1. Every attempt is recorded. There is no other fallback.

    Args:
        hessian: the hessian of a site, or any symmetric matrix such as its covariance.
        damping: fraction of the mean diagonal added to the diagonal; with 0 the next attempt
            is 1e-4.
        power: the power of a channel's energy in what is added to it, see `damping`.
        order: the channel at each position of the sweep; natural by default.
        escalate: whether more damping than asked for may be tried.

    Raises:
        NumericalError: there is no token, or a value is not finite.
        SingularError: no damping that may be tried makes the matrix positive definite; none does if
            all activations are zero.
        ValueError: a negative damping, or an order that is not a permutation.
    """
    matrix = hessian.matrix if isinstance(hessian, Hessian) else hessian
    diagonal = matrix.diagonal()
    if isinstance(hessian, Hessian) and hessian.tokens == 0:
        raise NumericalError("the Hessian has seen no token")
    if not torch.isfinite(matrix.sum()):
        raise NumericalError("the Hessian has values that are not finite")
    mean = diagonal.mean().item()
    if not diagonal.any():
        raise SingularError("the Hessian is zero: every calibration activation is zero")
    order = torch.arange(len(matrix), device=matrix.device) if order is None else order
    if not torch.equal(order.sort().values, torch.arange(len(matrix), device=order.device)):
        raise ValueError("order is not a permutation of the channels")

    # A lower factor of the matrix read backwards is, read backwards, an upper factor of it.
    backwards = order.flip(0)
    damped = matrix[backwards][:, backwards]
    attempts = []
    for attempt in ladder(damping) if escalate else [damping]:
        attempts.append(attempt)
        damped.diagonal().copy_(damp(diagonal, attempt, power)[backwards])
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0 and _is_sound(lower, damped.diagonal()):
            del damped
            return Factor(lower.flip(0, 1), order, attempt, tuple(attempts), power)
    raise SingularError(
        f"the Hessian is not positive definite at damping {', '.join(map(str, attempts))}: "
        f"smallest diagonal {diagonal.min().item():.3g}, mean {mean:.3g}; "
        "calibrate on more tokens, or damp more"
    )


def sweep_order(
    diagonal: Float[Tensor, "columns"], kind: SweepOrder, window: int = 1
) -> Int64[Tensor, "columns"]:
    """Return the channel at each position of the sweep.

    Args:
        diagonal: energy of each channel, the diagonal of the Hessian.
        kind: `natural`, or `activation`: falling energy, so that the channels that matter most
            leave the most channels behind them to absorb their error (GPTQ's act-order).
        window: with n:m sparsity, m. Whole windows of m consecutive channels then move together,
            by their mean energy, so that every window of the sweep is a window of the weight.

    Raises:
        ValueError: the channels do not fill whole windows.
    """
    columns = len(diagonal)
    if window < 1 or columns % window:
        raise ValueError(f"{columns} channels do not fill windows of {window}")
    channels = torch.arange(columns, device=diagonal.device)
    if kind is SweepOrder.natural:
        return channels
    energy = diagonal.reshape(-1, window).mean(1)
    windows = energy.argsort(descending=True, stable=True)
    return channels.reshape(-1, window)[windows].reshape(-1)


def _is_sound(lower: Float[Tensor, "columns columns"], diagonal: Float[Tensor, "columns"]) -> bool:
    # A pivot within rounding error of zero factorises without complaint and means nothing.
    smallest = 4 * torch.finfo(lower.dtype).eps * diagonal
    sound = torch.isfinite(lower.sum()) & (lower.diagonal().square() > smallest).all()
    return bool(sound.item())
