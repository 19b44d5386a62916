"""The Fisher information equals brute force given the labels, and its closed form over them."""

import contextlib
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_byte_tokenizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mi_experiments.calibration.fisher import (
    POSITIONS_CHUNK,
    draw_uniforms,
    measure_fisher,
    sample_labels,
)
from mi_experiments.errors import InputError, NumericalError
from mi_experiments.llm.activations import Place, allocator
from mi_experiments.llm.inventory import LinearView, take_inventory
from mi_experiments.llm.loading import load_model, open_model
from mi_experiments.llm.matmul_hooks import replace_output
from mi_experiments.llm.streaming import BlockWeights
from mi_experiments.llm.walker import Walker

EXACT = 1e-10  # relative, in float64: two ways to the same gradient differ by rounding alone
SEED = 3
PARTS = ("gate_up", "down")
Builder = Callable[..., Any]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Direct(PreTrainedModel):
    """Logits are the outputs of the only block, by default z = W·embedding(token)."""

    config_class = PreTrainedConfig

    def __init__(
        self, embeddings: Tensor, weight: Tensor, kind: Callable[..., nn.Linear] = nn.Linear
    ) -> None:
        super().__init__(PreTrainedConfig(num_hidden_layers=1))
        self.embedding = nn.Embedding.from_pretrained(embeddings)
        self.layers = nn.ModuleList([kind(*weight.shape, bias=False, dtype=weight.dtype)])
        self.layers[0].weight.data.copy_(weight)
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=self.layers[0](self.embedding(input_ids)))


def build_direct(kind: Callable[..., nn.Linear] = nn.Linear) -> Direct:
    """Five words, and as many channels, of which three carry something."""
    generator = torch.Generator().manual_seed(0)
    embeddings, weight = (
        nn.functional.pad(torch.randn(5, 3, generator=generator, dtype=torch.float64), (0, 2))
        for _ in range(2)
    )
    return Direct(embeddings, weight, kind)


def measure(model: PreTrainedModel, tokens: Tensor, seed: int = SEED, **how: Any) -> dict:
    on_block = how.pop("on_block", None)
    return measure_fisher(Walker(model, **how), tokens, seed=seed, on_block=on_block)


def labels_of(model: PreTrainedModel, sample: Tensor, seed: int = SEED) -> Tensor:
    """The labels that were drawn, from the model's full logits."""
    with torch.no_grad():
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
    return sample_labels(logits.softmax(-1), draw_uniforms(sample, seed))


@contextlib.contextmanager
def shifted(linear: LinearView, shift: Tensor) -> Iterator[None]:
    """Add a tensor to the output of a linear."""
    handle = linear.module.register_forward_hook(lambda _m, _a, output: output + shift)
    try:
        yield
    finally:
        handle.remove()


def fisher_by_hand(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Squared gradients on explicit leaves added to all outputs, of the textbook loss."""
    linears = [linear for block in take_inventory(model).linears for linear in block]
    sums = {linear.name: torch.zeros(linear.rows, dtype=model.dtype) for linear in linears}
    for sample in tokens:
        labels = labels_of(model, sample)
        with contextlib.ExitStack() as stack:
            leaves = {}
            for linear in linears:
                leaf = torch.zeros(1, len(sample), linear.rows, dtype=model.dtype)
                leaves[linear.name] = leaf.requires_grad_()
                stack.enter_context(shifted(linear, leaf))
            logits = model(input_ids=sample[None], use_cache=False).logits[0]
            cross_entropy(logits, labels, reduction="sum").backward()
        for name, leaf in leaves.items():
            sums[name] += leaf.grad[0].square().sum(0)
    return {name: total / tokens.numel() for name, total in sums.items()}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3"])
def test_equals_gradients_on_explicit_leaves(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model(name).double(), tiny_tokens(3, 9)
    fisher, by_hand = measure(model, tokens), fisher_by_hand(model, tokens)
    assert fisher.keys() == by_hand.keys()
    for linear, values in fisher.items():
        assert values.max() > 0, linear
        torch.testing.assert_close(values, by_hand[linear], rtol=EXACT, atol=EXACT * values.max())


def test_experts_and_their_router_equal_gradients_on_explicit_leaves(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    """Mixtral's formula by hand, with a leaf added to every output of the router and experts."""
    model, tokens = tiny_model("mixtral").double(), tiny_tokens(3, 9)
    fisher = measure(model, tokens)
    by_hand = {name: torch.zeros_like(values) for name, values in fisher.items() if "mlp" in name}
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, *shape: int) -> Tensor:
        return leaves.setdefault(name, torch.zeros(*shape, dtype=torch.float64).requires_grad_())

    def replace(name: str, moe: nn.Module) -> None:
        def forward(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, -2)
            logits = flat @ moe.gate.weight.T + leaf(f"{name}.gate", len(flat), 4)
            shares, chosen = logits.float().softmax(-1).topk(2, dim=-1)
            shares = shares / shares.sum(-1, keepdim=True)
            result = torch.zeros_like(flat)
            for expert in range(4):
                token, place = torch.nonzero(chosen == expert, as_tuple=True)
                up_name, down_name = (f"{name}.experts.{key}_proj.{expert}" for key in PARTS)
                both = flat[token] @ moe.experts.gate_up_proj[expert].T
                gate, up = (both + leaf(up_name, *both.shape)).chunk(2, dim=-1)
                down = (nn.functional.silu(gate) * up) @ moe.experts.down_proj[expert].T
                down = (down + leaf(down_name, *down.shape)) * shares[token, place, None]
                result = result.index_add(0, token, down)
            return result.view_as(hidden)

        moe.forward = forward

    for index, layer in enumerate(model.model.layers):
        replace(f"model.layers.{index}.mlp", layer.mlp)
    for sample in tokens:
        leaves.clear()
        labels = labels_of(model, sample)
        leaves.clear()
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        cross_entropy(logits, labels, reduction="sum").backward()
        for name, values in leaves.items():
            by_hand[name] += values.grad.square().sum(0) / tokens.numel()
    assert len(by_hand) == 2 * 9
    for name, values in by_hand.items():
        assert values.max() > 0, name
        torch.testing.assert_close(fisher[name], values, rtol=EXACT, atol=EXACT * values.max())


