"""What a run is asked to do: one plain dataclass per folder of `conf/`, with its ranges.

The YAML files hold every default value, once; the classes hold every type and range. A value that
does not fit is an `InputError` of one line that names the key, the value and what is allowed.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval, Predicate

from mi_experiments.config.expected import ExpectedConfig
from mi_experiments.config.fields import SEED_RANGE, SEEDS, About
from mi_experiments.config.method import (
    Allocation,
    Cost,
    NGroupsConfig,
    Scope,
    SparsityConfig,
    WbitsConfig,
)
from mi_experiments.config.recipe import RecipeConfig
from mi_experiments.config.texts import (
    DatasetConfig,
    EvaluationConfig,
    HubCorpusConfig,
    check_texts,
)
from mi_experiments.llm.activations import Place

LARGEST = 2**30
"""GiB that nothing has; a plan counts bytes in 64 bits."""

LONGEST_WAIT = 86_400
"""Seconds that a run may be asked to wait for a server."""


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
    """What is written of the compressed model.

    `dense`: the model and its grids. `packed`: its bits, exactly.
    """

    nothing = "nothing"
    dense = "dense"
    packed = "packed"


@dataclass
class ModelConfig:
    """A causal language model in Hugging Face format."""

    name: Annotated[str, About("what the model is called in records and tables")]
    path: Annotated[
        str,
        Predicate(str.strip),
        About(
            "a directory with config.json, *.safetensors and a tokenizer, or a hub id",
            allowed="a directory or a hub id org/name",
        ),
    ]
    revision: Annotated[str | None, About("branch, tag or commit on the hub; null for a directory")]
    dtype: Annotated[Dtype, About("number format in which the model runs; auto: as stored")]
    device: Annotated[
        str,
        Predicate(re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch),
        About("auto: cuda where there is one, else cpu", allowed="auto, cpu, cuda or cuda:N"),
    ]
    attention: Annotated[
        str,
        Predicate(("auto", "eager", "sdpa").__contains__),
        About("auto: sdpa where the model has it", allowed="auto, eager or sdpa"),
    ]
    seqlen: Annotated[
        int, Ge(2), About("tokens in a sequence, for calibration and evaluation", unit="tokens")
    ]
    blocks: Annotated[
        str | None, About("path of the list of decoder blocks, where it is not found by itself")
    ]
    ignore: Annotated[list[str], About("name patterns of block weights to leave alone")]
    offline: Annotated[bool, About("never ask the hub")]
    allow_float16: Annotated[bool, About("run a bfloat16 checkpoint in float16 all the same")]


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: Annotated[TrackingMode, About("where records go; never a prompt")]
    project: Annotated[
        str,
        Predicate(re.compile(r"(?=.*\S)[^/\\#?%:]{1,128}").fullmatch),
        About("its name there", allowed=r"1 to 128 characters, none of / \ # ? % :"),
    ]
    entity: Annotated[
        str | None,
        Predicate(re.compile(r"[^/\\#?%:\s]+").fullmatch),
        About(
            "user or team; null: that of the key",
            allowed="a name without a slash or blank, or null",
        ),
    ]
    tags: Annotated[list[str], About("of every run")]
    init_timeout: Annotated[
        int,
        Interval(ge=1, le=LONGEST_WAIT),
        About("how long to wait for the server before going offline", unit="seconds"),
    ]
    finish_timeout: Annotated[
        int,
        Interval(ge=1, le=LONGEST_WAIT),
        About("how long to wait at the end for the last records", unit="seconds"),
    ]


@dataclass
class MemoryConfig:
    """Where things live while a run goes on; the memory plan fills in what is not said."""

    activations: Annotated[Place, About("where hidden states live between blocks")]
    accelerator: Annotated[
        float | None,
        Interval(gt=0, lt=LARGEST),
        About(
            "to plan for; null: what is free",
            unit="GiB",
            allowed=f"a size in GiB, below {LARGEST:,}, or null",
        ),
    ]
    host: Annotated[
        float | None,
        Interval(gt=0, lt=LARGEST),
        About(
            "to plan for; null: what is free",
            unit="GiB",
            allowed=f"a size in GiB, below {LARGEST:,}, or null",
        ),
    ]


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
    corpora: Annotated[dict[str, HubCorpusConfig], About("published corpora, by name")]
    seed: Annotated[
        int, SEED_RANGE, About("the dataset and the grouping draw from it", allowed=SEEDS)
    ]
    export: Annotated[Export, About("what is written of the compressed model")]
    cache: Annotated[
        bool, About("read what another job has computed: tokens, dense perplexity, parts of plans")
    ]
    dry_run: Annotated[bool, About("print what would be done, compute nothing")]
    resume: Annotated[str | None, About("a run directory: continue what was stopped there")]
    expected: Annotated[
        ExpectedConfig | None,
        About("what the run should give, with tolerance, reason and source"),
    ]

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

    @property
    def needs_activations(self) -> bool:
        """Whether the plan depends on what the channels carry."""
        grouped = self.n_groups.grouping.needs_activations and self.n_groups.count > 1
        mixed = self.wbits.allocation is Allocation.mixed
        return grouped or mixed or self.sparsity.allocated

    @property
    def uses_fisher(self) -> bool:
        """Whether bits or pruned weights are spent by the Fisher information of the outputs."""
        mixed = self.wbits.allocation is Allocation.mixed and self.wbits.cost is Cost.fisher
        return mixed or (self.sparsity.allocated and self.sparsity.cost is Cost.fisher)

    @property
    def needs_dense_pair(self) -> bool:
        """Whether sweeps aim at the dense model, which then runs along block by block."""
        return self.recipe.input_correction != 0 or self.recipe.residual_correction != 0

    @property
    def has_safety_net(self) -> bool:
        """Whether the model is compressed twice: by its mixed plan, and with uniform widths."""
        return self.recipe.safety_net and self.wbits.allocation is Allocation.mixed

    def __post_init__(self) -> None:
        """Check what the parts say of each other."""
        check_texts(self.corpora, self.dataset, self.evaluation)
