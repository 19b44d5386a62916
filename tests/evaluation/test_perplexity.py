"""Perplexity equals the textbook sum over full logits, whatever the batches and chunks."""

import math
from collections.abc import Callable

import pytest
import torch
from evaluations import measure_perplexity
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
)

from mi_experiments.errors import InputError, NumericalError
from mi_experiments.evaluation.measure_text import summarize
from mi_experiments.evaluation.perplexity import token_nll
from mi_experiments.llm.calls import BlockOutput
from mi_experiments.llm.logits import measure_tokens, plan_waves
from mi_experiments.llm.walker import Walker

TOLERANCE = 1e-12  # relative, in float64: chunks and batches change only the order of sums
VOCABULARY = 61
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT_SHAPE = {k: v for k, v in SHAPE.items() if k != "intermediate_size"} | {
    "ffn_dim": 24,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, max_position_embeddings=64),
    # The decoder is not the model's direct child, and projects its output.
    "opt": OPTConfig(**OPT_SHAPE, word_embed_proj_dim=8),
    "gpt2": GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY, bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma2, capped": Gemma2Config(
        **SHAPE, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5
    ),
    "granite, divided": GraniteConfig(**SHAPE, logits_scaling=0.25),
    "cohere, multiplied": CohereConfig(**SHAPE, logit_scale=3.0),
    "mixtral": MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4),
}  # fmt: skip


def build_model(name: str = "llama") -> PreTrainedModel:
    """A random model in float64 with logits far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    model.set_experts_implementation("eager")  # the fused kernel has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def random_windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def nll_by_hand(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Nats of each predicted token, from the full logits of one window."""
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1]
    return logits.logsumexp(-1) - logits.gather(1, window[1:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_full_logits_on_every_kind_of_head(name: str) -> None:
    model = build_model(name)
    windows = random_windows(9, 23, 9, 2)
    by_hand = torch.cat([nll_by_hand(model, window) for window in windows])
    assert by_hand.std() > 0.1
    result = measure_perplexity(Walker(model), windows, batch_tokens=20, logits_chunk=5)
    assert result.mean == pytest.approx(by_hand.mean().item(), rel=TOLERANCE)
    assert result.value == pytest.approx(by_hand.mean().exp().item(), rel=TOLERANCE)


def test_token_nll_is_per_token_and_in_order() -> None:
    model = build_model()
    (window,) = random_windows(11)
    with torch.no_grad():
        before_norm: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(
            lambda module, args, output: before_norm.append(output)
        )
        model.model(input_ids=window[None])
        (nll,) = measure_tokens(
            Walker(model), BlockOutput(None), before_norm[0][0], window, 7, [token_nll]
        )
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, nll_by_hand(model, window), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (1, [[[0, 2]], [[3]], [[1]]]),
        (20, [[[0, 2]], [[3]], [[1]]]),
        (37, [[[0, 2, 3]], [[1]]]),
        (47, [[[0, 2, 3], [1]]]),
    ],
)
def test_waves_hold_whole_batches_and_at_most_their_tokens(
    wave: int, expected: list[list[list[int]]]
) -> None:
    windows = random_windows(10, 17, 10, 10)
    assert plan_waves(windows, batch_tokens=20, wave_tokens=wave) == expected


def test_a_wave_of_all_tokens_holds_all_windows() -> None:
    windows = random_windows(*range(3, 60))
    (wave,) = plan_waves(windows, batch_tokens=4096, wave_tokens=sum(map(len, windows)))
    assert sorted(i for group in wave for i in group) == list(range(57))


@pytest.mark.parametrize("wave", [1, 30, 10**6])
def test_waves_do_not_matter(wave: int) -> None:
    model, windows = build_model(), random_windows(10, 17, 10, 10)
    expected = measure_perplexity(Walker(model), windows, batch_tokens=20, logits_chunk=10)
    result = measure_perplexity(
        Walker(model), windows, batch_tokens=20, logits_chunk=10, wave_tokens=wave
    )
    assert result == expected


