"""In a real browser: no complaint, and every number drawn or printed is that of the records."""

import json
import math
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
from chromium import Node, Opened, Tree, open_page
from synthetic_runs import HOSTILE, make_broken_run, make_linears, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import average_over
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import read_result

Show = Callable[..., Opened]


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
    make_broken_run(root / "9", "failed", "block 3: no valid factor", seed=9)
    return root


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Write the page of a command line and open it; `act` is a script to run on it first."""

    def run(*arguments: object, act: str = "", flags: tuple[str, ...] = ()) -> Opened:
        page = tmp_path / "page.html"
        main([*map(str, arguments), "--html", str(page)])
        if act:
            # The policy, tested elsewhere, would rightly refuse it.
            text = page.read_text().replace("Content-Security-Policy", "x-none")
            page.write_text(text.replace("</body>", f"<script>{act}</script></body>"))
        return open_page(page, tmp_path / "profile", *flags)

    return run


def cells(tree: Tree, column: str) -> list[Node]:
    return tree.below("table", "td", data_column=column)


def points(tree: Tree, chart: str) -> list[Node]:
    return [node for node in tree.below(chart, "g") if node.attributes.get("class") == "point"]


def place(node: Node) -> tuple[float, float]:
    """Return where a group was moved to."""
    x, y = node.attributes["transform"].removeprefix("translate(").rstrip(")").split()
    return float(x), float(y)


def pixels(tree: Tree, chart: str, axis: str, log: bool) -> Callable[[float], float]:
    """Return the map from values to pixels that the printed ticks of an axis define."""
    ticks = [node for node in tree.below(chart, "text") if f"data-{axis}" in node.attributes]
    values = np.array([float(node.words) for node in ticks])
    shift = -4 if axis == "y" else 0
    places = np.array([node.number(axis) + shift for node in ticks])
    assert len(values) >= 2
    slope, start = np.polyfit(np.log(values) if log else values, places, 1)
    fitted = start + slope * (np.log(values) if log else values)
    assert np.abs(fitted - places).max() < 0.01
    return lambda value: start + slope * (math.log(value) if log else value)


def rounded(value: float, digits: int) -> str:
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def test_the_console_is_heard(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('first'); missing.call()</script>")
    heard = open_page(page, tmp_path / "profile").console
    assert len(heard) == 2
    assert "first" in heard[0]
    assert "missing is not defined" in heard[1]


def test_every_cell_of_the_table_is_a_number_of_a_record(sweep: Path, show: Show) -> None:
    opened = show(sweep)
    assert opened.console == []
    runs = [node.attributes["data-value"] for node in cells(opened.tree, "run")]
    assert runs == [*map(str, range(8)), "9"]
    for row, run in enumerate(runs):
        result = read_result(sweep / run)
        if result.bits is None:
            assert cells(opened.tree, "excess")[row].words == "–"
            assert cells(opened.tree, "error")[row].words == "block 3: no valid factor"
            continue
        dense, compressed = result.dense["stories"], result.compressed["stories"]
        expected = {
            "dense": dense.perplexity, "compressed": compressed.perplexity,
            "excess": compressed.nll - dense.nll, "average_bits": result.bits.average,
            "effective_bits": result.bits.effective, "realised_sparsity": result.sparsity,
        }  # fmt: skip
        for column, value in expected.items():
            cell = cells(opened.tree, column)[row]
            assert value is not None
            assert cell.number("data-value") == value
            assert cell.words == rounded(value, 4)
        memory = cells(opened.tree, "peak_memory")[row]
        assert memory.number("data-value") == max(result.memory.values())
        assert memory.words == "3.00 GB"
        assert cells(opened.tree, "seconds")[row].number("data-value") == 1.75


def test_every_point_is_where_its_record_says(sweep: Path, show: Show) -> None:
    tree = show(sweep).tree
    for chart, axis, log in (("frontier", "bits", False), ("calibration", "nsamples", True)):
        to_x, to_y = pixels(tree, chart, "x", log), pixels(tree, chart, "y", False)
        drawn = {node.attributes["data-run"]: node for node in points(tree, chart)}
        assert sorted(drawn) == [str(job) for job in range(8)]
        for run, node in drawn.items():
            result = read_result(sweep / run)
            assert result.bits is not None
            x = result.bits.effective if axis == "bits" else result.config["dataset"]["nsamples"]
            y = result.compressed["stories"].perplexity
            assert (node.number("data-x"), node.number("data-y")) == (x, y)
            assert place(node) == pytest.approx((to_x(x), to_y(y)), abs=0.02)
    (guide,) = [n for n in tree.below("frontier", "line") if n.attributes.get("class") == "guide"]
    assert guide.number("data-y") == read_result(sweep / "0").dense["stories"].perplexity


def test_lines_join_what_differs_in_nothing_else(sweep: Path, show: Show) -> None:
    tree = show(sweep).tree
    runs = {place(node): node.attributes["data-run"] for node in points(tree, "calibration")}
    wires = [n for n in tree.below("calibration", "path") if n.attributes.get("class") == "wire"]
    joined = [
        tuple(runs[float(x), float(y)] for x, y in (at.split() for at in line.split("L")))
        for line in (wire.attributes["d"].removeprefix("M") for wire in wires)
    ]
    assert sorted(joined) == [("0", "2"), ("1", "3"), ("4", "6"), ("5", "7")]


def test_layers_costs_and_bits_are_those_of_the_run(sweep: Path, show: Show) -> None:
    opened = show(sweep, act="choose('5');")
    assert opened.console == []
    tree, reports = opened.tree, read_linears(sweep / "5")
    tiles = {node.attributes["data-linear"]: node for node in tree.below("map", "rect")
             if "data-linear" in node.attributes}  # fmt: skip
    assert {name: node.number("data-value") for name, node in tiles.items()} == {
        report.name: report.average_bits for report in reports
    }
    errors = [(node.number("data-x"), node.number("data-y")) for node in points(tree, "error")]
    assert sorted(errors) == sorted((report.block, report.output_error) for report in reports)
    told = {(node.number("data-x"), node.number("data-y")) for node in points(tree, "information")}
    assert told == {(report.block, report.redundancy) for report in reports}
    for chart, kind, field in (("time", "rect", "seconds"), ("memory", "path", "memory")):
        marks = [n for n in tree.below(chart, kind) if "data-part" in n.attributes]
        found = {(n.attributes["data-run"], n.attributes["data-part"]): n.number("data-value")
                 for n in marks}  # fmt: skip
        assert found == {
            (str(job), part): value
            for job in range(8)
            for part, value in getattr(read_result(sweep / str(job)), field).items()
        }
    (seconds,) = {n.attributes["height"] for n in tree.below("time", "rect", data_part="load")}
    (compress,) = {n.attributes["height"] for n in tree.below("time", "rect", data_part="compress")}
    assert float(compress) / float(seconds) == pytest.approx(1.25 / 0.5)


def test_means_are_drawn_with_their_intervals(sweep: Path, show: Show) -> None:
    opened = show(sweep, "--over", "seed")
    assert opened.console == []
    means = average_over(read_runs([sweep]), ["seed"])
    means = means[means["status"] == "completed"]
    drawn = {
        tuple(node.number(f"data-{name}") for name in ("x", "y", "low", "high"))
        for node in points(opened.tree, "frontier")
    }
    half = means["compressed_ci95"]
    assert drawn == set(
        zip(
            means["effective_bits"], means["compressed"], means["compressed"] - half,
            means["compressed"] + half, strict=True,
        )
    )  # fmt: skip
    found = [node.attributes.get("data-value") for node in cells(opened.tree, "excess")]
    assert [float(value) for value in found if value] == means["excess"].tolist()
    assert cells(opened.tree, "excess")[0].words == (
        f"{rounded(means['excess'][0], 4)} ± {rounded(means['excess_ci95'][0], 4)}"
    )
    back = show(sweep, "--over", "seed", act="[...document.querySelectorAll('.segments button')]"
                ".find((one) => one.textContent === 'Runs').click();")  # fmt: skip
    assert len(points(back.tree, "frontier")) == 8
    assert len(cells(back.tree, "run")) == 9


def test_columns_sort_both_ways_and_the_filter_keeps_rows(sweep: Path, show: Show) -> None:
    click = "document.querySelector('#table button[data-column=excess]').click();"
    losses = {run: read_result(sweep / run).compressed["stories"].nll for run in "01234567"}
    order = sorted(losses, key=lambda run: losses[run])
    rising = show(sweep, act=click).tree
    assert [node.attributes["data-value"] for node in cells(rising, "run")] == [*order, "9"]
    (head,) = [n for n in rising.below("table", "th") if "aria-sort" in n.attributes]
    assert (head.attributes["aria-sort"], head.words) == ("ascending", "excess")
    falling = show(sweep, act=click * 2).tree
    assert [n.attributes["data-value"] for n in cells(falling, "run")] == [*order[::-1], "9"]
    (head,) = [n for n in falling.below("table", "th") if "aria-sort" in n.attributes]
    assert head.attributes["aria-sort"] == "descending"
    kept = show(sweep, act="const box = document.getElementById('filter'); box.value = 'Energy';"
                "box.dispatchEvent(new Event('input'));").tree  # fmt: skip
    assert [n.attributes["data-value"] for n in cells(kept, "run")] == ["4", "5", "6", "7"]
    assert kept.by_id("table-caption").words.startswith("4 of 9 rows")


def test_the_keyboard_reaches_points_and_chooses_runs(sweep: Path, show: Show) -> None:
    keys = ["ArrowRight", "ArrowRight", "Enter"]
    press = "const plot = document.querySelector('#frontier svg.plot'); plot.focus();" + "".join(
        f"plot.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}));" for key in keys
    )
    opened = show(sweep, act=press + "document.title = document.activeElement.tagName;")
    tree = opened.tree
    bits = {run: read_result(sweep / run).bits for run in "01234567"}
    second = sorted(bits, key=lambda run: bits[run].effective)[1]  # type: ignore[union-attr]
    assert opened.console == []
    assert tree.by_id("chosen").words.startswith(f"{second} ·")
    assert tree.by_id("tip").words.startswith(second)
    (row,) = [n for n in tree.below("table", "tr") if n.attributes.get("class") == "selected"]
    assert row.attributes["data-run"] == second
    plots = [n for n in tree.below("frontier", "svg") if n.attributes.get("tabindex") == "0"]
    assert len(plots) == 1
    assert "Arrow keys move between points" in plots[0].attributes["aria-label"]


@pytest.mark.parametrize(
    ("scheme", "first", "other"), [("0", "dark", "light"), ("1", "light", "dark")]
)
def test_light_and_dark(scheme: str, first: str, other: str, sweep: Path, show: Show) -> None:
    write = "document.title = getComputedStyle(document.body).backgroundColor;"
    flags = (f"--blink-settings=preferredColorScheme={scheme}",)
    paper = {"light": "rgb(246, 246, 243)", "dark": "rgb(14, 18, 22)"}

    def title(act: str) -> str:
        tree = show(sweep, act=act + write, flags=flags).tree
        return next(node.words for node, _ in tree.nodes if node.tag == "title")

    assert title("") == paper[first]
    assert title("document.getElementById('theme').click();") == paper[other]


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path, show: Show) -> None:
    root = tmp_path / "sweep"
    for job, name in enumerate(HOSTILE):
        make_run(root / f"{job} {name.replace('/', '∕')}", {name: 0.1 + job / 9},
                 n_groups__grouping=name)  # fmt: skip
        make_linears(root / f"{job} {name.replace('/', '∕')}", prefix=name)
    make_broken_run(root / "99", "failed", HOSTILE[0], n_groups__grouping=HOSTILE[1])
    check = "document.title = JSON.stringify([typeof hacked, document.images.length]);"
    for arguments in ((), ("--over", "seed")):
        opened = show(root, *arguments, act=check)
        assert opened.console == []
        title = next(node.words for node, _ in opened.tree.nodes if node.tag == "title")
        assert json.loads(title) == ["undefined", 0]
    plain = show(root)
    assert plain.console == []
    seen = [node.words for node in cells(plain.tree, "grouping")]
    assert seen == [" ".join(name.split()) for name in [*HOSTILE, HOSTILE[1]]]
    (error,) = [n.words for n in cells(plain.tree, "error") if n.words != "–"]
    assert error == HOSTILE[0]


def test_one_run_and_no_completed_run(tmp_path: Path, show: Show) -> None:
    make_run(tmp_path / "one" / "0")
    opened = show(tmp_path / "one")
    assert opened.console == []
    assert len(points(opened.tree, "frontier")) == 1
    assert "Every run here has nsamples = 32" in opened.tree.by_id("calibration").words
    assert "No run has compressed its linears" in opened.tree.by_id("map").words
    make_broken_run(tmp_path / "none" / "0", "failed", "no")
    make_broken_run(tmp_path / "none" / "1", "interrupted", None)
    opened = show(tmp_path / "none")
    assert opened.console == []
    assert "No completed run has a perplexity yet" in opened.tree.by_id("frontier").words
    assert opened.tree.by_id("summary").words.startswith("2 runs: 1 failed, 1 interrupted")


def test_two_hundred_runs(tmp_path: Path, show: Show) -> None:
    for job in range(200):
        make_run(tmp_path / "s" / str(job), 0.1 + job / 100, seed=job % 5,
                 dataset__nsamples=2 ** (job % 6), recipe__damping=job // 30 / 10)  # fmt: skip
        make_linears(tmp_path / "s" / str(job), blocks=2, salt=job)
    opened = show(tmp_path / "s")
    assert opened.console == []
    assert len(points(opened.tree, "frontier")) == 200
    assert len(cells(opened.tree, "run")) == 200
    assert len(opened.tree.below("time", "rect", data_part="compress")) == 200
