"""What a run is asked to do: one plain dataclass per folder of `conf/`, with its ranges.

The YAML files hold every default value, once; the classes hold every type and range. A value that
does not fit is an `InputError` of one line that names the key, the value and what is allowed.
"""

import re
from dataclasses import dataclass
from enum import Enum

from mi_experiments.config.expected import ExpectedConfig
from mi_experiments.config.method import (
    Allocation,
    Cost,
    NGroupsConfig,
    RecipeConfig,
    Scope,
    SparsityConfig,
    WbitsConfig,
)
from mi_experiments.config.texts import (
    DatasetConfig,
    EvaluationConfig,
    HubCorpusConfig,
    check_texts,
)
from mi_experiments.errors import require
from mi_experiments.llm.activations import Place
from mi_experiments.method.grouping import Grouping
from mi_experiments.method.pruning import Sparsity

UNMEASURED = (Grouping.contiguous, Grouping.random)
"""Groupings that need no activations."""


class Dtype(Enum):
    """Number format in which the model runs; `auto` is that of the checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TrackingMode(Enum):
    """Where Weights & Biases records go; `auto` is online where a key exists, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Export(Enum):
    """What is written of the compressed model."""

    nothing = "nothing"
    dense = "dense"
    packed = "packed"


@dataclass
class ModelConfig:
    """A causal language model in Hugging Face format."""

    name: str
    path: str
    revision: str | None
    dtype: Dtype
    device: str
    attention: str
    seqlen: int
    blocks: str | None
    ignore: list[str]
    offline: bool
    allow_float16: bool

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            "model.path", self.path, bool(self.path.strip()), "a directory or a hub id org/name"
        )
        require("model.seqlen", self.seqlen, self.seqlen >= 2, "at least 2 tokens")
        allowed = ("auto", "cpu", "cuda")
        named = self.device in allowed or bool(re.fullmatch(r"cuda:\d+", self.device))
        require("model.device", self.device, named, "auto, cpu, cuda or cuda:N")
        attentions = ("auto", "eager", "sdpa")
        known = self.attention in attentions
        require("model.attention", self.attention, known, "auto, eager or sdpa")


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: TrackingMode
    project: str
    entity: str | None
    tags: list[str]
    init_timeout: int
    finish_timeout: int

    def __post_init__(self) -> None:
        """Check ranges."""
        for key in ("init_timeout", "finish_timeout"):
            seconds = getattr(self, key)
            require(f"tracking.{key}", seconds, seconds >= 1, "seconds >= 1")


@dataclass
class MemoryConfig:
    """Where things live while a run goes on; the memory plan fills in what is not said."""

    activations: Place
    accelerator: float | None
    host: float | None

    def __post_init__(self) -> None:
        """Check ranges."""
        for key in ("accelerator", "host"):
            size = getattr(self, key)
            require(f"memory.{key}", size, size is None or size > 0, "a size in GiB, or null")


@dataclass
class Config:
    """A run."""

    model: ModelConfig
    dataset: DatasetConfig
    sparsity: SparsityConfig
    wbits: WbitsConfig
    n_groups: NGroupsConfig
    recipe: RecipeConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    memory: MemoryConfig
    corpora: dict[str, HubCorpusConfig]
    seed: int
    export: Export
    reuse: bool
    dry_run: bool
    resume: str | None
    expected: ExpectedConfig | None

    @property
    def bit_scope(self) -> Scope:
        """What shares one bit budget in this run."""
        if self.wbits.scope is not Scope.auto:
            return self.wbits.scope
        return Scope.model if self.sparsity.ratio == 0 else Scope.linear

    @property
    def adapts_groups(self) -> bool:
        """Whether a site may get fewer groups: where their scales compete for the same bits."""
        mixed = self.wbits.allocation is Allocation.mixed
        return self.n_groups.adaptive and mixed and self.bit_scope is Scope.model

    def __post_init__(self) -> None:
        """Check what the parts say of each other."""
        check_texts(self.corpora, self.dataset, self.evaluation)


def corrects_targets(config: Config) -> bool:
    """Say whether sweeps aim at the dense model, which then runs along block by block."""
    return config.recipe.input_share != 0 or config.recipe.residual_share != 0


def measures_loss(config: Config) -> bool:
    """Say whether bits or pruned weights are spent by Fisher information."""
    wbits, sparsity = config.wbits, config.sparsity
    mixed = wbits.allocation is Allocation.mixed and wbits.cost is Cost.fisher
    return mixed or (sparsity.allocated and sparsity.cost is Cost.fisher)


def has_safety_net(config: Config) -> bool:
    """Say whether a run compresses twice: by its mixed plan, and by the uniform alternative."""
    return config.recipe.safety_net and config.wbits.allocation is Allocation.mixed


def needs_activations(config: Config) -> bool:
    """Say whether the plan depends on what the channels carry."""
    measured = config.n_groups.grouping not in UNMEASURED and config.n_groups.count > 1
    mixed = config.wbits.allocation is Allocation.mixed
    return measured or mixed or config.sparsity.allocated


def sparsity_of(config: Config) -> Sparsity:
    """Return the sparsity that every linear gets, or that they get on average."""
    return Sparsity(config.sparsity.ratio, config.sparsity.n, config.sparsity.m)
