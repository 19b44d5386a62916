"""What is read back from W&B is what was recorded, and no client, network or key ends a run."""

import gc
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from composed import config_of
from wandb_records import (
    KEY,
    BrokenRun,
    Listener,
    evaluation,
    read_records,
    read_rows,
    read_summary,
)

from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config, TrackingMode
from mi_experiments.config.secrets import scrub
from mi_experiments.records import tracking
from mi_experiments.records.linears import LINEAR_SCHEMA, METRICS, LinearReport, weighted_mean
from mi_experiments.records.result import Bits, Result
from mi_experiments.records.tracking import Tracker, asked_mode, sweep_name

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module")
def config() -> Config:
    return config_of()


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch, tmp_path):
    """No key, no settings of this machine, and a client service that starts in the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # so that it is restored when it was set
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    wandb.teardown()
    yield
    tracking.stop_client()


def with_tracking(config: Config, **values) -> Config:
    return replace(config, tracking=replace(config.tracking, **values))


def report(block: int, name: str, bits: dict[int, int], information: float | None) -> LinearReport:
    shift = block + len(name) / 7
    return LinearReport(
        block=block,
        name=f"layers.{block}.{name}",
        site=f"layers.{block}.{name}",
        rows=3 * len(name),
        columns=sum(bits.values()),
        bits=bits,
        average_bits=3 + shift / 11,
        effective_bits=3.5 + shift / 13,
        sparsity=0.5 + shift / 101,
        output_error=1e-3 / 3 + shift / 1e4,
        levels=8,
        groups=2,
        pairwise_information=information,
        information_noise=information and information / 9,
        redundancy=None,
        total_correlation=10 / 3 + shift,
        damping=0.01,
        damping_attempts=(0.01, 0.1),
        dead_channels=0,
        tokens=2048,
        seconds=0.1 + shift / 3,
        status="compressed",
    )


LINEARS = [
    report(0, "q_proj", {2: 32, 4: 64}, 1 / 3),
    report(0, "down", {3: 96}, None),
    report(1, "q_proj", {2: 64, 5: 32}, 2 / 7),
    report(1, "down", {3: 32, 4: 64}, 0.1 + 0.2),
]


def shown(perplexity: float) -> float:
    """Return the float that a record has of a perplexity, which follows from its logarithm."""
    return evaluation(perplexity).measurements["perplexity"].value


def result(config: Config, status: str = "completed", error: str | None = None) -> Result:
    return Result(
        status=status,
        error=error,
        config=to_plain(config),
        provenance=None,
        dense={"text": evaluation(100 / 7), "other": evaluation(1e5 / 3)},
        compressed={"text": evaluation(110 / 7)},
        bits=Bits(requested=4.0, average=3.999999999999999, effective=4.3 / 3),
        sparsity=1 / 3,
        weights=1000,
        coverage=1.0,
        memory={},
        seconds={"load": 0.1, "evaluate dense": 0.30000000000000004},
        resumed=0,
    )


def read_table(directory: Path, name: str) -> list[dict]:
    (file,) = directory.glob(f"files/media/table/{name}_*.table.json")
    table = json.loads(file.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == tracking.__name__]


def runs(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if "run-" in path.name and not path.is_symlink()
    )


def test_every_number_is_read_back_from_the_offline_run(config, tmp_path, capfd):
    sweep_dir = tmp_path / "sweeps" / "2026-01-02" / "widths"
    run_dir = sweep_dir / "3"
    run_dir.mkdir(parents=True)
    (sweep_dir / ".wandb").mkdir()  # where it exists, the client would prefer it
    asked = with_tracking(config, mode=TrackingMode.offline, tags=["mine", "t" * 70, "mine"])
    done = result(asked)
    with Tracker.open(asked, run_dir, sweep_dir=sweep_dir, job="job 3") as tracker:
        for name, measured in done.dense.items():
            tracker.log_evaluation("dense", name, measured)
        for linear in LINEARS:
            tracker.log_linear(linear)
        print("on the terminal only")
        tracker.finish(done, LINEARS)

    assert (tracker.mode, tracker.fallback) == ("offline", None)
    assert tracker.directory is not None
    assert tracker.directory.parent == sweep_dir / "wandb"
    assert tracker.commands() == [
        f"wandb leet {sweep_dir}/wandb",
        f"wandb sync {tracker.directory}",
    ]
    assert capfd.readouterr() == ("on the terminal only\n", "")
    assert not (tracker.directory / "files" / "output.log").exists()

    records = read_records(tracker.directory)
    started = records["run"][0]
    assert started["run_group"] == "2026-01-02-widths"
    assert (started["job_type"], started["display_name"]) == ("compress", "job 3")
    assert started["tags"] == ["mine", "t" * 64, "embedded", "energy"]
    assert "host" not in started
    assert not {"environment", "stats", "output"} & records.keys()

    layers = read_rows(records, "layer")
    assert [row["layer"] for row in layers] == [0, 1, 2, 3]
    for row, linear in zip(layers, LINEARS, strict=True):
        recorded = {key: value for key, value in row.items() if key.startswith("layer/")}
        values = {f"layer/{name}": getattr(linear, name) for name in METRICS}
        assert recorded == {key: value for key, value in values.items() if value is not None}
    blocks = read_rows(records, "block")
    assert [row["block"] for row in blocks] == [0, 1]
    for row in blocks:
        linears = [linear for linear in LINEARS if linear.block == row["block"]]
        errors = {linear.name: linear.output_error for linear in linears}
        assert row["block/output_error"] == weighted_mean(linears, errors)
        assert row["block/seconds"] == sum(linear.seconds for linear in linears)
        assert ("block/pairwise_information" in row) == (row["block"] == 1)

    read = read_summary(tracker.directory)
    assert (read["state"], read["exit_code"]) == ("finished", 0)
    summary = {
        key: value
        for key, value in read["summary"].items()
        if not key.startswith("_") and key not in {"linears", "bit_histogram"}
    }
    assert summary == {
        "status": "completed",
        "dense/text/perplexity": shown(100 / 7),
        "dense/other/perplexity": shown(1e5 / 3),
        "compressed/text/perplexity": shown(110 / 7),
        "bits/requested": 4.0,
        "bits/average": 3.999999999999999,
        "bits/effective": 4.3 / 3,
        "sparsity": 1 / 3,
        "seconds/load": 0.1,
        "seconds/evaluate dense": 0.30000000000000004,
    }
    axes = {key: value for key, value in read["config"].items() if key != "config"}
    assert axes == {
        "model": "embedded",
        "nsamples": config.dataset.nsamples,
        "sparsity": config.sparsity.ratio,
        "wbits": config.wbits.average,
        "n_groups": config.n_groups.count,
        "grouping": "energy",
        "seed": config.seed,
    }
    assert read["config"]["config"] == to_plain(asked)

    table = read_table(tracker.directory, "linears")
    assert set(table[0]) == {*LINEAR_SCHEMA.names, "seconds"}
    for row, linear in zip(table, LINEARS, strict=True):
        assert {int(width): n for width, n in json.loads(row.pop("bits")).items()} == linear.bits
        assert tuple(json.loads(row.pop("damping_attempts"))) == linear.damping_attempts
        assert row == {name: getattr(linear, name) for name in row}
    assert [tuple(row.values()) for row in read_table(tracker.directory, "bit_histogram")] == [
        (0, 2, 32),
        (0, 3, 96),
        (0, 4, 64),
        (1, 2, 64),
        (1, 3, 32),
        (1, 4, 64),
        (1, 5, 32),
    ]


def test_two_trackers_of_one_process_are_two_runs_of_one_folder(config, tmp_path):
    asked = with_tracking(config, mode=TrackingMode.offline)
    trackers = []
    for seed in (0, 1):
        run_dir = tmp_path / str(seed)
        run_dir.mkdir()
        # The first one is left open: the client's default would hand it out again.
        tracker = Tracker.open(
            replace(asked, seed=seed), run_dir, sweep_dir=tmp_path, job=f"{seed}"
        )
        tracker.log_linear(LINEARS[seed])
        trackers.append(tracker)
    trackers[1].finish(result(asked), LINEARS[1:2])

    assert runs(tmp_path / "wandb") == sorted(tracker.directory for tracker in trackers)
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(tmp_path / "wandb")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr
    assert "Would sync 2 run(s)" in listed
    for seed, tracker in enumerate(trackers):
        rows = read_rows(read_records(tracker.directory), "layer")
        assert [row["layer/output_error"] for row in rows] == [LINEARS[seed].output_error]


def test_no_secret_is_in_any_byte_of_the_records(config, tmp_path, monkeypatch):
    token = "hf_" + "aB3" * 12
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-environment")
    monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    monkeypatch.setattr(sys, "argv", ["mi-run", "model.path=planted-argument"])
    model = replace(
        config.model,
        path="https://planted-user:planted-word@hub/model",
        revision="c0ffee" * 6 + "abcd",
    )
    dataset = replace(config.dataset, path=f"/data?key={KEY}&token={token}")
    asked = replace(config, model=model, dataset=dataset)
    asked = with_tracking(
        asked, mode=TrackingMode.offline, tags=[f"sk-{'x' * 20}", "planted-environment"],
        entity=token, project=f"of-{token}",
    )  # fmt: skip
    failed = result(asked, "failed", f"https://planted-user@hub refused {token}")
    with Tracker.open(asked, tmp_path, sweep_dir=None, job=f"job-{token}") as tracker:
        tracker.log_linear(LINEARS[0])
        tracker.finish(failed, LINEARS)

    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"output_error" in content
    assert not list(tmp_path.rglob("*.py"))
    for secret in ("planted", token, KEY, "sk-xxx", socket.gethostname() + '"'):
        assert secret.encode() not in content, secret
    sent = read_summary(tracker.directory)["config"]["config"]["model"]
    assert (sent["path"], sent["revision"]) == ("https://***@hub/model", model.revision)


def test_secrets_are_masked_and_ordinary_names_are_not():
    for plain in (
        "task-specific-long-name",
        "models/opt-125m",
        "a@b",
        "hf://data/x@main",
        KEY[:39],
    ):
        assert scrub(plain) == plain
    assert scrub("ftp://user:pa@host") == "ftp://***@host"
    assert scrub({"a": ["sk-abcdefgh", KEY], "revision": KEY, "n": 1.5}) == {
        "a": ["***", "***"],
        "revision": KEY,
        "n": 1.5,
    }


def test_a_sweep_is_named_by_its_path_below_sweeps(tmp_path):
    assert sweep_name(tmp_path / "sweeps" / "table 2" / "x+y") == "table-2-x-y"
    assert sweep_name(tmp_path / "elsewhere") == "elsewhere"
    assert len(sweep_name(tmp_path / ("n" * 200))) == 80


class Terminal(io.StringIO):
    """Somebody sits there, and must not be asked."""

    def isatty(self):
        return True

    def read(self, *_):
        raise AssertionError("a person was asked")

    readline = read


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_key_it_is_offline_at_once_and_asks_neither_person_nor_network(
    config, tmp_path, monkeypatch, terminal
):
    if terminal:
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(sys, "stderr", Terminal())
    with Listener() as listener:
        monkeypatch.setenv("WANDB_BASE_URL", listener.url)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, listener.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with Tracker.open(config, tmp_path, sweep_dir=None, job="job") as tracker:
            tracker.log_linear(LINEARS[0])
            tracker.finish(result(config), LINEARS)
        wandb.teardown()
        assert listener.connections == []
    # Error reports of the client's service take no proxy: it must have been started without.
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert (tracker.mode, tracker.fallback) == ("offline", None)
    assert len(runs(tmp_path / "wandb")) == 1


@pytest.mark.parametrize("answers", [False, True])
def test_an_unreachable_server_means_offline_and_says_so(
    config, tmp_path, monkeypatch, caplog, capfd, answers
):
    asked = with_tracking(config, init_timeout=1)
    with Listener() as listener:
        monkeypatch.setenv("WANDB_BASE_URL", listener.url if answers else "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with Tracker.open(asked, tmp_path, sweep_dir=None, job="job") as tracker:
            tracker.log_linear(LINEARS[0])
            tracker.finish(result(asked), LINEARS)
        assert bool(listener.connections) == answers
    assert tracker.mode == "offline"
    assert tracker.fallback is not None
    assert tracker.fallback.startswith("W&B is offline: CommError")
    assert warned(caplog) == [tracker.fallback]
    assert runs(tmp_path / "wandb") == [tracker.directory]
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in content
    assert capfd.readouterr() == ("", "")


def test_online_without_a_key_is_offline_and_says_so(config, tmp_path, caplog):
    asked = with_tracking(config, mode=TrackingMode.online)
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="job") as tracker:
        pass
    assert tracker.mode == "offline"
    assert tracker.fallback == "W&B is offline: no API key was found (wandb login)"
    assert warned(caplog) == [tracker.fallback]


def test_a_client_that_cannot_even_write_leaves_the_run_alone(config, tmp_path):
    asked = with_tracking(config, mode=TrackingMode.offline)
    asked.tracking.project = "no/slash"  # past the check of the config
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="job") as tracker:
        tracker.log_linear(LINEARS[0])
        tracker.finish(result(asked), LINEARS)
    assert (tracker.mode, tracker.directory, tracker.commands()) == ("disabled", None, [])
    assert tracker.fallback is not None
    assert tracker.fallback.startswith("W&B records nothing: ")


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("broken", ["log", "update", "finish"])
def test_a_client_that_raises_or_hangs_does_not_reach_the_run(
    config, tmp_path, monkeypatch, caplog, broken, hangs
):
    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.2)
    hang = threading.Event() if hangs else None
    run = BrokenRun(tmp_path, broken, hang)
    started = time.monotonic()
    with Tracker(run, mode="offline") as tracker:
        tracker.log_evaluation("dense", "text", evaluation(2.0))
        for linear in LINEARS:
            tracker.log_linear(linear)
        tracker.finish(result(config), LINEARS)
    assert time.monotonic() - started < 10  # the client itself would have kept it for 30
    if hang is not None:
        hang.set()
    reason = "no answer within 0.2 s" if hangs else "ConnectionResetError: Connection lost"
    assert tracker.fallback == f"W&B stopped recording: {reason}"
    assert warned(caplog) == [tracker.fallback]
    assert run.calls.count(broken) == 1
    assert run.calls[-1] == broken


def kill_service() -> None:
    for process in gc.get_objects():
        if type(process) is subprocess.Popen and "wandb-core" in str(process.args):
            process.kill()
            process.wait()
    time.sleep(0.2)


def test_after_the_client_died_the_next_run_records_again(config, tmp_path, capfd):
    asked = with_tracking(config, mode=TrackingMode.offline)
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="killed") as killed:
        kill_service()
        for linear in LINEARS:
            killed.log_linear(linear)
        killed.finish(result(asked), LINEARS)
    assert killed.fallback is not None
    assert killed.fallback.startswith("W&B stopped recording: ConnectionResetError")
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="next") as tracker:
        tracker.finish(result(asked), LINEARS)
    assert (tracker.mode, tracker.fallback) == ("offline", None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", [TrackingMode.auto, TrackingMode.offline])
def test_a_variable_that_the_client_refuses_costs_no_record(config, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    monkeypatch.setenv("WANDB_RUN_ID", "team/run")
    asked = with_tracking(config, mode=mode)
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="job") as tracker:
        tracker.log_linear(LINEARS[0])
        tracker.finish(result(asked), LINEARS)
    assert tracker.mode == "offline"
    assert tracker.fallback is not None
    assert ("WANDB_MODE=ofline" in tracker.fallback) == (mode is TrackingMode.auto)
    assert "WANDB_RUN_ID=team/run" in tracker.fallback
    for name in ("WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name)  # it would stop the reader too
    assert read_summary(tracker.directory)["state"] == "finished"


def test_a_failed_run_is_closed_as_failed(config, tmp_path):
    asked = with_tracking(config, mode=TrackingMode.offline)
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="failed") as tracker:
        for linear in LINEARS[:3]:
            tracker.log_linear(linear)
        failed = replace(result(asked, "failed", "block 1 is singular"), bits=None, compressed={})
        tracker.finish(failed, LINEARS[:3])
    records = read_records(tracker.directory)
    assert records["exit"][-1]["exit_code"] == 1
    assert "run_group" not in records["run"][0]  # no sweep
    (update,) = [r["update"] for r in records["summary"] if "status" in r["update"]]
    assert (update["status"], update["error"]) == ("failed", "block 1 is singular")
    blocks = read_rows(records, "block")
    assert [row["block"] for row in blocks] == [0]  # block 1 is not complete


def test_a_run_that_ends_before_its_result_is_closed_as_failed(config, tmp_path):
    asked = with_tracking(config, mode=TrackingMode.offline)
    with (
        pytest.raises(KeyboardInterrupt),
        Tracker.open(asked, tmp_path, sweep_dir=None, job="interrupted") as tracker,
    ):
        raise KeyboardInterrupt
    read = read_summary(tracker.directory)
    assert (read["state"], read["exit_code"]) == ("failed", 1)


def test_disabled_writes_nothing(config, tmp_path):
    asked = with_tracking(config, mode=TrackingMode.disabled)
    with Tracker.open(asked, tmp_path, sweep_dir=None, job="job") as tracker:
        tracker.log_linear(LINEARS[0])
        tracker.finish(result(asked), LINEARS)
    assert (tracker.mode, tracker.fallback, tracker.commands()) == ("disabled", None, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "mode"),
    [
        ("offline", "offline"),
        ("dryrun", "offline"),
        ("disabled", "disabled"),
        ("online", "online"),
        ("nonsense", "auto"),
    ],
)
def test_the_environment_variable_counts_under_auto_only(monkeypatch, variable, mode):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert asked_mode(TrackingMode.auto) == mode
    assert asked_mode(TrackingMode.online) == "online"


def test_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    run = BrokenRun(tmp_path / "it's a run", "nothing", None)
    leet, sync = Tracker(run, mode="offline").commands()
    assert shlex.split(leet) == ["wandb", "leet", str(tmp_path)]
    assert shlex.split(sync) == ["wandb", "sync", str(tmp_path / "it's a run")]
    run.url = "https://server/run"
    assert Tracker(run, mode="online").commands() == [run.url]
    online = Tracker(run, "online", "W&B stopped recording: x").commands()
    assert online == [run.url, sync.replace("sync", "sync --no-skip-online")]
