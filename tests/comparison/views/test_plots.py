"""The figures for papers draw the numbers of the records, and text as it is written."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from synthetic_runs import compare_runs, make_broken_run, make_linears, make_run

from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import average_over
from mi_experiments.comparison.views.data import linears_with_kinds
from mi_experiments.comparison.views.plots import (
    draw_calibration,
    draw_curves,
    draw_frontier,
    draw_map,
    draw_memory,
    draw_time,
    write_plots,
)
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import read_result


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write two groupings, two calibration counts and two seeds, and a failed run."""
    root = tmp_path / "sweep"
    for job in range(8):
        grouping, nsamples = ("random", "energy")[job // 4], (8, 64)[job // 2 % 2]
        make_run(
            root / str(job), 0.2 + math.sin(job) / 9, n_groups__grouping=grouping,
            dataset__nsamples=nsamples, seed=job % 2,
        )  # fmt: skip
        make_linears(root / str(job), salt=job)
    make_broken_run(root / "9", "failed", "no", seed=9)
    return root


def axes_of(figure: Figure | str) -> Axes:
    assert isinstance(figure, Figure), figure
    return figure.axes[0]


def points(axes: Axes) -> set[tuple[float, float]]:
    """Return all points, of whatever look."""
    found = set()
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line = container.lines[0]
        assert line is not None
        found |= set(zip(*map(list, line.get_data()), strict=True))
    return found


def lines(axes: Axes, label: str) -> list[list[tuple[float, float]]]:
    return [list(zip(*map(list, line.get_data()), strict=True))
            for line in axes.get_lines() if line.get_label() == label]  # fmt: skip


def expected(sweep: Path, x: str) -> dict[str, tuple[float, float]]:
    """Return what each run's point should be, from its record."""
    found = {}
    for job in range(8):
        result = read_result(sweep / str(job))
        assert result.bits is not None
        across = {"bits": result.bits.effective, "nsamples": result.config["dataset"]["nsamples"]}
        found[str(job)] = (across[x], result.compressed["stories"].perplexity)
    return found


def test_the_frontier_is_that_of_the_records(sweep: Path) -> None:
    axes = axes_of(draw_frontier(compare_runs(sweep), "stories", "compressed"))
    drawn = expected(sweep, "bits")
    assert points(axes) == set(drawn.values())
    (stairs,) = lines(axes, "frontier")
    best = [(x, y) for x, y in drawn.values() if all(b > x or p >= y for b, p in drawn.values())]
    assert stairs[:-1] == sorted(best)
    assert stairs[-1] == (max(x for x, _ in drawn.values()), min(y for _, y in best))
    ((level, _),) = lines(axes, "level")
    assert level[1] == read_result(sweep / "0").dense["stories"].perplexity
    assert axes.get_xlabel() == "effective bits per weight"
    assert axes.get_ylabel() == "perplexity"


def test_lines_of_calibration_join_what_differs_in_nothing_else(sweep: Path) -> None:
    axes = axes_of(draw_calibration(compare_runs(sweep), "stories", "compressed"))
    drawn = expected(sweep, "nsamples")
    assert points(axes) == set(drawn.values())
    pairs = [("0", "2"), ("1", "3"), ("4", "6"), ("5", "7")]
    assert sorted(lines(axes, "line")) == sorted([drawn[a], drawn[b]] for a, b in pairs)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "64"]


def test_means_have_their_intervals(sweep: Path) -> None:
    comparison = compare_runs(sweep, "--over", "seed")
    axes = axes_of(draw_frontier(comparison, "stories", "compressed"))
    means = average_over(read_runs([sweep]), ["seed"]).dropna(subset="compressed")
    assert points(axes) == set(zip(means["effective_bits"], means["compressed"], strict=True))
    spans = set()
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        upright = container.lines[2][1]
        spans |= {(bottom[1], top[1]) for bottom, top in upright.get_segments()}
    half = means["compressed_ci95"]
    low, high = means["compressed"] - half, means["compressed"] + half
    assert spans == set(zip(low, high, strict=True))


def test_a_difference_has_no_frontier_but_a_zero(sweep: Path) -> None:
    comparison = compare_runs(sweep, "--baseline", "grouping=random")
    axes = axes_of(draw_frontier(comparison, "stories", "difference"))
    frame = comparison.runs.dropna(subset="difference")
    assert points(axes) == set(zip(frame["effective_bits"], frame["difference"], strict=True))
    assert lines(axes, "frontier") == []
    assert lines(axes, "level") == [[(0, 0.0), (1, 0.0)]]


