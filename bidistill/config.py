"""What a run is made of: frozen dataclasses, read from a YAML recipe plus dotted overrides.

A recipe has the shape of :class:`TrainConfig`. Paths are relative to the folder in which the
command runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from bidistill.baselines.methods import completed
from bidistill.data.records import Role
from bidistill.errors import UserError
from bidistill.loss_names import checked
from bidistill.settings import (
    STRICT,
    AtLeastOne,
    Count,
    Decay,
    Fraction,
    Message,
    NonNegative,
    Positive,
    check,
    plain,
    read,
)

Combine = Literal["sum", "pcgrad", "mgda", "ngdiff"]
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _cache_kind(value: object) -> object:
    """True and false, of recipes from before there was a choice, as the words for them."""
    return ("memory" if value else "off") if isinstance(value, bool) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastSettings:
    """Adapters that listen to the forget set: see ``bidistill/contrastive.py``."""

    __pydantic_config__ = STRICT

    ridge: Positive = 0.03
    """Share of the mean input energy added in every direction; more of it trusts the data less."""
    input_rms: Positive = 3.0
    """Root mean square norm of what an adapter's A makes of the forget set's inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the linear layers of the model."""

    __pydantic_config__ = STRICT

    rank: AtLeastOne = 16
    alpha: Positive = 32
    """Scale: an adapter adds ``alpha / rank`` times its product."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LINEAR_LAYERS
    """Names of the linear layers that get an adapter; that of the LM head, such as ``lm_head``, may
    be among them, at the cost told in ``bidistill/head.py``."""
    layers: tuple[Count, Count] | None = None
    """First and last transformer layer that get adapters, both included; ``null`` is all."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: ContrastSettings | None = None
    """Choose A by what tells the forget set from the rest, and freeze it; ``null`` trains A."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the trained change that is exported; training overshoots, which costs neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to change."""

    __pydantic_config__ = STRICT

    path: str
    """Folder with ``config.json``, a tokenizer and ``*.safetensors``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; trained weights are float32 always."""
    adapter: LoraSettings | None = field(default_factory=LoraSettings)
    """``null`` trains all weights."""
    attention: Literal["auto", "flash"] = "auto"
    """``flash``: one call of PyTorch's FlashAttention for all sequences of a pack; takes CUDA and
    bfloat16. ``auto``: a call of PyTorch's attention for each, on any device."""
    liger: bool = False
    """Norms, rotary angles and gated layers by the package liger-kernel; takes CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Training records and how they are mixed."""

    __pydantic_config__ = STRICT

    train: Path | Annotated[tuple[Path, ...], Field(min_length=1)]
    """JSON lines file of records, or several files, whose ids differ."""
    per_step: Annotated[dict[Role, Count], Field(min_length=1)]
    """Records of each role in every step."""
    max_answer_tokens: AtLeastOne | None = None
    """Longer answers are cut here; ``null`` keeps them whole."""
    bucket: AtLeastOne = 1
    """Steps whose records are drawn together and sorted by length; 1 mixes short and long."""
    workers: Count | None = None
    """Processes that tokenise; ``null``: one a processor, but none for a small file."""
    cache: Path | None = None
    """Folder for token stores; ``null``: ``tokens`` in bidistill's folder in the user's cache."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of records."""
        return self.train if isinstance(self.train, tuple) else (self.train,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Who shows the student what to answer, and what it is told before."""

    __pydantic_config__ = STRICT

    kind: Literal["base", "frozen", "live", "ema"] = "base"
    """``base``: the model before training, with no weights of its own; ``frozen``: a model beside
    the student, which stays as it is; ``live``: the student as it is at each step; ``ema``: the
    student with the moving average of what trains. See ``docs/teachers.md``."""
    path: str | None = None
    """Folder of a frozen teacher, with the student's vocabulary; ``null``: ``model.path``."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a frozen teacher's weights and compute; ``null``: ``model.dtype``."""
    ema_decay: Decay = 0.99
    """Share of the average that each step keeps; about ``1 / (1 - ema_decay)`` steps count."""
    contexts: dict[Role, tuple[Message, ...]] = field(default_factory=dict)
    """Messages put before the question in the teacher's view, by role."""
    default_context: tuple[Message, ...] = ()
    """Messages for the roles that ``contexts`` does not name."""
    cache: Annotated[Literal["memory", "disk", "topk", "off"], BeforeValidator(_cache_kind)] = (
        "memory"
    )
    """Compute the teacher's hidden rows once, before the first step, and keep them there; ``topk``
    keeps the best ids of each row on disk instead, for the loss ``topk_kl``; ``off`` computes the
    rows in each step. ``true`` is ``memory``, ``false`` is ``off``."""
    topk: AtLeastOne = 64
    """Ids of each answer token that ``cache: topk`` keeps."""
    cache_folder: Path | None = None
    """Folder for rows on disk; ``null``: ``teacher`` in bidistill's folder in the user's cache."""

    @property
    def on_disk(self) -> bool:
        """Whether a store on disk stands for the teacher while training."""
        return self.cache in ("disk", "topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss of one role."""

    __pydantic_config__ = STRICT

    loss: Annotated[str, AfterValidator(checked)]
    """Name of a loss: see ``bidistill/losses.py``."""
    options: dict[str, float | int | str] = field(default_factory=dict)
    """Arguments of the loss function, such as ``forward: 0.5``."""
    weight: NonNegative = 1.0
    """Factor on every token of the role."""
    positions: Literal["answer", "first"] = "answer"
    """All tokens of the answer, or the first alone."""
    instructed: bool = True
    """Whether the teacher reads this role's context; false: none, whatever ``teacher`` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up, constant middle and linear decay."""

    __pydantic_config__ = STRICT

    lr: Positive = 5e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 3
    decay_fraction: Fraction = 0.5
    """Share of the steps, at the end, over which the rate falls to zero."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to at most this global norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a step is cut up among processes and in time; all of it may change on resume.

    The result of a step stays the same, up to the rounding of ``model.dtype``.
    """

    __pydantic_config__ = STRICT

    shard: AtLeastOne | None = None
    """Ranks that share out one copy of the model; 1: each holds a copy; ``null``: all ranks share
    one."""
    accumulate: AtLeastOne = 1
    """Parts that each rank's share of a step is cut into, one after the other in memory. The ranks
    add up gradients after each part; with ``shard: 1``, where each holds them whole, after all."""
    offload: bool = False
    """Keep each rank's part of the weights, gradients and optimiser in the memory of the host."""
    recompute: bool = False
    """Keep the inputs of the blocks alone and run each block again in the backward."""
    chunk_bytes: AtLeastOne | None = None
    """Logits that the losses hold at a time; ``null``: what their back-end works best with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """How far the student may move from the model it was: see ``docs/guards.md``."""

    __pydantic_config__ = STRICT

    kl_budget: Positive
    """Largest KL(model before training || student), nats per answer token, on examples that must
    stay; beyond it training ends, and the last checkpoint within it is exported."""
    every: AtLeastOne = 10
    """Steps between measurements; the last step is measured, too."""
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] = ("retain",)
    """Whose examples are measured; ``data.per_step`` need not take any of them."""
    examples: AtLeastOne = 64
    """How many of them, drawn once by ``seed``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = STRICT

    method: str | None = None
    """Name of an unlearning method that `load_config` has laid under the recipe; ``null``: none."""
    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objectives: dict[Role, ObjectiveConfig]
    """One loss for each role that takes part."""
    combine: Combine = "sum"
    """How the roles' gradients become one: see ``bidistill/combine.py``."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig | None = None
    """``null``: train to the end, wherever that leads."""
    steps: AtLeastOne
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: AtLeastOne = 10
    """Steps between checkpoints."""
    keep_checkpoints: AtLeastOne = 2
    """Older checkpoints are deleted."""
    async_checkpoints: bool = False
    """Write checkpoints while training goes on, from a copy in the memory of the host; see
    ``docs/checkpoints.md``."""
    output: Path
    """Folder for checkpoints, logs and the trained model."""
    threads: AtLeastOne | None = None
    """CPU threads; ``null`` leaves the choice to PyTorch."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, apply ``a.b=value`` overrides in order and check the result.

    A recipe that names a method gets from it what it does not say itself.

    Args:
        path: YAML file with the keys of :class:`TrainConfig`.
        overrides: each a dotted key, ``=`` and a YAML value, such as ``optim.lr=1e-4``.

    Raises:
        UserError: the file cannot be read, a key is unknown or missing, a value is not of the
            kind expected, a role is sampled without having an objective, or what makes the method
            is changed.
    """
    config = check(TrainConfig, completed(read(path, overrides)))
    require_objectives(config)
    return config


def require_objectives(config: TrainConfig) -> None:
    """Refuse a configuration that samples a role without saying what to train it for.

    Raises:
        UserError: names the role.
    """
    for role, count in config.data.per_step.items():
        if count and role not in config.objectives:
            raise UserError(
                f"objectives: got none for role {role!r}, of which data.per_step takes {count}; "
                f"add objectives.{role}, or set data.per_step.{role} to 0"
            )


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration in plain types, ready for JSON or YAML."""
    return plain(config)