@pytest.mark.parametrize("batch_tokens", [1, 20, 10**6])
@pytest.mark.parametrize("logits_chunk", [1, 7, 10**6])
def test_batches_and_chunks_do_not_matter(batch_tokens: int, logits_chunk: int) -> None:
    model, windows = build_model(), random_windows(10, 17, 10, 10)
    expected = measure_perplexity(Walker(model), windows, batch_tokens=10, logits_chunk=10)
    result = measure_perplexity(
        Walker(model), windows, batch_tokens=batch_tokens, logits_chunk=logits_chunk
    )
    assert result.mean == pytest.approx(expected.mean, rel=TOLERANCE)
    assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-9)


def test_mean_is_over_tokens_not_over_windows() -> None:
    result = summarize("perplexity", [1.0, 100.0], [1, 4])
    assert result.mean == 101 / 5
    assert result.mean != (1 / 1 + 100 / 4) / 2


def test_standard_error_of_equal_windows_is_that_of_their_means() -> None:
    means = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    result = summarize("perplexity", (means * 7).tolist(), [7] * 4)
    assert result.standard_error == pytest.approx(means.std().item() / 2, rel=TOLERANCE)
    assert summarize("perplexity", [3.0], [2]).standard_error is None


def test_standard_error_covers_the_spread_of_unequal_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 60, (2000, 40), generator=generator)
    sums = counts + counts.sqrt() * torch.randn(2000, 40, generator=generator)
    results = [
        summarize("perplexity", s, c) for s, c in zip(sums.tolist(), counts.tolist(), strict=True)
    ]
    spread = torch.tensor([r.mean for r in results]).std().item()
    stated = torch.tensor([r.standard_error for r in results]).square().mean().sqrt().item()
    assert stated == pytest.approx(spread, rel=0.1)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = build_model()
    nn.init.zeros_(model.lm_head.weight)
    result = measure_perplexity(Walker(model), random_windows(9, 5), batch_tokens=9, logits_chunk=4)
    assert result.value == pytest.approx(VOCABULARY, rel=TOLERANCE)
    assert result.standard_error == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("logits_chunk", [1, 6, 50])
