"""Weights & Biases: a second home of a run's records, never their source and never its end.

The files of the run directory are the truth. Whatever the client does (no network, a rejected
key, an exception, no answer) becomes one line in `Tracker.fallback`, and the run goes on. Nothing
here asks for a key, and without one nothing touches the network: the records lie in a folder that
`wandb leet` shows and `wandb sync` uploads.
"""

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb

from mi_experiments.config.compose import to_plain
from mi_experiments.config.config import Config, TrackingConfig, TrackingMode
from mi_experiments.config.secrets import scrub
from mi_experiments.records.linears import METRICS, LinearReport, weighted_mean
from mi_experiments.records.result import Evaluation, Result
from mi_experiments.records.wandb_environment import sound_environment

log = logging.getLogger(__name__)

CALL_SECONDS = 30.0
"""Longest wait for the client to take a record, to look for a key, or to shut down."""

CLIENT_THREADS = ("ChkStopThr", "IntMsgThr", "NetStatThr")
"""Threads of the client; each fails with a page of text if its service is shut down before it."""

Outcome = tuple[Any, str | None]
"""What the client returned and None; or None and in one line why it returned nothing."""


class Tracker:
    """One run's records in Weights & Biases; a context manager that closes them.

    Attributes:
        mode: `online`, `offline` or `disabled`: what it really is.
        fallback: one line when that is not what was asked, or when recording stopped.
        finish_timeout: seconds that the last records may take to arrive at the server.
        directory: folder of this run's records on disk; None if there are none.
    """

    def __init__(
        self, run: Any, mode: str, fallback: str | None = None, finish_timeout: int = 0
    ) -> None:
        self.mode = mode
        self.fallback = fallback
        self.finish_timeout = finish_timeout
        self.failed = False
        self.directory = Path(run.dir).parent if run is not None else None
        self._run = run
        self._url = run.url if run is not None else None
        self._linears = 0
        self._block: list[LinearReport] = []
        if fallback:
            log.warning("%s", fallback)

    @classmethod
    def open(cls, config: Config, run_dir: Path, *, sweep_dir: Path | None, job: str) -> "Tracker":
        """Start the records of a run, online if asked and possible, else offline.

        Args:
            config: the config of the run; what it sends is scrubbed of secrets.
            run_dir: the directory of the run.
            sweep_dir: of its multirun, whose runs share one folder; None for a single run.
            job: name of the run.
        """
        asked = asked_mode(config.tracking.mode)
        if asked == "disabled":
            return cls(None, mode="disabled")
        # The client reports its own errors over the network, even from offline runs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options = describe_run(config, run_dir, sweep_dir, job)
        tracking = config.tracking
        unused = () if tracking.mode is TrackingMode.auto else ("WANDB_MODE",)
        with sound_environment(unused) as reason:
            if asked != "offline" and reason is None:
                found, reason = attempt(has_key, CALL_SECONDS)
                if found:
                    run, reason = start("online", options, tracking)
                    if run is not None:
                        return cls(run, "online", finish_timeout=tracking.finish_timeout)
                    for unfinished in Path(options["dir"], "wandb").glob(f"run-*-{options['id']}"):
                        shutil.rmtree(unfinished, ignore_errors=True)
                elif asked == "online":
                    reason = reason or "no API key was found (wandb login)"
            run, failure = start("offline", options, tracking)
        if run is None:
            return cls(None, mode="disabled", fallback=f"W&B records nothing: {failure}")
        return cls(run, mode="offline", fallback=f"W&B is offline: {reason}" if reason else None)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(exit_code=0 if kind is None else 1)

    def log_linear(self, report: LinearReport) -> None:
        """Add a point to the `layer/*` curves, and to the `block/*` curves per complete block."""
        if self._block and self._block[0].block != report.block:
            self._log_block()
        values = {name: getattr(report, name) for name in METRICS}
        row = {f"layer/{name}": value for name, value in values.items() if value is not None}
        row["layer"] = self._linears
        self._call(lambda run: run.log(row))
        self._linears += 1
        self._block.append(report)

    def log_evaluation(self, phase: str, name: str, evaluation: Evaluation) -> None:
        """Put what was measured on a text into the summary; `phase` is `dense` or `compressed`."""
        measured = curves_of(phase, name, evaluation)
        self._call(lambda run: run.summary.update(measured))

    def finish(self, result: Result, linears: Sequence[LinearReport]) -> None:
        """Record summary and tables, and close the run; as failed if it did not complete."""
        if self._block and result.bits is not None:
            self._log_block()
        summary = summary_of(result)
        self._call(lambda run: run.summary.update(summary))
        if linears:
            self._call(lambda run: run.log(tables_of(linears)))
        self._close(exit_code=0 if result.status == "completed" else 1)

    def commands(self) -> list[str]:
        """Return what to type, or the address to open, to look at the records."""
        if self.directory is None:
            return []
        folder, own = (shlex.quote(str(path)) for path in (self.directory.parent, self.directory))
        if self._url is None:
            return [f"wandb leet {folder}", f"wandb sync {own}"]
        return [self._url, f"wandb sync --no-skip-online {own}"] if self.fallback else [self._url]

    def _log_block(self) -> None:
        """Record the means over the linears of a block by their weights, and its seconds."""
        linears, self._block = self._block, []
        row: dict[str, Any] = {"block": linears[0].block}
        for metric in METRICS:
            values = {linear.name: getattr(linear, metric) for linear in linears}
            if None not in values.values():
                row[f"block/{metric}"] = weighted_mean(linears, values)
        row["block/seconds"] = sum(linear.seconds for linear in linears)
        self._call(lambda run: run.log(row))

    def _close(self, exit_code: int) -> None:
        self._call(lambda run: run.finish(exit_code=exit_code), self.finish_timeout)
        self._run = None
        if self.failed:
            # Only now, when it is known how the run ended: what is on disk says so, and is synced.
            self.failed = False
            stop_client(exit_code)

    def _call(self, record: Callable[[Any], object], upload: int = 0) -> None:
        """Hand records to the client; after its first failure, nothing more."""
        run = self._run
        if run is None:
            return
        _, failure = attempt(lambda: record(run), CALL_SECONDS + upload)
        if failure:
            self._run = None
            stopped = f"W&B stopped recording: {failure}"
            self.fallback = f"{self.fallback}; {stopped}" if self.fallback else stopped
            log.warning("%s", stopped)
            self.failed = True


