"""Plans count what a run does; at the stated rates GPTQ takes the time that was published."""

import math
import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from mi_experiments.commands.reproduce import main
from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.experiment.dry_run import dry_run
from mi_experiments.reproduction.estimate import Work, count_work
from mi_experiments.reproduction.preview import Job, amount, described, plan_job, summary
from mi_experiments.reproduction.rows import compose_row, read_conf

SHAPES, RATES = read_conf("shapes"), read_conf("estimates")

PARAMETERS = {
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1_3b": 1_315_758_080,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "vicuna_13b_v1_5": 13_015_864_320,
}
"""What is known of the published checkpoints."""


def outlined(row: str):
    config = from_hydra(compose_row(row, []))
    with described(config, SHAPES) as known:
        return dry_run(known), config


def test_every_model_of_the_papers_has_a_shape() -> None:
    files = (Path(conf_directory()) / "experiment" / "papers").rglob("*.yaml")
    named = {name for file in files for name in re.findall(r"/model: (\w+)", file.read_text())}
    assert named == SHAPES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = dict(SHAPES[name])
    config = CONFIG_MAPPING[shape.pop("model_type")](**shape)
    width, depth = config.hidden_size, config.num_hidden_layers
    if name.startswith("opt"):
        narrow = config.word_embed_proj_dim
        outside = config.vocab_size * narrow + (2048 + 2) * width
        outside += 2 * narrow * width if narrow != width else 0
        outside += 2 * width if config.do_layer_norm_before else 0
        block = 4 * (width**2 + width) + 2 * width * config.ffn_dim + config.ffn_dim + width
        block += 4 * width
    else:
        outside = 2 * config.vocab_size * width + width
        block = 4 * width**2 + 3 * width * config.intermediate_size + 2 * width
    assert outside + depth * block == PARAMETERS[name]


@pytest.mark.parametrize(
    ("width", "depth", "minutes"), [(5120, 40, 20.9), (12288, 96, 4.2 * 60)], ids=["13B", "175B"]
)
def test_the_published_method_takes_its_published_time(
    width: int, depth: int, minutes: float
) -> None:
    """OPT on one A100: two passes; for each of six linears a full Hessian and three factors."""
    tokens = 128 * 2048
    columns = [width] * 5 + [4 * width]
    rows = [width] * 4 + [4 * width, width]
    hessians = depth * sum(2 * tokens * c**2 for c in columns)
    solving = depth * sum(4 / 3 * c**3 + r * c**2 for r, c in zip(rows, columns, strict=True))
    weights = depth * sum(r * c for r, c in zip(rows, columns, strict=True))
    # Its Hessians are of float32 inputs, without tensor cores.
    work = Work(4.0 * tokens * weights, 0.0, hessians + solving, depth * sum(columns), 0.0)
    assert work.seconds(RATES) / 60 == pytest.approx(minutes, rel=0.25)


def test_what_a_row_does_is_counted_as_by_hand() -> None:
    """SparseGPT on OPT-125M: 12 blocks of four sites, one pass to measure and one to go on."""
    outline, config = outlined("papers/sparsegpt/opt_125m_50")
    tokens, h, f = 128 * 2048, 768, 3072
    weights = 12 * (4 * h * h + 2 * h * f)
    work = count_work(outline, config, RATES)
    evaluated = 3 * 256 * 2048
    assert work.forward == 2 * weights * (2 * tokens + 2 * evaluated)
    assert work.hessians == 12 * tokens * (3 * h**2 + f**2)
    sweeps = 4 * h * h**2 + f * h**2 + h * f**2
    assert work.sweeps == pytest.approx(12 * ((3 * h**3 + f**3) / 3 + sweeps))
    assert work.columns == 12 * (5 * h + f)
    # Two evaluations and the sweep read the model.
    assert work.read == 3 * 2 * weights


def test_a_row_that_compresses_nothing_is_two_evaluations() -> None:
    outline, config = outlined("papers/sparsegpt/opt_125m_dense")
    work = count_work(outline, config, RATES)
    assert (work.hessians, work.sweeps, work.columns) == (0, 0, 0)
    assert work.read == 2 * 2 * outline.weights


def test_this_projects_recipe_costs_more_than_the_published_one() -> None:
    """Two streams, two sweeps, two rounds, a plan: each is in the count."""
    ours = count_work(*outlined("papers/obr/llama2_7b_50_w4"), RATES)
    theirs = count_work(*outlined("papers/gptq/llama_7b_w4"), RATES)
    assert ours.hessians == 5 * theirs.hessians
    assert ours.columns == 4 * theirs.columns
    assert ours.seconds(RATES) > theirs.seconds(RATES)


def test_the_plan_shows_jobs_downloads_memory_and_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["papers/sparsegpt", "--plan", "--only", "opt_125m_50"])
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "facebook/opt-125m@" in printed
    assert "hours (estimate)" in printed
    assert "Hours are an estimate, no measurement" in printed
    assert "1 rows are 1 runs" in printed
    assert "penn_treebank/test/0000.parquet: 1 of unknown size" in printed
    size = re.search(r"to download: ([\d.]+) GiB and 1 of unknown size", printed)
    assert size is not None
    files = sum(RATES["downloads"][name] for name in (
        "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet"))  # fmt: skip
    expected = (files + 2 * PARAMETERS["opt_125m"]) / 2**30
    assert float(size[1]) == pytest.approx(expected, abs=0.051)


def test_each_run_and_file_is_counted_once() -> None:
    one = Job("t/a", "x", "m@1", ["t"], {"m@1": 2.0**30, "text": None}, "", 1.5)
    same = Job("t/b", "x", "m@1", ["t"], {"m@1": 2.0**30, "text": None}, "", 1.5)
    other = Job("t/c", "y", "n@1", ["t"], {"n@1": 2.0**30, "here": 0.0}, "", None)
    assert (
        amount([one.downloads, same.downloads, other.downloads]) == "2.0 GiB and 1 of unknown size"
    )
    told = summary([one, same, other], RATES)
    assert "3 rows are 2 runs" in told
    assert "about 1.5 hours, and 1 unknown" in told


def test_a_text_that_is_here_is_not_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext-2-raw-v1"
    folder.mkdir()
    (folder / "test-00000-of-00001.parquet").write_bytes(b"x")
    row = "papers/sparsegpt/opt_125m_50"
    config = from_hydra(compose_row(row, [f"corpora.wikitext2.path={tmp_path}"]))
    job = plan_job(row, "x", config, SHAPES, RATES)
    sizes = {name.rpartition("/")[2]: size for name, size in job.downloads.items()}
    assert sizes["test-00000-of-00001.parquet"] == 0
    assert sizes["c4-train.00000-of-01024.json.gz"] == 319e6
    assert sizes["0000.parquet"] is None
    assert job.hours is not None
    assert math.isfinite(job.hours)
