"""Does the safety net choose right? Both candidates of a run on the evaluation text.

python benchmarks/safety_net.py OUTPUT.csv [SETTING ...] -- OVERRIDES

Each SETTING is a comma list of overrides, and each is run with seeds 0 and 1. The row of a run has
the divergence that the net saw and the excess loss that it did not see, of both candidates.
"""

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.experiment import safety_net
from mi_experiments.experiment.phases import Run, evaluate_text
from mi_experiments.experiment.progress import Progress
from mi_experiments.experiment.run_experiment import run_experiment
from mi_experiments.llm.walker import Walker
from mi_experiments.records.tracking import Tracker

SEEDS = (0, 1)


def main(arguments: list[str]) -> None:
    """Run every setting with every seed, and write a row as soon as it is known."""
    own, _, shared = "\0".join(arguments).partition("\0--\0")
    output, *chosen = own.split("\0")
    seen: dict[str, float] = {}
    diverge = safety_net.diverge

    def diverge_and_evaluate(run: Run, name: str, walker: Walker) -> Any:
        (text,) = run.texts
        seen[name] = evaluate_text(run, text, walker, f"evaluate {name}").nll
        return diverge(run, name, walker)

    safety_net.diverge = diverge_and_evaluate
    with Path(output).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([
            "setting",
            "seed",
            "kept",
            "right",
            *(
                f"{name}_{value}"
                for name in ("mixed", "uniform")
                for value in ("kl", "error", "excess", "bits", "effective")
            ),
        ])
        for setting in chosen:
            for seed in SEEDS:
                overrides = [*shared.split("\0"), *setting.split(","), f"seed={seed}",
                             "recipe.safety_net=true", "tracking=disabled"]  # fmt: skip
                with initialize_config_dir(conf_directory(), version_base="1.3"):
                    config = from_hydra(compose("config", overrides=overrides))
                with tempfile.TemporaryDirectory() as folder:
                    tracker = Tracker.open(config, Path(folder), sweep_dir=None, job="benchmark")
                    result = run_experiment(config, Path(folder), tracker, Progress())
                net = result.safety_net
                assert net is not None
                (dense,) = result.dense.values()
                excess = {name: nll - dense.nll for name, nll in seen.items()}
                row = [setting, seed, net.kept, excess[net.kept] == min(excess.values())]
                for name, entry in net.candidates.items():
                    row += [entry.kl, entry.standard_error, excess[name],
                            entry.average_bits, entry.effective_bits]  # fmt: skip
                table.writerow(row)
                file.flush()
                print(*row)


if __name__ == "__main__":
    main(sys.argv[1:])