def asked_mode(mode: TrackingMode) -> str:
    """Return the configured mode; under `auto` that of the environment variable WANDB_MODE."""
    if mode is not TrackingMode.auto:
        return mode.name
    known = {"run": "online", "dryrun": "offline"} | {m.name: m.name for m in TrackingMode}
    return known.get(os.environ.get("WANDB_MODE", ""), "auto")


def has_key() -> bool:
    """Say whether the client has a key, without asking for one and without the network."""
    wandb.finish()  # beside an open run the client would answer False
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)


def start(
    mode: Literal["online", "offline"], options: dict[str, Any], tracking: TrackingConfig
) -> Outcome:
    """Start a run and its curves."""

    def begin() -> Any:
        wandb.setup(settings=wandb.Settings(silent=True))
        run = wandb.init(mode=mode, settings=private_settings(tracking), **options)
        for axis in ("layer", "block"):
            run.define_metric(axis, summary="none")
            run.define_metric(f"{axis}/*", step_metric=axis, summary="none")
        return run

    run, failure = attempt(begin, tracking.init_timeout + CALL_SECONDS)
    if failure:
        stop_client()
    return run, failure


def stop_client(exit_code: int = 1) -> None:
    """Shut the client's service down, so that the next run starts with a sound one."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None if args.thread in started else hook(args)
    started = {t for t in threading.enumerate() if t.name in CLIENT_THREADS}
    _, failure = attempt(lambda: wandb.teardown(exit_code=exit_code), CALL_SECONDS)
    if failure:
        # It would go on asking the server for hours, and keep the terminal or pipe of this run.
        for process in service_processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def service_processes() -> list[int]:
    """Return the ids of the client's services that this process has started; on Linux."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_text(errors="replace").split("\0")
            own = ["--pid", str(os.getpid())] in [words[i : i + 2] for i in range(len(words))]
            if own and Path(words[0]).name == "wandb-core":
                found.append(int(file.parent.name))
    return found


