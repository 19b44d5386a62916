"""Replay is exact, sites are the textbook groups, and whatever replay relies on is checked."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from mi_experiments.errors import InputError, NumericalError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.inventory import LinearView, block_list, take_inventory
from mi_experiments.llm.loading import load_skeleton
from mi_experiments.llm.replay import Stream
from mi_experiments.llm.walker import Walker

GATED = [
    "self_attn.q_proj+k_proj+v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj+up_proj",
    "mlp.down_proj",
]
TEXTBOOK_SITES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma3": GATED,
    "opt": ["self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": [
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    "phi": ["self_attn.q_proj+k_proj+v_proj+mlp.fc1", "self_attn.dense", "mlp.fc2"],
}
MOE_IGNORE = ("*.mlp.experts.*", "*.mlp.gate")
IGNORE = {**dict.fromkeys(TEXTBOOK_SITES, ()), "qwen3_moe": MOE_IGNORE}
SEQLEN = 12


@torch.no_grad()
def inputs_in_model(model: PreTrainedModel, batches: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Collect what every module reads, and the last block returns, in plain full forwards."""
    seen: dict[str, list[Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}
    path, blocks = block_list(model)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(names[module], []).append(args[0].clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.setdefault(f"{path}.{len(blocks)}", []).append(output.clone())

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles.append(blocks[-1].register_forward_hook(after))
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def linear_named(block: Block, suffix: str) -> LinearView:
    return next(linear for linear in block.linears if linear.name.endswith(suffix))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", IGNORE)
def test_replay_is_the_model_bit_for_bit(
    name: str, attention: str, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model(name, attention=attention), tiny_tokens(5, SEQLEN)
    expected = inputs_in_model(model, tokens.split(2))
    buffers = set()
    for block in Walker(model, batch_size=2, ignore=IGNORE[name]).walk(tokens):
        stream = block.stream
        buffers.add(stream.hidden.data_ptr())
        assert torch.equal(stream.hidden, expected[block.name])
    assert torch.equal(stream.hidden, expected[f"{block_list(model)[0]}.{block.index + 1}"])
    assert len(buffers) == 1
    assert stream.hidden.shape == (5, SEQLEN, 32)


def test_replay_is_exact_in_bfloat16(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model("llama").to(torch.bfloat16), tiny_tokens(3, SEQLEN)
    expected = inputs_in_model(model, tokens.split(2))
    for block in Walker(model, batch_size=2).walk(tokens):
        stream = block.stream
    assert stream.hidden.dtype == torch.bfloat16
    assert torch.equal(stream.hidden, expected["model.layers.2"])


def test_later_blocks_see_the_compressed_ones(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model("qwen3"), tiny_tokens(4, SEQLEN)
    dense = inputs_in_model(model, tokens.split(4))["model.layers.2"]
    for block in Walker(model, batch_size=4).walk(tokens):
        for linear in block.linears:
            linear.write_weight(linear.read_weight().round(decimals=1))
    compressed = inputs_in_model(model, tokens.split(4))["model.layers.2"]
    assert torch.equal(block.stream.hidden, compressed)
    assert not torch.allclose(compressed, dense)


def test_arguments_of_block_0_do_not_serve_every_block(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model("gemma3"), tiny_tokens(2, SEQLEN)
    expected = inputs_in_model(model, tokens.split(2))["model.layers.4"]
    walk = Walker(model, batch_size=2).walk(tokens)
    stream = next(walk).stream
    wrong = dataclasses.replace(
        stream,
        hidden=stream.hidden.clone(),
        calls={rows: [calls[0]] * len(calls) for rows, calls in stream.calls.items()},
    )
    for index, module in enumerate(block_list(model)[1]):
        wrong.advance(f"model.layers.{index}", module)
    for _ in walk:
        pass
    assert torch.equal(stream.hidden, expected)
    assert (wrong.hidden - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", TEXTBOOK_SITES)
def test_sites_are_the_textbook_groups_with_and_without_weights(
    name: str, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model = tiny_model(name)
    described = Walker(tiny_model(name, device="meta")).describe_blocks(SEQLEN)
    walked = list(Walker(model, batch_size=2).walk(tiny_tokens(3, SEQLEN)))
    assert len(walked) == len(described) == model.config.num_hidden_layers
    for real, planned in zip(walked, described, strict=True):
        assert [site.name for site in real.sites] == TEXTBOOK_SITES[name]
        assert real.name == planned.name
        for here, there in zip(real.sites, planned.sites, strict=True):
            assert (here.name, here.columns) == (there.name, there.columns)
            shapes = [(linear.name, linear.rows, linear.columns) for linear in here.linears]
            assert shapes == [(l.name, l.rows, l.columns) for l in there.linears]  # noqa: E741
        assert {linear for site in real.sites for linear in site.linears} == set(real.linears)


def test_a_mixture_of_experts_is_described_without_weights(
    tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    skeleton = load_skeleton(str(tmp_path), revision=None, offline=True)
    for block in Walker(skeleton, ignore=MOE_IGNORE).describe_blocks(SEQLEN):
        assert [site.name for site in block.sites] == GATED[:2]


@pytest.mark.parametrize("name", TEXTBOOK_SITES)
def test_feed_gives_what_each_linear_reads_in_the_model(
    name: str, tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(5, SEQLEN)
    expected = inputs_in_model(model, tokens.split(2))
    for block in Walker(model, batch_size=2).walk(tokens):
        fed: dict[str, list[Tensor]] = {}
        block.feed(block.sites, lambda site, x, fed=fed: fed.setdefault(site.name, []).append(x))
        assert [*fed] == [site.name for site in block.sites]
        for site in block.sites:
            for linear in site.linears:
                reads = expected[linear.name].flatten(0, -2)
                assert torch.equal(torch.cat(fed[site.name]), reads)


def test_feeding_one_site_after_another_is_true_sequential(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, SEQLEN)
    block = next(Walker(model, batch_size=2).walk(tokens))
    fed: dict[str, list[Tensor]] = {}
    for site in block.sites:
        block.feed([site], lambda site, x: fed.setdefault(site.name, []).append(x.clone()))
        for linear in site.linears:
            linear.write_weight(linear.read_weight() / 2)
    expected = inputs_in_model(model, tokens.split(2))
    for site in block.sites:
        reads = expected[site.linears[0].name].flatten(0, -2)
        assert torch.equal(torch.cat(fed[site.name]), reads)


def test_feed_stops_at_the_last_site_asked_for(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model = tiny_model("llama")
    block = next(Walker(model, batch_size=2).walk(tiny_tokens(5, SEQLEN)))
    ran: list[str] = []
    for linear in block.linears:
        linear.module.register_forward_hook(
            lambda *_, name=linear.name: ran.append(name.rpartition(".")[2])
        )
    block.feed([block.sites[1], block.sites[0]], lambda site, x: None)
    assert ran == ["q_proj", "k_proj", "v_proj"] * 3
    ran.clear()
    block.feed([], lambda site, x: None)
    assert not ran


def test_hooks_and_grad_mode_are_left_as_found(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model = tiny_model("llama").requires_grad_(True)

    def fail(site: object, x: Tensor) -> None:
        assert not x.requires_grad
        raise ZeroDivisionError

    for block in Walker(model).walk(tiny_tokens(2, SEQLEN)):
        with pytest.raises(ZeroDivisionError):
            block.feed(block.sites, fail)
        assert torch.is_grad_enabled()
        assert count_hooks(model) == 0
        assert not block.stream.hidden.requires_grad
    assert count_hooks(model) == 0


def test_feed_refuses_blocks_and_sites_of_another_place(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    walk = Walker(tiny_model("llama"), batch_size=2).walk(tiny_tokens(2, SEQLEN))
    first, second = next(walk), next(walk)
    with pytest.raises(RuntimeError, match=r"the walk has left model\.layers\.0"):
        first.feed(first.sites, lambda site, x: None)
    with pytest.raises(ValueError, match="no such sites"):
        second.feed(first.sites, lambda site, x: None)


def test_a_bad_activation_names_block_and_sample(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(5, SEQLEN)
    calls: list[int] = []

    def poison(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            output[1, 7, 3] = torch.nan

    walk = Walker(model, batch_size=2).walk(tokens)
    next(walk)
    linear_named(next(walk), "down_proj").module.register_forward_hook(poison)
    with pytest.raises(NumericalError, match=r"sample 3 .* the output of model\.layers\.1"):
        next(walk)

    model = tiny_model("llama")
    model.model.embed_tokens.weight[tokens[4, 0]] = torch.inf
    tokens[:4].masked_fill_(tokens[:4] == tokens[4, 0], 2 if tokens[4, 0] != 2 else 3)
    with pytest.raises(NumericalError, match=r"sample 4 .* the input of model\.layers\.0"):
        next(Walker(model, batch_size=2).walk(tokens))


@pytest.mark.parametrize(("name", "suffix"), [("gpt2", "c_attn"), ("llama", "k_proj")])
def test_a_linear_is_seen_as_rows_by_columns(
    name: str,
    suffix: str,
    tiny_model: Callable[..., Any],
    tiny_tokens: Callable[..., Tensor],
) -> None:
    block = next(Walker(tiny_model(name)).walk(tiny_tokens(1, SEQLEN)))
    linear = linear_named(block, suffix)
    x = torch.randn(3, linear.columns)
    weight = linear.read_weight()
    bias = 0 if linear.module.bias is None else linear.module.bias
    assert weight.shape == (linear.rows, linear.columns)
    torch.testing.assert_close(linear.module(x), x @ weight.T + bias)

    storage = linear.module.weight.data_ptr()
    new = torch.randn(linear.rows, linear.columns)
    linear.write_weight(new)
    assert torch.equal(linear.read_weight(), new)
    assert linear.module.weight.data_ptr() == storage
    linear.read_weight().zero_()
    assert torch.equal(linear.read_weight(), new)
    linear.module.to(torch.bfloat16)
    linear.write_weight(new)
    assert linear.module.weight.dtype == torch.bfloat16
    assert torch.equal(linear.read_weight(), new.bfloat16().float())
    with pytest.raises(ValueError, match=suffix):
        linear.write_weight(new[1:])


def test_every_matrix_is_compressed_or_ignored_or_an_error(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("qwen3_moe")
    assert take_inventory(model).coverage == 1
    block = model.model.layers[1]
    block.kernel = nn.Conv1d(2, 2, 3)
    block.table = nn.Embedding(2, 3)
    block.tensor = nn.Parameter(torch.zeros(2, 2, 2, 2))
    with pytest.raises(InputError, match=r"3 weights .* model\.layers\.1\.tensor \[2, 2, 2, 2\]"):
        take_inventory(model)
    del block.kernel, block.table, block.tensor
    inventory = take_inventory(model, ignore=MOE_IGNORE)
    matrices = [p.numel() for p in model.model.layers.parameters() if p.ndim >= 2]
    experts = 2 * (4 * 32 * 32 + 4 * 32 * 16 + 4 * 32)
    assert sum(inventory.ignored.values()) == experts
    assert inventory.compressed == sum(matrices) - experts
    assert inventory.coverage == pytest.approx(1 - experts / sum(matrices))
    assert take_inventory(tiny_model("gpt2")).coverage == 1


def test_ignored_linears_are_in_no_site(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    walk = Walker(
        tiny_model("llama"), batch_size=1, ignore=["*.v_proj", "model.layers.0.mlp.*"]
    ).walk(tiny_tokens(1, SEQLEN))
    assert [[site.name for site in block.sites] for block in walk] == [
        ["self_attn.q_proj+k_proj", "self_attn.o_proj"],
        ["self_attn.q_proj+k_proj", *GATED[1:]],
    ]


def test_a_pattern_that_ignores_nothing_is_an_error(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"model\.ignore=\['\*\.gait'\] matches no weight"):
        take_inventory(tiny_model("llama"), ignore=["*.q_proj", "*.gait"])


def test_a_weight_with_two_names_is_an_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight and .* are one weight"):
        take_inventory(model)
    assert take_inventory(model, ignore=["*.up_proj"]).coverage < 1


def test_block_list_is_found_by_its_length_or_named(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert block_list(model)[0] == "model.layers"
    model.extra = nn.ModuleList([nn.Identity(), nn.Identity()])
    model.model.layers[0].experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert block_list(model) == ("model.layers", model.model.layers)
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(InputError, match=r"LlamaForCausalLM has 2 lists .* model\.blocks=PATH"):
        block_list(model)
    assert block_list(model, "model.more") == ("model.more", model.model.more)
    with pytest.raises(InputError, match=r"model\.blocks=model\.norm is not a list"):
        block_list(model, "model.norm")
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match=r"LlamaForCausalLM has 0 lists of 3 blocks"):
        block_list(model)


def test_what_the_model_cannot_take_is_refused(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"dataset\.seqlen=65 exceeds the 64"):
        next(Walker(model).walk(tiny_tokens(1, 65)))
    with pytest.raises(InputError, match="token 128 is beyond the 128 embeddings"):
        next(Walker(model).walk(torch.full((1, SEQLEN), 128)))
    with pytest.raises(ValueError, match="training mode"):
        next(Walker(model.train(), batch_size=1).walk(tiny_tokens(1, SEQLEN)))


class ToyBlock(nn.Module):
    """Returns a tuple, reads its hidden state by keyword, and adds to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, shift: Tensor, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        hidden_states += self.mix(hidden_states + shift)
        return hidden_states, None

    def mix(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Toy(PreTrainedModel):
    """The smallest model with blocks; ``order`` says which run."""

    config_class = LlamaConfig

    def __init__(self, block: type[ToyBlock] = ToyBlock, order: tuple[int, ...] = (0, 1)) -> None:
        config = LlamaConfig(
            vocab_size=128, hidden_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        super().__init__(config)
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 8)
        self.layers = nn.ModuleList([block() for _ in range(2)])
        self.order = order
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def between(self, hidden: Tensor) -> Tensor:
        return hidden

    def shift(self, tokens: Tensor) -> Tensor:
        return torch.ones(8)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, shift = self.embed(input_ids), self.shift(input_ids)
        for index in self.order:
            hidden = self.layers[index](shift, hidden_states=self.between(hidden))[0]
        return hidden


def walk_to_end(model: Toy, tokens: Tensor) -> Stream:
    for block in Walker(model, batch_size=2).walk(tokens):
        stream = block.stream
    return stream


def test_keyword_inputs_tuple_outputs_and_in_place_blocks_replay_exactly(
    tiny_tokens: Callable[..., Tensor],
) -> None:
    model, tokens = Toy(), tiny_tokens(3, SEQLEN)
    block = next(Walker(model, batch_size=2).walk(tokens))
    before = block.stream.hidden.clone()
    for _ in range(2):
        block.feed(block.sites, lambda site, x: None)
    assert torch.equal(block.stream.hidden, before)
    expected = torch.cat([model(batch, use_cache=False) for batch in tokens.split(2)])
    assert torch.equal(walk_to_end(model, tokens).hidden, expected)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 0), r"layers\.0 is called twice"),
        ((1, 0), r"layers\.1 is called twice or out of order"),
        ((0,), r"layers\.1 is not called"),
    ],
)
def test_blocks_that_form_no_chain_are_refused(
    order: tuple[int, ...], message: str, tiny_tokens: Callable[..., Tensor]
) -> None:
    with pytest.raises(InputError, match=message):
        walk_to_end(Toy(order=order), tiny_tokens(2, SEQLEN))


def test_a_change_between_blocks_is_refused(tiny_tokens: Callable[..., Tensor]) -> None:
    class Scaled(Toy):
        def between(self, hidden: Tensor) -> Tensor:
            return hidden * 2

    with pytest.raises(InputError, match=r"layers\.1 does not read what the block before"):
        walk_to_end(Scaled(), tiny_tokens(2, SEQLEN))


@pytest.mark.parametrize("nsamples", [1, 4])
def test_arguments_that_depend_on_the_tokens_are_refused(
    nsamples: int, tiny_tokens: Callable[..., Tensor]
) -> None:
    class TokenDependent(Toy):
        def shift(self, tokens: Tensor) -> Tensor:
            return tokens[:, :1, None].float().expand(-1, -1, 8)

    with pytest.raises(InputError, match=r"layers\.0 reads more than its hidden state"):
        walk_to_end(TokenDependent(), tiny_tokens(nsamples, SEQLEN))


def test_a_linear_called_twice_or_never_is_refused(tiny_tokens: Callable[..., Tensor]) -> None:
    class Twice(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            return self.a(self.a(x)) + self.b(x)

    class Never(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.raises(InputError, match=r"layers\.0\.a is called twice"):
        walk_to_end(Toy(Twice), tiny_tokens(2, SEQLEN))
    with pytest.raises(InputError, match=r"layers\.0\.b not called"):
        walk_to_end(Toy(Never), tiny_tokens(2, SEQLEN))


def test_an_expert_called_twice_or_none_of_them_is_refused(
    tiny_tokens: Callable[..., Tensor],
) -> None:
    class Fused(ToyBlock):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 8, 8))

    class Twice(Fused):
        def mix(self, x: Tensor) -> Tensor:
            hidden = super().mix(x) + x @ self.experts[2]
            return hidden + (x + 1) @ self.experts[2]

    class Added(Fused):
        def mix(self, x: Tensor) -> Tensor:
            return super().mix(x) + self.experts[0, 0]

    class InCompany(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.others = nn.Parameter(torch.randn(3, 8, 8))

        def mix(self, x: Tensor) -> Tensor:
            shared = (x + 1) @ self.experts[0] + (x + 1) @ self.others[0]
            y = x + 1
            return super().mix(x) + shared + y @ self.experts[1] + y @ self.others[1]

    tokens = tiny_tokens(2, SEQLEN)
    with pytest.raises(InputError, match=r"layers\.0\.experts\.2 is called twice"):
        walk_to_end(Toy(Twice), tokens)
    with pytest.raises(InputError, match=r"layers\.0\.experts not called .*\['\*\.experts'\]"):
        walk_to_end(Toy(Added), tokens)
    with pytest.raises(InputError, match=r"experts of layers\.0\.\w+ share their inputs"):
        walk_to_end(Toy(InCompany), tokens)


def test_the_advice_of_an_error_can_be_taken(tiny_tokens: Callable[..., Tensor]) -> None:
    class Convolving(ToyBlock):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.kernel = nn.Conv1d(8, 8, 3, padding=1)
            self.inner.scale = nn.Parameter(torch.ones(2, 4))

        def mix(self, x: Tensor) -> Tensor:
            mixed = self.inner.kernel(super().mix(x).mT).mT
            return (mixed.unflatten(-1, (2, 4)) * self.inner.scale).flatten(-2)

    model, tokens = Toy(Convolving), tiny_tokens(2, SEQLEN)
    ignore: list[str] = []
    for name in ("kernel", "scale"):
        with pytest.raises(InputError, match=rf"layers\.0\.inner\.{name}") as caught:
            next(Walker(model, batch_size=2, ignore=ignore).walk(tokens))
        (advice,) = re.findall(r"add model\.ignore=\[(.*)\]", str(caught.value))
        ignore += advice.strip("'").split("','")
    assert ignore == ["*.inner.kernel", "*.inner.scale"]
    for block in Walker(model, batch_size=2, ignore=ignore).walk(tokens):
        assert [site.name for site in block.sites] == ["a+b"]


def test_vectors_are_no_matrices_whatever_their_shape(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2_moe")
    model.model.layers[0].shift = nn.Parameter(torch.zeros(1, 1, 32))
    inventory = take_inventory(model)
    names = {linear.name for linear in inventory.linears[0]}
    assert "model.layers.0.shift" not in names
    # The same shape in a linear layer is a matrix with one row.
    assert "model.layers.0.mlp.shared_expert_gate" in names


def test_sites_do_not_depend_on_the_dtype(
    tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Tensor]
) -> None:
    """DeepSeek's router multiplies in float32, whatever the dtype of the model."""
    names = [
        [
            [site.name for site in block.sites]
            for block in Walker(tiny_model("deepseek_v3").to(dtype), batch_size=2).walk(
                tiny_tokens(2, SEQLEN)
            )
        ]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert names[0] == names[1]
    assert names[0][1][4] == "mlp.gate+mlp.shared_experts.gate_proj+up_proj"


def test_a_linear_that_a_later_batch_misses_is_refused() -> None:
    class Choosy(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            return self.a(x) + (self.b(x) if x.sum() > 0 else 0)

    model, tokens = Toy(Choosy), torch.tensor([[1, 1], [1, 1], [2, 2], [2, 2]])
    model.embed.weight[1], model.embed.weight[2] = 5.0, -5.0
    block = next(Walker(model, batch_size=2).walk(tokens))
    (site,) = block.sites
    seen: list[int] = []
    block.feed(block.sites, lambda site, x: seen.append(len(x)))
    assert seen == [4, 4]
    assert site.name == "a+b"

    only_b = dataclasses.replace(site, linears=site.linears[1:])
    block = dataclasses.replace(block, sites=(only_b,))
    with pytest.raises(InputError, match=r"samples 2 to 3 reach no \['layers\.0\.b'\]"):
        block.feed([only_b], lambda site, x: None)


def test_a_site_is_one_tensor_not_one_address(tiny_tokens: Callable[..., Tensor]) -> None:
    class Changed(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.mul_(2))

    class Recycled(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            self.a(x + 1)
            return self.b(x + 2)

    class Viewed(ToyBlock):
        def mix(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.view(-1, 8)).view_as(x)

    tokens = tiny_tokens(2, SEQLEN)
    for kind, names in [(Changed, ["a", "b"]), (Recycled, ["a", "b"]), (Viewed, ["a+b"])]:
        block = next(Walker(Toy(kind), batch_size=2).walk(tokens))
        assert [site.name for site in block.sites] == names
