"""A saved view of the runs in Weights & Biases: published where there is a key, else a JSON file.

The view draws what `tracking` sends: curves over the linears (`layer/*`) and blocks (`block/*`),
the summary (`bits/effective`, `compressed/TEXT/perplexity`) and the axes of the config.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws

from mi_experiments.comparison.views.data import Comparison, label_of
from mi_experiments.errors import InputError
from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.records.linears import METRICS
from mi_experiments.records.tracking import CALL_SECONDS, attempt, has_key, sweep_name

AXES = ("nsamples", "wbits", "n_groups", "sparsity", "seed")
"""Settings that `tracking` sends by their short names; each is an upright of the parallel plot."""

DEFINITION = "wandb_workspace.json"

SAVE_SECONDS = 60.0
"""Longest wait for the server to take the view."""


def publish_workspace(comparison: Comparison, beside: Path) -> str:
    """Save the view in Weights & Biases, or write its definition into a directory.

    Nothing asks for a key, and without one nothing touches the network.

    Returns:
        One line: the address of the view, or why there is only a file.
    """
    workspace = build_workspace(comparison)
    found, failure = attempt(has_key, CALL_SECONDS)
    if found:
        address, failure = attempt(lambda: save(workspace), SAVE_SECONDS)
        if failure is None:
            return str(address)
    path = beside / DEFINITION
    definition = workspace._to_model().model_dump(by_alias=True, exclude_none=True)
    write_atomically(path, (json.dumps(definition, indent=2) + "\n").encode())
    return f"{path}: the view is not published: {failure or 'no API key was found (wandb login)'}"


def save(workspace: ws.Workspace) -> str:
    """Publish a view under the entity of its runs, or the client's own."""
    workspace.entity = workspace.entity or str(wandb.Api().default_entity)
    workspace.save()  # type: ignore[no-untyped-call]
    return str(workspace.url)


def build_workspace(comparison: Comparison) -> ws.Workspace:
    """Return the view: frontier, settings side by side, layers and blocks.

    Runs of several sweeps are grouped by sweep; those of one are not, for a group is drawn as its
    mean.

    Raises:
        InputError: the runs were recorded in more than one project, or one does not say in which.
    """
    entity, project = find_project(comparison)
    sweeps = find_sweeps(comparison)
    texts = comparison.runs["text"].dropna().unique()
    measured = {
        f"{name} on {text}": f"compressed/{text}/{name}"
        for name in measured_names(comparison)
        for text in texts
    }
    bits = wr.SummaryMetric("bits/effective")
    frontier: list[wr.PanelTypes] = [
        wr.ScatterPlot(title=f"{title} against {label_of(name)}", x=axis, y=wr.SummaryMetric(key))
        for title, key in measured.items()
        for name, axis in (("effective_bits", bits), ("nsamples", wr.Config("nsamples")))
    ]
    uprights: list[tuple[str, wr.Config | wr.SummaryMetric]] = [
        *(("log " * (name == "nsamples") + name, wr.Config(name)) for name in AXES),
        ("effective bits", bits),
        *((title, wr.SummaryMetric(key)) for title, key in measured.items()),
    ]
    parallel: wr.PanelTypes = wr.ParallelCoordinatesPlot(
        title="settings and results",
        columns=[
            wr.ParallelCoordinatesPlotColumn(
                metric=metric, display_name=name, log=name.startswith("log ") or None
            )
            for name, metric in uprights
        ],
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"mi-compare {' '.join(sweeps or ())}".strip()[:120],
        settings=ws.WorkspaceSettings(max_runs=max(10, len(comparison.details))),
        sections=[
            ws.Section(name="Frontier", panels=frontier, is_open=True, pinned=True),
            ws.Section(name="Settings", panels=[parallel], is_open=True),
            ws.Section(name="Layers", panels=curves("layer"), is_open=True),
            ws.Section(name="Blocks", panels=curves("block")),
        ],
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")] if sweeps and len(sweeps) > 1 else [],
            filters=ws.And(ws.Metric("Group").isin(sweeps)) if sweeps else "",
            pinned_columns=[
                *(f"config:{name}" for name in (*AXES, "grouping")),
                "summary:bits/effective",
                *(f"summary:{key}" for key in measured.values()),
            ],
        ),
    )


def measured_names(comparison: Comparison) -> list[str]:
    """Return the names of what was measured of any run."""
    texts = (text for run in comparison.details.values() for text in run.result.dense.values())
    return list(dict.fromkeys(name for text in texts for name in text.measurements))


def curves(axis: str) -> list[wr.PanelTypes]:
    """Return a chart of each metric over the linears (`layer`) or blocks (`block`)."""
    return [
        wr.LinePlot(title=label_of(metric), x=axis, y=[f"{axis}/{metric}"], title_x=axis)
        for metric in METRICS
    ]


def find_project(comparison: Comparison) -> tuple[str, str]:
    """Return entity (empty for the client's own) and project of the runs."""
    found: dict[tuple[Any, Any], str] = {}
    for run, detail in comparison.details.items():
        tracking = detail.result.config.get("tracking")
        if not isinstance(tracking, Mapping) or not isinstance(tracking.get("project"), str):
            raise InputError(f"--wandb: {run} does not say in which project it is; use --where")
        found.setdefault((tracking.get("entity") or "", tracking["project"]), run)
    if len(found) > 1:
        places = ", ".join(f"{run} in {'/'.join(place)}" for place, run in found.items())
        raise InputError(f"--wandb shows one project, these runs have more: {places}; use --where")
    ((entity, project),) = found
    return entity, project


def find_sweeps(comparison: Comparison) -> list[str] | None:
    """Return the groups of the runs' sweeps; None if a run belongs to no sweep."""
    names = []
    for detail in comparison.details.values():
        parents = detail.directory.resolve().parents
        sweep = next((parent for parent in parents if (parent / "multirun.yaml").exists()), None)
        if sweep is None:
            return None
        names.append(sweep_name(sweep))
    return list(dict.fromkeys(names))