def test_maps_and_curves_are_those_of_the_linears(sweep: Path) -> None:
    linears = linears_with_kinds(read_linears(sweep / "5"))
    reports = {report.name: report for report in read_linears(sweep / "5")}
    axes = axes_of(draw_map(linears, "average_bits", "5"))
    kinds = [tick.get_text() for tick in axes.get_yticklabels()]
    assert kinds == ["attn.q_proj", "attn.v_proj", "mlp.down_proj"]
    expected = [[reports[f"model.layers.{block}.{kind}"].average_bits for block in range(3)]
                for kind in kinds]  # fmt: skip
    assert np.array_equal(np.asarray(axes.images[0].get_array()), expected)
    axes = axes_of(draw_curves(linears, "output_error", "kind", "5"))
    for kind in kinds:
        (line,) = lines(axes, f"5 {kind}")
        assert line == [
            (block, reports[f"model.layers.{block}.{kind}"].output_error) for block in range(3)
        ]
    axes = axes_of(draw_curves(linears, "pairwise_information", "site_kind", "5"))
    assert lines(axes, "5 mlp.down_proj") == [[(block, (1 + block) / 30) for block in range(3)]]
    assert lines(axes, "noise 5 mlp.down_proj") == [[(block, 1 / 7e5) for block in range(3)]]
    assert len(axes.get_lines()) == 4


def test_costs_are_those_of_the_records(sweep: Path) -> None:
    comparison = compare_runs(sweep)
    axes = axes_of(draw_time(comparison))
    heights = {bar.get_label(): [patch.get_height() for patch in bar.patches]  # type: ignore[attr-defined]
               for bar in axes.containers}  # fmt: skip
    assert heights == {"load": [0.5] * 8 + [0.0], "compress": [1.25] * 8 + [0.0]}
    assert [patch.get_y() for patch in axes.containers[1].patches[:8]] == [0.5] * 8  # type: ignore[attr-defined]
    axes = axes_of(draw_memory(comparison))
    for label, bytes_ in (("host", 2e9), ("accelerator", 3e9)):
        (line,) = lines(axes, label)
        assert line[:8] == [(run, bytes_ / 1e9) for run in range(8)]
        assert math.isnan(line[8][1])


def test_what_cannot_be_drawn_is_said(sweep: Path, tmp_path: Path) -> None:
    comparison = compare_runs(sweep, "--where", "nsamples == 8")
    drawn, left_out = write_plots(comparison, tmp_path / "figures")
    assert left_out == [
        "no plot calibration_compressed: every run has nsamples=8",
        "no plot calibration_excess: every run has nsamples=8",
    ]
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")}
    failed = compare_runs(sweep, "--where", "status == 'failed'")
    assert write_plots(failed, tmp_path / "none") == ([], [
        "no plot frontier_compressed: no completed run has it",
        "no plot calibration_compressed: no completed run has it",
        "no plot layers: no completed run has linears",
        "no plot time: no run has recorded it",
        "no plot memory: no run has recorded it",
    ])  # fmt: skip


def test_the_same_records_make_the_same_files(sweep: Path, tmp_path: Path) -> None:
    comparison = compare_runs(sweep, "--where", "nsamples == 8")
    contents = []
    for name in ("a", "b"):
        write_plots(comparison, tmp_path / name)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    for name, content in contents[0].items():
        assert content.startswith(b"%PDF" if name.endswith(".pdf") else b"\x89PNG"), name


def test_text_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    names = ["$a$_{%}\\", "_hidden", "\\frac", "../../x", "<b>&"]
    for job, name in enumerate(names):
        run = tmp_path / "sweep" / f"{job}{name.replace('/', '')}"
        make_run(run, {names[3]: 0.1 + job}, n_groups__grouping=name)
        make_linears(run, prefix=name)
    comparison = compare_runs(tmp_path / "sweep")
    figure = draw_frontier(comparison, names[3], "compressed")
    assert isinstance(figure, Figure)
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.replace(r"\$", "$") for text in named] == sorted(names)
    assert not any(cbook.is_math_text(text) for text in named)
    make_run(tmp_path / "two" / names[0], {names[3]: 0.1, names[4]: 0.2})
    make_linears(tmp_path / "two" / names[0], prefix=names[0])
    drawn, _ = write_plots(compare_runs(tmp_path / "two"), tmp_path / "figures")
    assert {"frontier_excess_.._.._x", "frontier_excess__b_"} <= {*drawn}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {*drawn}


def test_every_model_has_a_frontier_of_its_own(tmp_path: Path) -> None:
    """Also where only its files tell it apart."""
    for job, excess in enumerate((0.4, 0.3, 0.2, 0.1)):
        origin = {"model_files": {"model.safetensors": "ab"[job % 2]}}
        make_run(tmp_path / str(job), excess, seed=job, origin=origin)
    comparison = compare_runs(tmp_path)
    assert comparison.models == ["model_files"]
    drawn = lines(axes_of(draw_frontier(comparison, "stories", "compressed")), "frontier")
    runs = read_runs([tmp_path])
    lowest = {(row["effective_bits"], row["compressed"]) for row in runs.to_dict("records")[2:]}
    assert {line[0] for line in drawn} == lowest
