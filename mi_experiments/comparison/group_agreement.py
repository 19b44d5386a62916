"""How far runs that differ in their calibration group the channels alike.

The groups of a run are in its `plan.safetensors`. Two runs that agree in everything that varies but
the named settings (`seed`, `dataset.nsamples`) are a pair; of a pair, the adjusted Rand index is
taken at every site and averaged over the sites.
"""

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mi_experiments.comparison.columns import (
    cells,
    find_settings,
    stands_for,
    varying,
)
from mi_experiments.comparison.run_table import find_runs
from mi_experiments.errors import InputError
from mi_experiments.method.grouping import adjusted_rand_index
from mi_experiments.persistence.plain_json import BrokenRecord, parse_json

PLAN = "plan.safetensors"


def agreement_over(
    frame: pd.DataFrame,
    paths: Sequence[Path],
    names: Sequence[str],
    left_out: list[str] | None = None,
) -> pd.DataFrame:
    """Compare the groups of runs that agree in everything that varies except some settings.

    Args:
        frame: rows of `read_runs`; only completed runs count.
        paths: the paths that they were read from.
        names: settings in which the runs of a pair may differ, and differ in at least one.
        left_out: receives a line for each run whose plan cannot be read; None if that is an error.

    Returns:
        A row for each group of such runs: its settings, `runs`, `pairs`, `sites`, `agreement`
        (mean adjusted Rand index over sites and pairs: 1 for equal groups, about 0 by chance) and
        `lowest` (of a site, averaged over pairs).

    Raises:
        InputError: an unknown key, no pair at all, a plan that cannot be read, or two runs of a
            pair that do not have the same sites.
    """
    over = find_settings(frame, names, "--stability")
    free = stands_for(frame, over)
    # How a run was evaluated has no part in its groups.
    apart = [
        name
        for name in varying(frame)
        if name not in free and not re.match(r"evaluation\.|tokens_sha256$|text$", name)
    ]
    done = frame[frame["status"] == "completed"].drop_duplicates("run")
    places = {name: directory for directory, name in find_runs(paths).items()}
    groups_of: dict[str, dict[str, Tensor]] = {}
    members: dict[tuple[Any, ...], list[str]] = {}
    for key, run in zip(cells(done[apart]), done["run"], strict=True):
        try:
            groups_of[run] = read_groups(places[run])
        except InputError as error:
            if left_out is None:
                raise
            left_out.append(f"left out: {error}")
        else:
            members.setdefault(key, []).append(run)
    asked = dict(zip(done["run"], cells(done[over]), strict=True))
    rows = []
    for key, runs in members.items():
        groups = {run: groups_of[run] for run in runs}
        pairs = [
            pair for pair in itertools.combinations(runs, 2) if asked[pair[0]] != asked[pair[1]]
        ]
        if not pairs:
            continue
        by_site = [
            compare_groups(groups[one], groups[other], pair=(one, other)) for one, other in pairs
        ]
        sites = [statistics.fmean(values) for values in zip(*by_site, strict=True)]
        rows.append(
            dict(zip(apart, key, strict=True))
            | {
                "runs": len(runs),
                "pairs": len(pairs),
                "sites": len(sites),
                "agreement": statistics.fmean(sites),
                "lowest": min(sites),
            }
        )
    if not rows:
        raise InputError(
            f"--stability {','.join(names)}: no two completed runs differ in {' or '.join(over)} "
            "and agree in everything else"
        )
    return pd.DataFrame(rows)


def read_groups(run_dir: Path) -> dict[str, Tensor]:
    """Return the group of every channel by site, from the plan of a run.

    Raises:
        InputError: the plan is not there or cannot be read.
    """
    path = run_dir / PLAN
    groups: dict[str, Tensor] = {}
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no plan of a run: it is no file")
    try:
        with safe_open(path, "pt") as file:
            plan = parse_json(file.metadata()["plan"], path)
            for name, (_, site, *_) in plan["linears"].items():
                if site not in groups:
                    groups[site] = channel_groups(file.get_tensor(f"{name}.channel_group"))
    except BrokenRecord:
        raise
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError
    ) as error:  # fmt: skip
        raise InputError(f"{path} is no plan of a run: {type(error).__name__}: {error}") from error
    return groups


def channel_groups(tensor: Tensor) -> Tensor:
    """Return the group of every channel.

    Raises:
        ValueError: it is none: not one whole number a channel.
    """
    if tensor.ndim != 1 or not len(tensor) or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} are no groups of channels")
    return tensor


def compare_groups(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, pair: tuple[str, str]
) -> list[float]:
    """Return the adjusted Rand index of each site.

    Raises:
        InputError: the sites are not the same.
    """
    if {site: len(group) for site, group in one.items()} != {
        site: len(group) for site, group in other.items()
    }:
        raise InputError(f"--stability: {' and '.join(pair)} do not have the same sites")
    return [adjusted_rand_index(one[site], other[site]) for site in one]
