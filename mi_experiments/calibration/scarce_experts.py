"""Show an expert every token, not only those that are routed to it.

An expert that sees few tokens has too few to be calibrated on. All tokens that enter its module are
the next best: they are drawn from what it reads, though not as the router draws them.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_experiments.errors import InputError
from mi_experiments.llm.blocks import Block
from mi_experiments.llm.calls import Stop, hooks
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input
from mi_experiments.llm.sites import Site


@torch.no_grad()
def feed_all_tokens(
    block: Block,
    sites: Sequence[Site],
    consume: Callable[[Site, Float[Tensor, "tokens columns"]], None],
) -> None:
    """Hand over what experts would read, if every token were routed to each of them.

    The block runs with its present weights up to the module of the experts, as the model calls it:
    with hidden states, the experts chosen for each token, and their shares. That module then runs
    once for each expert, on the same hidden states, with that expert as the one choice.

    Args:
        block: At which the walk stands.
        sites: Routed sites of this block.
        consume: Called once per batch and site, in the order of the sites, as by `Block.feed`.

    Raises:
        InputError: If the module of an expert is called with anything else, or does not use the
            expert.
        ValueError: If a site is not routed.
    """
    if ordinary := [site.name for site in sites if not site.routed]:
        raise ValueError(f"{ordinary} read every token as it is")
    modules = {site.linears[0].module: site.linears[0] for site in reversed(sites)}
    calls: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = _routing(modules[module], (*args, *kwargs.values()))
        if len(calls) == len(modules):
            raise Stop

    for _, hidden, call in block.batches():
        calls.clear()
        with (
            hooks(m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules),
            suppress(Stop),
        ):
            call.replay(block.module, hidden)
        for site in sites:
            if (module := site.linears[0].module) not in calls:
                raise _refusal(modules[module])
            _feed_expert(site, *calls[module], consume)


def _feed_expert(
    site: Site,
    hidden: Tensor,
    chosen: Tensor,
    shares: Tensor,
    consume: Callable[[Site, Float[Tensor, "tokens columns"]], None],
) -> None:
    """Run a module of experts with every token routed to the expert of one site."""
    linear = site.linears[0]
    expert = linear.expert
    assert expert is not None  # the site is routed

    def read(_: LinearView, inputs: Tensor) -> None:
        consume(site, inputs.flatten(0, -2))
        raise Stop

    with on_input([linear], read), suppress(Stop):
        linear.module(hidden, torch.full_like(chosen[:, :1], expert), shares[:, :1])
        # Stopped, unless the expert is one that does nothing, as LongCat's are beyond a number.
        raise _refusal(linear)


def _routing(linear: LinearView, values: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states, choices and shares that a module of experts is called with."""
    match values:
        case [Tensor() as hidden, Tensor() as chosen, Tensor() as shares] if (
            hidden.is_floating_point()
            and not chosen.is_floating_point()
            and chosen.shape == shares.shape
            and chosen.ndim == 2
            and hidden.shape[:-1].numel() == len(chosen)
        ):
            return hidden, chosen, shares
    raise _refusal(linear)


def _refusal(linear: LinearView) -> InputError:
    return InputError(
        f"{linear.name} cannot be calibrated on all tokens: its module does not multiply by it "
        "when called with hidden states, the experts of each token and their shares; leave it as "
        f"it is with a pattern of model.ignore that matches {linear.parameter_name}"
    )
