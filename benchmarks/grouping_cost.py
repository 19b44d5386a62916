"""What could a grouping gain at best? Prices of all groupings, before anything is compressed.

python benchmarks/grouping_cost.py OUTPUT.csv [OVERRIDES]

A bit more divides a group's error by 4. With the best widths, fractions allowed, all groups lose
the same per weight: the geometric mean of what they lose at equal widths. So the mean of the
logarithm of cost / weights says what a partition is worth, whatever the budget. Printed is that
mean minus the one of random groups, by site and over all: -0.1 is a tenth less error. Prices are
those of the plan, of grids that are really fitted, at the width nearest to `wbits.average`.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from mi_experiments.calibration.hessians import measure_plan_fisher
from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.config.config import Config
from mi_experiments.config.identity import register_resolvers
from mi_experiments.experiment.phases import Run
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import open_run
from mi_experiments.experiment.stop import StopRequest
from mi_experiments.method.grouping import Grouping
from mi_experiments.planning.cost_key import cost_config
from mi_experiments.planning.group_count import log_cost
from mi_experiments.planning.site_costs import measure_block_costs
from mi_experiments.records.recorder import Recorder
from mi_experiments.records.tracking import Tracker


def main(arguments: list[str]) -> None:
    """Price every grouping, and write a row for each and a column for each kind of site."""
    output, *overrides = arguments
    register_resolvers()
    configs = {}
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        for grouping in Grouping:
            chosen = [*overrides, "tracking=disabled", "sparsity=dense", "n_groups.adaptive=false"]
            composed = compose("config", [*chosen, f"n_groups={grouping.value}"])
            configs[grouping.value] = from_hydra(composed)
    first = configs["random"]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(first, Path(folder))
        tracker = Tracker.open(first, Path(folder), sweep_dir=None, job="benchmark")
        run = open_run(first, recorder, tracker, Progress(), StopRequest())
        costs = pd.DataFrame({name: mean_log_cost(run, config) for name, config in configs.items()})
    table = (costs.sub(costs["random"], axis=0)).T
    table.to_csv(output)
    print(table.round(3).to_string())


def mean_log_cost(run: Run, config: Config) -> dict[str, float]:
    """Return the mean log cost of a weight, by kind of site and over all."""
    average = config.wbits.average
    config = cost_config(config)
    widths = config.wbits.candidate_widths()
    at = min(range(len(widths)), key=lambda index: abs(widths[index] - average))
    fisher = measure_plan_fisher(run.walker, run.calibration, config)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for block in run.walker.walk(run.calibration):
        for linear in measure_block_costs(block, fisher, True, config).linears:
            assert linear.group_costs is not None
            weights = int(linear.group_costs.sizes.sum())
            mean = log_cost(linear.group_costs.costs[:, at].double(), linear.group_costs.sizes)
            for kind in (linear.site.removeprefix(f"{block.name}."), "all"):
                sums[kind][0] += mean * weights
                sums[kind][1] += weights
    return {kind: total / weights for kind, (total, weights) in sums.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
