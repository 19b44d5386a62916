"""What must hold of every decoder architecture, and does without a line of code for any."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import composed
import pytest
import torch
from tiny_models import TINY_CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mi_experiments.compression.pipeline import CompressedLinear, compress_model
from mi_experiments.config.config import Config
from mi_experiments.llm.inventory import LinearView, block_list, take_inventory
from mi_experiments.llm.matmul_hooks import replace_output
from mi_experiments.llm.walker import Walker
from mi_experiments.planning.plan import plan_compression

Builder = Callable[..., Any]
SEQLEN = 12
BATCH = 2
UNCHANGED = ("wbits=unquantized", "sparsity=dense", "n_groups=contiguous")
everywhere = pytest.mark.parametrize("name", TINY_CONFIGS)


@torch.no_grad()
def run_in_batches(model: PreTrainedModel, tokens: Tensor) -> None:
    for batch in tokens.split(BATCH):
        model(input_ids=batch, use_cache=False)


def seen_by_modules(model: PreTrainedModel, tokens: Tensor) -> dict[str, list[tuple[Any, ...]]]:
    """Collect the arguments of every module in plain full forwards, and what the blocks return."""
    seen: dict[str, list[tuple[Any, ...]]] = {}
    blocks = block_list(model)[1]

    def watch(name: str, module: nn.Module) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            values = (*args, *kwargs.values())
            seen.setdefault(name, []).append(
                tuple(v.clone() if isinstance(v, Tensor) else v for v in values)
            )

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        seen.setdefault("the last block", []).append((hidden.clone(),))

    handles = [watch(name, module) for name, module in model.named_modules()]
    handles.append(blocks[-1].register_forward_hook(after))
    run_in_batches(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


@everywhere
def test_walking_is_running_the_model_bit_for_bit(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(5, SEQLEN)
    seen = seen_by_modules(model, tokens)
    for block in Walker(model, batch_size=BATCH).walk(tokens):
        stream = block.stream
    assert torch.equal(stream.hidden, torch.cat([hidden for (hidden,) in seen["the last block"]]))


@everywhere
def test_every_matrix_and_every_expert_is_compressed(name: str, tiny_model: Builder) -> None:
    model = tiny_model(name)
    inventory = take_inventory(model)
    # Only gpt-oss has biases of two dimensions: one for each expert.
    weights = [
        parameter.numel()
        for key, parameter in inventory.modules.named_parameters()
        if parameter.ndim >= 2 and not (name == "gpt_oss" and key.endswith("_bias"))
    ]
    assert (inventory.coverage, inventory.ignored) == (1.0, {})
    assert inventory.compressed == sum(weights)
    views = [linear for linears in inventory.linears for linear in linears]
    assert len({linear.name for linear in views}) == len(views)
    spans = {(l.stored.data_ptr(), l.stored.numel()) for l in views}  # noqa: E741
    assert sum(size for _, size in spans) == inventory.compressed


@everywhere
def test_sites_get_what_their_linears_read(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(5, SEQLEN)
    seen = seen_by_modules(model, tokens)
    for block in Walker(model, batch_size=BATCH).walk(tokens):
        fed: dict[str, list[Tensor]] = {site.name: [] for site in block.sites}
        block.feed(block.sites, lambda site, x, fed=fed: fed[site.name].append(x.clone()))
        assert {linear for site in block.sites for linear in site.linears} == set(block.linears)
        for site in block.sites:
            reads = torch.cat(fed[site.name])
            assert reads.shape[1] == site.columns
            for linear in site.linears:
                if linear.expert is None:
                    expected = torch.cat([args[0].flatten(0, -2) for args in seen[linear.name]])
                elif "down_proj" in linear.name:
                    continue  # what goes down is computed by hand below
                else:
                    owner = linear.name.rpartition(".experts.")[0] + ".experts"
                    expected = torch.cat([
                        routed_by_hand(linear.expert, *args) for args in seen[owner]
                    ])
                assert torch.equal(reads, expected), linear.name


def routed_by_hand(
    expert: int, hidden: Tensor, chosen: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """List the tokens of an expert: those that have it as first choice, then as second."""
    if chosen is None or shares is None:
        return hidden.view(4, -1, hidden.shape[-1])[expert]
    assert chosen.shape == shares.shape
    rows = [
        token
        for place in range(chosen.shape[1])
        for token in range(len(hidden))
        if chosen[token, place] == expert
    ]
    return hidden[rows]


def test_experts_of_mixtral_by_hand(tiny_model: Builder, tiny_tokens: Builder) -> None:
    """The router's choice and what each expert makes of its tokens, from the formulas."""
    model, tokens = tiny_model("mixtral"), tiny_tokens(3, SEQLEN)
    top = model.config.num_experts_per_tok
    for block in Walker(model, batch_size=3).walk(tokens):
        fed: dict[str, Tensor] = {}
        block.feed(block.sites, lambda site, x, fed=fed: fed.__setitem__(site.name, x.clone()))
        moe = block.module.mlp
        hidden = fed["mlp.gate"]
        chosen = (hidden @ moe.gate.weight.T).topk(top).indices
        for expert in range(4):
            tokens_of = hidden[(chosen == expert).any(1)]
            reads = fed[f"mlp.experts.gate_up_proj.{expert}"]
            assert len(reads) == len(tokens_of)
            assert {tuple(row) for row in reads.tolist()} == {
                tuple(row) for row in tokens_of.tolist()
            }
            gate, up = (reads @ moe.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            torch.testing.assert_close(
                fed[f"mlp.experts.down_proj.{expert}"], nn.functional.silu(gate) * up
            )
        assert sum(len(fed[s.name]) for s in block.sites if s.routed) == 2 * top * len(hidden)


@everywhere
def test_every_linear_is_seen_the_right_way_round(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    """An output is the input times the weight, plus what is the same for every token."""
    model, tokens = tiny_model(name), tiny_tokens(4, SEQLEN)
    for block in Walker(model, batch_size=4).walk(tokens):
        called: set[str] = set()

        def check(
            linear: LinearView, inputs: Tensor, output: Tensor, called: set[str] = called
        ) -> Tensor:
            called.add(linear.name)
            rest = output - inputs @ linear.read_weight().T
            rest = rest.flatten(0, -2)
            assert (rest - rest[0]).abs().max() < 1e-4 * output.abs().max(), linear.name
            return output

        ((_, hidden, call),) = block.batches()
        with replace_output(block.linears, check), torch.no_grad():
            call.replay(block.module, hidden)
        assert called == {linear.name for linear in block.linears}


@everywhere
def test_sites_are_known_before_the_weights(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    walked = Walker(tiny_model(name), batch_size=2).walk(tiny_tokens(2, SEQLEN))
    described = Walker(tiny_model(name, device="meta")).describe_blocks(SEQLEN)
    for real, planned in zip(walked, described, strict=True):
        for here, there in zip(real.sites, planned.sites, strict=True):
            assert (here.name, here.columns, here.stage) == (there.name, there.columns, there.stage)
            shapes = [(linear.name, linear.rows, linear.columns) for linear in here.linears]
            assert shapes == [(l.name, l.rows, l.columns) for l in there.linears]  # noqa: E741


@cache
def config_of(*overrides: str) -> Config:
    small = ["n_groups.count=2", "n_groups.multiple=1"]
    return composed.config_of(*overrides, base=small)


def compress(model: PreTrainedModel, tokens: Tensor, *overrides: str) -> list[CompressedLinear]:
    # Every expert makes do with its own tokens: Llama 4's cannot be shown any others.
    config = config_of("recipe.min_tokens=1", *overrides)
    walker = Walker(model, batch_size=BATCH)
    plan = plan_compression(walker, tokens, config)
    blocks = compress_model(walker, tokens, plan, config)
    return [linear for block in blocks for linear in block.linears]


@everywhere
def test_sixteen_bits_and_no_sparsity_change_no_weight(
    name: str, tiny_model: Builder, tiny_tokens: Builder
) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    linears = compress(model, tiny_tokens(8, 16), *UNCHANGED)
    assert {linear.report.status for linear in linears} == {"untouched"}
    weights = sum(linear.report.rows * linear.report.columns for linear in linears)
    assert weights == take_inventory(model).compressed
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@everywhere
def test_compressed_models_are_audited_and_survive_the_disk(
    name: str, tiny_model: Builder, tiny_tokens: Builder, tmp_path: Path
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(8, 16)
    embeddings = model.get_input_embeddings().weight.clone()
    linears = compress(
        model, tokens, "wbits=uniform", "n_groups=contiguous", "sparsity.scope=linear"
    )
    for linear in linears:
        report = linear.report
        assert (report.status, report.average_bits, report.sparsity) == ("compressed", 4.0, 0.5)
        weight = linear.linear.read_weight()
        assert weight.shape == (report.rows, report.columns)
        assert int((weight == 0).sum()) >= weight.numel() // 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation=model.config._attn_implementation,
        experts_implementation="eager",
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for same in (model, loaded):
        assert torch.equal(same.get_input_embeddings().weight, embeddings)
        head = same.get_output_embeddings().weight
        tied = head.data_ptr() == same.get_input_embeddings().weight.data_ptr()
        assert tied == bool(model.config.tie_word_embeddings)
