"""A sweep in Weights & Biases: every job is there, and its definition drives our command."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composed import config_of
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import (
    create_sweep_command,
    create_sweep_command_args,
)
from wandb_records import read_records, read_rows, read_summary

from mi_experiments.comparison.run_table import flatten
from mi_experiments.config.compose import conf_directory, to_plain
from mi_experiments.records.linears import METRICS, read_linears
from mi_experiments.records.result import read_result

DEFINITION = Path(conf_directory()) / "wandb_sweep.yaml"


@pytest.mark.slow
def test_leet_lists_every_job_of_a_sweep_with_its_numbers(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    code = "from mi_experiments.commands.start import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "wbits.average=3,4", "dataset.nsamples=4", "seed=7",
         "n_groups.count=2", "recipe=textbook", "evaluation.datasets.embedded.max_windows=4",
         "tracking=offline", "hydra.sweep.dir=sweeps/widths"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "sweeps" / "widths"
    jobs = {file.parent.name: read_result(file.parent) for file in sweep.glob("*/result.json")}
    assert len(jobs) == 2
    # The one folder that `wandb leet sweeps/widths/wandb` opens, and nothing else.
    tracked = [path for path in (sweep / "wandb").glob("*run-*") if not path.is_symlink()]
    assert not list(sweep.glob("*/wandb"))
    found = {}
    for directory in tracked:
        records = read_records(directory)
        started = records["run"][0]
        assert started["run_group"] == "widths"
        found[started["display_name"]] = (read_summary(directory), records)
    assert found.keys() == jobs.keys()
    for name, (read, records) in found.items():
        result, linears = jobs[name], read_linears(sweep / name)
        assert (read["state"], read["exit_code"]) == ("finished", 0)
        summary, config = read["summary"], read["config"]
        assert result.bits is not None
        expected = {
            "status": "completed",
            "sparsity": result.sparsity,
            **{f"bits/{key}": value for key, value in vars(result.bits).items()},
            **{f"dense/{text}/perplexity": e.perplexity for text, e in result.dense.items()},
            **{f"compressed/{t}/perplexity": e.perplexity for t, e in result.compressed.items()},
        }
        assert {key: summary[key] for key in expected} == expected
        # Seconds go on while the last records are written.
        assert {key for key in summary if key.startswith("seconds/")} == {
            f"seconds/{phase}" for phase in result.seconds
        }
        assert config["config"] == result.config
        asked = result.config
        assert {key: config[key] for key in ("nsamples", "wbits", "n_groups", "sparsity")} == {
            "nsamples": asked["dataset"]["nsamples"],
            "wbits": asked["wbits"]["average"],
            "n_groups": asked["n_groups"]["count"],
            "sparsity": asked["sparsity"]["ratio"],
        }
        assert (config["grouping"], config["seed"]) == (asked["n_groups"]["grouping"], 7)
        rows = read_rows(records, "layer")
        assert len(rows) == len(linears)
        for row, linear in zip(rows, linears, strict=True):
            for metric in METRICS:
                assert row.get(f"layer/{metric}") == getattr(linear, metric)
    assert {read["config"]["wbits"] for read, _ in found.values()} == {3.0, 4.0}


def test_the_sweep_definition_runs_this_command_with_keys_of_the_config() -> None:
    definition: Any = OmegaConf.to_container(OmegaConf.load(DEFINITION))
    assert definition["method"] in {"grid", "random", "bayes"}
    assert definition["metric"]["goal"] in {"minimize", "maximize"}
    parameters = definition["parameters"]
    known = dict(flatten(to_plain(config_of())))
    sent = {"model", "nsamples", "sparsity", "wbits", "n_groups", "grouping"}
    for key, choice in parameters.items():
        assert key in known
        # A value of the sweep would take the place of a column of the same name.
        assert key not in sent
        assert list(choice) == ["values"]
        assert choice["values"]
    # What the agent starts, as the client itself makes it of the definition.
    for last in (0, -1):
        chosen = {key: {"value": choice["values"][last]} for key, choice in parameters.items()}
        arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        command = create_sweep_command(definition["command"])
        place = command.index("${args_no_hyphens}")
        words = command[:place] + arguments + command[place + 1 :]
        assert words[-1 - len(arguments)] == "mi-run"
        config = config_of(*arguments)
        values = dict(flatten(to_plain(config)))
        assert {key: values[key] for key in chosen} == {k: v["value"] for k, v in chosen.items()}
        phase, text, quantity = definition["metric"]["name"].split("/")
        assert (phase, quantity) == ("compressed", "perplexity")
        assert text in config.evaluation.datasets
