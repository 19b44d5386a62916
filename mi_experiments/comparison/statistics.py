"""What may be said of a table of runs: paired with a baseline, averaged over seeds, pivoted.

Two rows are compared or averaged only if they agree in everything that varies (`varying`) except
what was named; an average carries the 95 % interval of Student's t and the number of its samples.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mi_experiments.comparison.columns import (
    COUNT,
    INTERVAL,
    averaged_columns,
    cells,
    find_column,
    find_settings,
    measured_columns,
    settings,
    show_value,
    stands_for,
    varying,
)
from mi_experiments.comparison.identity import PROVENANCE, tell_models_apart
from mi_experiments.errors import InputError


def add_difference(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Add `difference`: excess minus that of the baseline which agrees in everything else.

    Of any other measurement, `difference_NAME` is that of the compressed models' values. Only
    completed runs are paired. A baseline differs from itself by 0; a run without a partner has no
    difference.

    Args:
        frame: rows of `read_runs`.
        baseline: `KEY=VALUE[,KEY=VALUE]`: settings that make a run a baseline. A config's name
            (`recipe`, `model`) stands for all keys of its group.

    Returns:
        The table with one more column, nats per token, and one for each other measurement.

    Raises:
        InputError: an unknown key or value, two baselines for one run, or no pair at all.
    """
    wanted = dict(part.partition("=")[::2] for part in split_baseline(baseline))
    columns = find_settings(frame, wanted, "--baseline")
    measured = {"difference": "excess"} | {
        name.replace("compressed", "difference", 1): name
        for name in measured_columns(frame, "compressed")
    }
    known = frame[list(measured.values())].notna().any(axis=1)
    completed = (frame["status"] == "completed") & known
    chosen = completed.copy()
    for column, value in zip(columns, wanted.values(), strict=True):
        holds = frame[column].map(lambda cell, value=value: spells(value, cell))
        if not holds.any():
            known = ", ".join(dict.fromkeys(map(show_value, frame[column])))
            raise InputError(f"--baseline: no run has {column}={value}; there is {known}")
        chosen &= holds
    free = stands_for(frame, columns)
    keys = [name for name in varying(frame) if name not in free]
    agreeing = cells(frame[keys])
    partners: dict[tuple[Any, ...], int] = {}
    for row in frame.index[chosen]:
        if (other := partners.setdefault(agreeing[row], row)) != row:
            raise InputError(
                f"--baseline {baseline}: {frame['run'][other]} and {frame['run'][row]} agree in "
                "everything else; leave one out with --where, or name more keys"
            )
    paired = completed & pd.Series([key in partners for key in agreeing], frame.index)
    if not (paired & ~chosen).any():
        raise InputError(
            f"--baseline {baseline}: {explain_no_pair(frame, keys, completed, chosen)}"
        )
    differences = {
        column: [
            frame[name][row] - frame[name][partners[agreeing[row]]] if paired[row] else math.nan
            for row in frame.index
        ]
        for column, name in measured.items()
    }
    return frame.assign(**differences)


def split_baseline(baseline: str) -> list[str]:
    """Split `KEY=VALUE[,KEY=VALUE]`; a value may have commas."""
    return re.split(r",(?=[\w.]+=)", baseline)


def explain_no_pair(
    frame: pd.DataFrame, keys: Sequence[str], completed: pd.Series, chosen: pd.Series
) -> str:
    """Say what keeps runs and baselines apart: the fewest keys in which two of them differ."""
    apart = [
        [key for key, cell, own in zip(keys, other, baseline, strict=True) if cell != own]
        for other in cells(frame.loc[completed & ~chosen, keys])
        for baseline in cells(frame.loc[chosen, keys])
    ]
    if not apart:
        return "there are no completed runs on both sides"
    fewest: list[str] = min(apart, key=len)
    if origin := [key for key in fewest if key in PROVENANCE]:
        return (
            f"no run agrees with a baseline in everything else; they differ in {', '.join(origin)}"
        )
    return f"no run agrees with a baseline in everything else; add {', '.join(fewest)}"


def spells(text: str, cell: object) -> bool:
    """Tell whether a value is the one that was written, as on the command line of a run."""
    if pd.isna(cell) or pd.api.types.is_bool(cell) or isinstance(cell, str):
        return text == show_value(cell)
    try:
        return float(text) == cell
    except ValueError:
        return False


