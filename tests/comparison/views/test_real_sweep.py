"""A real sweep on the embedded model, compared: minutes, so run by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from chromium import NAMES, open_page

from mi_experiments.commands.compare import main
from mi_experiments.comparison.views.data import LAYER_METRICS
from mi_experiments.records.linears import read_linears
from mi_experiments.records.result import read_result


@pytest.mark.slow
def test_a_real_sweep_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "sweeps" / "real"
    subprocess.run(
        [sys.executable, "-c", "from mi_experiments.commands.start import run; run()", "-m",
         "dataset.nsamples=8,32", "seed=0,1", "tracking=disabled", f"hydra.sweep.dir={sweep}"],
        check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main(["sweeps", "--over", "seed", "--sort", "excess", "--html", "page.html"])
    main(["sweeps", "--output", "runs.csv"])
    main(["sweeps", "--wandb"])
    assert json.loads(Path("sweeps/wandb_workspace.json").read_text())["project"]
    data = json.loads(Path("page.html").read_text().split('id="data">')[1].split("</script>")[0])
    table = pd.read_csv("runs.csv").set_index("run")
    assert len(data["rows"]) == len(table) == 4
    assert [row["runs"] for row in data["means"]] == [2, 2]
    for row in data["rows"]:
        result = read_result(tmp_path / "sweeps" / row["run"])
        dense, compressed = result.dense["embedded"], result.compressed["embedded"]
        assert result.bits is not None
        assert row["compressed"] == compressed.perplexity == table["compressed"][row["run"]]
        assert row["excess"] == compressed.nll - dense.nll == table["excess"][row["run"]]
        assert row["effective_bits"] == result.bits.effective
        assert row["floor"] == dense.floor
        assert data["runs"][row["run"]]["seconds"] == result.seconds
        linears = data["runs"][row["run"]]["linears"]
        for place, report in enumerate(read_linears(tmp_path / "sweeps" / row["run"])):
            for metric in LAYER_METRICS:
                assert linears[metric][place] == getattr(report, metric), metric
    if any(map(shutil.which, NAMES)):
        opened = open_page(tmp_path / "page.html", tmp_path / "profile")
        assert opened.console == []
        assert len(opened.tree.below("map", "rect", data_metric="average_bits")) == 28
