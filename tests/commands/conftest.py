"""`mi-run` in this process, on a tiny model and text."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, Ended

from mi_experiments.commands.run import main
from mi_experiments.compression import pipeline


@pytest.fixture
def mi_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run `mi-run` with arguments, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mi-run", *arguments])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a small .jsonl corpus of different documents."""
    path = tmp_path / "corpus.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"{word * (i + 7) % 9973:x}" for word in range(1, 60))})
        for i in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def local(tiny_directory: Path, text: Path) -> list[str]:
    """Give the arguments of a run on a tiny directory and text."""
    return [
        "model=local",
        f"model.path={tiny_directory}",
        "model.seqlen=32",
        "dataset=text",
        f"dataset.path={text}",
        "evaluation.datasets.text.max_windows=4",
        *SMALL,
    ]


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let this process receive SIGTERM while it compresses the n-th linear from now on."""

    def interrupt(number: int) -> None:
        real = pipeline.compress_linear
        calls: list[int] = []

        def compress(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(pipeline, "compress_linear", compress)

    return interrupt
