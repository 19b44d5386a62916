"""Whatever becomes of the server and whenever, a run ends as it would have, and says one line.

Real commands with a key, against ports of this machine that refuse, that accept and never answer,
and against a server that answers until a moment of the run and then does one or the other.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from wandb_records import KEY, BrokenRun, Listener, evaluation, read_summary
from wandb_server import WandbServer

from mi_experiments.records import tracking
from mi_experiments.records.result import Result, read_result

CALL_SECONDS = 8
PATIENCE = f"from mi_experiments.records import tracking; tracking.CALL_SECONDS = {CALL_SECONDS}"
COMMAND = [
    "dataset.nsamples=4", "evaluation.datasets.embedded.max_windows=4", "n_groups.count=2",
    "recipe=textbook", "tracking.init_timeout=2", "tracking.finish_timeout=3", "hydra.run.dir=run",
]  # fmt: skip


@dataclass
class Ended:
    """How a command ended, in the folder where it was given."""

    folder: Path
    out: str
    err: str
    code: int

    @property
    def result(self) -> Result:
        return read_result(self.folder / "run")

    @property
    def said(self) -> list[str]:
        """Return the lines about Weights & Biases in what a person reads at the end."""
        return re.findall(r"^W&B +(.*)$", self.out, re.MULTILINE)


def mi_run(folder: Path, url: str) -> Ended:
    """Do a run that has a key for a server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        environment[name] = str(folder / "home")
    environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    code = f"{PATIENCE}\nfrom mi_experiments.commands.start import run\nrun()"
    # A process of the client that stayed behind would keep the pipe open, and this waiting.
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return Ended(folder, done.stdout, done.stderr, done.returncode)


def check(ended: Ended, reason: str) -> None:
    """Require a complete run, one line, a command that uploads, and records that are all there."""
    assert ended.code == 0, ended.err
    result = ended.result
    assert (result.status, result.error) == ("completed", None)
    assert result.bits is not None
    (warning,) = ended.err.strip().splitlines()
    assert warning.startswith(f"WARNING: {reason}")
    assert ended.said[0] == warning.removeprefix("WARNING: ")
    sync = shlex.split(ended.said[-1])
    assert sync[:2] == ["wandb", "sync"]
    directory = Path(sync[-1])
    read = read_summary(directory)
    assert (read["state"], read["exit_code"]) == ("finished", 0)
    summary = read["summary"]
    for phase in ("dense", "compressed"):
        for name, measured in getattr(result, phase).items():
            assert summary[f"{phase}/{name}/perplexity"] == measured.perplexity
    for name, value in vars(result.bits).items():
        assert summary[f"bits/{name}"] == value
    content = b"".join(p.read_bytes() for p in ended.folder.rglob("*") if p.is_file())
    assert KEY.encode() not in content
    # The client takes a folder whose server it cannot ask: all that is missing is the upload.
    listed = [sys.executable, "-m", "wandb", "sync", "--dry-run", *sync[2:]]
    shown = subprocess.run(listed, capture_output=True, text=True, check=True, timeout=60).stderr
    assert "Would sync 1 run(s)" in shown


def test_a_server_that_refuses_from_the_start(tmp_path: Path) -> None:
    check(mi_run(tmp_path, "http://127.0.0.1:9"), "W&B is offline: CommError")


@pytest.mark.slow
def test_a_server_that_never_answers_from_the_start(tmp_path: Path) -> None:
    with Listener() as listener:
        ended = mi_run(tmp_path, listener.url)
        assert listener.connections
    check(ended, "W&B is offline: CommError")


MOMENTS = {"middle": "records", "end": "artifact"}
"""By the first request of a kind: records come seconds after the start, the tables at the end."""


@pytest.mark.parametrize(
    ("moment", "how"),
    [
        ("end", "stop"),
        pytest.param("middle", "hang", marks=pytest.mark.slow),
        pytest.param("middle", "stop", marks=pytest.mark.slow),
        pytest.param("end", "hang", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_is_lost_on_the_way(moment: str, how: str, tmp_path: Path) -> None:
    def lose(server: WandbServer, kind: str) -> None:
        if kind == MOMENTS[moment]:
            server.stop() if how == "stop" else server.hanging.set()

    with WandbServer(lose) as server:
        ended = mi_run(tmp_path, server.url)
        assert server.counts["run"] >= 1  # it was online
        assert server.counts[MOMENTS[moment]] >= 1
    check(ended, "W&B stopped recording: ")
    assert ended.said[1].startswith(f"{server.url}/somebody/mi_experiments/runs/")
    assert "--no-skip-online" in ended.said[-1]


def test_what_is_waited_for_is_bounded_whatever_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After the first call without an answer comes one more, which ends the client."""
    allowed: list[float] = []

    def never(action: object, seconds: float) -> tracking.Outcome:
        allowed.append(seconds)
        return None, "no answer"

    monkeypatch.setattr(tracking, "attempt", never)
    tracker = tracking.Tracker(BrokenRun(tmp_path, "nothing", None), "online", None, 7)
    for _ in range(3):
        tracker.log_evaluation("dense", "text", evaluation(2.0))
    tracker.finish(_failed(), [])
    tracker.__exit__(None)
    assert allowed == [tracking.CALL_SECONDS] * 2
    allowed.clear()
    tracker = tracking.Tracker(BrokenRun(tmp_path, "nothing", None), "online", None, 7)
    tracker.__exit__(None)
    assert allowed == [tracking.CALL_SECONDS + 7, tracking.CALL_SECONDS]


def _failed() -> Result:
    return Result(
        status="failed", error="x", config={}, provenance=None, dense={}, compressed={}, bits=None,
        sparsity=None, weights=None, coverage=None, memory={}, seconds={}, resumed=0,
    )  # fmt: skip
