"""Run the same mi-run command again and again, in processes that end in every possible way.

`python crash_server.py OVERRIDES...` composes the command once, imports everything once, and then
forks a process for each line of JSON on standard input. The process does what `mi-run` does, from
the claim of its directory to its exit code; before that, it may arrange its own end. The product
knows nothing of this: only functions of the standard library are counted, and ended at.
"""

import faulthandler
import gc
import importlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mi_experiments.errors import NumericalError

STEPS = ("mkdir", "fsync", "chmod", "replace", "rename", "unlink", "rmdir")
"""Everything in `os` that a commit is made of; between two of them the disk does not change."""

WORK = {
    "texts": "mi_experiments.phases:evaluate_text",
    "drafts": "mi_experiments.plan:draft_block",
    "linears": "mi_experiments.pipeline:compress_linear",
    "passes": "mi_experiments.llm.replay:Stream.advance",
}
"""What takes the time of a run, counted."""

COUNTERS = ("steps", "writes", "stations", *WORK)


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; of a signal, minus its number.
        out: standard output and error.
        seconds: that it took.
        counts: steps, writes and work that it did.
        trail: name of each step, with the name of its file.
    """

    code: int
    out: str
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    trail: list[str] = field(default_factory=list)


class Server:
    """The parent of the processes, driven from a test."""

    def __init__(self, root: Path, overrides: list[str]) -> None:
        self.root = root
        package = Path(__file__).parents[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MI_EXPERIMENTS_CACHE": str(root / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, *overrides],
            cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, run_dir: Path | str, **end: Any) -> Ended:
        """Do the run in a directory, below the root; keywords say how the process ends.

        With `halt`, return when it has stopped itself; it goes on with the next call.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"run_dir": str(run_dir), **end}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the server ended with {self.process.wait()}"
        return Ended(**json.loads(line))

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@contextmanager
def serving(root: Path, *overrides: str) -> Iterator[Server]:
    """Keep a server for the length of a with statement."""
    server = Server(root, list(overrides))
    try:
        yield server
    finally:
        server.close()


# What follows runs in the processes.


