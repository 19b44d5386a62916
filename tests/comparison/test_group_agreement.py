"""Runs are paired by what they were asked, and their groups compared site by site."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from synthetic_runs import make_broken_run, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.group_agreement import agreement_over, read_groups
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.errors import InputError

EQUAL, HALVES, CROSSED = [0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]


def group(run_dir: Path, **sites: list[int]) -> None:
    """Write a plan with these groups; two linears read every site."""
    linears = {f"{site}.{n}": [0, site, 4, len(sites[site])] for site in sites for n in "qk"}
    tensors = {
        f"{name}.channel_group": torch.tensor(sites[site], dtype=torch.int32)
        for name, (_, site, *_) in linears.items()
    }
    metadata = {"plan": json.dumps({"linears": linears})}
    save_file(tensors, run_dir / "plan.safetensors", metadata)


def make(root: Path, name: str, sites: dict[str, list[int]], **settings: object) -> None:
    make_run(root / name, **settings)
    group(root / name, **sites)


def test_agreement_by_hand(tmp_path: Path) -> None:
    make(tmp_path, "0", {"a": EQUAL, "b": HALVES}, seed=0)
    make(tmp_path, "1", {"a": [1, 1, 0, 0], "b": CROSSED}, seed=1)
    make(tmp_path, "2", {"a": EQUAL, "b": HALVES}, seed=2)
    (row,) = agreement_over(read_runs([tmp_path]), [tmp_path], ["seed"]).to_dict("records")
    # Site a: all three agree. Site b: 0-1 and 1-2 cross (index -0.5), 0-2 agree.
    assert row == {
        "runs": 3, "pairs": 3, "sites": 2, "lowest": pytest.approx(0.0),
        "agreement": pytest.approx((1 + (-0.5 + 1 - 0.5) / 3) / 2),
    }  # fmt: skip


def test_only_runs_that_agree_in_everything_else_are_paired(tmp_path: Path) -> None:
    for job, (grouping, nsamples, seed) in enumerate([
        ("energy", 8, 0),
        ("energy", 8, 1),
        ("energy", 32, 0),
        ("redundancy", 8, 0),
    ]):
        make(tmp_path, str(job), {"a": EQUAL if seed == 0 else CROSSED}, seed=seed,
             n_groups__grouping=grouping, dataset__nsamples=nsamples)  # fmt: skip
    make_broken_run(tmp_path / "4", "failed", "no memory", seed=3)
    frame = read_runs([tmp_path])
    seeds = agreement_over(frame, [tmp_path], ["seed"])
    assert seeds[["grouping", "nsamples", "pairs"]].values.tolist() == [["energy", 8, 1]]
    assert seeds["agreement"].tolist() == pytest.approx([-0.5])
    counts = agreement_over(frame, [tmp_path], ["dataset.nsamples"])
    assert counts[["grouping", "seed", "agreement"]].values.tolist() == [["energy", 0, 1.0]]
    both = agreement_over(frame, [tmp_path], ["seed", "nsamples"])
    assert both[["grouping", "pairs"]].values.tolist() == [["energy", 3]]


def test_several_texts_are_one_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path, str(seed), {"a": EQUAL}, seed=seed, excess={"stories": 0.1, "news": 0.2})
    assert agreement_over(read_runs([tmp_path]), [tmp_path], ["seed"])["pairs"].tolist() == [1]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    make(tmp_path, "0", {"a": EQUAL}, seed=0)
    frame = read_runs([tmp_path])
    with pytest.raises(InputError, match="no two completed runs differ in seed"):
        agreement_over(frame, [tmp_path], ["seed"])
    with pytest.raises(InputError, match="it is no setting"):
        agreement_over(frame, [tmp_path], ["excess"])
    make(tmp_path, "1", {"b": EQUAL}, seed=1)
    with pytest.raises(InputError, match="0 and 1 do not have the same sites"):
        agreement_over(read_runs([tmp_path]), [tmp_path], ["seed"])
    (tmp_path / "1" / "plan.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"1/plan\.safetensors is no plan"):
        read_groups(tmp_path / "1")
    (tmp_path / "1" / "plan.safetensors").unlink()
    with pytest.raises(InputError, match=r"1/plan\.safetensors is no plan"):
        read_groups(tmp_path / "1")


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        make(tmp_path, str(seed), {"a": EQUAL}, seed=seed)
    main([str(tmp_path), "--stability", "seed", "--format", "json"])
    expected = [{"runs": 2, "pairs": 1, "sites": 1, "agreement": 1.0, "lowest": 1.0}]
    assert json.loads(capsys.readouterr().out) == expected
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--stability", "seed", "--over", "seed"])
