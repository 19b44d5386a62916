"""Shared fixtures: one thread, caches outside the home, and tiny models built without a network.

Shapes and types of arguments are checked at every call in the tests of folders that hold tensors.
Whole runs make the same calls by the ten thousand; there the checks would be half of the time.
"""

import gc
import os
import tempfile
from types import SimpleNamespace
from weakref import WeakKeyDictionary

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="mi-experiments-tests-")

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from greenlet import getcurrent

torch.set_num_threads(1)


class PerGreenlet:
    """Attributes of each greenlet, as `threading.local` has those of each thread."""

    def __init__(self) -> None:
        vars(self)["own"] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own.setdefault(getcurrent(), SimpleNamespace()), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own.setdefault(getcurrent(), SimpleNamespace()), name, value)


# Batches that take turns in a block would find each other's shapes.
jaxtyping._storage._shape_storage = PerGreenlet()

CHECKED = (
    "calibration", "llm", "method",
    "compression/test_pipeline.py", "evaluation/test_perplexity.py", "export/test_packed.py",
    "planning/test_plan.py",
)  # fmt: skip
"""Folders and files in whose tests every call is checked against its annotated shapes."""


def pytest_collection() -> None:
    """Import the tests, and the libraries with them, without looking for garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every search to come, as the commands do."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Remove the memory-mapped copies of the texts that tests wrote."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def shape_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check the shapes of every call, in the folders where that is what tests are about."""
    path = request.path.relative_to(Path(__file__).parent)
    checked = path.parts[0] in CHECKED or path.as_posix() in CHECKED
    jaxtyping.config.update("jaxtyping_disable", not checked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> None:
    """Leave what earlier tests imported and cached out of every search for garbage to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a token cache of its own, subprocesses included."""
    monkeypatch.setenv("MI_EXPERIMENTS_CACHE", str(tmp_path / "mi-cache"))
    return tmp_path / "mi-cache"


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Give the builder of tiny models: ``tiny_model("llama")``, names in tiny_models.py."""
    # Imported late: tests of the mathematics need not wait for transformers.
    from tiny_models import build_tiny_model

    return build_tiny_model


@pytest.fixture
def tiny_tokens() -> Callable[..., torch.Tensor]:
    """Give a builder of random token ids for the tiny models: ``tiny_tokens(nsamples, seqlen)``."""

    def build(nsamples: int, seqlen: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, 128, (nsamples, seqlen), generator=generator)

    return build


@pytest.fixture
def tiny_directory(tmp_path: Path) -> Path:
    """Save a tiny Llama and a byte tokenizer as a hub-format directory."""
    from tiny_models import build_byte_tokenizer, build_tiny_model

    directory = tmp_path / "tiny-llama"
    build_tiny_model("llama", vocab_size=260).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return directory
