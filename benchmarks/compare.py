"""Time mi-compare on recorded sweeps of the size of a paper, each command in its own process.

The records are invented (tests/fixtures/synthetic_runs.py); their number and shape are those of a
sweep over a 7B model: 225 linears a run.

    python benchmarks/compare.py --runs 200
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))

from synthetic_runs import make_linears, make_run  # noqa: E402 - after the path to it

GROUPINGS = ("mutual_information", "random", "contiguous", "sensitivity")
COMMANDS = {
    "table": [],
    "means and paired differences": ["--over", "seed", "--baseline", "grouping=random"],
    "page": ["--html", "page.html"],
    "page with means": ["--html", "page.html", "--over", "seed"],
    "plots": ["--plots", "figures"],
}


def write_sweep(root: Path, runs: int, blocks: int) -> None:
    """Write runs that differ in grouping, calibration count and seed."""
    for job in range(runs):
        seed, place = job % 5, job // 5
        make_run(
            root / str(job), 0.1 + job / runs, n_groups__grouping=GROUPINGS[place % 4], seed=seed,
            dataset__nsamples=8 * 2 ** (place // 4 % 5), wbits__average=2.5 + place // 20 / 2,
        )  # fmt: skip
        make_linears(root / str(job), blocks=blocks, salt=job)


def processor() -> float:
    """Return the processor time of all commands so far, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(directory: Path, arguments: list[str], repeats: int) -> tuple[float, float]:
    """Return the shortest time of a command and its shortest processor time, seconds."""
    command = [sys.executable, "-c", "from mi_experiments.commands.compare import main; main()"]
    times, busy = [], []
    for _ in range(repeats):
        started, before = time.perf_counter(), processor()
        subprocess.run([*command, "sweep", *arguments], cwd=directory, check=True,
                       stdout=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)})  # fmt: skip
        times.append(time.perf_counter() - started)
        busy.append(processor() - before)
    return min(times), min(busy)


def main() -> None:
    """Write the records, run the commands, print their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=75, help="of 3 linears each")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_sweep(Path(directory) / "sweep", options.runs, options.blocks)
        print(f"{options.runs} runs of {3 * options.blocks} linears, fastest of {options.repeats}")
        for name, arguments in COMMANDS.items():
            seconds, busy = measure(Path(directory), arguments, options.repeats)
            print(f"{name:30} {seconds:6.2f} s   {busy:6.2f} s of processor")
        print(
            f"{'size of the page':30} {Path(directory, 'page.html').stat().st_size / 1e6:6.2f} MB"
        )


if __name__ == "__main__":
    main()