class Counters:
    """Numbers and a trail that are still there when the process that counted has been killed."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 << 17)

    def add(self, name: str) -> int:
        """Count one, and return how many there are."""
        place = 8 * COUNTERS.index(name)
        (value,) = struct.unpack_from("q", self.memory, place)
        struct.pack_into("q", self.memory, place, value + 1)
        return value + 1

    def note(self, line: str) -> None:
        """Add a line to the trail."""
        (end,) = struct.unpack_from("q", self.memory, 1 << 10)
        content = line.encode() + b"\n"
        start = (1 << 11) + end
        self.memory[start : start + len(content)] = content
        struct.pack_into("q", self.memory, 1 << 10, end + len(content))

    def read(self) -> tuple[dict[str, int], list[str]]:
        """Return all numbers, and the trail."""
        counts = {
            name: struct.unpack_from("q", self.memory, 8 * place)[0]
            for place, name in enumerate(COUNTERS)
        }
        (end,) = struct.unpack_from("q", self.memory, 1 << 10)
        return counts, self.memory[1 << 11 : (1 << 11) + end].decode().splitlines()


def die() -> None:
    """End this process as nothing else does: no handler, no finally, no buffer written."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(
    counters: Counters,
    *,
    run_dir: str,
    before: int | None = None,
    tear: int | None = None,
    manifests: int | None = None,
    spoil: list[str] | None = None,
    stations: bool = False,
    **_: Any,
) -> None:
    """Count steps and writes, and be killed at one of them.

    Args:
        counters: that outlive this process.
        run_dir: of the run.
        before: the step before which to be killed.
        tear: the write to be killed in the middle of.
        manifests: be killed after so many new manifests.
        spoil: change a byte of the second file when the first, by its beginning, has been written.
        stations: at every write and removal, be killed as two processes, of which one lives on;
            what the dead one left is kept in `RUN_DIR@NUMBER`.
    """
    seen: list[str] = []
    removals = ("unlink", "rmdir")

    def station() -> bool:
        """Say whether this is the process that is to die here."""
        pid = os.fork()
        if pid == 0:
            return True
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        shutil.copytree(run_dir, f"{run_dir}@{counters.add('stations'):03}")
        return False

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            number = counters.add("steps")
            what = arguments[0]
            path = os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else os.fspath(what)
            counters.note(f"{name} {path}")
            inside = f"{run_dir}/" in path and not path.endswith(".tmp")
            if number == before or (stations and name in removals and inside and station()):
                die()
            # What a killed process has written is there, flushed or not: this is no power failure.
            done = None if name == "fsync" else function(*arguments, **options)
            if spoil and name == "replace" and f"{run_dir}/{spoil[0]}" in path:
                content = bytearray(Path(spoil[1]).read_bytes())
                content[-1] ^= 1
                Path(spoil[1]).write_bytes(content)
            if name == "replace" and Path(arguments[1]).name == "manifest.json":
                seen.append(path)
                if len(seen) == manifests:
                    die()
            return done

        return step

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    atomic = importlib.import_module("mi_experiments.atomic")
    place = atomic.place

    def torn_place(path: Path, write: Callable[[Path], object], size: int) -> None:
        def torn(temporary: Path) -> None:
            write(temporary)
            os.truncate(temporary, temporary.stat().st_size // 2)
            die()

        if counters.add("writes") == tear or (stations and station()):
            place(path, torn, size)
        for half in path.parent.glob(f".{path.name}.*.tmp") if stations else ():
            half.unlink()
        place(path, write, size)

    atomic.place = torn_place


def count_work(counters: Counters, send: list[list[Any]], fail: list[Any] | None) -> None:
    """Count what takes time; send signals to this process, or fail, when counts are reached."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            if name == "passes" and arguments[0].hidden.is_meta:
                # Of the plan for memory, which looks at shapes.
                return function(*arguments, **options)
            number = counters.add(name)
            for signal_name in [s for n, at, s in send if (n, at) == (name, number)]:
                os.kill(os.getpid(), getattr(signal, signal_name))
            if fail == [name, number]:
                raise NumericalError("no valid factor")
            return function(*arguments, **options)

        return count

    for name, place in WORK.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, counted(name, getattr(owner, last)))


def prepare(request: dict[str, Any], counters: Counters) -> None:
    """Make a forked process what the request asks for."""
    output = os.open(request["run_dir"] + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    watch(counters, **request)
    count_work(counters, request.get("send", []), request.get("fail"))
    if request.get("other_plan"):
        change_plans()
    if "limit" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))


def change_plans() -> None:
    """Let one bit of every linear's plan come out differently, as other code might."""
    plan = importlib.import_module("mi_experiments.plan")
    finish = plan.finish

    def changed(*arguments: Any) -> Any:
        linear = finish(*arguments)
        linear.bits[0] ^= 1
        return linear

    plan.finish = changed


def wait(pid: int, seconds: float | None) -> int:
    """Wait for a process, and kill it after a while."""
    if seconds is not None:
        time.sleep(seconds)
        # Until somebody waits for it, its number is its own, even if it has ended.
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve(do_run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `do_run` that does the real one in a process a request."""

    def served(composed: Any, run_dir: Path, sweep_dir: Path | None) -> Any:
        warm(composed)
        # Memory that the collector does not visit stays shared with the parent.
        gc.collect()
        gc.freeze()
        sys.stdout.flush()
        for line in sys.stdin:
            request = json.loads(line)
            counters = Counters()
            started = time.perf_counter()
            pid = os.fork()
            if pid == 0:
                prepare(request, counters)
                return do_run(composed, Path(request["run_dir"]), sweep_dir)
            if request.get("halt"):
                assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
                print(json.dumps({"code": 0, "out": "", "seconds": 0.0}), flush=True)
                sys.stdin.readline()
                os.kill(pid, signal.SIGCONT)
            code = wait(pid, request.get("seconds"))
            seconds = time.perf_counter() - started
            counts, trail = counters.read()
            out = Path(request["run_dir"] + ".out").read_text()
            print(json.dumps(vars(Ended(code, out, seconds, counts, trail))), flush=True)
        os._exit(0)

    return served


def warm(composed: Any) -> None:
    """Import and cache what every run needs, by opening its model once."""
    from mi_experiments.llm.loading import open_model

    open_model(composed.model.path, revision=None, dtype="auto", device="cpu", offline=True)


def main() -> None:
    """Compose the command, and serve."""
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    from mi_experiments.commands import run

    run.do_run = serve(run.do_run)
    sys.argv = ["mi-run", *sys.argv[1:]]
    code = 0
    try:
        run.main()
    except SystemExit as left:
        code = int(left.code or 0)
    # Without the time that taking the interpreter apart would need.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
