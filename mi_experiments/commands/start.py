"""The commands of `pyproject.toml`, started without delay.

What is imported stays until the end. The collector would look through it again and again for
garbage, a fifth of the time of a start; so it waits until everything is there, and then leaves
that alone for good.
"""

import gc
import signal
from importlib import import_module


def run() -> None:
    """Start `mi-run`."""
    _hold_signals()
    _start("run")


def reproduce() -> None:
    """Start `mi-reproduce`."""
    _hold_signals()
    _start("reproduce")


def compare() -> None:
    """Start `mi-compare`."""
    _start("compare")


def _hold_signals() -> None:
    """Let a wish to stop wait until `StopRequest.listen` takes it; until then, nothing could."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))


def _start(command: str) -> None:
    """Import a command and everything that it needs, then run it."""
    gc.disable()
    try:
        module = import_module(f"mi_experiments.commands.{command}")
    finally:
        gc.freeze()
        gc.enable()
    module.main()
