"""The saved view names what tracking sends, and is published only where there is a key."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from composed import config_of
from synthetic_runs import compare_runs, make_linears, make_run

from mi_experiments.commands.compare import main
from mi_experiments.comparison.views import workspace
from mi_experiments.comparison.views.workspace import AXES, DEFINITION, build_workspace
from mi_experiments.errors import InputError
from mi_experiments.records import tracking
from mi_experiments.records.linears import METRICS, read_linears
from mi_experiments.records.result import read_result
from mi_experiments.records.tracking import describe_run, summary_of


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no settings of this machine, and no address that answers."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")


def sweep(root: Path, name: str = "first", **changes: Any) -> Path:
    (root / "sweeps" / name).mkdir(parents=True)
    (root / "sweeps" / name / "multirun.yaml").touch()
    for seed in range(2):
        run = root / "sweeps" / name / "deep" / str(seed)
        own = {"mode": "offline", "project": "mi", "entity": None} | changes
        make_run(run, {"stories": 0.1 + seed, "news": 0.3}, seed=seed, tracking=own)
        make_linears(run)
    return root / "sweeps" / name


def definition(*arguments: object) -> dict[str, Any]:
    model = build_workspace(compare_runs(*arguments))._to_model()
    return dict(model.model_dump(by_alias=True, exclude_none=True)["spec"]["section"])


def panels(section: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (found,) = [s for s in section["panelBankConfig"]["sections"] if s["name"] == name]
    return [panel["config"] for panel in found["panels"]]


def test_curves_have_the_axis_and_the_metrics_that_are_logged(tmp_path: Path) -> None:
    section = definition(sweep(tmp_path))
    for name, axis in (("Layers", "layer"), ("Blocks", "block")):
        curves = panels(section, name)
        assert {curve["xAxis"] for curve in curves} == {axis}
        assert [curve["metrics"] for curve in curves] == [[f"{axis}/{m}"] for m in METRICS]
    report = read_linears(tmp_path / "sweeps" / "first" / "deep" / "0")[0]
    assert all(hasattr(report, metric) for metric in METRICS)


def test_every_summary_and_setting_is_one_that_tracking_sends(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    section = definition(root)
    summary = summary_of(read_result(root / "deep" / "0"))
    config = config_of()
    sent = describe_run(config, tmp_path, root, "0")["config"]
    known = {f"summary:{key}" for key in summary} | {f"config:{key}.value" for key in sent}
    frontier = panels(section, "Frontier")
    assert [(plot["xAxis"], plot["yAxis"]) for plot in frontier] == [
        (x, f"summary:compressed/{text}/perplexity")
        for text in ("stories", "news")
        for x in ("summary:bits/effective", "config:nsamples.value")
    ]
    (parallel,) = panels(section, "Settings")
    uprights = [column["accessor"] for column in parallel["columns"]]
    assert uprights[:5] == [f"config:{name}.value" for name in AXES]
    assert {plot[axis] for plot in frontier for axis in ("xAxis", "yAxis")} | {*uprights} <= known


def test_runs_are_those_of_the_sweeps(tmp_path: Path) -> None:
    one, two = sweep(tmp_path), sweep(tmp_path, "second")
    (runset,) = definition(one)["runSets"]
    (rule,) = runset["filters"]["filters"]
    assert (rule["key"]["name"], rule["value"]) == ("group", ["first"])
    assert runset["grouping"] == []
    (runset,) = definition(one, two)["runSets"]
    assert runset["filters"]["filters"][0]["value"] == ["first", "second"]
    assert runset["grouping"] == [{"section": "run", "name": "group"}]
    assert tracking.sweep_name(two) == "second"


def test_runs_of_no_sweep_are_not_filtered(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    (root / "multirun.yaml").unlink()
    (runset,) = definition(root)["runSets"]
    assert runset["filters"]["filters"] == []


def test_two_projects_are_refused(tmp_path: Path) -> None:
    one, two = sweep(tmp_path), sweep(tmp_path, "second", project="other", entity="me")
    with pytest.raises(InputError, match=r"0 in /?mi, .*0 in me/other; use --where"):
        build_workspace(compare_runs(one, two))
    view = build_workspace(compare_runs(one, two, "--where", "tracking.project == 'other'"))
    assert (view.entity, view.project) == ("me", "other")


def test_without_a_key_the_definition_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sweep(tmp_path)
    main([str(root), "--wandb"])
    out = capsys.readouterr()
    path = root / DEFINITION
    why = "the view is not published: no API key was found (wandb login)"
    assert (out.out, out.err) == (f"{path}: {why}\n", "")
    written = json.loads(path.read_text())
    fresh = build_workspace(compare_runs(root))._to_model()
    assert without_ids(written) == without_ids(fresh.model_dump(by_alias=True, exclude_none=True))
    assert written["project"] == "mi"


def without_ids(value: Any) -> Any:
    """Leave out the random names of panels."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in {"__id__", "id"}}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Pretend that there is a key, and replace the request to the server."""

    def pretend(save: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(workspace, "has_key", lambda: True)
        monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"default_entity": "me"}))
        monkeypatch.setattr(workspace.ws.Workspace, "save", save)
        address = property(lambda view: f"https://example.org/{view.entity}/{view.project}")
        monkeypatch.setattr(workspace.ws.Workspace, "url", address)

    return pretend


def test_with_a_key_it_is_published_under_the_own_entity(
    tmp_path: Path, with_key: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[Any] = []
    with_key(lambda view: saved.append(view))
    root = sweep(tmp_path)
    main([str(root), "--wandb"])
    assert capsys.readouterr().out == "https://example.org/me/mi\n"
    assert [view.entity for view in saved] == ["me"]
    assert not (root / DEFINITION).exists()


def test_a_failed_request_loses_nothing(
    tmp_path: Path, with_key: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(view: Any) -> None:
        raise ConnectionError("no such project\nsecond line")

    with_key(refuse)
    root = sweep(tmp_path)
    main([str(root), "--wandb"])
    line = f"{root / DEFINITION}: the view is not published: ConnectionError: no such project\n"
    assert capsys.readouterr().out == line
    assert json.loads((root / DEFINITION).read_text())["displayName"] == "mi-compare first"