def test_logits_never_exist_for_more_than_a_chunk(logits_chunk: int) -> None:
    model, made = build_model(), []

    def note(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        alive = sum(rows for rows, storage in made if not storage.expired())
        rows = output.shape[:-1].numel()
        made.append((rows, StorageWeakRef(output.untyped_storage())))
        # The first calls are the comparison of chunked logits with the model's own.
        assert alive + rows <= logits_chunk or len(made) <= 3

    model.lm_head.register_forward_hook(note)
    windows = random_windows(40, 40, 40)
    measure_perplexity(Walker(model), windows, batch_tokens=120, logits_chunk=logits_chunk)
    assert max(rows for rows, _ in made) == min(logits_chunk, 39)
    assert sum(rows for rows, _ in made) >= 117


class PeakBytes(TorchDispatchMode):
    """The largest sum of bytes of tensors that are alive after an operation and came from one."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {t.untyped_storage()._cdata for t in arguments if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(model: PreTrainedModel, windows: list[Tensor], logits_chunk: int = 8) -> int:
    with PeakBytes() as peak:
        measure_perplexity(Walker(model), windows, batch_tokens=128, logits_chunk=logits_chunk)
    return peak.peak


def test_memory_does_not_grow_with_the_number_of_windows() -> None:
    model = build_model()
    few, many = (peak_bytes(model, random_windows(*[32] * count)) for count in (4, 40))
    assert many == few


def test_memory_does_not_hold_the_logits_of_a_window() -> None:
    vocabulary = 50 * VOCABULARY
    config = LlamaConfig(**SHAPE | {"vocab_size": vocabulary}, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    windows = random_windows(*[64] * 4)
    all_logits = 2 * 63 * vocabulary * 8
    assert peak_bytes(model, windows, logits_chunk=126) > all_logits
    assert peak_bytes(model, windows, logits_chunk=16) < all_logits / 2


def test_no_graph_is_kept_and_nothing_is_left_on_the_model() -> None:
    model, outputs = build_model(), []
    model.lm_head.register_forward_hook(
        lambda module, arguments, output: outputs.append(output.requires_grad)
    )
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    measure_perplexity(Walker(model), random_windows(12, 12), batch_tokens=12, logits_chunk=4)
    assert outputs
    assert not any(outputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model.model._forward_hooks


def test_a_forward_of_its_own_is_put_back() -> None:
    model = build_model()
    own = model.model.forward
    vars(model.model)["forward"] = own
    expected = measure_perplexity(
        Walker(build_model()), random_windows(12), batch_tokens=1, logits_chunk=5
    )
    measured = measure_perplexity(Walker(model), random_windows(12), batch_tokens=1, logits_chunk=5)
    assert measured == expected
    assert vars(model.model)["forward"] is own


def test_progress_is_told_every_block_of_every_wave() -> None:
    model, windows, told = build_model(), random_windows(8, 9, 8, 8), []
    measure_perplexity(
        Walker(model),
        windows,
        batch_tokens=16,
        logits_chunk=64,
        wave_tokens=16,
        on_block=lambda: told.append(1),
    )
    assert len(told) == 2 * len(plan_waves(windows, 16, 16)) == 6


def test_a_window_that_is_not_finite_is_named() -> None:
    model, windows = build_model(), random_windows(8, 8, 8)
    windows = [window.clamp(max=VOCABULARY - 2) for window in windows]
    windows[1][3] = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = math.nan
    with pytest.raises(NumericalError, match=r"window 1 of 3 \(8 tokens\) is not finite"):
        measure_perplexity(Walker(model), windows, batch_tokens=64, logits_chunk=64)
    with pytest.raises(NumericalError, match="window 0 of 1"):
        measure_perplexity(Walker(model), windows[1:2], batch_tokens=64, logits_chunk=64)


def test_a_perplexity_beyond_float64_is_an_error() -> None:
    with pytest.raises(NumericalError, match=r"overflows: 800\.0 nats"):
        summarize("perplexity", [1600.0], [2])


class InPlace(nn.Module):
    """A norm that goes on in the memory of what it reads."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.copy_(self.norm(hidden)).mul_(2)


def test_a_tail_may_work_in_place() -> None:
    model, windows = build_model(), random_windows(9, 11)
    model.model.norm = InPlace(model.model.norm)
    by_hand = torch.cat([nll_by_hand(model, window) for window in windows])
    result = measure_perplexity(Walker(model), windows, batch_tokens=20, logits_chunk=5)
    assert result.mean == pytest.approx(by_hand.mean().item(), rel=TOLERANCE)


class Residual(nn.Module):
    """A head that also reads something that is not the decoder's output."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.calls = head, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self.head(hidden) * self.calls


def test_logits_that_are_not_a_function_of_the_decoder_are_an_error() -> None:
    model = build_model()
    model.lm_head = Residual(model.lm_head)
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*not a function of the last"):
        measure_perplexity(Walker(model), random_windows(8), batch_tokens=8, logits_chunk=8)


class Shortcut(nn.Module):
    """A norm that adds what the first block returned."""

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.first = norm, None
        block.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.first = output

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.first)


def test_a_model_that_reads_earlier_blocks_is_an_error() -> None:
    model = build_model()
    model.model.norm = Shortcut(model.model.norm, model.model.layers[0])
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*last block's output alone"):
        measure_perplexity(Walker(model), random_windows(8), batch_tokens=8, logits_chunk=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call | {"windows": []}, "at least two tokens"),
        (lambda call: call | {"windows": random_windows(5, 1)}, "at least two tokens"),
        (lambda call: call | {"walker": Walker(build_model().train())}, "training mode"),
        (lambda call: call | {"logits_chunk": 0}, "at least 1"),
        (lambda call: call | {"batch_tokens": 0}, "at least 1"),
    ],
)
def test_misuse_is_a_value_error(change: Callable[[dict], dict], message: str) -> None:
    call = {"walker": Walker(build_model()), "windows": random_windows(5)}
    with pytest.raises(ValueError, match=message):
        measure_perplexity(**change(call | {"batch_tokens": 8, "logits_chunk": 8}))
