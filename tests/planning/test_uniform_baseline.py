"""The uniform alternative spends the same budget, exactly, and stores as many scales."""

from fractions import Fraction
from functools import cache

import pytest
import torch
from composed import config_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_experiments.method.grid import scale_groups
from mi_experiments.method.grouping import Grouping, group_channels
from mi_experiments.method.information_summary import InformationSummary
from mi_experiments.method.pruning import Sparsity
from mi_experiments.planning.plan import LinearPlan, Plan
from mi_experiments.planning.uniform_baseline import uniform_alternative

SHAPES = {"a.q": (48, 96), "a.k": (16, 96), "a.o": (96, 48), "b.q": (48, 96), "b.o": (96, 160)}


@cache
def mixed_plan(groups: int, average: float, widths: tuple[int, ...] = (3, 4)) -> Plan:
    """Return a plan whose groups have these widths, over and over."""
    linears = {}
    for place, (name, (rows, columns)) in enumerate(SHAPES.items()):
        group = group_channels(Grouping.random, groups, columns, multiple=8)
        of_group = [widths[(place + index) % len(widths)] for index in range(groups)]
        linears[name] = LinearPlan(
            block=int(name > "b"), site=name[:3].replace("k", "q"), rows=rows, columns=columns,
            channel_group=group, bits=torch.tensor(of_group, dtype=torch.uint8)[group.long()],
            scale_group=scale_groups(group, None), sparsity=Sparsity(0.5),
        )  # fmt: skip
    summary = InformationSummary(0.1, 1.0, 0.0, 0.01, 3.0, 0.5, "copula", 0.1, 0.3)
    return Plan(linears, {"a.q": summary}, Sparsity(0.5, 0, 0), average)


def spent(linears: list[LinearPlan]) -> Fraction:
    bits = sum(linear.rows * int(linear.bits.sum()) for linear in linears)
    return Fraction(bits, sum(linear.rows * linear.columns for linear in linears))


def scopes(plan: Plan, scope: str) -> list[list[LinearPlan]]:
    shares: dict[str, list[LinearPlan]] = {}
    for name, linear in plan.linears.items():
        key = {"linear": name, "site": linear.site, "model": ""}[scope]
        shares.setdefault(key, []).append(linear)
    return list(shares.values())


@pytest.mark.parametrize("scope", ["linear", "site", "model"])
@settings(deadline=None)
@given(
    groups=st.integers(1, 9),
    widths=st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple),
    multiple=st.sampled_from([1, 8, 32]),
)
def test_it_spends_what_the_mixed_plan_spends_and_could_buy_no_more(
    scope: str, groups: int, widths: tuple[int, ...], multiple: int
) -> None:
    plan = mixed_plan(groups, 3.5, widths)
    config = config_of("wbits.average=3.5", f"wbits.scope={scope}", f"n_groups.multiple={multiple}")
    uniform = uniform_alternative(plan, config)
    assert list(uniform.linears) == list(plan.linears)
    for mixed, even in zip(scopes(plan, scope), scopes(uniform, scope), strict=True):
        budget = spent(mixed)
        low = int(budget)
        last = even[-1]
        unit = last.columns if groups == 1 else multiple if last.columns >= groups * multiple else 1
        weights = sum(linear.rows * linear.columns for linear in even)
        assert (budget - spent(even)) * weights >= 0
        full = bool((last.bits > low).all())
        assert full or (budget - spent(even)) * weights < last.rows * unit
        for linear in even:
            assert set(linear.bits.tolist()) <= ({low, low + 1} if budget > low else {low})
    for name, linear in uniform.linears.items():
        # As many groups, each of contiguous channels and of one width: as many scales.
        assert linear.channel_group.diff().min() >= 0
        assert linear.channel_group.unique().tolist() == list(range(groups))
        assert linear.scale_group.max() == plan.linears[name].scale_group.max()
        for group in range(groups):
            assert len(linear.bits[linear.channel_group == group].unique()) == 1
    assert (uniform.sparsity, uniform.requested) == (plan.sparsity, plan.requested)


@pytest.mark.parametrize("scope", ["linear", "site", "model"])
def test_a_whole_average_is_plain_uniform(scope: str) -> None:
    """Also where the mixed plan found no use for the last bits."""
    config = config_of("wbits.average=3", f"wbits.scope={scope}")
    uniform = uniform_alternative(mixed_plan(5, 3.0, (2, 3)), config)
    assert all((linear.bits == 3).all() for linear in uniform.linears.values())


def test_halves_by_hand() -> None:
    plan = mixed_plan(4, 3.5, (3, 4))
    uniform = uniform_alternative(plan, config_of("wbits.average=3.5", "n_groups.multiple=8"))
    linear = uniform.linears["a.q"]
    assert linear.bits.tolist() == [4] * 48 + [3] * 48
    assert linear.channel_group.tolist() == [i // 24 for i in range(96)]
    assert uniform.information["a.q"].stability is None
    assert uniform.information["a.q"].mean_redundancy == 0.5


def test_one_group_a_linear_mixes_whole_linears() -> None:
    """4608, 1536, 4608, 4608 and 15360 weights at 3, 5, 3, 5, 3 bits: 3.4 on average."""
    plan = mixed_plan(1, 3.5, (3, 5))
    uniform = uniform_alternative(plan, config_of("wbits.average=3.5", "wbits.scope=model"))
    widths = [linear.bits.unique().tolist() for linear in uniform.linears.values()]
    # What is saved at 3 bits pays for later ones: 1843, 2458 - 1536, 2765, 4608.
    assert widths == [[3], [4], [3], [4], [3]]


def test_widths_that_are_asked_for_are_kept_to() -> None:
    config = config_of("wbits.average=4", "wbits.widths=[2,8]", "n_groups.multiple=8")
    plan = mixed_plan(3, 4.0, (8, 2, 2))
    assert uniform_alternative(plan, config).linears["a.q"].bits.tolist() == [8] * 32 + [2] * 64
    below = config_of("wbits.average=4", "wbits.widths=[2,3]", "n_groups.multiple=8")
    assert (uniform_alternative(mixed_plan(3, 4.0, (3,)), below).linears["a.q"].bits == 3).all()


@pytest.mark.parametrize(("wbits", "expected"), [("mixed", True), ("uniform", False)])
def test_only_a_mixed_plan_has_an_alternative(wbits: str, expected: bool) -> None:
    assert config_of(f"wbits={wbits}", "recipe.safety_net=true").has_safety_net is expected
    assert not config_of(f"wbits={wbits}", "recipe.safety_net=false").has_safety_net
