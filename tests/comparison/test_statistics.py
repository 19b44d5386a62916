"""Averages, intervals and paired differences equal what a hand computes."""

import math
import statistics
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import make_broken_run, make_run

from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import (
    add_difference,
    average_over,
    half_width,
    pivot,
)
from mi_experiments.errors import InputError

EXCESS = {("random", 0): 0.30, ("random", 1): 0.34, ("random", 2): 0.35,
          ("energy", 0): 0.25, ("energy", 1): 0.26, ("energy", 2): 0.33}  # fmt: skip
T2 = 4.302652729749464
"""Student's two-sided 95 % quantile at 2 degrees of freedom: 0.95 √(2 / (1 − 0.95²))."""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write two groupings with three seeds each."""
    for (grouping, seed), excess in EXCESS.items():
        make_run(tmp_path / f"{grouping}{seed}", excess, n_groups__grouping=grouping, seed=seed)
    return tmp_path


def student_quantile(freedom: int) -> float:
    """Return the half width of an interval in standard errors of its mean."""
    values = [float(value) for value in range(freedom + 1)]
    return half_width(values) / (statistics.stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.706204736),
        (2, 4.302652730),
        (3, 3.182446305),
        (4, 2.776445105),
        (5, 2.570581836),
        (9, 2.262157163),
        (10, 2.228138852),
        (30, 2.042272456),
        (120, 1.979930405),
    ],
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=1e-9)


def test_student_quantiles_in_closed_form() -> None:
    assert student_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert student_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
    normal = statistics.NormalDist().inv_cdf(0.975)
    # Cornish-Fisher: t = z + (z³ + z) / 4ν + O(ν⁻²)
    expansion = normal + (normal**3 + normal) / (4 * 5000)
    assert student_quantile(5000) == pytest.approx(expansion, abs=1e-6)


def test_half_width_of_a_small_sample() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(T2 * 1.0 / math.sqrt(3), rel=1e-12)
    assert half_width([2.0, 2.0]) == 0
    assert math.isnan(half_width([1.0]))


def test_average_over_seeds_equals_the_hand(sweep: Path) -> None:
    averaged = average_over(read_runs([sweep]), ["seed"])
    assert averaged["grouping"].tolist() == ["energy", "random"]
    assert averaged["runs"].tolist() == [3, 3]
    assert "seed" not in averaged
    assert "dataset.seed" not in averaged
    # energy: 0.28, deviations −3, −2, 5 hundredths, variance 19e-4; random: 0.33, −3, 1, 2, 7e-4
    assert averaged["excess"].tolist() == pytest.approx([0.28, 0.33], abs=1e-12)
    widths = [T2 * math.sqrt(19e-4 / 3), T2 * math.sqrt(7e-4 / 3)]
    assert averaged["excess_ci95"].tolist() == pytest.approx(widths, rel=1e-9)
    assert averaged["excess_n"].tolist() == [3, 3]
    perplexities = [math.exp(1.5 + EXCESS["random", seed]) for seed in range(3)]
    assert averaged["compressed"][1] == pytest.approx(statistics.mean(perplexities))
    assert averaged["average_bits"].tolist() == pytest.approx([2.99, 2.99])
    assert averaged["effective_bits"].tolist() == pytest.approx([3.28, 3.33])
    assert averaged["seconds"].tolist() == [1.75, 1.75]
    assert averaged["seconds_ci95"].tolist() == [0, 0]


def test_what_differs_otherwise_stays_apart(sweep: Path) -> None:
    make_run(sweep / "x", 9.0, n_groups__grouping="random", seed=3, recipe__damping=0.2)
    make_broken_run(sweep / "y", "failed", "no", n_groups__grouping="random", seed=4)
    averaged = average_over(read_runs([sweep]), ["seed"])
    table = {
        (row["grouping"], row["recipe.damping"], row["status"]): (row["runs"], row["excess_n"])
        for row in averaged.to_dict("records")
    }
    assert table == {
        ("energy", 0.1, "completed"): (3, 3),
        ("random", 0.1, "completed"): (3, 3),
        ("random", 0.2, "completed"): (1, 1),
        ("random", 0.1, "failed"): (1, 0),
    }
    one = averaged[averaged["recipe.damping"] == 0.2].iloc[0]
    assert one["excess"] == pytest.approx(9.0)
    assert math.isnan(one["excess_ci95"])


def test_a_repeated_run_is_no_second_sample(sweep: Path) -> None:
    make_run(sweep / "again", 0.3, n_groups__grouping="random", seed=1)
    with pytest.raises(InputError, match=r"again and random1 agree in seed=1 too"):
        average_over(read_runs([sweep]), ["seed"])


def test_averaging_over_two_keys(sweep: Path) -> None:
    averaged = average_over(read_runs([sweep]), ["seed", "n_groups.grouping"])
    assert averaged["runs"].tolist() == [6]
    assert averaged["excess"][0] == pytest.approx(statistics.mean(EXCESS.values()))
    error = statistics.stdev(EXCESS.values()) / math.sqrt(6)
    assert averaged["excess_ci95"][0] == pytest.approx(2.570581836 * error)


@pytest.mark.parametrize("key", ["excess", "run", "status"])
def test_only_settings_are_averaged_over(key: str, sweep: Path) -> None:
    with pytest.raises(InputError, match=f"--over {key} is not allowed"):
        average_over(read_runs([sweep]), [key])


def test_differences_are_paired_by_seed(sweep: Path) -> None:
    frame = add_difference(read_runs([sweep]), "n_groups.grouping=random")
    expected = {
        f"{grouping}{seed}": excess - EXCESS["random", seed]
        for (grouping, seed), excess in EXCESS.items()
    }
    found = dict(zip(frame["run"], frame["difference"], strict=True))
    assert found == pytest.approx(expected, abs=1e-12)
    # −5, −8, −2 hundredths: mean −5, variance 9e-4
    energy = average_over(frame, ["seed"]).iloc[0]
    assert energy["difference"] == pytest.approx(-0.05)
    assert energy["difference_ci95"] == pytest.approx(T2 * 0.03 / math.sqrt(3))
    assert energy["difference_n"] == 3


def test_pairs_without_seeds(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.5, n_groups__grouping="random")
    make_run(tmp_path / "1", 0.4, n_groups__grouping="energy")
    frame = add_difference(read_runs([tmp_path]), "grouping=random")
    assert frame["difference"].tolist() == pytest.approx([0.0, -0.1])


def test_a_run_without_partner_has_no_difference(sweep: Path) -> None:
    make_run(sweep / "x", 0.1, n_groups__grouping="energy", seed=9)
    make_broken_run(sweep / "y", "failed", "no", n_groups__grouping="energy", seed=1)
    frame = add_difference(read_runs([sweep]), "grouping=random")
    assert frame.loc[frame["difference"].isna(), "run"].tolist() == ["x", "y"]
    assert average_over(frame, ["seed"])["difference_n"].tolist() == [3, 3, 0]


def test_a_recipe_stands_for_its_whole_group(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.5, recipe__name="textbook", recipe__damping=0.01)
    make_run(tmp_path / "1", 0.2)
    frame = add_difference(read_runs([tmp_path]), "recipe=textbook")
    assert frame["difference"].tolist() == pytest.approx([0.0, -0.3])


def test_several_baseline_keys(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.2, sparsity__ratio=0.0)
    make_run(tmp_path / "1", 0.5, sparsity__ratio=0.5, sparsity__n=2, sparsity__m=4)
    frame = read_runs([tmp_path])
    with pytest.raises(InputError, match=r"everything else; add sparsity\.n, sparsity\.m"):
        add_difference(frame, "sparsity=0")
    paired = add_difference(frame, "sparsity=0,sparsity.n=0,sparsity.m=0")
    assert paired["difference"].tolist() == pytest.approx([0.0, 0.3])


def test_values_are_written_as_on_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "0", 0.2, wbits__symmetric=True, wbits__average=4.0)
    make_run(tmp_path / "1", 0.3, wbits__group_size=64, wbits__average=4.0)
    frame = read_runs([tmp_path])
    first = "wbits=4,wbits.symmetric=true,wbits.group_size=null"
    assert add_difference(frame, first)["difference"][1] == pytest.approx(0.1)
    second = "wbits=4.0,wbits.symmetric=false,wbits.group_size=64"
    assert add_difference(frame, second)["difference"][0] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("baseline", "line"),
    [
        ("grouping=nothing", "no run has grouping=nothing; there is energy, random"),
        ("wbits=three", "no run has wbits=three; there is 3"),
        ("grouping", "no run has grouping="),
        ("groupin=random", "unknown column groupin; did you mean grouping"),
        ("excess=0.3", "--baseline excess is not allowed"),
        ("seed=0", "everything else"),
    ],
)
def test_bad_baselines(baseline: str, line: str, sweep: Path) -> None:
    frame = read_runs([sweep])
    if baseline == "seed=0":
        frame = frame[(frame["seed"] == 0) == (frame["grouping"] == "random")]
        frame = frame.reset_index(drop=True)
    with pytest.raises(InputError, match=line):
        add_difference(frame, baseline)


def test_two_baselines_for_one_run_are_refused(sweep: Path) -> None:
    make_run(sweep / "again", 0.3, n_groups__grouping="random", seed=1)
    with pytest.raises(InputError, match="again and random1 agree in everything else"):
        add_difference(read_runs([sweep]), "grouping=random")


def test_different_texts_are_never_paired(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"stories": 0.5, "news": 0.7}, n_groups__grouping="random")
    make_run(tmp_path / "1", {"stories": 0.4, "news": 0.5}, n_groups__grouping="energy")
    frame = add_difference(read_runs([tmp_path]), "grouping=random")
    assert frame["difference"].tolist() == pytest.approx([0.0, 0.0, -0.1, -0.2])


def test_pivot_holds_every_value_in_its_cell(tmp_path: Path) -> None:
    for row, grouping in enumerate(("random", "energy")):
        for average in (3.0, 4.0):
            if (grouping, average) == ("energy", 4.0):
                make_broken_run(
                    tmp_path / "f", "failed", "no", n_groups__grouping=grouping,
                    wbits__average=average,
                )  # fmt: skip
            else:
                make_run(
                    tmp_path / f"{row}{average}", row + average, n_groups__grouping=grouping,
                    wbits__average=average,
                )  # fmt: skip
    table = pivot(read_runs([tmp_path]), "grouping", "wbits", "excess").set_index("grouping")
    assert table.loc["random", ["wbits=3", "wbits=4"]].tolist() == pytest.approx([3.0, 4.0])
    assert table.loc["energy", "wbits=3"] == pytest.approx(4.0)
    assert pd.isna(table.loc["energy", "wbits=4"])


def test_pivot_of_averages_keeps_intervals(sweep: Path) -> None:
    averaged = average_over(read_runs([sweep]), ["seed"])
    table = pivot(averaged, "grouping", "wbits", "excess")
    assert table["wbits=3"].tolist() == averaged["excess"].tolist()
    assert table["wbits=3_ci95"].tolist() == averaged["excess_ci95"].tolist()
    assert table["wbits=3_n"].tolist() == [3, 3]


def test_pivot_refuses_two_values_for_one_cell(sweep: Path) -> None:
    with pytest.raises(InputError, match="they differ in seed: use --over or --where"):
        pivot(read_runs([sweep]), "grouping", "wbits", "excess")