def attempt(action: Callable[[], Any], seconds: float) -> Outcome:
    """Call the client in a thread, which may fail or hang without taking the run with it."""
    outcome: list[Outcome] = [(None, f"no answer within {seconds:g} s")]

    def work() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:  # noqa: BLE001 - nothing the client raises may end the run
            first = (str(error).strip() or "no message").splitlines()[0]
            outcome.append((None, scrub(f"{type(error).__name__}: {first}")))

    thread = threading.Thread(target=work, name="wandb", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[-1]


def private_settings(tracking: TrackingConfig) -> wandb.Settings:
    """Return settings that keep the terminal clean and the machine's details out of the records."""
    return wandb.Settings(
        init_timeout=tracking.init_timeout,
        finish_timeout=tracking.finish_timeout,
        finish_timeout_raises=True,
        use_dot_wandb=False,
        console="off",
        host="",
        save_code=False,
        x_disable_machine_info=True,
    )


def describe_run(config: Config, run_dir: Path, sweep_dir: Path | None, job: str) -> dict[str, Any]:
    """Return where a run belongs and what is sent of its config: the axes flat, and all of it."""
    axes = {
        "model": config.model.name,
        "nsamples": config.dataset.nsamples,
        "sparsity": config.sparsity.ratio,
        "wbits": config.wbits.average,
        "n_groups": config.n_groups.count,
        "grouping": config.n_groups.grouping.name,
        "seed": config.seed,
    }
    tags = scrub([*config.tracking.tags, axes["model"], axes["grouping"]])
    return {
        "id": secrets.token_hex(4),
        "dir": str(sweep_dir or run_dir),
        "project": scrub(config.tracking.project),
        "entity": scrub(config.tracking.entity),
        "group": scrub(sweep_name(sweep_dir)) if sweep_dir else None,
        "job_type": "compress",
        "name": scrub(job),
        "tags": [tag[:64] for tag in dict.fromkeys(tags) if tag],
        "config": scrub(axes | {"config": to_plain(config)}),
        "reinit": "finish_previous",
    }


def sweep_name(sweep_dir: Path) -> str:
    """Return the path of a multirun below `sweeps/` as one word of at most 80 characters."""
    path = sweep_dir.resolve().as_posix()
    name = path.rpartition("/sweeps/")[2] if "/sweeps/" in path else sweep_dir.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-80:]


def curves_of(phase: str, text: str, evaluation: Evaluation) -> dict[str, float]:
    """Return what was measured on a text by its keys: `compressed/TEXT/perplexity`."""
    return {
        f"{phase}/{text}/{name}": found.value for name, found in evaluation.measurements.items()
    }


def summary_of(result: Result) -> dict[str, Any]:
    """Return the numbers of a run as flat keys, those that are known."""
    summary = {"status": result.status, "error": scrub(result.error), "sparsity": result.sparsity}
    summary["stability"] = result.stability
    if net := result.safety_net:
        summary["safety_net/kept"] = net.kept
        summary |= {f"safety_net/{name}/kl": entry.kl for name, entry in net.candidates.items()}
    for phase, texts in (("dense", result.dense), ("compressed", result.compressed)):
        for name, evaluation in texts.items():
            summary |= curves_of(phase, name, evaluation)
    if result.bits is not None:
        summary |= {f"bits/{name}": value for name, value in vars(result.bits).items()}
    summary |= {f"seconds/{name}": value for name, value in result.seconds.items()}
    summary |= {f"from_cache/{phase}": len(names) for phase, names in result.from_cache.items()}
    return {name: value for name, value in summary.items() if value is not None}


def tables_of(linears: Sequence[LinearReport]) -> dict[str, wandb.Table]:
    """Return the linears, a row each, and the number of channels by block and width."""
    rows = [
        [json.dumps(v) if isinstance(v, dict | tuple) else v for v in vars(linear).values()]
        for linear in linears
    ]
    channels: Counter[tuple[int, int]] = Counter()
    for linear in linears:
        channels.update({(linear.block, width): n for width, n in linear.bits.items()})
    histogram = [[block, width, n] for (block, width), n in sorted(channels.items())]
    return {
        "linears": wandb.Table(columns=list(vars(linears[0])), data=rows),
        "bit_histogram": wandb.Table(columns=["block", "width", "channels"], data=histogram),
    }