def test_an_expert_without_tokens_is_not_felt(tiny_model: Builder, tiny_tokens: Builder) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
        layer.mlp.gate.weight[2:] = 0
    fisher = measure(model, tiny_tokens(2, 8))
    for layer in range(2):
        for part in PARTS:
            names = [f"model.layers.{layer}.mlp.experts.{part}_proj.{e}" for e in range(4)]
            felt = [bool(fisher[name].any()) for name in names]
            assert any(felt[:2])
            assert felt[2:] == [False, False]
            assert len({len(fisher[name]) for name in names}) == 1


def test_equals_finite_differences(tiny_model: Builder, tiny_tokens: Builder) -> None:
    # Not Llama, whose norm computes in float32 whatever the dtype of the model.
    model, tokens, step = tiny_model("gpt2").double(), tiny_tokens(1, 5), 1e-5
    fisher, labels = measure(model, tokens), labels_of(model, tokens[0])

    def loss(linear: LinearView, position: int, row: int, size: float) -> float:
        shift = torch.zeros(5, linear.rows, dtype=torch.float64)
        shift[position, row] = size
        with shifted(linear, shift), torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0]
        return cross_entropy(logits, labels, reduction="sum").item()

    linears = take_inventory(model).linears[0]
    for linear, row in [(linears[0], 1), (linears[2], 4), (linears[-1], 7)]:
        gradients = [
            (loss(linear, t, row, step) - loss(linear, t, row, -step)) / (2 * step)
            for t in range(5)
        ]
        expected = math.fsum(gradient**2 for gradient in gradients) / 5
        assert fisher[linear.name][row].item() == pytest.approx(expected, rel=1e-6)


def test_of_logits_is_the_variance_of_the_label() -> None:
    """For y = z the Fisher information is diag(p) − ppᵀ, whatever the text's next tokens are."""
    model = build_direct()
    tokens = torch.randint(5, (16, 1024), generator=torch.Generator().manual_seed(1))
    (fisher,) = measure(model, tokens).values()
    with torch.no_grad():
        p = model(input_ids=tokens).logits.softmax(-1).flatten(0, 1)
    expected = (p * (1 - p)).mean(0)
    # (p − [label = k])² has variance p(1 − p)(1 − 2p)² over labels.
    error = (p * (1 - p) * (1 - 2 * p).square()).sum(0).sqrt() / len(p)
    assert ((fisher - expected).abs() < 4 * error).all()
    # Neither of the two usual mistakes would pass for it.
    onehot = nn.functional.one_hot
    likeliest = (p - onehot(p.argmax(-1), 5)).square().mean(0)
    following = (p[:-1] - onehot(tokens.flatten()[1:], 5)).square().mean(0)
    for mistake in (likeliest, following):
        assert ((mistake - expected).abs() > 20 * error).any()


