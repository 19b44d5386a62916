"""What is measured is a row of one table, found by name from the logits to the page."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from synthetic_runs import compare_runs, make_run
from tiny_models import build_tiny_model

from mi_experiments.commands.compare import main
from mi_experiments.commands.run_tables import print_result
from mi_experiments.comparison.columns import find_column
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.comparison.statistics import add_difference, average_over
from mi_experiments.comparison.views.data import to_plain
from mi_experiments.config.renames import text_with_measurements, text_without_measurements
from mi_experiments.errors import NumericalError
from mi_experiments.evaluation.accuracy import token_hits
from mi_experiments.evaluation.measure_text import measure_text
from mi_experiments.evaluation.measurements import MEASUREMENTS, Kind, average, measurement
from mi_experiments.llm.walker import Walker
from mi_experiments.records.record_check import check_record
from mi_experiments.records.result import RESULT, Result, read_result, write_result
from mi_experiments.records.tracking import summary_of
from mi_experiments.reproduction.verdicts import by_key


def test_accuracy_is_how_often_the_argmax_of_plain_logits_comes() -> None:
    model = build_tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    words = model.config.vocab_size
    windows = [torch.randint(3, words, (n,), generator=generator) for n in (9, 23, 9)]
    hits, counts = [], []
    for window in windows:
        with torch.no_grad():
            likeliest = model(input_ids=window[None]).logits[0].argmax(-1)
        # Half of the tokens are the likeliest ones; what follows sees them, as in the oracle below.
        window[1::2] = likeliest[:-1][0 : len(window) : 2][: len(window[1::2])]
        with torch.no_grad():
            again = model(input_ids=window[None]).logits[0].argmax(-1)
        hits.append(float((again[:-1] == window[1:]).sum()))
        counts.append(len(window) - 1)
    assert 0 < sum(hits) < sum(counts)
    found = measure_text(
        Walker(model), windows, ["perplexity", "accuracy"], batch_tokens=20, logits_chunk=5
    )
    mean, standard_error = average(hits, counts)
    assert found["accuracy"].value == found["accuracy"].mean == mean == sum(hits) / sum(counts)
    assert found["accuracy"].standard_error == standard_error
    alone = measure_text(Walker(model), windows, batch_tokens=20, logits_chunk=5)
    assert alone == {"perplexity": found["perplexity"]}


def test_several_measurements_take_one_forward() -> None:
    model = build_tiny_model("llama")
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    window = torch.arange(3, 20)

    def forwards(*names: str) -> int:
        calls.clear()
        measure_text(Walker(model), [window], names, batch_tokens=32, logits_chunk=4)
        return len(calls)

    assert forwards("perplexity") == forwards("perplexity", "accuracy") == forwards("accuracy")


def test_logits_that_are_not_finite_are_no_miss() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, 0.0]])
    hits = token_hits(logits, torch.tensor([1, 1, 0]))
    assert hits[0] == 1
    assert hits[1:].isnan().all()
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(NumericalError, match=r"window 0 of 1 .*: its accuracy is nan"):
        measure_text(
            Walker(model), [torch.arange(3, 20)], ["accuracy"], batch_tokens=32, logits_chunk=4
        )


def test_a_record_of_a_perplexity_alone_is_read_and_hashed_as_before() -> None:
    before = {"protocol": "text", "nll": 1.5, "perplexity": math.exp(1.5), "standard_error": 0.1}
    now = text_with_measurements(before)
    assert now["measurements"]["perplexity"]["mean"] == 1.5
    assert text_with_measurements(now) == now
    assert text_without_measurements(now) == before


@pytest.fixture
def surprise(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a row to the table: the share of tokens that are no hit, halved."""
    kind = Kind(
        "halved misses",
        unit="share",
        lower_is_better=True,
        of_tokens=lambda logits, targets: 1 - token_hits(logits, targets),
        of_mean=lambda mean: mean / 2,
    )
    monkeypatch.setitem(MEASUREMENTS, "misses", kind)
    return "misses"


def add(run_dir: Path, name: str, dense: float, compressed: float) -> Result:
    """Add a measurement to the record of a run."""
    result = read_result(run_dir)
    phases = {
        phase: {
            text: replace(
                found, measurements=found.measurements | {name: measurement(name, mean, 0.01)}
            )
            for text, found in getattr(result, phase).items()
        }
        for phase, mean in (("dense", dense), ("compressed", compressed))
    }
    result = replace(result, **phases)
    write_result(result, run_dir)
    return result


@pytest.mark.parametrize("name", ["accuracy", "misses"])
def test_a_new_row_is_in_records_tables_curves_and_the_page(
    name: str, surprise: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factor = 0.5 if name == surprise else 1.0
    for seed in (0, 1):
        for grouping in ("random", "energy"):
            run_dir = tmp_path / f"{grouping}-{seed}"
            make_run(run_dir, 0.25 + seed, seed=seed, n_groups__grouping=grouping)
            after = 0.3 + 0.1 * seed + 0.05 * (grouping == "energy")
            result = add(run_dir, name, 0.5, after)
    assert check_record(run_dir) == []
    # The record, the curves and the keys of verdicts.
    record = json.loads((run_dir / RESULT).read_text())
    entry = record["compressed"]["stories"]["measurements"][name]
    assert entry["value"] == pytest.approx(0.45 * factor)
    assert summary_of(result)[f"compressed/stories/{name}"] == entry["value"]
    assert by_key(result.compressed)[f"stories/{name}"].value == entry["value"]
    # What the run prints.
    console = Console(width=120)
    printed = replace(result, coverage=1.0)
    print_result(printed, run_dir, None, [], console)
    assert f"{0.5 * factor:.4f} │     {0.45 * factor:.4f} │ -10.00%" in capsys.readouterr().out
    # The table of runs: means, paired differences, and other names.
    frame = read_runs([tmp_path])
    assert frame[f"dense_{name}"].tolist() == [0.5 * factor] * 4
    assert find_column(frame, name) == f"compressed_{name}"
    paired = average_over(add_difference(frame, "grouping=random"), ["seed"])
    energy = paired[paired["grouping"] == "energy"].iloc[0]
    assert energy[f"compressed_{name}"] == pytest.approx(0.4 * factor)
    assert energy[f"difference_{name}"] == pytest.approx(0.05 * factor)
    assert energy[f"compressed_{name}_n"] == 2
    main([str(tmp_path)])
    assert f"{0.45 * factor:.4f}" in capsys.readouterr().out
    # The page: its axis, and in which direction is better.
    data = to_plain(compare_runs(tmp_path))
    column = f"compressed_{name}"
    assert column in data["losses"]
    assert data["labels"][column] == MEASUREMENTS[name].label
    assert (column in data["rising"]) is not MEASUREMENTS[name].lower_is_better
    # A measurement that cannot be is a contradiction.
    add(run_dir, name, 0.5, 0.3)
    edited = json.loads((run_dir / RESULT).read_text())
    edited["compressed"]["stories"]["measurements"][name]["value"] = 0.7
    (run_dir / RESULT).write_text(json.dumps(edited))
    assert f"compressed.stories.{name} is 0.7, and" in check_record(run_dir)[0]
