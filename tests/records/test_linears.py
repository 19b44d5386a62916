"""A number of a linear is declared once: disk, curves and pages follow from its field."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pytest
from synthetic_runs import make_linears

from mi_experiments.comparison.views.data import INFORMATION, LABELS, LAYER_METRICS
from mi_experiments.records.linears import (
    LINEAR_SCHEMA,
    METRICS,
    LinearReport,
    Metric,
    metrics_of,
    read_linears,
    schema_of,
    write_linears,
)


@dataclass(frozen=True)
class Longer(LinearReport):
    """A report with one number more."""

    kurtosis: Annotated[float | None, Metric("kurtosis of the inputs", of_site=True)] = None


def test_a_new_metric_is_a_field_and_nothing_else() -> None:
    assert list(metrics_of(Longer)) == [*METRICS, "kurtosis"]
    assert metrics_of(Longer)["kurtosis"] == Metric("kurtosis of the inputs", of_site=True)
    assert schema_of(Longer).field("kurtosis").type == pa.float64()
    assert schema_of(Longer).remove(len(LINEAR_SCHEMA)) == LINEAR_SCHEMA


def test_every_metric_is_on_the_page_with_its_label() -> None:
    assert tuple(METRICS) == LAYER_METRICS
    assert {name: LABELS[name] for name in METRICS} == {n: m.label for n, m in METRICS.items()}
    assert {name for name, metric in METRICS.items() if metric.of_site} == set(INFORMATION)


def test_every_field_is_on_disk_but_for_times() -> None:
    names = [field.name for field in dataclasses.fields(LinearReport)]
    assert LINEAR_SCHEMA.names == [name for name in names if name != "seconds"]


def test_a_type_without_a_column_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd:
        shape: complex

    with pytest.raises(KeyError):
        schema_of(Odd)


def test_reports_are_read_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    make_linears(tmp_path)
    reports = read_linears(tmp_path)
    assert len({report.output_error for report in reports}) == len(reports) > 1
    write_linears(reports, tmp_path / "again")
    assert read_linears(tmp_path / "again") == reports