def test_of_an_earlier_position_sums_over_the_labels_it_influences() -> None:
    """If a position alone moves n logits alike, its Fisher information is the sum of theirs."""

    class Broadcast(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden)[:, ::n].repeat_interleave(n, dim=1)

    n = 4
    model = build_direct(Broadcast)
    tokens = torch.randint(5, (16, 1024), generator=torch.Generator().manual_seed(1))
    fisher = torch.stack([measure(model, sample[None])["layers.0"] for sample in tokens])
    with torch.no_grad():
        p = model(input_ids=tokens).logits.softmax(-1)
    # n independent scores on one position in n: the mean is that of single scores, and nothing is
    # left of the cross terms, which would multiply it by up to n.
    difference = fisher - (p * (1 - p)).mean(1)
    error = difference.std(0) / math.sqrt(len(tokens))
    assert (difference.mean(0).abs() < 4 * error).all()
    assert (error < 0.05 * fisher.mean(0)).all()


def test_labels_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.arange(8, dtype=torch.float64) / 8
    labels = sample_labels(probabilities.expand(8, -1), uniforms)
    assert labels.tolist() == [1, 1, 3, 3, 3, 3, 4, 4]
    # Rounding of the sum of a row must not make the last label too likely or overflow.
    labels = sample_labels(0.999 * probabilities[None], torch.tensor([1 - 2**-53]).double())
    assert labels.tolist() == [4]


def test_more_positions_than_a_chunk_are_all_counted() -> None:
    model, seqlen = build_direct(), 2 * POSITIONS_CHUNK + 3
    tokens = torch.randint(5, (1, seqlen), generator=torch.Generator().manual_seed(1))
    by_hand = fisher_by_hand(model, tokens)["layers.0"]
    torch.testing.assert_close(measure(model, tokens)["layers.0"], by_hand, rtol=EXACT, atol=0)


def test_models_may_scale_in_place_before_in_and_after_a_block() -> None:
    class Doubling(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden.mul_(2))

    class Scaled(Direct):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
            hidden = self.embedding(input_ids).mul_(2)
            return CausalLMOutput(logits=self.layers[0](hidden).mul_(2))

    direct, tokens = build_direct(), torch.tensor([[1, 4, 0, 2, 3, 3]])
    model = Scaled(direct.embedding.weight, direct.layers[0].weight, Doubling)
    by_hand = fisher_by_hand(model, tokens)["layers.0"]
    torch.testing.assert_close(measure(model, tokens)["layers.0"], by_hand, rtol=EXACT, atol=0)


