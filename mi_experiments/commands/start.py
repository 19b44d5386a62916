"""The commands of `pyproject.toml`, started without delay.

What is imported stays until the end. The collector would look through it again and again for
garbage, a fifth of the time of a start; so it waits until everything is there, and then leaves
that alone for good.
"""

import gc
from importlib import import_module


def run() -> None:
    """Start `mi-run`."""
    _start("run")


def reproduce() -> None:
    """Start `mi-reproduce`."""
    _start("reproduce")


def compare() -> None:
    """Start `mi-compare`."""
    _start("compare")


def _start(command: str) -> None:
    """Import a command and everything that it needs, then run it."""
    gc.disable()
    try:
        module = import_module(f"mi_experiments.commands.{command}")
    finally:
        gc.freeze()
        gc.enable()
    module.main()