def average_over(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Average the rows that agree in status, error and everything that varies except some keys.

    Args:
        frame: rows of `read_runs`.
        names: settings to average over; their copies go with them.

    Returns:
        A row a group: its settings, `runs`, and of each of `averaged_columns` the mean, half the
        width of its 95 % interval (`_ci95`, missing for one sample) and the number of samples
        (`_n`).

    Raises:
        InputError: an unknown key, or two completed runs that agree in these keys too: repeats of
            one sample, which would make the interval too narrow.
    """
    over = find_settings(frame, names, "--over")
    free = stands_for(frame, over)
    apart = [name for name in varying(frame) if name not in free]
    constant = [
        name
        for name in settings(frame)
        if name not in free and name not in apart and frame[name].nunique(dropna=False) == 1
    ]
    identity = ["status", "error", *apart]
    rows = []
    for members in agreeing_rows(frame, identity):
        group = frame.iloc[members]
        refuse_repeats(group, over)
        first = group.iloc[0]
        rows.append({name: first[name] for name in identity + constant} | averages(group))
    order = [name for name in frame if name in {*identity, *constant}]
    averaged = pd.DataFrame(rows)
    return averaged[order + [name for name in averaged if name not in order]]


def agreeing_rows(frame: pd.DataFrame, names: Sequence[str]) -> list[list[int]]:
    """Return the places of the rows that agree in some columns, together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(cells(frame[list(names)])):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def joined_by_means(frame: pd.DataFrame, names: Sequence[str]) -> list[list[int]]:
    """Return the places of the rows that `average_over` joins to one mean each."""
    free = stands_for(frame, find_settings(frame, names, "--over"))
    return agreeing_rows(frame, ["status", *(name for name in varying(frame) if name not in free)])


def joined_by_pairs(frame: pd.DataFrame, names: Sequence[str]) -> list[list[int]]:
    """Return the places of the rows that `add_difference` compares with one baseline each."""
    free = stands_for(frame, find_settings(frame, names, "--baseline"))
    paired = frame["difference"].notna()
    keys = [name for name in varying(frame) if name not in free]
    return [[row for row in members if paired.iloc[row]] for members in agreeing_rows(frame, keys)]


def refuse_repeats(group: pd.DataFrame, over: list[str]) -> None:
    """Refuse completed runs that are one sample twice."""
    seen: dict[tuple[Any, ...], str] = {}
    done = group[group["status"] == "completed"]
    for key, run in zip(cells(done[over]), done["run"], strict=True):
        if key in seen:
            values = ", ".join(f"{n}={show_value(v)}" for n, v in zip(over, key, strict=True))
            raise InputError(
                f"--over: {seen[key]} and {run} agree in {values} too, so they are one sample "
                f"twice: leave one out with --where \"run != '{run}'\""
            )
        seen[key] = run


def averages(group: pd.DataFrame) -> dict[str, Any]:
    """Return the number of rows, and mean, interval and count of what is averaged."""
    row: dict[str, Any] = {"runs": len(group)}
    for name in averaged_columns(group):
        if name in group:
            values = group[name].dropna()
            row[name] = values.mean()
            row[name + INTERVAL] = half_width(values.tolist())
            row[name + COUNT] = len(values)
    return row


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the mean's 95 % interval by Student's t; NaN below two values."""
    # Imported late: most tables are not averaged.
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count)


def pivot(frame: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """Spread a value over two settings: a row for each of one, a column for each of the other.

    Interval and count go with an averaged value. Rows without the value leave their cell missing.

    Raises:
        InputError: an unknown column, two rows with a value for one cell, or cells of different
            models or texts that neither setting tells apart.
    """
    down, across = find_settings(frame, (rows, columns), "--pivot")
    value = find_column(frame, value)
    known = frame[frame[value].notna()]
    told = stands_for(known, (down, across))
    others = [name for name in varying(known) if name not in told]
    if origin := tell_models_apart(known, others):
        raise InputError(
            f"--pivot: the cells are of different {', '.join(origin)}: name it as rows or "
            "columns, or choose one with --where"
        )
    table: dict[Any, dict[str, Any]] = {}
    for row in frame.to_dict("records"):
        label = f"{across}={show_value(row[across])}"
        line = table.setdefault(show_value(row[down]), {down: row[down]})
        if not pd.isna(row[value]) and not pd.isna(line.get(label, math.nan)):
            others = [name for name in varying(frame) if name not in {down, across}]
            raise InputError(
                f"--pivot: several rows have {down}={show_value(row[down])} and {label}; they "
                f"differ in {', '.join(others) or 'nothing'}: use --over or --where"
            )
        if label not in line or not pd.isna(row[value]):
            parts = [name for name in (value, value + INTERVAL, value + COUNT) if name in frame]
            line |= {label + name.removeprefix(value): row[name] for name in parts}
    return pd.DataFrame(list(table.values()))