def test_output_without_influence_is_exactly_zero(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model = tiny_model("llama")
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    mlp.down_proj.weight[:, 5] = 0
    attention.o_proj.weight.zero_()
    fisher = measure(model, tiny_tokens(2, 8))
    for linear in ("gate_proj", "up_proj"):
        values = fisher[f"model.layers.1.mlp.{linear}"]
        assert values[5] == 0
        assert values.count_nonzero() == len(values) - 1
    for linear in ("q_proj", "k_proj", "v_proj"):
        assert not fisher[f"model.layers.1.self_attn.{linear}"].any()
        assert fisher[f"model.layers.0.self_attn.{linear}"].any()


def test_is_the_mean_over_samples_in_any_order(tiny_model: Builder, tiny_tokens: Builder) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(5, 8)
    whole, turned = measure(model, tokens), measure(model, tokens.flip(0))
    parts = [measure(model, tokens[:2]), measure(model, tokens[2:])]
    for name, values in whole.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(turned[name], values, rtol=1e-6, atol=0)
        mean = (2 * parts[0][name] + 3 * parts[1][name]) / 5
        torch.testing.assert_close(mean, values, rtol=1e-6, atol=0)


def test_seed_decides_and_global_randomness_does_not(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model("gpt2"), tiny_tokens(2, 8)
    state = torch.get_rng_state()
    first = measure(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again, other = measure(model, tokens), measure(model, tokens, seed=SEED + 1)
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert not torch.equal(values, other[name])
    # Equal positions of different samples must not share their draws.
    assert not torch.equal(draw_uniforms(tokens[0], SEED), draw_uniforms(tokens[1], SEED))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_modes_do_not_matter(
    mode: Builder, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 8)
    expected = measure(model, tokens)
    # Not frozen, so that its graph, if there were one, would hold the tokens.
    model.model.embed_tokens.weight.requires_grad_()
    with mode():
        values = measure(model, tokens + 0)
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert not any(value.is_inference() or value.requires_grad for value in values.values())


def test_half_precision_keeps_the_score_of_a_sure_model() -> None:
    """At p = 0.999, bfloat16 rounds p to 1; most labels then have a score of zero."""
    logits = torch.tensor([math.log(0.999), math.log(0.0005), math.log(0.0005)])
    model = Direct(torch.eye(3)[:1], logits[:, None].expand(3, 3)).to(torch.bfloat16)
    (fisher,) = measure(model, torch.zeros(1, 32, dtype=torch.int64)).values()
    p = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].float().softmax(-1)
    assert labels_of(model, torch.zeros(32, dtype=torch.int64)).max() == 0
    torch.testing.assert_close(fisher, (p - torch.eye(3)[0]).square(), rtol=0.02, atol=0)


def graph_tensors() -> int:
    """Tensors known to Python that hold on to a graph."""
    return sum(type(o) is Tensor and o.grad_fn is not None for o in gc.get_objects())


def test_leaves_neither_graph_nor_gradients_nor_hooks(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 8)
    # Even if someone forgot to freeze it, no parameter may collect a gradient.
    forgotten = [model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight]
    for parameter in forgotten:
        parameter.requires_grad_()
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    made: list[StorageWeakRef] = []

    def note(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        made.append(StorageWeakRef(output.untyped_storage()))

    watched = [model.lm_head, model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj]
    handles = [module.register_forward_hook(note) for module in watched]
    before = graph_tensors()
    counts: list[int] = []

    def check(name: str) -> None:
        counts.append(len(made))
        assert graph_tensors() == before
        assert all(storage.expired() for storage in made)

    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        values = measure(model, tokens, on_block=check)
    finally:
        gc.enable()
    # Three samples: through each block and the head once, and back through each block.
    assert [after - earlier for earlier, after in itertools.pairwise(counts)] == [3, 6, 3]
    for handle in handles:
        handle.remove()
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(value.requires_grad for value in values.values())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("passing", [1, 2])
def test_hooks_go_when_the_model_fails(
    passing: int, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    """In the forward pass of a block, and in its second one."""
    model, calls = tiny_model("llama"), []
    module = model.model.layers[1].mlp

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == passing:
            raise ZeroDivisionError

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        measure(model, tiny_tokens(1, 8))
    handle.remove()
    assert len(calls) == passing
    for module in model.modules():
        assert not (module._forward_hooks)
        assert not (module._forward_pre_hooks)
        assert not (module._backward_hooks)
        assert "forward" not in vars(module)


def test_reports_blocks_forward_and_backward(tiny_model: Builder, tiny_tokens: Builder) -> None:
    seen: list[str] = []
    measure(tiny_model("llama"), tiny_tokens(3, 4), on_block=seen.append)
    assert seen == [f"model.layers.{index}" for index in (0, 1, 1, 0)]


def test_refuses_what_has_no_answer(tiny_model: Builder, tiny_tokens: Builder) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 4)
    with pytest.raises(ValueError, match="no token"):
        measure(model, tokens[:0])
    with pytest.raises(ValueError, match="training mode"):
        measure(model.train(), tokens)
    model.eval()
    idle = LinearView("model.idle", nn.Linear(2, 3))
    walker = Walker(model)
    first, second = walker.inventory.linears
    unread = dataclasses.replace(walker.inventory, linears=(first, (*second, idle)))
    vars(walker)["inventory"] = unread
    with pytest.raises(InputError, match=r"reaches 1 linears, model\.idle"):
        measure_fisher(walker, tokens, seed=SEED)
    with pytest.raises(InputError, match="beyond the 128 embeddings"):
        measure(model, tokens + 1000)
    model.model.embed_tokens.weight[int(tokens[1, -1])] = math.nan
    assert int(tokens[1, -1]) not in tokens[0]
    with pytest.raises(NumericalError, match=r"sample 1 is not finite in the input of"):
        measure(model, tokens)


def test_gradients_that_are_not_finite_name_sample_and_linear(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    """A forward pass is finite; the gradient that goes back through it is not."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, marked: Tensor) -> Tensor:
            ctx.save_for_backward(marked)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return torch.where(ctx.saved_tensors[0], math.inf, gradient), None

    model, tokens = tiny_model("llama"), tiny_tokens(3, 4)
    seen: list[Tensor] = []

    def steepen(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        seen.append(output)
        # See_form, three samples forward, three back: of these the second.
        return Steep.apply(output, torch.tensor(len(seen) == 6))

    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(steepen)
    with pytest.raises(NumericalError, match=r"sample 1: .*layers\.0\.mlp\.up_proj are"):
        measure(model, tokens)
    handle.remove()
    model.lm_head.weight.fill_(math.inf)
    with pytest.raises(NumericalError, match=r"sample 0: .*last hidden states are"):
        measure(model, tokens)


def whole_model(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """One backward pass through the whole model, of the textbook loss, for any kind of linear."""
    linears = [linear for block in take_inventory(model).linears for linear in block]
    sums = {linear.name: torch.zeros(linear.rows, dtype=torch.float64) for linear in linears}

    def collect(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            sums[linear.name] += gradient.flatten(0, -2).square().sum(0)

        output.register_hook(add)
        return output

    for sample in tokens:
        labels = labels_of(model, sample)
        leaf = model.get_input_embeddings()(sample[None]).requires_grad_()
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: leaf.clone())  # noqa: B023
        with replace_output(linears, collect):
            logits = model(input_ids=sample[None], use_cache=False).logits[0]
        handle.remove()
        cross_entropy(logits, labels, reduction="sum").backward()
    return {name: total / tokens.numel() for name, total in sums.items()}


@pytest.mark.parametrize(
    "name", ["llama", "opt", "gpt2", "gemma3", "opt_narrow", "falcon", "mixtral", "qwen2_moe"]
)
def test_equals_autograd_through_the_whole_model(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model(name).double(), tiny_tokens(3, 2 * POSITIONS_CHUNK // 5)
    fisher, expected = measure(model, tokens), whole_model(model, tokens)
    assert fisher.keys() == expected.keys()
    for linear, values in fisher.items():
        torch.testing.assert_close(
            values, expected[linear], rtol=EXACT, atol=EXACT * values.max().item()
        )


def test_refuses_a_tail_that_reads_more_than_the_last_block(
    tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model = tiny_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden - hidden.mean(1, keepdim=True))
    with pytest.raises(InputError, match="cannot be computed in chunks"):
        measure(model, tiny_tokens(1, 8))


def watch_loads(weights: BlockWeights, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every load; assert at each, and at each drop, that no other block holds a weight."""
    loads: list[int] = []

    def holding() -> list[int]:
        held = [any(not p.is_meta for p in block.parameters()) for block in weights.blocks]
        return [index for index, full in enumerate(held) if full]

    def load(self: BlockWeights, block: int) -> None:
        assert holding() == []
        real_load(self, block)
        assert holding() == [block]
        loads.append(block)

    def drop(self: BlockWeights, block: int) -> None:
        assert holding() == [block]
        real_drop(self, block)
        assert holding() == []

    real_load, real_drop = BlockWeights.load, BlockWeights.drop
    monkeypatch.setattr(BlockWeights, "load", load)
    monkeypatch.setattr(BlockWeights, "drop", drop)
    return loads


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("place", [Place.host, Place.disk])
def test_one_block_at_a_time_from_disk_changes_no_bit(
    name: str,
    place: Place,
    tiny_model: Builder,
    tiny_tokens: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    request = {"revision": None, "dtype": "auto", "device": "cpu", "offline": True}
    build_byte_tokenizer().save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), **request)
    resident, _ = load_model(str(tmp_path), **request)
    tokens = tiny_tokens(3, 12)
    expected = measure(resident, tokens)
    loads = watch_loads(opened.weights, monkeypatch)
    made: list[StorageWeakRef] = []
    most = 0

    def allocate(shape: Any, dtype: torch.dtype) -> Tensor:
        made.append(StorageWeakRef((room := real(shape, dtype)).untyped_storage()))
        return room

    def count(_: str) -> None:
        nonlocal most
        alive = sum(not storage.expired() for storage in made)
        most = max(most, alive)
        # The gradient stays to the end; on the way back the input of each block goes with it.
        back = max(0, len(loads) - 1 - blocks)
        assert alive == (len(made) if not back else blocks + 1 - back)

    real = allocator(place, torch.device("cpu"), tmp_path)
    blocks = len(opened.weights.blocks)
    values = measure(
        opened.model, tokens, weights=opened.weights, allocate=allocate, on_block=count
    )
    assert all(torch.equal(values[linear], expected[linear]) for linear in expected)
    assert values.keys() == expected.keys()
    # To see how blocks are called, forward, backward.
    assert loads == [0, *range(blocks), *reversed(range(blocks))]
    assert most == len(made) == blocks + 1
    assert all(storage.expired() for storage in made)
    assert not list(tmp_path.glob(".activations*"))
